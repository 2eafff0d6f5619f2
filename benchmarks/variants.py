"""What the extension's parts and other variants do: kNN and linear accuracy of the encoder after pretraining, one
JSON line per run in results/variants.jsonl.

    .venv/bin/python benchmarks/variants.py digits 42 1 2
    .venv/bin/python benchmarks/variants.py fashion 42 1 2     # needs Debian's dataset-fashion-mnist
    .venv/bin/python benchmarks/variants.py fashion 42 --only "default,queue of noise at first"

A ResNet with four blocks, 16 to 128 channels wide. One thread per run, so that two may run side by side. Digits:
1,437 images, 15 epochs. Fashion-MNIST: the
first 3,000 training images at 16 pixels, 12 epochs; the first 2,000 test images are held out.
"""

import sys, time
from functools import partial

import numpy as np, torch
import torch.nn.functional as F
from fastai.vision.all import (CategoryBlock, DataBlock, ImageBlock, IndexSplitter, PILImageBW, SchedCos, SchedLin,
                               set_seed)
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from common import fashion_mnist, receipt
from ressl_fastai.callback import InfoNCEWarmup
from ressl_fastai.data import digits_dls
from ressl_fastai.evaluate import embed, knn_accuracy
from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import small_resnet
from ressl_fastai.views import strong_tfms, weak_tfms

torch.set_num_threads(1)

def fashion_dls(n_train=3000, n_valid=2000, size=16, bs=64):
    "`DataLoaders` of the first Fashion-MNIST images"
    x,y,valid_x,valid_y = fashion_mnist(n_train, n_valid, size)
    ims,ys = np.concatenate([x, valid_x]),np.concatenate([y, valid_y])
    block = DataBlock(
        (ImageBlock(PILImageBW), CategoryBlock),
        get_x=ims.__getitem__,
        get_y=ys.__getitem__,
        splitter=IndexSplitter(range(n_train, n_train + n_valid)),
    )
    return block.dataloaders(range(len(ims)), bs=bs, num_workers=0)

views = dict(digits=dict(scale=(0.7,1.), flip_p=0.), fashion=dict(scale=(0.4,1.)))
make_dls,epochs = dict(digits=digits_dls, fashion=fashion_dls),dict(digits=15, fashion=12)

def variants(data):
    strong = partial(strong_tfms, **views[data])
    small = strong_tfms(10, **{**views[data], 'scale':(views[data]['scale'][0]/2,views[data]['scale'][0])})
    return {
        'default': {},
        'InfoNCE alone': dict(warmup=InfoNCEWarmup(1, fraction=True)),
        'warm-up 2 epochs': dict(warmup=InfoNCEWarmup(2)),
        'warm-up ramp over 30 %': dict(warmup=InfoNCEWarmup(0, ramp=0.3, fraction=True)),
        'predictor': dict(predictor_layers=2),
        'predictor, warm-up 2 epochs': dict(predictor_layers=2, warmup=InfoNCEWarmup(2)),
        'two crops': dict(strong_tfms=[strong(16), small]),
        'momentum to 1': dict(teacher_momentum=SchedCos(0.97, 1.0)),
        'teacher_temp 0.02 to 0.06': dict(teacher_temp=SchedLin(0.02, 0.06)),
        'projector without BN': dict(projector_bn=False),
        'queue filled as it goes': dict(fill=first_batch),
        'queue of noise at first': dict(fill=noise),
    }

def first_batch(ressl):
    "Instead of a full queue: the embeddings of one batch; slots without an embedding do not count"
    x = next(iter(ressl.train_dl))[0]
    with torch.no_grad(): ressl.net.queue.enqueue(ressl._teach(ressl._view(x, ressl.weak_tfms)))

def noise(ressl):
    "Instead of embeddings: random directions, as in public code"
    feats = ressl.net.queue.feats
    ressl.net.queue.enqueue(F.normalize(torch.randn_like(feats), dim=1))

def run(data, nm, seed):
    kwargs,start = variants(data)[nm],time.time()
    set_seed(seed, reproducible=True)
    kw = dict(
        weak_tfms=weak_tfms(16, **views[data]),
        strong_tfms=strong_tfms(16, **views[data]),
        teacher_momentum=0.97,
        warmup=None,
        metrics=[],
    )
    fill = kwargs.pop('fill', None)
    learn = ressl_learner(make_dls[data](), partial(small_resnet, widen=0.25), **{**kw, **kwargs})
    if fill: learn.ressl._fill_queue = partial(fill, learn.ressl)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs[data], 2e-3)
    seconds = time.time()-start
    (tx,ty),(vx,vy) = embed(learn, learn.dls.train),embed(learn, learn.dls.valid)
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(tx, ty)
    return dict(
        knn=round(knn_accuracy(tx, ty, vx, vy), 4), linear=round(linear.score(vx, vy), 4), seconds=round(seconds, 1)
    )


def main(data, *args):
    only = args[-1].split(',') if '--only' in args else list(variants(data))
    for seed in map(int, [o for o in args if o.isdigit()] or ('42','1','2')):
        for nm in only: receipt('variants', seed, data=data, epochs=epochs[data], variant=nm, **run(data, nm, seed))

if __name__=='__main__': main(*sys.argv[1:])
