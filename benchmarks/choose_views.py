"""What does the choice of views change? kNN accuracy after 200 steps, views differing in one thing from the defaults.

One JSON line per set and seed in results/choose_views.jsonl, about three minutes each on one thread.

    apt-get install dataset-fashion-mnist, and the packages that hand_over.py names for tiles and emoji
    .venv/bin/python benchmarks/choose_views.py

The sets, all at 32 pixels: tiles of 37 photographs (the class is the photograph), emoji of two vendors (the class is
the category, the neighbours are Twitter's, the images tested are Google's), Fashion-MNIST, and `write_signs`: coloured
signs whose colour is random.
"""
import time

import numpy as np, torch
from fastai.vision.all import set_seed
from fastcore.script import call_parse

from common import fashion_mnist, receipt
from hand_over import arrays, quiet
from ressl_fastai.data import tensor_dls
from ressl_fastai.evaluate import knn_accuracy, pixel_features
from ressl_fastai.label_efficiency import NoValidation
from ressl_fastai.learner import ressl_learner
from ressl_fastai.loaders import normalize_stats, same_normalize
from ressl_fastai.models import small_resnet
from ressl_fastai.signs import draw_signs
from ressl_fastai.views import strong_tfms, weak_tfms

size = 32
colours = {'colour kept':dict(jitter=(0.4,0.4,0.,0.), gray_p=0.),
           'colour dropped':dict(jitter=(0.4,0.4,0.4,0.5), gray_p=0.5)}
variants = {'default':{}, 'gentle crops':dict(scale=(0.6,1.)), 'no flip':dict(flip_p=0.), **colours}

def images(data):
    "Images that are pretrained on; then those that are neighbours, with labels, and those that are tested"
    if data in ('tiles','emoji'): return arrays(data)
    if data=='fashion': x,y,vx,vy = fashion_mnist(4000, 1000, size)
    if data=='signs':
        x,y = map(np.array, draw_signs(4000, seed=1, size=size))
        x,y,vx,vy = x[:3000],y[:3000],x[3000:],y[3000:]
    return x,x,y,vx,vy

def views(given):
    "The two views; colour is the strong one's alone"
    shared = {k:v for k,v in given.items() if k in ('scale','flip_p')}
    return dict(weak_tfms=weak_tfms(size, **shared), strong_tfms=strong_tfms(size, **given))

@call_parse
def main(
    data:str='tiles,fashion,emoji,signs', # What to run
    seeds:str='0,1', # Seeds of weights, batches and views
    steps:int=200 # Of pretraining, 64 images each
):
    torch.set_num_threads(1)
    for seed in map(int, seeds.split(',')):
        for nm in data.split(','):
            unlabelled,x,y,vx,vy = images(nm)
            dls = tensor_dls(np.concatenate([x, vx]), np.concatenate([y, vy]), valid_idx=range(len(x), len(x)+len(vx)))
            pool = tensor_dls(unlabelled, valid_idx=range(64))
            accuracy,seconds = {'raw pixels':knn_accuracy(*(o for dl in dls for o in pixel_features(dl, side=8)))},{}
            for k,given in variants.items():
                if nm=='fashion' and k in colours: continue
                set_seed(seed, reproducible=True)
                start = time.process_time()
                learn = ressl_learner(pool, small_resnet, stem='small_pool', n_hidden=512, queue_size=1024,
                                      **views(given))
                same_normalize(dls, normalize_stats(pool), 'the pool')
                def knn(): return knn_accuracy(*(o for dl in dls for o in learn.embed(dl)))
                if k=='default': accuracy['random encoder'] = knn()
                n_epoch = max(1, round(steps/len(pool.train)))
                with quiet(learn): learn.fit_one_cycle(n_epoch, 2e-3, cbs=NoValidation())
                accuracy[k],seconds[k] = knn(),round(time.process_time()-start, 1)
            receipt('choose_views', seed, data=nm, n_pretrain=len(unlabelled), n_neighbours=len(x), n_test=len(vx),
                    steps=n_epoch*len(pool.train), cpu_seconds=seconds,
                    knn_accuracy={k:round(v, 4) for k,v in accuracy.items()})
