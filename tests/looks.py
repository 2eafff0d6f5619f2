"What the tests of looks share: a small network, digits, folders of noise, planted clusters."
import numpy as np
from fastai.vision.all import (CategoryBlock, DataBlock, ImageBlock, IndexSplitter, PILImage, PILImageBW,
                               get_image_files)
from helpers import NoBN, fit, seed_all
from sklearn.datasets import load_digits, make_blobs

from ressl_fastai.learner import ressl_learner

def few_digits():
    "140 images for training and 60 for validation; the items are 100, 101, ..."
    digits = load_digits()
    block = DataBlock((ImageBlock(PILImageBW),CategoryBlock), get_x=(digits.images*15).astype(np.uint8).__getitem__,
                      get_y=digits.target.__getitem__, splitter=IndexSplitter(range(140, 200)))
    return block.dataloaders(range(100, 300), bs=32, num_workers=0)

def make(dls=None, n_in=1, **kwargs):
    seed_all()
    kwargs = {**dict(queue_size=8, n_hidden=16, dim=8, metrics=[]), **kwargs}
    return ressl_learner(dls or few_digits(), NoBN(n_in), **kwargs)

def trained(path):
    "Trained for an epoch, so that teacher and student differ; 'start' holds what it was before"
    learn = make(predictor_layers=2, path=path)
    learn.save('start')
    return fit(learn)

def folder(path, n=40):
    "Files with noise"
    rng = np.random.default_rng(0)
    for i in range(n): PILImage.create(rng.integers(0, 255, (20,20,3), dtype=np.uint8)).save(path/f'{i:02}.png')
    return get_image_files(path).sorted()

def blobs(n=10, seed=0):
    "Features in `n` clusters of 60, and which it is"
    return make_blobs(60*n, 16, centers=np.random.default_rng(5).normal(size=(n,16))*10, random_state=seed)
