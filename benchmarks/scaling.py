"""How a step's time grows with batch size, queue size, number of crops, image size and size of the data set, one
thing changed at a time from ResNet-18 at 32 px, stem for
64 px, batch 64, queue 1024. Small networks on purpose: what is not network shows. One JSON line per series in
results/scaling.jsonl. About 4 minutes on 2 cores.

    .venv/bin/python benchmarks/scaling.py
"""

import argparse, statistics

import torch, torchvision.models as tvm

from common import answer_peak, peak, peaks, photographs, receipt, spread
from ressl_fastai.data import tensor_dls
from ressl_fastai.learner import ressl_learner
from ressl_fastai.views import strong_tfms
from step import parts, steps

series = dict(
    bs=[16, 32, 64, 128],
    queue_size=[256, 1024, 4096, 16384, 65536],
    crops=[1, 2, 4],
    size=[16, 32, 64, 96],
    images=[512, 2048, 8192],
)
base = dict(bs=64, queue_size=1024, crops=1, size=32, images=1024)

def make(bs, queue_size, crops, size, images):
    torch.manual_seed(0)
    x = photographs(min(images, 1024), size)
    x = x.repeat(-(-max(images, bs*6)//len(x)), 1, 1, 1)[:max(images, bs*6)]
    learn = ressl_learner(
        tensor_dls(x, valid_pct=0, bs=bs),
        tvm.resnet18,
        stem='standard',
        queue_size=min(queue_size, len(x)),
        dim=128,
        metrics=[],
        strong_tfms=[strong_tfms(size) for _ in range(crops)],
    )
    if queue_size>len(x): learn.model.queue = full_queue(queue_size)
    return learn

def full_queue(size, dim=128):
    "A queue larger than the data set, which `ressl_learner` refuses, full of random directions"
    from ressl_fastai.feature_queue import FeatureQueue
    queue = FeatureQueue(size, dim)
    queue.enqueue(torch.nn.functional.normalize(torch.randn(size, dim), dim=1))
    return queue

def memory(value, name):
    "Megabytes that networks, data and a few steps take"

    def run():
        learn = make(**{**base, name: int(value)})
        steps(learn, 2)

    return peak(run)

def main(names, n):
    for name in names:
        rows = []
        for v in series[name]:
            learn = make(**{**base, name:v})
            s = steps(learn, n)
            rows.append(
                {
                    name: v,
                    'ms': round(1e3 * statistics.median(s), 2),
                    'spread': spread(s),
                    'images_per_second': round(learn.dls.train.bs / statistics.median(s), 1),
                    'parts': parts(learn, 3),
                    'mb': peaks([str(v)], name)[str(v)],
                }
            )
        receipt('scaling', 0, series=name, base=base, rows=rows)

if __name__=='__main__':
    answer_peak(memory)
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('series', nargs='*', default=list(series), help=', '.join(series))
    p.add_argument('--steps', type=int, default=4)
    args = p.parse_args()
    main(args.series, args.steps)
