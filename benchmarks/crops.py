"""Crops of the whole photograph against crops of its shrunk centre: held-out accuracy and cost, with views of 64
pixels.

37 photographs of Debian's wallpaper packages, each cut into 4 x 4 pictures of 3:2, 60 pixels apart, stand for a
folder of
592 photographs of 420 x 280 pixels. The class is the photograph; 4 pictures of each, drawn at random, are held out. A
network
is trained for 60 epochs by each way to load them, three seeds, and its frozen features are judged by kNN and by
logistic
regression with ten labels per class. One JSON line per way and seed in results/crops.jsonl, about 25 minutes of CPU
in all.

    cd benchmarks; python -W ignore crops.py [--seeds 3] [--epochs 60]
"""

import argparse, tempfile, time
from pathlib import Path

import numpy as np, torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import FuncSplitter, parent_label
from fastai.vision.augment import Resize
from fastai.vision.data import ImageBlock
from fastai.vision.utils import get_image_files
from PIL import Image

from common import receipt
from hand_over import photographs
from ressl_fastai.data import cached_dls
from ressl_fastai.evaluate import embed, knn_accuracy, linear_accuracy
from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import small_resnet

size = 64
ways = dict(  # item transform, and the size of views where it is not that of the images
    shrunk_centre=(Resize(size), None),
    shrunk_squished=(Resize(size, method='squish'), None),
    large_centre=(Resize(160), size),
    whole_squished=(Resize(160, method='squish'), size),
    whole_padded=(Resize(160, method='pad', pad_mode='zeros'), size))

def save_pictures(folder, n=4, gap=60, shape=(420,280)):
    "n x n pictures of each photograph, in a folder by its name"
    for form,names in photographs.items():
        for name in names.split():
            im = Image.open(Path('/usr/share')/form.format(name)).convert('RGB')
            w,h = n*shape[0]+(n-1)*gap,n*shape[1]+(n-1)*gap
            scale = max(w/im.width, h/im.height)
            im = im.resize((round(im.width*scale), round(im.height*scale)), Image.LANCZOS)
            for i in range(n*n):
                left,top = i%n*(shape[0]+gap),i//n*(shape[1]+gap)
                file = folder/name.replace('/', '_')/f'{i:02}.jpg'
                file.parent.mkdir(parents=True, exist_ok=True)
                im.crop((left, top, left+shape[0], top+shape[1])).save(file, quality=92)

def make_dls(folder, item_tfm, seed):
    files = get_image_files(folder).sorted()
    held_out = {
        f
        for name in sorted({o.parent for o in files})
        for f in np.random.default_rng([seed, len(name.name)]).choice([o for o in files if o.parent == name], 4, False)
    }
    block = DataBlock((ImageBlock,CategoryBlock), get_items=lambda o: files, get_y=parent_label,
                      splitter=FuncSplitter(held_out.__contains__), item_tfms=item_tfm)
    return block.dataloaders(folder, bs=64, num_workers=0)

def ten_labels(train, valid, seed):
    (x,y),(vx,vy) = train,valid
    rng = np.random.default_rng(seed)
    idxs = np.concatenate([rng.choice(np.flatnonzero(y.numpy()==c), 10, False) for c in range(int(y.max())+1)])
    return linear_accuracy(x[idxs], y[idxs], vx, vy)['top1']

def main(seeds, epochs, only):
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)
        save_pictures(folder)
        for seed in range(seeds):
            for way in only or ways:
                item_tfm,view_size = ways[way]
                torch.manual_seed(seed)
                start = time.process_time()
                dls = cached_dls(make_dls(folder, item_tfm, seed))
                loading = time.process_time()-start
                learn = ressl_learner(dls, small_resnet, size=view_size, metrics=[])
                start = time.process_time()
                with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 3e-3)
                seconds = time.process_time()-start
                train,valid = embed(learn, dls.train),embed(learn, learn.dls.valid)
                receipt('crops', seed, way=way, images=dls.train.n, held_out=dls.valid.n, epochs=epochs, view_size=size,
                        knn=round(float(knn_accuracy(*train, *valid, k=5)), 4),
                        ten_labels=round(ten_labels(train, valid, seed), 4),
                        cpu_seconds=dict(loading=round(loading, 1), training=round(seconds, 1)))

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--epochs', type=int, default=60)
    p.add_argument('--only', nargs='*', choices=list(ways), help='some of the ways')
    args = p.parse_args()
    main(args.seeds, args.epochs, args.only)
