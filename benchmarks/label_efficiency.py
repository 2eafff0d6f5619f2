"""How many labels does pretraining save? Fashion-MNIST, and emoji pictures of two vendors; one JSON line per run in
results/label_efficiency.jsonl.

    .venv/bin/python benchmarks/label_efficiency.py emoji      # needs two npm packages, see common.py
    .venv/bin/python benchmarks/label_efficiency.py fashion    # needs Debian's dataset-fashion-mnist

emoji: pretrained on the 7,572 pictures of both vendors at 32 pixels, without labels; then labels for one vendor's
pictures, tested on the other's, both ways. The nine
categories are those with more than five pictures. fashion: pretrained on the first 10,000 training images at 28
pixels, tested on the first 2,000 test images.
Encoders are kept in /tmp/label_efficiency (or $ENCODERS):
a run that is repeated takes them from there. Few cores: --seeds 0 --labels 10 is the shortest. The random encoder's
batch norms have the statistics of the pictures since 28 November: --rows 'random encoder' --epochs 0.
"""

import json, os, time
from pathlib import Path

import numpy as np
from fastai.vision.all import (CategoryBlock, DataBlock, ImageBlock, IndexSplitter, PILImage, PILImageBW,
                               aug_transforms, set_seed)
from fastcore.script import call_parse

from common import emoji, fashion_mnist, receipt
from ressl_fastai.evaluate import embed, knn_accuracy, pixel_features
from ressl_fastai.label_efficiency import label_rows
from ressl_fastai.learner import ressl_learner
from ressl_fastai.transfer import encoder_learner
from ressl_fastai.models import small_resnet
from ressl_fastai.views import strong_tfms, weak_tfms

folder = Path(os.environ.get('ENCODERS', '/tmp/label_efficiency'))
settings = dict(
    emoji=dict(
        size=32, epochs=24, lr=2e-3, scale=(0.2, 1.0), flip_p=0.5, jitter=(0.4, 0.4, 0.4, 0.1), gray_p=0.2, blur_p=0.5
    ),
    fashion=dict(
        size=28, epochs=15, lr=2e-3, scale=(0.4, 1.0), flip_p=0.5, jitter=(0.4, 0.4, 0.0, 0.0), gray_p=0.0, blur_p=0.2
    ),
)

def arrays(data):
    "Images that are pretrained on, then for each task its name, training images and labels, test images and labels"
    if data=='fashion':
        x,y,vx,vy = fashion_mnist(10_000, 2000)
        return x,[('fashion', x, y, vx, vy)]
    pics = {v:emoji(v) for v in ('twitter','google')}
    keep = {v:y!='Component' for v,(_,y,_) in pics.items()}   # five pictures of hair and skin
    def of(v): return pics[v][0][keep[v]],pics[v][1][keep[v]]

    return np.concatenate([x for x, _, _ in pics.values()]), [
        (f'label {a}, test {b}', *of(a), *of(b)) for a, b in (('twitter', 'google'), ('google', 'twitter'))
    ]


def image_dls(x, valid, y=None, **kwargs):
    "`DataLoaders` of an array of images, those at `valid` for validation"
    blocks = [ImageBlock(PILImageBW if x.ndim==3 else PILImage)] + [CategoryBlock]*(y is not None)
    block = DataBlock(
        blocks, get_x=x.__getitem__, get_y=None if y is None else y.__getitem__, splitter=IndexSplitter(valid), **kwargs
    )
    return block.dataloaders(range(len(x)), bs=64, num_workers=0)

def pretrain(data, x, seed, epochs):
    "Encoder file of `data` and `seed`, and the seconds it took (wall and processor); made unless it is there"
    s,file = settings[data],folder/f'{data}-{seed}-{epochs}.pth'
    seconds = file.with_suffix('.json')
    if not seconds.exists():
        folder.mkdir(exist_ok=True)
        set_seed(seed, reproducible=True)
        weak = weak_tfms(s['size'], s['scale'], flip_p=s['flip_p'])
        strong = strong_tfms(s['size'], **{k:s[k] for k in ('scale','flip_p','jitter','gray_p','blur_p')})
        learn = ressl_learner(
            image_dls(x, range(64)),
            small_resnet,
            stem='small_pool',
            weak_tfms=weak,
            strong_tfms=strong,
            n_hidden=512,
            queue_size=1024,
        )
        start = time.time(),time.process_time()
        if epochs:
            with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, s['lr'])
        learn.save_encoder(file)
        seconds.write_text(json.dumps([round(time.time()-start[0]), round(time.process_time()-start[1])]))
    return file,json.loads(seconds.read_text())

def quality(train, valid):
    "What all labels give"
    return {f'knn{k}':knn_accuracy(*train, *valid, k=k) for k in (20,200)}

def rounded(o): return {k:rounded(v) for k,v in o.items()} if isinstance(o, dict) else round(float(o), 4)

@call_parse
def main(
    data:str, # emoji or fashion
    seeds:str='0,1,2', # Seeds of pretraining and of label draws
    labels:str='1,5,10,50', # Labels per class; the smallest category of emoji has 85 pictures
    steps:int=200, # Training steps of fine-tuning and of training from scratch
    rows:str='', # Rows of `label_efficiency`, all without it
    epochs:int=None # Of pretraining, in place of the settings'; 0 is for the rows that need none
):
    epochs = settings[data]['epochs'] if epochs is None else epochs
    x,tasks = arrays(data)
    labels,rows = tuple(map(int, labels.split(','))),rows.split(',') if rows else label_rows
    for seed in map(int, seeds.split(',')):
        file,seconds = pretrain(data, x, seed, epochs)
        for nm,tx,ty,vx,vy in tasks:
            tfms = aug_transforms(
                size=settings[data]['size'], max_rotate=10.0, max_zoom=1.2, max_lighting=0.2, max_warp=0.0
            )
            dls = image_dls(
                np.concatenate([tx, vx]), range(len(tx), len(tx) + len(vx)), np.concatenate([ty, vy]), batch_tfms=tfms
            )
            learn = encoder_learner(file, dls)
            random_learn,start = encoder_learner(file, dls, trained=False),time.time()
            feats = {
                'pretrained': lambda dl: embed(learn, dl),
                'random encoder': lambda dl: embed(random_learn, dl),
                'raw pixels': pixel_features,
            }
            if not epochs: del feats['pretrained']
            full = {k:quality(f(dls.train), f(dls.valid)) for k,f in feats.items()}
            few = learn.label_efficiency(dls, labels, seeds=(seed,), rows=rows, n_steps=steps)
            tables = {
                c: few.pivot(index='labels', columns='row', values=c).to_dict()
                for c in ('accuracy', 'balanced_accuracy')
            }
            receipt(
                'label_efficiency',
                seed,
                data=data,
                task=nm,
                n_pretrain=len(x),
                n_train=len(tx),
                n_test=len(vx),
                settings=dict(settings[data], epochs=epochs),
                steps=steps,
                pretrain_seconds=seconds[0],
                pretrain_cpu_seconds=seconds[1],
                seconds=round(time.time() - start),
                all_labels=rounded(full),
                **rounded(tables),
            )
