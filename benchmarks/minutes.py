"""How good an encoder is after so many minutes: ours with its defaults, other packages as they document themselves.

Asked: do the defaults reach the best peer's quality of 8 minutes in 3, with the same encoder and the same pictures?
n: the sets and seeds that the receipts hold. Machine: that of each receipt.

    cd benchmarks; python -W ignore levers.py --prepare /tmp/levers                # pictures, once; see there
    cd benchmarks; python -W ignore minutes.py --sets emoji,tiles --seeds 0,1,2    # hours; one line a case
    cd benchmarks; python -W ignore minutes.py --sets tiles --seeds 0 --minutes 0.1,0.2    # tries it
    cd benchmarks; python -W ignore minutes.py --sets tiles --seeds 0 --minutes 0.2 --only ours    # its memory, too

One JSON line per set, case and seed in results/minutes.jsonl, cases that are there already, of this kind of processor,
are left out. Minutes are of processor time of one thread, with data, views and everything but evaluation. What else
runs on the machine takes less from a case than it would by the clock, but not nothing, as caches are shared: leave it
alone. Encoder: `small_resnet` with `stem='small_pool'`, 32 pixels. Sets and measures are those of levers.py: kNN, ten
labels per class, and on emoji how often the nearest picture of the other vendor shows the same thing.

- `ours`: `ressl_learner(dls, small_resnet)`, its learning rate and batch, one cycle over each number of minutes
- `lightly MoCo`, `lightly BYOL`, `lightly SimCLR`: the loops of lightly's examples for small images (256 pictures in a
  batch, SGD 0.06, momentum 0.99, no blur), one training, looked at after each number of minutes; `..., bf16` with
  autocast and channels last given to them, as ours has them by itself where the processor is made for bfloat16;
  `..., channels last` with that alone, as ours on others; `..., schedule` with the optimizer of lightly's CIFAR-10
  benchmark too (128 pictures, SGD 0.06, momentum 0.9, weight decay 5e-4, cosine to zero), one training for
  each number of minutes
- `self_supervised MOCO`: its callback and kornia's views in a fastai `Learner`, one cycle over each number of minutes
- `random encoder`, `pixels`: nothing is trained; `..., statistics`: batch norms have those of the pictures"""

import json, resource, time
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path

import torch
from fastai.callback.schedule import SchedCos
from fastai.data.block import DataBlock
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastai.vision.core import PILImage, imagenet_stats
from fastai.vision.data import ImageBlock
from fastcore.script import call_parse
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import (BYOLPredictionHead, BYOLProjectionHead, MoCoProjectionHead, SimCLRProjectionHead)
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform, MoCoV2Transform, SimCLRTransform
from PIL import Image
from self_supervised.vision.moco import MOCO, create_moco_model, get_moco_aug_pipelines
from torch import nn
from torch.utils.data import DataLoader, Dataset

from common import cpu, receipt, root
from continued import learner, new_statistics
from hand_over import train
from levers import imagenet, load, quality
from ressl_fastai.models import create_encoder, small_resnet

size,nf = 32,256  # features of small_resnet

def encoder(): return create_encoder(small_resnet, 3, False, 'small_pool', (size,size))

# ours

def ours(x, minutes):
    "(minutes, encoder, pictures seen) for each number of minutes, each a training of its own"
    for m in minutes:
        start = time.process_time()
        learn = learner(x)
        yield m,learn.model.encoder,fit(learn, m, start, learn.lr)

def fit(learn, minutes, start, lr):
    "One cycle until `minutes` after `start` of processor time; how many pictures went through"
    return train(learn, 60*minutes-(time.process_time()-start), lr)*learn.dls.train.bs

# self_supervised

