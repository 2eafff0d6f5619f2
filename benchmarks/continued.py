"""Does it pay to start from an encoder of other pictures? Continued against from scratch, at equal minutes.

Asked: what should the learning rate, the frozen layers and the warm-up be when an encoder from a file is trained on
new pictures, and is it ahead of fresh weights after as many minutes?
n: the sets and seeds that the receipts hold. Machine: that of each receipt.

    cd benchmarks; python -W ignore levers.py --prepare /tmp/levers                # pictures, once; see there
    cd benchmarks; python -W ignore continued.py --seeds 0,1,2                     # ten minutes a line
    cd benchmarks; python -W ignore continued.py --sets tiles --seeds 0 --minutes 0.1 --first 0.1    # tries it

One JSON line per set and seed in results/continued.jsonl; the set is the one continued on, the encoder comes from the
other (emoji or tiles) after `first` minutes. Minutes are of processor time of one thread, encoder and measures those
of minutes.py, whose case 'ours' is `from scratch` here. The minutes of the first training are not counted: the
question is that of somebody who has the file.

- `as it is`: the file's encoder, not trained further; `new statistics`: but for those of its batch norms, which are
  measured on the new pictures
- `continued`: `learn.load_encoder(file)`, then as from scratch
- `lr / 4`, `lr / 16`: the same with lower learning rates
- `relations alone`: the same with `warmup=None`
- `statistics kept`: the same with `FrozenBatchNorm`
- `half frozen`: two of the body's four stages keep their weights, but for those of batch norms (`splitter`,
  `learn.freeze_to(1)`)
- `frozen, then all`: the projector alone for a fifth of the time (`learn.freeze()`), then everything"""

import os, time
from pathlib import Path

import torch
from fastai.torch_core import set_seed
from fastcore.script import call_parse
from torch import nn
from torch.optim.swa_utils import update_bn

from common import receipt
from hand_over import train
from levers import imagenet, load, quality
from ressl_fastai.batch_norm import FrozenBatchNorm
from ressl_fastai.data import tensor_dls
from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import small_resnet

size = 32
others = dict(tiles='emoji', emoji='tiles')

def learner(x, **kwargs):
    "With all defaults, at the seed that is set"
    return ressl_learner(tensor_dls(x, valid_pct=0), small_resnet, stem='small_pool', metrics=[], **kwargs)

def halves(model):
    "Parameters of the body's first two stages, of its last two, and of the head"
    *first,third,fourth = model.encoder[0]
    parts = nn.ModuleList(first),nn.ModuleList([third,fourth]),model.projector
    return [list(o.parameters()) for o in parts]

def new_statistics(net, x, stats=imagenet):
    "`net` with the batch statistics of `x`, which `stats` normalise"
    mean,std = stats
    shuffled = x[torch.randperm(len(x))]  # or batches would be of one class, and less varied than all of them
    update_bn(((o.permute(0,3,1,2).float()/255-mean)/std for o in shuffled.split(256)), net)
    return net

def source(folder, data, seed, minutes, x):
    "File of an encoder trained on `x` for so many minutes; made unless it is there"
    file = folder/f'{data}-{seed}-{minutes:g}.pth'
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        set_seed(seed, reproducible=True)
        learn = learner(x)
        train(learn, 60*minutes, learn.lr)
        learn.save_encoder(file)
    return file

def continued(x, file, seconds, lr=1., frozen=None, warm=0., **kwargs):
    "Encoder after `seconds`; `lr` in learning rates of from scratch, `warm` of the time with all but the head frozen"
    start = time.process_time()
    learn = learner(x, **kwargs)
    if file is not None: learn.load_encoder(file)
    def left(): return seconds-(time.process_time()-start)
    if warm:
        learn.freeze()
        train(learn, warm*left(), lr*learn.lr)
        learn.unfreeze()
    if frozen is not None: learn.freeze_to(frozen)
    steps = train(learn, left(), lr*learn.lr)
    return learn.model.encoder,steps

rows = {
    'from scratch': dict(file=None),
    'continued': {},
    'lr / 4': dict(lr=1/4),
    'lr / 16': dict(lr=1/16),
    'relations alone': dict(warmup=None),
    'statistics kept': dict(cbs=FrozenBatchNorm),
    'half frozen': dict(frozen=1, splitter=halves),
    'frozen, then all': dict(warm=0.2),
}

@call_parse
def main(
    sets:str='tiles,emoji', # To continue on
    seeds:str='0,1,2',
    minutes:str='1', # Of processor time, on the new pictures
    first:float=3., # Likewise, on the other set
    only:str='', # Rows, all without it; separated by ;
    data:str='/tmp/levers', # What `levers.py --prepare` made
):
    torch.set_num_threads(1)
    folder = Path(os.environ.get('ENCODERS', '/tmp/continued'))
    for seed in map(int, seeds.split(',')):
        for name in sets.split(','):
            arrays = load(Path(data), name)
            def judged(net): return quality(net.eval(), arrays, imagenet, torch.device('cpu'))
            file = source(folder, others[name], seed, first, load(Path(data), others[name])['x'].contiguous())
            set_seed(seed, reproducible=True)
            net = learner(arrays['x']).load_encoder(file).model.encoder
            found = [dict(row='as it is', minutes=0, **judged(net)),
                     dict(row='new statistics', minutes=0, **judged(new_statistics(net, arrays['x'])))]
            for m in map(float, minutes.split(',')):
                for row in only.split(';') if only else rows:
                    set_seed(seed, reproducible=True)
                    net,steps = continued(arrays['x'].contiguous(), **dict(dict(file=file, seconds=60*m), **rows[row]))
                    found.append(dict(row=row, minutes=m, steps=steps, **judged(net)))
            receipt('continued', seed, data=name, source=others[name], first=first, size=size, arch='small_resnet',
                    n_pictures=len(arrays['x']), found=found)
