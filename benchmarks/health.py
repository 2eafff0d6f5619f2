"""What watching costs: seconds of a training step without and with `Guard`, and of an epoch without and with `HealthMonitor`, in turns in one process.
One JSON line in results/health.jsonl.

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
    "Seconds of every training step, all callbacks included"
    order = -200
    def before_fit(self): self.last,self.steps = None,[]
    def before_batch(self):
        if not self.training: return
        now = time.perf_counter()
        if self.last is not None: self.steps.append(now-self.last)
        self.last = now
    def after_train(self): self.last = None

def epoch(learn, cbs):
    "Seconds of one epoch, and mean seconds of its training steps"
    clock,start = Clock(),time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=[clock, *cbs])
    return time.perf_counter()-start,statistics.mean(clock.steps)

def main(n=8):
    set_seed(0)
    learn = ressl_learner(digits_dls(16, bs=64), partial(small_resnet, widen=0.25), metrics=[], guard=False)
    cases,res = dict(none=lambda: [], guard=lambda: [Guard(every=20)], monitor=lambda: [HealthMonitor()]),{}
    for i in range(n+1):
        for nm,cbs in cases.items():
            o = epoch(learn, cbs())
            if i: res.setdefault(nm, []).append(o)
    def ratio(nm, j): return [a[j]/b[j] for a,b in zip(res[nm], res['none'])]
    def show(vals): return dict(median=round(statistics.median(vals), 4), min=round(min(vals), 4), max=round(max(vals), 4))
    receipt('health', 0, data='digits 16 px, bs 64, 22 steps and 360 validation images', repeats=n, ms_per_step=round(1e3*statistics.median(o[1] for o in res['none']), 2),
            guard_step=show(ratio('guard', 1)), monitor_epoch=show(ratio('monitor', 0)))

if __name__=='__main__': main()