def self_supervised(x, minutes):
    for m in minutes:
        start = time.process_time()
        block = DataBlock((ImageBlock(PILImage),), get_x=x.numpy().__getitem__,
                          splitter=lambda o: (list(range(len(o))), []),
                          batch_tfms=[Normalize.from_stats(*imagenet_stats, cuda=False)])
        dls = block.dataloaders(range(len(x)), bs=64, num_workers=0)
        pipelines = get_moco_aug_pipelines(size=size, rotate=False, stats=imagenet_stats, cuda=False)
        net = encoder()
        model = create_moco_model(nn.Sequential(net, nn.Flatten()), 512, 128)
        learn = Learner(dls, model, loss_func=nn.MSELoss(), cbs=[MOCO(pipelines, K=1024)])
        yield m,net,fit(learn, m, start, 1e-3)

# lightly

class Pictures(Dataset):
    def __init__(self, x, tfm): self.ims,self.tfm = [Image.fromarray(o) for o in x.numpy()],tfm
    def __len__(self): return len(self.ims)
    def __getitem__(self, i): return self.tfm(self.ims[i])

class Momentum(nn.Module):
    "A network and its average"
    def __init__(self, net):
        super().__init__()
        self.net,self.average = net,deepcopy(net)
        deactivate_requires_grad(self.average)
    def follow(self): update_momentum(self.net, self.average, 0.99)

class MoCo(Momentum):
    tfm = staticmethod(lambda: MoCoV2Transform(input_size=size, gaussian_blur=0.))
    def __init__(self, net):
        super().__init__(nn.Sequential(net, nn.Flatten(), MoCoProjectionHead(nf, 512, 128)))
        self.criterion = NTXentLoss(memory_bank_size=(4096,128))
    def outputs(self, q, k):
        self.follow()
        with torch.no_grad(): key = self.average(k)
        return self.net(q),key
    def loss(self, outputs): return self.criterion(*outputs)

class BYOL(Momentum):
    tfm = staticmethod(lambda: BYOLTransform(
        view_1_transform=BYOLView1Transform(input_size=size, gaussian_blur=0.),
        view_2_transform=BYOLView2Transform(input_size=size, gaussian_blur=0.)))
    def __init__(self, net):
        super().__init__(nn.Sequential(net, nn.Flatten(), BYOLProjectionHead(nf, 1024, 256)))
        self.predict,self.criterion = BYOLPredictionHead(256, 1024, 256),NegativeCosineSimilarity()
    def outputs(self, a, b):
        self.follow()
        with torch.no_grad(): za,zb = self.average(a),self.average(b)
        return self.predict(self.net(a)),zb,self.predict(self.net(b)),za
    def loss(self, o): return 0.5*(self.criterion(o[0], o[1])+self.criterion(o[2], o[3]))

class SimCLR(nn.Module):
    tfm = staticmethod(lambda: SimCLRTransform(input_size=size, gaussian_blur=0.))
    def __init__(self, net):
        super().__init__()
        self.net = nn.Sequential(net, nn.Flatten(), SimCLRProjectionHead(nf, 512, 128))
        self.criterion = NTXentLoss()
    def outputs(self, a, b): return self.net(a),self.net(b)
    def loss(self, outputs): return self.criterion(*outputs)

def batches(dl):
    while True: yield from dl

class Lightly:
    "One of lightly's examples, on the pictures `x`; counts its minutes"
    def __init__(self, x, method, bf16, channels_last, bs=256, **kwargs):
        self.start,self.evaluating,self.n = time.process_time(),0.,0
        self.bf16,self.layout = bf16,torch.channels_last if channels_last else torch.contiguous_format
        self.net = encoder()
        self.model = method(self.net)
        self.model.to(memory_format=self.layout)
        self.batches = batches(DataLoader(Pictures(x, method.tfm()), bs, shuffle=True, drop_last=True))
        params = [p for p in self.model.parameters() if p.requires_grad]
        self.opt = torch.optim.SGD(params, lr=0.06, **kwargs)

    @property
    def minutes(self): return (time.process_time()-self.start-self.evaluating)/60

    def step(self):
        views = [o.contiguous(memory_format=self.layout) for o in next(self.batches)[:2]]
        with torch.autocast('cpu', torch.bfloat16) if self.bf16 else nullcontext(): outputs = self.model.outputs(*views)
        self.model.loss([o.float() for o in outputs]).backward()
        self.opt.step()
        self.opt.zero_grad()
        self.n += len(views[0])

    @contextmanager
    def pause(self):
        "What is done here takes no minutes"
        now = time.process_time()
        yield
        self.model.train()
        self.evaluating += time.process_time()-now

