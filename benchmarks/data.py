"""One epoch of batches, nothing trained: fastai's pipeline from PNG files and from arrays, `cached_dls` and
`tensor_dls`, in turns in one process. One JSON line per size in
results/data.jsonl. About five minutes.

    .venv/bin/python benchmarks/data.py
"""

import argparse, tempfile, time
from pathlib import Path

from fastai.data.block import DataBlock
from fastai.data.transforms import Normalize, RandomSplitter
from fastai.vision.augment import Resize
from fastai.vision.core import PILImage, imagenet_stats
from fastai.vision.data import ImageBlock, ImageDataLoaders
from PIL import Image

from common import answer_peak, in_turns, peak, peaks, photographs, ratio, receipt, spread
from ressl_fastai.data import cached_dls, tensor_dls

def save(x, folder):
    for i,o in enumerate(x):
        (folder/'all').mkdir(exist_ok=True, parents=True)
        Image.fromarray(o.permute(1,2,0).numpy()).save(folder/'all'/f'{i:05}.png')

def epoch(dls):
    for _ in dls.train: pass

def kw(): return dict(bs=64, batch_tfms=[Normalize.from_stats(*imagenet_stats, cuda=False)])

def fastai_files(x, d, num_workers=0):
    return ImageDataLoaders.from_folder(
        d / 'images', valid_pct=0.01, item_tfms=Resize(x.shape[2]), num_workers=num_workers, **kw()
    )


def fastai_arrays(x, d):
    arrays = x.permute(0,2,3,1).numpy()
    return DataBlock(
        (ImageBlock(PILImage),), get_x=arrays.__getitem__, splitter=RandomSplitter(0.01), batch_tfms=kw()['batch_tfms']
    ).dataloaders(range(len(x)), bs=64, num_workers=0)


cases = dict(
    fastai_files=fastai_files,
    fastai_files_2_workers=lambda x, d: fastai_files(x, d, 2),
    fastai_arrays=fastai_arrays,
    cached_dls=lambda x, d: cached_dls(fastai_files(x, d), d / 'cache'),
    tensor_dls=lambda x, d: tensor_dls(x, valid_pct=0.01, **kw()),
)

def memory(name, size, n):
    """Megabytes that the `DataLoaders` and an epoch take, beyond the arrays; of the main process, so without
    workers. What is mapped from a file counts where it was read"""
    with tempfile.TemporaryDirectory() as d:
        d,x = Path(d),photographs(int(n), int(size))
        save(x, d/'images')
        if name=='cached_dls': cases[name](x, d)  # makes the cache

        def run():
            dls = cases[name](x, d)
            epoch(dls)

        return peak(run)

def main(sizes, n, rounds):
    for size in sizes:
        with tempfile.TemporaryDirectory() as d:
            d,x = Path(d),photographs(n, size)
            save(x, d/'images')
            files = fastai_files(x, d)
            start = time.perf_counter()
            cached_dls(files, d / 'cache')
            first = time.perf_counter() - start
            start = time.perf_counter()
            cached_dls(files, d / 'cache')
            later = time.perf_counter() - start
            t = in_turns({k:lambda dls=f(x, d): epoch(dls) for k,f in cases.items()}, rounds)
        receipt(
            'data',
            0,
            size=size,
            images=n,
            bs=64,
            ms={k: spread(v) for k, v in t.items()},
            images_per_second={k: round(len(files.train) * 64 * 1e3 / spread(v)['median']) for k, v in t.items()},
            times_faster_than_files=ratio(t['fastai_files'], t['cached_dls']),
            times_faster_than_arrays=ratio(t['fastai_arrays'], t['tensor_dls']),
            making_the_cache_seconds=round(first, 2),
            opening_it_seconds=round(later, 2),
            mb=peaks(cases, size, n),
        )

if __name__=='__main__':
    answer_peak(memory)
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--sizes', type=int, nargs='+', default=[32,64,224], help="sides in pixels")
    p.add_argument('--images', type=int, default=1024)
    p.add_argument('--rounds', type=int, default=3)
    args = p.parse_args()
    main(args.sizes, args.images, args.rounds)
