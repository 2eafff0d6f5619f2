"""Does it pay to label what `suggest_labels` names? Accuracy after labelling 10 to 100 images, suggested or random,
one JSON line per data set and pretraining seed.

    .venv/bin/python benchmarks/suggest_labels.py digits 0 1 2
    .venv/bin/python benchmarks/suggest_labels.py fashion 0 1     # needs Debian's dataset-fashion-mnist

Digits: 1,437 images to choose from, 15 epochs of pretraining, small_resnet at half width. Fashion-MNIST: the first
10,000 training images at 16 pixels, 8 epochs, quarter
width; tested on the first 5,000 test images. One thread. The features are frozen; on those of the labelled images,
scaled to length 1, logistic regression (C=10) and the
nearest neighbour are tried. 'random' is the mean and standard deviation of 20 draws, 'suggested' of 5 seeds of
k-means with all labels at once, 'in rounds' of the
same with 10, 20, 50 and 100 labels one after the other. Features are kept in /tmp/suggest_labels.
"""

import sys, time
from functools import partial
from pathlib import Path

import numpy as np, torch
import torch.nn.functional as F
from fastai.vision.all import set_seed
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from common import receipt
from ressl_fastai.data import digits_dls
from ressl_fastai.evaluate import embed, knn_accuracy
from ressl_fastai.curate import typiclust
from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import small_resnet
from ressl_fastai.views import strong_tfms, weak_tfms
from variants import fashion_dls, views

torch.set_num_threads(1)

sizes,draws,seeds = (10,20,50,100),20,5
setups = dict(
    digits=dict(dls=partial(digits_dls, bs=32), epochs=15, widen=0.5),
    fashion=dict(dls=partial(fashion_dls, 10_000, 5_000), epochs=8, widen=0.25),
)


def pretrained(data, seed, folder=Path('/tmp/suggest_labels')):
    "Features and classes of the training and validation images, and the seconds of pretraining"
    file,setup,start = folder/f'{data}-{seed}.pt',setups[data],time.time()
    if file.exists(): return torch.load(file)
    set_seed(seed, reproducible=True)
    learn = ressl_learner(
        setup['dls'](),
        partial(small_resnet, widen=setup['widen']),
        weak_tfms=weak_tfms(16, **views[data]),
        strong_tfms=strong_tfms(16, **views[data]),
        teacher_momentum=0.97,
        metrics=[],
    )
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(setup['epochs'], 2e-3)
    found = dict(train=embed(learn, learn.dls.train), valid=embed(learn, learn.dls.valid), seconds=time.time()-start)
    folder.mkdir(exist_ok=True)
    torch.save(found, file)
    return found

def in_rounds(x, seed):
    "Each round adds to the images labelled before"
    chosen = []
    for n in sizes:
        chosen = chosen + typiclust(x, n-len(chosen), chosen, seed=seed)['index'].tolist()
        yield n,chosen

def choices(x):
    "(how, n, images) of everything that is compared"
    for seed in range(draws):
        order = np.random.default_rng(seed).permutation(len(x))
        for n in sizes: yield 'random',n,order[:n]
    for seed in range(seeds):
        for n in sizes: yield 'suggested',n,typiclust(x, n, seed=seed)['index'].to_numpy()
        for n,chosen in in_rounds(x, seed): yield 'in rounds',n,np.array(chosen)

def accuracies(x, y, valid_x, valid_y):
    "Logistic regression, nearest neighbour, and how many classes were seen"
    linear = (
        LogisticRegression(C=10, max_iter=1000).fit(x, y).score(valid_x, valid_y)
        if len(y.unique()) > 1
        else (valid_y == y[0]).float().mean().item()
    )
    return linear,knn_accuracy(x, y, valid_x, valid_y, k=1),len(y.unique())

def main(data, *pretraining_seeds):
    for seed in map(int, pretraining_seeds or ('0','1','2')):
        found = pretrained(data, seed)
        (x, y), (valid_x, valid_y) = (
            [
                F.normalize(o.as_subclass(Tensor), dim=1) if i == 0 else o.as_subclass(Tensor)
                for i, o in enumerate(found[part])
            ]
            for part in ('train', 'valid')
        )
        rows = {}
        for how, n, idxs in choices(x):
            rows.setdefault((how, n), []).append(accuracies(x[idxs], y[idxs], valid_x, valid_y))
        results = [
            dict(
                how=how,
                n=n,
                **{
                    k: round(float(v), 4)
                    for nm, col in zip(('linear', 'nearest', 'classes'), np.array(o).T)
                    for k, v in ((nm, col.mean()), (nm + '_std', col.std()))
                },
            )
            for (how, n), o in rows.items()
        ]
        receipt(
            'suggest_labels',
            seed,
            data=data,
            n_images=len(x),
            epochs=setups[data]['epochs'],
            pretraining_seconds=round(found['seconds']),
            knn=round(knn_accuracy(x, y, valid_x, valid_y), 4),
            results=results,
        )

if __name__=='__main__': main(*sys.argv[1:])
