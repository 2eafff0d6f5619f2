"""Does pretraining help a U-Net? 10, 50 and 200 masks of emoji on photographs.

One JSON line per seed in results/masks.jsonl, two to three minutes of one core each.

    apt-get install plasma-workspace-wallpapers mate-backgrounds lomiri-wallpapers-20.04 lomiri-wallpapers-16.04
    npm install --prefix /tmp/emoji emoji-datasource-twitter emoji-datasource-google
    .venv/bin/python benchmarks/masks.py --keep /tmp/masks.npz   # reads emoji and photographs, once
    .venv/bin/python benchmarks/masks.py --data /tmp/masks.npz --seed 0
    .venv/bin/python benchmarks/masks.py --data /tmp/masks.npz --images 280 --epochs 1 --steps 4   # tries it

A picture is an emoji, turned, of random size and place, on a part of a photograph. Its mask is the emoji's own alpha
channel: which pixels belong to it. Emoji and photographs of the test are in no other picture; an emoji and its skin
tones, of both vendors, are on one side. Pretraining sees the training pictures without masks.

- `pretrained`: `learn.to_unet_learner(dls)` and fastai's `fine_tune`, a quarter of the steps frozen
- `from scratch`: the same U-Net from an encoder that was never trained, unfrozen, one cycle of as many steps
- `mean mask`: the mean of the masks, above one half; what place alone tells

Both have the same augmentation, batches, number of steps and learning rate, 2e-3. Dice is that of all test pixels
together: twice the pixels that are right over those of both masks.
"""

import os, time
from glob import glob
from pathlib import Path

import numpy as np
from fastai.vision.all import DataBlock, Dice, ImageBlock, IndexSplitter, MaskBlock, aug_transforms, set_seed
from fastcore.script import call_parse
from PIL import Image, ImageOps

from common import receipt
from ressl_fastai.data import tensor_dls
from ressl_fastai.label_efficiency import NoValidation
from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import small_resnet
import ressl_fastai.transfer

def ingredients():
    "Emoji with alpha, (n, 64, 64, 4) uint8, a number for those that belong together, photographs (m, 96, 144, 3)"
    folder,cuts,codes = Path(os.environ.get('EMOJI', '/tmp/emoji'))/'node_modules',[],[]
    for vendor in ('twitter','google'):
        files = sorted((folder/f'emoji-datasource-{vendor}'/'img'/vendor/'64').glob('*.png'))
        if not files: raise FileNotFoundError(f"no emoji of {vendor} in {folder}: see the head of {__file__}")
        cuts += [np.asarray(Image.open(f).convert('RGBA').resize((64,64))) for f in files]
        codes += [f.stem.split('-')[0] for f in files]
    tops = 'backgrounds','wallpapers'
    photos = sorted(f for top in tops for f in glob(f'/usr/share/{top}/**/*.jpg', recursive=True))
    def photo(f): return np.asarray(ImageOps.fit(Image.open(f).convert('RGB'), (144,96)))
    return np.stack(cuts),np.unique(codes, return_inverse=True)[1],np.stack([photo(f) for f in photos])

def picture(rng, cut, photo, size):
    "(size, size, 3) uint8, and its mask of 0 and 1"
    side = rng.integers(48, 97)
    left,top = rng.integers(0, 145-side),rng.integers(0, 97-side)
    im = Image.fromarray(photo).resize((size,size), Image.BILINEAR, box=(left,top,left+side,top+side))
    n = int(size*rng.uniform(0.4, 0.85))
    emoji = Image.fromarray(cut).resize((n,n), Image.BILINEAR).rotate(rng.uniform(-30, 30), Image.BILINEAR)
    place = tuple(int(o) for o in rng.integers(0, size-n+1, 2))
    im.paste(emoji, place, emoji)
    mask = Image.new('L', im.size)
    mask.paste(emoji.getchannel('A'), place)
    return np.asarray(im),np.uint8(np.asarray(mask)>127)

