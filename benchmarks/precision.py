"""float32, bfloat16 and channels last: what a step costs, and what the encoder is worth, one JSON line per case in
results/precision.jsonl.

    .venv/bin/python benchmarks/precision.py speed
    .venv/bin/python benchmarks/precision.py knn digits 42 1 2
    .venv/bin/python benchmarks/precision.py knn fashion 42 1 2   # needs Debian's dataset-fashion-mnist

speed: student forward and backward, teacher forward and optimizer step on ready-made images, batches of 64, one
thread, images per second of *processor* time, so that
other processes on the machine matter less; the layouts take turns, the median counts. knn: is anything lost by being
fast? The defaults (our views, the precision and layout that
'auto' chooses) against plain float32 with torchvision's transforms of PIL pictures: `digits_dls`, 15 epochs, and
10,000 images of Fashion-MNIST, 4 epochs, tested on 2,000.
"""

import sys, time
from functools import partial
from statistics import median

import numpy as np, torch, torchvision.models as tv, torchvision.transforms as T
from fastai.vision.all import set_seed
from torchvision.transforms.functional import to_pil_image

from common import fashion_mnist, receipt
from ressl_fastai.data import digits_dls, tensor_dls
from ressl_fastai.evaluate import embed, knn_accuracy
from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import ReSSLModel, create_encoder, small_resnet
from ressl_fastai.precision import has_bfloat16
from ressl_fastai.views import strong_tfms, weak_tfms

torch.set_num_threads(1)
tiny = partial(small_resnet, widen=0.25)
ways = {
    'float32': (None, False),
    'float32, channels last': (None, True),
    'bfloat16': (torch.bfloat16, False),
    'bfloat16, channels last': (torch.bfloat16, True),
}
cases = {
    'tiny 8 px': (tiny, 1, 8),
    'tiny 16 px': (tiny, 1, 16),
    'small_resnet 16 px': (small_resnet, 1, 16),
    'small_resnet 32 px': (small_resnet, 3, 32),
    'resnet18 32 px': (tv.resnet18, 3, 32),
    'resnet18 64 px': (tv.resnet18, 3, 64),
    'mobilenet_v3_small 64 px': (tv.mobilenet_v3_small, 3, 64),
    'efficientnet_b0 64 px': (tv.efficientnet_b0, 3, 64),
    'convnext_tiny 64 px': (tv.convnext_tiny, 3, 64),
}

def stepper(arch, n_in, size, dtype, channels_last, bs=64):
    "A function that makes one step"
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = ReSSLModel(create_encoder(arch, n_in, size=size), 128, projector_bn=True).train().to(memory_format=layout)
    model.half_dtype = dtype
    x, opt = (
        torch.rand(bs, n_in, size, size).contiguous(memory_format=layout),
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01),
    )

    def step():
        z = model(x)
        with torch.no_grad(), model.autocast(x): target = model.teacher(x)
        (z*target).sum().backward()
        opt.step()
        opt.zero_grad()

    return step

def speed(nm, rounds=5, bs=64):
    here = {w:how for w,how in ways.items() if how[0] is None or has_bfloat16('cpu')}  # emulated, it takes minutes
    steps,times = {w:stepper(*cases[nm], *how) for w,how in here.items()},{w:[] for w in here}
    for i in range(rounds+1):
        for w,step in steps.items():
            start = time.process_time()
            step()
            if i: times[w].append(time.process_time()-start)
    receipt(
        'precision',
        case=nm,
        images_per_cpu_second={w: round(bs / median(t), 1) for w, t in times.items()},
        rounds=rounds,
        bs=bs,
    )


def pil(*tfms):
    "A transform of batches that makes PIL pictures and treats one after another"
    tfm = T.Compose([*tfms, T.ToTensor()])
    return lambda x: torch.stack([tfm(to_pil_image(o)) for o in x])

def views(plain, size, scale, flip_p):
    """Weak and strong, ours or torchvision's, with the same parameters; the blur of both reaches four standard
    deviations"""
    if not plain: return [f(size, scale, flip_p=flip_p) for f in (weak_tfms, strong_tfms)]
    first = T.RandomResizedCrop(size, scale),T.RandomHorizontalFlip(flip_p)
    return pil(*first), pil(
        *first, T.RandomApply([T.ColorJitter(0.4, 0.4)], 0.8), T.RandomApply([T.GaussianBlur(17, (0.1, 2.0))], 0.5)
    )


def fashion_dls():
    x,y,vx,vy = fashion_mnist(10_000, 2000)
    return tensor_dls(np.concatenate([x,vx])[:,None], np.concatenate([y,vy]), valid_idx=range(len(x), len(x)+len(vx)))

data = dict(
    digits=dict(dls=digits_dls, epochs=15, views=(16, (0.7, 1.0), 0.0), stem='auto'),
    fashion=dict(dls=fashion_dls, epochs=4, views=(28, (0.4, 1.0), 0.5), stem='small_pool'),
)


def knn(nm, seed):
    for plain in (False,True):
        set_seed(seed, reproducible=True)
        weak,strong = views(plain, *data[nm]['views'])
        learn = ressl_learner(
            data[nm]['dls'](),
            tiny,
            stem=data[nm]['stem'],
            weak_tfms=weak,
            strong_tfms=strong,
            teacher_momentum=0.97,
            metrics=[],
            **dict(precision='float32', channels_last=False) if plain else {},
        )
        start = time.process_time()
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(data[nm]['epochs'], 2e-3)
        seconds,(tx,ty),(vx,vy) = time.process_time()-start,embed(learn, learn.dls.train),embed(learn, learn.dls.valid)
        receipt(
            'precision',
            seed,
            case=f"{nm}, {data[nm]['epochs']} epochs",
            way='float32, PIL views' if plain else 'default',
            chosen=repr(learn.precision),
            knn=round(knn_accuracy(tx, ty, vx, vy), 4),
            cpu_seconds=round(seconds, 1),
        )

if __name__=='__main__':
    what,*args = sys.argv[1:]
    if what=='speed':
        for nm in args or cases: speed(nm)
    else:
        nm,*seeds = args or ('digits',)
        for seed in map(int, seeds or ('42','1','2')): knn(nm, seed)
