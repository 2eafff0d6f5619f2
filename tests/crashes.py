"""What tests of fits that go on share: a learner, all that a fit leaves behind, a crash and a new learner from other
random numbers that goes on."""

import random
from functools import partial

import numpy as np, pytest, torch
from fastai.vision.all import (CategoryBlock, CSVLogger, DataBlock, EarlyStoppingCallback, GradientAccumulation,
                               ImageBlock, ImageDataLoaders, IndexSplitter, PILImageBW, Resize, SaveModelCallback,
                               SchedCos)
from helpers import Crash, Net, quiet, seed_all, state
from sklearn.datasets import load_digits
from torch import Tensor

from ressl_fastai import recipes  # learn.fit_warmup_cos
from ressl_fastai.callback import InfoNCEWarmup
from ressl_fastai.checkpoint import Checkpoint
from ressl_fastai.evaluate import KNNAccuracy
from ressl_fastai.health import HealthMonitor
from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import small_resnet
from ressl_fastai.views import multi_crop_tfms, weak_tfms

digits = load_digits()

def small_dls(n=128, bs=32, labels=True, **kwargs):
    "`n` digits of 8 pixels for training, 32 for validation"
    ims = (digits.images*15).astype(np.uint8)
    block = DataBlock(
        [ImageBlock(PILImageBW)] + [CategoryBlock] * labels,
        get_x=ims.__getitem__,
        get_y=digits.target.__getitem__ if labels else None,
        splitter=IndexSplitter(list(range(32))),
    )
    return block.dataloaders(range(n+32), bs=bs, **{'num_workers':0, **kwargs})

def make(seed=0, dls=None, arch=None, **kwargs):
    seed_all(seed)
    kw = dict(queue_size=50, n_hidden=16, dim=8, metrics=[])
    return ressl_learner(dls or small_dls(), arch or Net(), **{**kw, **kwargs})

def fit(learn, n=6, method='fit_one_cycle', cbs=None, **kwargs):
    quiet(learn, getattr(learn, method), n, 1e-2, cbs=cbs, **kwargs)
    return learn

def everything(learn):
    "What a fit leaves behind, in plain types"
    rec,opt = learn.recorder,learn.opt.state_dict()
    return dict(
        model=state(learn),
        opt=[dict(o) for o in opt['state']],
        hypers=[{k: float(v) for k, v in h.items()} for h in opt['hypers']],
        values=[list(map(float, v)) for v in rec.values],
        lrs=list(map(float, rec.lrs)),
        losses=list(map(float, rec.losses)),
        iters=list(rec.iters),
        smooth_loss=float(rec.smooth_loss.value),
        hps={k: list(map(float, v)) for k, v in getattr(rec, 'hps', {}).items()},
        random=[random.random(), float(np.random.rand()), torch.rand(2)],
    )

def differences(a, b, at=''):
    "Where two nests of dicts, lists and tensors are not the same bits"
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for k in a for d in differences(a[k], b[k], f'{at}.{k}')]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f'{at}.{i}')]
    if isinstance(a, Tensor) and isinstance(b, Tensor): return [] if a.dtype==b.dtype and torch.equal(a, b) else [at]
    return [] if type(a)==type(b) and a==b else [at]

def check(tmp_path, n_steps, make=make, fit=fit, cbs=lambda: [], every=None, n_crash=11):
    "A crash, and a new learner from other random numbers that goes on, against a fit without `Checkpoint`"
    whole = everything(fit(make(), cbs=cbs()))
    assert len(whole['lrs'])==n_steps, len(whole['lrs'])
    with pytest.raises(KeyboardInterrupt): fit(make(), cbs=[*cbs(), Checkpoint(tmp_path/'run', every), Crash(n_crash)])
    learn = make(seed=1)
    assert differences(whole, everything(fit(learn, cbs=[*cbs(), Checkpoint(tmp_path/'run', every)])))==[]
    return learn

# a fit with all that users add to it

of_colour = dict(arch=partial(small_resnet, widen=0.125), stem='small')  # arguments of `make`, for images of files

def from_folder(path, seed, **kwargs):
    return ImageDataLoaders.from_folder(
        path, valid_pct=0.2, seed=seed, **{**dict(item_tfms=Resize(8), bs=16, num_workers=0), **kwargs}
    )

def everything_and(learn, cbs, path):
    "And what callbacks leave behind; NaN, where nothing was measured, as -1"
    def numbers(rows): return torch.tensor([list(map(float, o)) for o in rows], dtype=torch.float64).nan_to_num(-1.)
    history = [numbers(o.values() for o in cb.history) for cb in cbs if isinstance(cb, HealthMonitor)]
    rows = [l.rsplit(',', 1)[0] for l in (path/'history.csv').read_text().splitlines()]  # without the time
    return {
        **everything(learn),
        'values': numbers(learn.recorder.values),
        'history': history,
        'csv': rows,
        'best': torch.load(path / 'best.pth'),
    }


def full_learner(seed, dls):
    "Labels, kNN every second epoch, multi-crop with a generator of its own, warm-up and schedules"
    return make(
        seed,
        dls,
        **of_colour,
        metrics=KNNAccuracy(every=2),
        warmup=InfoNCEWarmup(1, ramp=2),
        teacher_momentum=SchedCos(0.9, 1.0),
        weak_tfms=weak_tfms(8),
        strong_tfms=multi_crop_tfms(8, (1, 0.7), (0.2, 0.1), (1.0, 0.5), generator=torch.Generator().manual_seed(7)),
    )

def full_callbacks(path):
    return [
        HealthMonitor(),
        GradientAccumulation(40),
        CSVLogger(path / 'history.csv', append=True),
        SaveModelCallback('valid_loss', fname=path / 'best'),
        EarlyStoppingCallback('valid_loss', patience=9),
    ]


def train(path, seed, dls, *more):
    "Everything that the fit leaves behind; the bar is on"
    path.mkdir(exist_ok=True)
    learn,cbs = full_learner(seed, dls),full_callbacks(path)
    learn.fit_one_cycle(4, 1e-2, cbs=[*cbs,*more])
    return everything_and(learn, cbs, path)