def lightly(method, bf16=False, channels_last=False):
    "A training of one of lightly's examples, looked at after each number of minutes"
    def run(x, minutes):
        training = Lightly(x, method, bf16, channels_last)
        for m in minutes:
            while training.minutes<m: training.step()
            with training.pause(): yield m,training.net,training.n
    return run

def scheduled(method):
    "One of lightly's examples with bf16 and the optimizer of its CIFAR-10 benchmark, a training for each of `minutes`"
    lr = SchedCos(0.06, 0.)
    def run(x, minutes):
        for m in minutes:
            training = Lightly(x, method, True, True, bs=128, momentum=0.9, weight_decay=5e-4)
            while (share := training.minutes/m)<1:
                training.opt.param_groups[0]['lr'] = lr(share)
                training.step()
            yield m,training.net,training.n
    return run

methods = {'MoCo':MoCo, 'BYOL':BYOL, 'SimCLR':SimCLR}
cases = {'ours':ours, **{f'lightly {k}':lightly(o) for k,o in methods.items()},
         **{f'lightly {k}, bf16':lightly(o, True, True) for k,o in methods.items()},
         **{f'lightly {k}, channels last':lightly(o, False, True) for k,o in methods.items()},
         **{f'lightly {k}, bf16, schedule':scheduled(o) for k,o in methods.items()},
         'self_supervised MOCO':self_supervised}

# what nothing was trained for

def untrained(x, minutes): yield 0,encoder(),0
def with_statistics(x, minutes): yield 0,new_statistics(encoder(), x),0
def pixels(x, minutes): yield 0,nn.Flatten(),0

cases |= {'random encoder':untrained, 'random encoder, statistics':with_statistics, 'pixels':pixels}

def peak_memory():
    "Megabytes that this process has held at most"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024

def there(**what):
    "Whether a receipt has all of that already"
    file = root/'benchmarks'/'results'/'minutes.jsonl'
    lines = [json.loads(o) for o in file.read_text().splitlines()] if file.exists() else []
    return any(all(o.get(k)==v for k,v in what.items()) for o in lines)

@call_parse
def main(
    sets:str='emoji,tiles', # Of levers.py: emoji, tiles, others, fashion
    seeds:str='0,1,2',
    minutes:str='1,3,8', # Of processor time
    only:str='', # Cases, all without it; separated by ;
    data:str='/tmp/levers', # What `levers.py --prepare` made
):
    torch.set_num_threads(1)
    wanted = [float(o) for o in minutes.split(',')]
    fresh = True  # a case keeps memory, so that only the first of a process tells its own
    for seed in map(int, seeds.split(',')):
        for name in sets.split(','):
            arrays = load(Path(data), name)
            x = arrays['x'].contiguous()
            for case in only.split(';') if only else cases:
                if there(data=name, case=case, seed=seed, minutes=wanted, cpu=cpu()): continue
                set_seed(seed, reproducible=True)
                device,found,memory,before = torch.device('cpu'),[],None,peak_memory()
                for m,net,n in cases[case](x, wanted):
                    if fresh: memory,fresh = round(peak_memory()-before),False
                    found.append(dict(minutes=m, pictures=n, **quality(net.eval(), arrays, imagenet, device)))
                receipt('minutes', seed, data=name, case=case, minutes=wanted, size=size, arch='small_resnet',
                        n_pictures=len(x), memory_mb=memory, found=found)
