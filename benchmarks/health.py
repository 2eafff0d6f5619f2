"""What watching costs: processor seconds of training without, with `Guard` as it is by default, and with `HealthMonitor`, in turns in one process.
One JSON line in results/health.jsonl. Processor time of one thread, not time on the clock: other work on the machine does not count.

    .venv/bin/python benchmarks/health.py
"""
import statistics, time
from functools import partial

import torch
from fastai.vision.all import Callback, set_seed

from common import receipt
from ressl_fastai.data import digits_dls
from ressl_fastai.health import Guard, HealthMonitor
from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import small_resnet

torch.set_num_threads(1)

class Clock(Callback):
    "Processor seconds of the training part of an epoch"
    order = -200
    def before_train(self): self.start = time.process_time()
    def after_train(self): self.train = time.process_time()-self.start

def epoch(learn, cbs):
    "Processor seconds of an epoch: its training, and all of it"
    clock,start = Clock(),time.process_time()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=[clock, *cbs])
    return clock.train,time.process_time()-start

def show(vals): return dict(median=round(statistics.median(vals), 4), min=round(min(vals), 4), max=round(max(vals), 4))

def main(n=5):
    set_seed(0)
    learn = ressl_learner(digits_dls(8, bs=28), partial(small_resnet, widen=0.25), metrics=[], guard=False)
    cases,res = dict(none=lambda: [], guard=lambda: [Guard()], monitor=lambda: [HealthMonitor()]),{}
    for i in range(n+1):
        for nm,cbs in cases.items():
            seconds = epoch(learn, cbs())
            if i: res.setdefault(nm, []).append(seconds)   # the first round warms up
    def ratio(nm, part): return show([a[part]/b[part] for a,b in zip(res[nm], res['none'])])
    receipt('health', 0, data='digits, 8 pixels, bs 28: 51 steps, 360 validation images', n_looks=1, repeats=n,
            train_seconds=show([o[0] for o in res['none']]), guard_train=ratio('guard', 0), monitor_epoch=ratio('monitor', 1))

if __name__=='__main__': main()
