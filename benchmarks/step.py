"""One training step of `ressl_learner`, end to end, against the floor: the student's forward and backward, a plain
optimizer step and the teacher's forward on
ready tensors of the same type and layout. A few steps of each in turns, in one process per configuration; one JSON
line each in results/step.jsonl.

    .venv/bin/python benchmarks/step.py                        # the two that have bars: 32 px with a 3x3 stem, 64
    px; about 7 minutes on 2 cores
    .venv/bin/python benchmarks/step.py resnet50 mobilenet vit  # others, 10 minutes

`parts` is where a step's time goes, from torch.profiler in steps of their own: data is the look-up, other is fastai's
and our callbacks, recorder and loop, as seen by the
profiler, which slows it. `overhead_ms` is the same without the profiler: steps in which every other part does nothing.
fastai writes zeros into the gradients, which is a part, zero_grad."""

import argparse, gc, io, statistics, time
from contextlib import contextmanager, nullcontext, redirect_stdout
from copy import deepcopy
from itertools import repeat
from unittest.mock import patch

import numpy as np, torch, torchvision.models as tvm
from fastai.callback.core import Callback, CancelFitException
from torch.profiler import profile, record_function

from common import answer_peak, peak, peaks, photographs, ratio, receipt, spread
from ressl_fastai import callback
from ressl_fastai.data import tensor_dls
from ressl_fastai.feature_queue import FeatureQueue
from ressl_fastai.learner import ressl_learner

configs = dict(
    resnet18_32=dict(arch=tvm.resnet18, size=32, steps=3),
    resnet18_64=dict(arch=tvm.resnet18, size=64, steps=4),
    resnet18_32_standard=dict(arch=tvm.resnet18, size=32, steps=6, stem='standard'),
    resnet50=dict(arch=tvm.resnet50, size=224, bs=16, steps=1, rounds=3),
    mobilenet=dict(arch=tvm.mobilenet_v3_small, size=64, steps=5),
    vit=dict(arch='vit_tiny_patch16_224', size=64, steps=4, kw=dict(img_size=64, patch_size=8)),
)

class Stamps(Callback):
    "When each batch is done; stops after `n`"
    order = 1000
    def __init__(self, n): self.n = n
    def before_fit(self): self.times = []
    def after_batch(self):
        if not self.training: return
        self.times.append(time.perf_counter())
        if len(self.times)>self.n: raise CancelFitException

def steps(learn, n, bar=False):
    """Seconds of each of `n` steps of `learn`, the first not counted: from the end of one batch to the end of the
    next, all that fastai does included"""
    stamps = Stamps(n)
    with nullcontext() if bar else learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=stamps)
    return np.diff(stamps.times).tolist()

def arch(name, config):
    if not isinstance(config['arch'], str): return config['arch']
    import timm
    return timm.create_model(config['arch'], pretrained=False, num_classes=0, **config['kw'])

def make(name, precision, bs=64, queue_size=1024, n=None, stem='auto', **config):
    torch.manual_seed(0)
    np.random.seed(0)
    dls = tensor_dls(photographs(n or bs*(config.get('steps', 4)+2), config['size']), valid_pct=0, bs=bs)
    return ressl_learner(
        dls, arch(name, config), stem=stem, queue_size=min(queue_size, dls.train.n), precision=precision, metrics=[]
    )


class Floor:
    "Networks alone"
    def __init__(self, learn, precision):
        self.model = deepcopy(learn.model)
        fmt = torch.channels_last if learn.precision.channels_last else torch.contiguous_format
        self.model.to(memory_format=fmt).train()
        size = learn.dls.train.images.shape[2:]
        self.x = torch.randn(learn.dls.train.bs, 3, *size).to(memory_format=fmt)
        self.opt = torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], lr=1e-4, foreach=True)
        self.dtype = torch.bfloat16 if precision=='bfloat16' else None

    def __call__(self):
        with torch.autocast('cpu', self.dtype) if self.dtype else nullcontext():
            z = self.model(self.x)
            with torch.no_grad(): self.model.teacher(self.x)
        (z.float()*self.x.mean()).sum().backward()
        self.opt.step()
        self.opt.zero_grad()


def memory(case, name, precision):
    "Megabytes that the networks, their optimizer and a few steps take"

    def ours():
        learn = make(name, precision, **configs[name])
        steps(learn, 2)

    def floor():
        f = Floor(make(name, precision, **configs[name]), precision)
        gc.collect()
        for _ in range(3): f()
    return peak(dict(ours=ours, floor=floor)[case])

def timed(f):
    start = time.perf_counter()
    f()
    return time.perf_counter()-start

def measure(learn, floor, n, rounds):
    "Seconds per step in each round"
    ours,bare = [],[]
    for i in range(rounds+1):
        a,b = statistics.mean(steps(learn, n)),statistics.mean(timed(floor) for _ in range(n))
        if i:
            ours.append(a)
            bare.append(b)
    return ours,bare

