"""What watching costs: the share of a training's processor time that is spent inside `Guard`, as it is by default,
and inside `HealthMonitor`.
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

class Timed:
    "Counts the processor seconds of a callback's events"
    def __call__(self, event):
        start = time.process_time()
        try: return super().__call__(event)
        finally: self.spent += time.process_time()-start

class TimedGuard(Timed, Guard): spent = 0.
class TimedMonitor(Timed, HealthMonitor): spent = 0.

def main(n=5):
    set_seed(0)
    learn,res = ressl_learner(digits_dls(8, bs=28), partial(small_resnet, widen=0.25), metrics=[], guard=False),[]
    for i in range(n+1):
        cbs,start = (TimedGuard(),TimedMonitor()),time.process_time()
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=cbs)
        total = time.process_time()-start
        if i: res.append((total, *(cb.spent/total for cb in cbs)))  # the first epoch warms up

    def show(vals, digits):
        return dict(
            median=round(statistics.median(vals), digits), min=round(min(vals), digits), max=round(max(vals), digits)
        )

    total,guard,monitor = zip(*res)
    receipt(
        'health',
        0,
        data='digits, 8 pixels, bs 28: an epoch of 51 steps, one look, 360 validation images',
        repeats=n,
        epoch_seconds=show(total, 2),
        guard_share=show(guard, 4),
        monitor_share=show(monitor, 4),
    )

if __name__=='__main__': main()
