"""The same encoder, images and batch size through `ressl_learner`, lightly's MoCo recipe and self_supervised's MOCO
callback: images per second end to end, a few
steps of each in turns in one process. One JSON line per size in results/peers.jsonl. About 8 minutes on 2 cores.

    .venv/bin/pip install -e '.[bench]' && .venv/bin/python benchmarks/peers.py

lightly: its documented MoCo loop in plain PyTorch, its transforms in a torch `DataLoader` with as many workers as
cores. self_supervised: its callback in a fastai `Learner`
over fastai's `DataLoaders` of arrays in memory, its kornia pipelines. Ours: bfloat16 where the processor has it
(`precision='auto'`), and float32, which the peers compute in."""

import argparse, statistics, time, warnings
from copy import deepcopy

import numpy as np, torch, torchvision.models as tvm
from fastai.data.block import DataBlock
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.vision.core import PILImage, imagenet_stats
from fastai.vision.data import ImageBlock
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.moco_transform import MoCoV2Transform
from PIL import Image
from self_supervised.vision.moco import MOCO, MoCoModel, create_moco_model, get_moco_aug_pipelines
from torch import nn

from common import answer_peak, peak, peaks, photographs, ratio, receipt, spread
from ressl_fastai.data import tensor_dls
from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import create_encoder
from step import steps

bs,queue_size = 64,1024

def encoder(size): return create_encoder(tvm.resnet18, 3, False, 'auto', (size,size))

def ours(x, size, precision):
    learn = ressl_learner(
        tensor_dls(x, valid_pct=0, bs=bs),
        tvm.resnet18,
        queue_size=min(queue_size, len(x)),
        precision=precision,
        metrics=[],
    )
    return lambda n: steps(learn, n)

class Lightlys(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.backbone,self.head = encoder(size),MoCoProjectionHead(512, 512, 128)
        self.backbone_momentum,self.head_momentum = deepcopy(self.backbone),deepcopy(self.head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.head_momentum)

    def forward(self, x): return self.head(self.backbone(x).flatten(1))
    def forward_momentum(self, x): return self.head_momentum(self.backbone_momentum(x).flatten(1)).detach()

class Pairs(torch.utils.data.Dataset):
    def __init__(self, x, size):
        self.ims, self.tfm = [Image.fromarray(o.permute(1, 2, 0).numpy()) for o in x], MoCoV2Transform(input_size=size)

    def __len__(self): return len(self.ims)
    def __getitem__(self, i): return self.tfm(self.ims[i])

def lightlys(x, size):
    model,loss = Lightlys(size),NTXentLoss(memory_bank_size=(queue_size,128))
    dl = torch.utils.data.DataLoader(
        Pairs(x, size), bs, shuffle=True, drop_last=True, num_workers=torch.get_num_threads()
    )
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.06)
    def run(n):
        times = []
        for q,k in dl:
            update_momentum(model.backbone, model.backbone_momentum, 0.99)
            update_momentum(model.head, model.head_momentum, 0.99)
            loss(model(q), model.forward_momentum(k)).backward()
            opt.step()
            opt.zero_grad()
            times.append(time.perf_counter())
            if len(times)>n: break
        return np.diff(times).tolist()
    return run

def self_supervised(x, size):
    pil = x.permute(0,2,3,1).numpy()
    dls = DataBlock(
        (ImageBlock(PILImage),),
        get_x=pil.__getitem__,
        splitter=lambda o: (list(range(len(o))), []),
        batch_tfms=[Normalize.from_stats(*imagenet_stats, cuda=False)],
    ).dataloaders(range(len(x)), bs=bs, num_workers=0)
    pipelines = get_moco_aug_pipelines(size=size, rotate=False, stats=imagenet_stats, cuda=False)
    learn = Learner(
        dls,
        create_moco_model(nn.Sequential(encoder(size), nn.Flatten()), 512, 128),
        loss_func=nn.MSELoss(),
        cbs=[MOCO(pipelines, K=queue_size)],
    )
    return lambda n: steps(learn, n)

cases = dict(
    ours=lambda x, size: ours(x, size, 'auto'),
    ours_float32=lambda x, size: ours(x, size, 'float32'),
    lightly=lightlys,
    self_supervised=self_supervised,
)


def memory(name, size):
    "Megabytes that networks, data and a few steps take; of the main process, so without lightly's workers"
    torch.manual_seed(0)
    x = photographs(bs*5, int(size))

    def run():
        f = cases[name](x, int(size))
        f(2)

    return peak(run)

def main(sizes, n, rounds):
    for size in sizes:
        torch.manual_seed(0)
        np.random.seed(0)
        x = photographs(bs*(n+2), size)
        fs = {k:f(x, size) for k,f in cases.items()}
        t = {k:[] for k in fs}
        for i in range(rounds+1):
            for k,f in fs.items():
                s = statistics.mean(f(n))
                if i: t[k].append(s)
        receipt(
            'peers',
            0,
            size=size,
            bs=bs,
            arch='resnet18',
            images_per_second={k: round(bs / statistics.median(v), 1) for k, v in t.items()},
            times_faster_than={k: ratio(v, t['ours']) for k, v in t.items() if k != 'ours'},
            float32_times_faster_than={
                k: ratio(v, t['ours_float32']) for k, v in t.items() if not k.startswith('ours')
            },
            ms={k: spread(v) for k, v in t.items()},
            mb=peaks(cases, size),
        )

if __name__=='__main__':
    warnings.filterwarnings('ignore')
    answer_peak(memory)
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--sizes', type=int, nargs='+', default=[64,32], help="sides in pixels")
    p.add_argument('--steps', type=int, default=3, help="steps of each in a round")
    p.add_argument('--rounds', type=int, default=5)
    args = p.parse_args()
    main(args.sizes, args.steps, args.rounds)
