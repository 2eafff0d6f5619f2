"""A weak and a strong view of 64 uint8 photographs, normalised, ready for the network: ours against kornia,
torchvision on PIL images, torchvision's v2 on
tensors and lightly, in turns in one process. One JSON line per size in results/views.jsonl. Two and a half minutes.

    .venv/bin/pip install -e '.[bench]' && .venv/bin/python benchmarks/views.py

A turn lasts a tenth of a second, or with `--turn 0` one batch, whose data and code the others have driven out of the
caches.
All have the paper's parameters: crop, flip | crop, flip, jitter, grayscale, blur. Kernels of the blur are a tenth of
the side, as is usual; ours reaches four
standard deviations."""

import argparse, warnings

import kornia.augmentation as K, torch, torchvision.transforms as T, torchvision.transforms.v2 as T2
from fastai.data.transforms import Normalize
from fastai.vision.core import imagenet_stats
from lightly.transforms import GaussianBlur
from lightly.transforms.multi_view_transform import MultiViewTransform
from PIL import Image
from torch import nn

from common import answer_peak, in_turns, peak, peaks, photographs, ratio, receipt, spread
from ressl_fastai.callback import ReSSL
from ressl_fastai.views import strong_tfms, weak_tfms

scale,jitter = (0.2,1.),(0.4,0.4,0.4,0.1)

def kernel(size): return max(3, size//10 | 1)

def ours(x, size):
    "As `ReSSL` makes and normalises them"
    callback = ReSSL(weak_tfms(size), strong_tfms(size))
    callback.normalize = Normalize.from_stats(*imagenet_stats, cuda=False)
    return lambda: [callback._view(x, o) for o in (callback.weak_tfms, callback.strong_tfms)]

def kornias(x, size):
    "Every image with its own random numbers, as ours"
    norm = K.Normalize(*map(torch.tensor, imagenet_stats))
    first = [K.RandomResizedCrop((size,size), scale=scale), K.RandomHorizontalFlip()]
    weak = nn.Sequential(*first, norm)
    strong = nn.Sequential(
        *first,
        K.ColorJitter(*jitter, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((kernel(size),) * 2, (0.1, 2.0), p=0.5),
        norm,
    )

    def views():
        o = x.float()/255
        return weak(o),strong(o)
    return views

def pipelines(T, size, last, blur=None):
    first = [T.RandomResizedCrop(size, scale, antialias=True), T.RandomHorizontalFlip()]
    blur = blur or T.RandomApply([T.GaussianBlur(kernel(size), (0.1,2.))], 0.5)
    return T.Compose(first + last), T.Compose(
        [*first, T.RandomApply([T.ColorJitter(*jitter)], 0.8), T.RandomGrayscale(0.2), blur, *last]
    )


def one_by_one(ims, *tfms): return lambda: [torch.stack([f(im) for im in ims]) for f in tfms]

def pictures(x): return [Image.fromarray(o.permute(1,2,0).numpy()) for o in x]

def torchvisions(x, size):
    return one_by_one(pictures(x), *pipelines(T, size, [T.ToTensor(), T.Normalize(*imagenet_stats)]))


def torchvisions_v2(x, size):
    return one_by_one(
        list(x), *pipelines(T2, size, [T2.ToDtype(torch.float32, scale=True), T2.Normalize(*imagenet_stats)])
    )


def lightlys(x, size):
    "lightly's own blur and collection of views over torchvision's transforms, as in its MoCo and SimCLR transforms"
    both = MultiViewTransform(
        pipelines(T, size, [T.ToTensor(), T.Normalize(*imagenet_stats)], GaussianBlur(sigmas=(0.1, 2.0), prob=0.5))
    )
    ims = pictures(x)
    return lambda: [torch.stack(o) for o in zip(*map(both, ims))]

cases = dict(ours=ours, kornia=kornias, torchvision_pil=torchvisions, torchvision_v2=torchvisions_v2, lightly=lightlys)

def memory(name, size, bs):
    "Megabytes that both views of a batch take"
    bs,size = int(bs),int(size)
    cases[name](photographs(2, size), size)()  # what the libraries allocate once
    return peak(cases[name](photographs(bs, size), size))

def main(sizes, bs, n, turn):
    torch.empty(
        31 * 2**18
    # as after a first training step: glibc then keeps what was freed (how much, this is what tells it) and does not ask
    # for it again each time
    )
    for size in sizes:
        torch.manual_seed(0)
        x = photographs(bs, size)
        t = in_turns({k:f(x, size) for k,f in cases.items()}, n, least=turn)
        receipt(
            'views',
            0,
            size=size,
            bs=bs,
            rounds=n,
            turn=turn,
            ms={k: spread(v) for k, v in t.items()},
            images_per_second={k: round(bs * 1e3 / spread(v)['median']) for k, v in t.items()},
            times_faster_than={k: ratio(v, t['ours']) for k, v in t.items() if k != 'ours'},
            mb=peaks(cases, size, bs),
        )

if __name__=='__main__':
    warnings.filterwarnings('ignore')
    answer_peak(memory)
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--sizes', type=int, nargs='+', default=[32,64,224], help="sides in pixels")
    p.add_argument('--bs', type=int, default=64, help="images")
    p.add_argument('--rounds', type=int, default=9, help="measurements of each")
    p.add_argument('--turn', type=float, default=0.1, help="seconds that each is called again in its turn, at least")
    args = p.parse_args()
    main(args.sizes, args.bs, args.rounds, args.turn)
