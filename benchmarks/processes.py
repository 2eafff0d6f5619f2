"""What several processes cost beyond their networks: processor time of an image in training, with one process and one
thread as 1. Strong scaling shares one batch out, weak scaling gives each process a batch. Processor time, since it
is hardly disturbed by what else runs on the machine; on two cores a ratio of 1 is twice the speed. Batch norm of all
processes is PyTorch's on a GPU; on a CPU, where there is none, it is ours, written for tests and not for speed.

    .venv/bin/python benchmarks/processes.py    # about 2 minutes on 2 cores

One JSON line for each case in results/processes.jsonl."""

import os, tempfile, time
from pathlib import Path

import numpy as np, torch
import torch.distributed as dist
from fastai.callback.core import Callback, CancelFitException
from torch.multiprocessing import start_processes
from torchvision.models import resnet18

from common import receipt
from ressl_fastai.data import tensor_dls
from ressl_fastai.learner import ressl_learner

cases = {  # name: processes, threads of each, images of all in a batch, whether batch norm takes statistics of all
    'one process':(1, 1, 32, True),
    'one process, two threads':(1, 2, 32, True),
    'two processes share the batch':(2, 1, 32, True),
    'two processes, twice the batch':(2, 1, 64, True),
    'two processes share the batch, each its own batch norm':(2, 1, 32, False),
    'two processes, twice the batch, each its own batch norm':(2, 1, 64, False)}
n_steps,size = 4,64

class Clock(Callback):
    "Processor and wall seconds from the second step on"
    order = 1000
    def now(self): return np.array([time.process_time(),time.perf_counter()])
    def after_batch(self):
        if self.train_iter==2: self.start = self.now()
        if self.train_iter==2+n_steps:
            self.seconds = self.now()-self.start
            raise CancelFitException

def run(n, threads, bs, sync_bn):
    "Seconds of one process"
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x = np.random.default_rng(0).integers(0, 256, (1024,size,size,3), dtype=np.uint8)
    dls = tensor_dls(x, valid_pct=0.1, seed=0, bs=bs//n, device=torch.device('cpu'))
    learn,clock = ressl_learner(dls, resnet18, queue_size=512, precision='float32', guard=False),Clock()
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(sync_bn=sync_bn): learn.fit(1, cbs=clock)
    return clock.seconds

def process(rank, folder, n, *how):
    os.environ.update(WORLD_SIZE=str(n), RANK=str(rank))
    store = dist.FileStore(f'{folder}/store', n)
    if n>1: dist.init_process_group('gloo', store=store, rank=rank, world_size=n)
    np.save(f'{folder}/{rank}.npy', run(n, *how))

def measure(n, threads, bs, sync_bn):
    "Processor milliseconds of an image, summed over processes, and wall milliseconds"
    with tempfile.TemporaryDirectory() as folder:
        start_processes(process, (folder,n,threads,bs,sync_bn), nprocs=n, start_method='fork')
        seconds = np.stack([np.load(Path(folder)/f'{i}.npy') for i in range(n)])
    return [1000*o/(n_steps*bs) for o in (seconds[:,0].sum(), seconds[:,1].max())]

if __name__=='__main__':
    first = None
    for nm,(n,threads,bs,sync_bn) in cases.items():
        cpu,wall = measure(n, threads, bs, sync_bn)
        first = first or cpu
        receipt('processes', seed=0, case=nm, processes=n, threads_each=threads, bs=bs, size=size, sync_bn=sync_bn,
                cpu_ms=round(cpu, 2), wall_ms=round(wall, 2), ratio=round(cpu/first, 3))