def named(learn):
    "Where each part of a step is: the object and the name of the function"
    return dict(
        views=(callback.ReSSL, '_view'),
        teacher=(callback.ReSSL, '_teach'),
        loss=(callback.ReSSL, '_loss'),
        ema=(callback, 'update_teacher'),
        queue=(FeatureQueue, 'enqueue'),
        optimizer=(type(learn.opt), 'step'),
        zero_grad=(type(learn.opt), 'zero_grad'),
        student=(type(learn.model), 'forward'),
        data=(type(learn.dls.train), 'create_batches'),
        backward=(torch.Tensor, 'backward'),
    )

@contextmanager
def patched(learn, replace):
    "Each part replaced by what `replace` makes of its name and function"
    patches = [patch.object(o, nm, replace(k, getattr(o, nm))) for k,(o,nm) in named(learn).items()]
    for p in patches: p.start()
    try: yield
    finally:
        for p in patches: p.stop()

def overhead(name, precision, n=60, **config):
    """Milliseconds per step of fastai's loop, callbacks, recorder and progress bar, ours included: a training in
    which every part does nothing"""
    learn = make(name, precision, n=config.get('bs', 64)*(n+2), **config)
    steps(learn, 1)
    batch = next(iter(learn.dls.train.create_batches(range(learn.dls.train.bs))))
    pred = torch.zeros(learn.dls.train.bs, learn.model.queue.feats.shape[1], requires_grad=True)

    def loss(self, pred, *yb):
        self.restore_loss()
        return pred.mean()

    idle = dict(
        views=lambda self, x, tfms: x,
        teacher=lambda self, x: pred.detach(),
        student=lambda self, *x: pred,
        loss=loss,
        data=lambda self, samps: repeat(batch),
    )
    with patched(learn, lambda k, f: idle.get(k, lambda *args, **kwargs: None)), redirect_stdout(io.StringIO()):
        seconds = steps(learn, n, bar=True)
    return round(1e3*statistics.median(seconds), 2)

def parts(learn, n):
    "Milliseconds per step of each part"
    def wrap(k, f):
        def labelled(*args, **kwargs):
            with record_function(f'part {k}'): return f(*args, **kwargs)
        def batches(*args, **kwargs):
            it = f(*args, **kwargs)
            while True:
                with record_function(f'part {k}'): b = next(it, None)
                if b is None: return
                yield b
        return batches if k=='data' else labelled
    with patched(learn, wrap), profile() as prof: seconds = steps(learn, n)
    found = {e.key[5:]:e for e in prof.key_averages() if e.key.startswith('part ')}
    calls = {k:1+(k=='views') for k in found}
    ms = {k:round(e.cpu_time_total/e.count*calls[k]/1e3, 2) for k,e in found.items()}
    step = 1e3*statistics.mean(seconds)
    return dict(ms, step=round(step, 2), other=round(step-sum(ms.values()), 2))

def syncs(learn, n=2):
    "Values read back per step, each of which makes a GPU's host wait"
    with profile() as prof: steps(learn, n)
    return {k:e.count/(n+1) for k in ('aten::item','aten::nonzero') for e in prof.key_averages() if e.key==k}

def run(name, precision, rounds):
    config = configs[name]
    learn = make(name, precision, **config)
    steps(learn, 1)                                            # fills the queue, makes the optimizer
    floor = Floor(learn, precision)
    ours,bare = measure(learn, floor, config['steps'], rounds or config.get('rounds', 7))
    bs = learn.dls.train.bs
    receipt(
        'step',
        0,
        config=name,
        precision=precision,
        layout='channels_last' if learn.precision.channels_last else 'contiguous',
        bs=bs,
        size=config['size'],
        images_per_second=round(bs / statistics.median(ours), 1),
        floor_images_per_second=round(bs / statistics.median(bare), 1),
        times_the_floor=ratio(ours, bare),
        rounds=[round(a / b, 3) for a, b in zip(ours, bare)],
        ms=dict(ours=spread(ours), floor=spread(bare)),
        mb=peaks(('ours', 'floor'), name, precision),
        parts=parts(learn, config['steps']),
        overhead_ms=(ms := overhead(name, precision, **config)),
        overhead_share=round(ms / 1e3 / statistics.median(ours), 4),
        read_back=syncs(learn),
    )
    gc.collect()

if __name__=='__main__':
    answer_peak(memory)
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('configs', nargs='*', default=['resnet18_32','resnet18_64'], help=', '.join(configs))
    p.add_argument('--precision', nargs='+', default=['bfloat16','float32'], choices=['bfloat16','float32'])
    p.add_argument('--rounds', type=int, help="default: 7, 3 for resnet50")
    args = p.parse_args()
    for name in args.configs:
        for precision in args.precision: run(name, precision, args.rounds)