def pictures(cuts, photos, n, size, rng):
    made = [picture(rng, cuts[rng.integers(len(cuts))], photos[rng.integers(len(photos))], size) for _ in range(n)]
    return tuple(np.stack(o) for o in zip(*made))

def split(groups, n_photos, rng):
    "Which emoji and which photographs are for the test: a fifth"
    test_groups = rng.permutation(groups.max()+1)[:(groups.max()+1)//5]
    return np.isin(groups, test_groups),np.isin(np.arange(n_photos), rng.permutation(n_photos)[:n_photos//5])

def mask_dls(x, masks, test, test_masks, bs):
    "All of `x` in the training set, `test` in the validation set"
    ims,ys = np.concatenate([x, test]),np.concatenate([masks, test_masks])
    block = DataBlock((ImageBlock, MaskBlock(['ground','emoji'])), get_x=ims.__getitem__, get_y=ys.__getitem__,
                      splitter=IndexSplitter(range(len(x), len(ims))), batch_tfms=aug_transforms(max_warp=0.))
    return block.dataloaders(range(len(ims)), bs=bs, num_workers=0)

def trained(learn, row, dls, steps, lr=2e-3):
    "Dice of a U-Net, after training it"
    unet = learn.to_unet_learner(dls, metrics=Dice(), cbs=NoValidation())
    epochs = max(2, round(steps/len(dls.train)))
    frozen = epochs//4 if row=='pretrained' else 0
    with unet.no_bar(), unet.no_logging():
        if frozen: unet.fine_tune(epochs-frozen, lr, freeze_epochs=frozen)
        else:
            unet.unfreeze()
            unet.fit_one_cycle(epochs, lr)
        unet.remove_cb(NoValidation)
        return round(float(unet.validate()[1]), 4)

def dice(a, b): return round(float(2*(a&b).sum()/(a.sum()+b.sum())), 4)

@call_parse
def main(
    data:str=None, # File that `--keep` has made; default: emoji and photographs are read anew
    keep:str=None, # Where to keep them, and no more
    seed:int=0, # Of pictures, networks and batches
    images:int=1500, # Pictures for training, of which a few get masks
    size:int=32, # Their side in pixels
    epochs:int=20, # Of pretraining
    steps:int=150, # Of each U-Net
):
    cuts,groups,photos = np.load(data).values() if data else ingredients()
    if keep: return np.savez_compressed(keep, cuts=cuts, groups=groups, photos=photos)
    rng = np.random.default_rng(seed)
    test_cut,test_photo = split(groups, len(photos), rng)
    x,masks = pictures(cuts[~test_cut], photos[~test_photo], images, size, rng)
    test,test_masks = pictures(cuts[test_cut], photos[test_photo], max(20, images//5), size, rng)
    set_seed(seed, reproducible=True)
    dls = tensor_dls(x, valid_idx=range(64), bs=min(64, images//4))
    learn = ressl_learner(dls, small_resnet, metrics=[])
    untrained = ressl_learner(dls, small_resnet, metrics=[])
    start = time.process_time()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 2e-3)
    seconds,res = time.process_time()-start,{}
    for n in (10, 50, 200):
        idxs = np.arange(64, 64+n)
        mean = np.uint8(masks[idxs].mean(0)>=0.5)
        res[n] = {'mean mask': dice(np.broadcast_to(mean, test_masks.shape), test_masks)}
        for row,source in (('pretrained',learn), ('from scratch',untrained)):
            set_seed(seed, reproducible=True)
            dls = mask_dls(x[idxs], masks[idxs], test, test_masks, min(16, n))
            res[n][row] = trained(source, row, dls, steps)
    receipt('masks', seed, dice=res, images=images, test_images=len(test), size=size, epochs=epochs, steps=steps,
            pretraining_cpu_seconds=round(seconds, 1), cpu_seconds=round(time.process_time(), 1), arch='small_resnet')
