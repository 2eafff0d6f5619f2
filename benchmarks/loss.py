"""The relational loss as attention against the published formula: seconds for forward and backward, side by side in one process, and peak memory beyond
the embeddings, each case in its own process. One JSON line per shape in results/loss.jsonl.

    .venv/bin/python benchmarks/loss.py
"""
import argparse, statistics, subprocess, sys, time
from pathlib import Path

import torch
import torch.nn.functional as F

from common import memory, receipt
from ressl_fastai.losses import ressl_loss

shapes = ((64,1024,128), (256,4096,128), (256,16384,128), (256,65536,512), (256,131072,512))

def published(z_student, z_teacher, queue, student_temp=0.1, teacher_temp=0.04):
    "Cross entropy of two softmaxes over (bs, K) logits, as the paper writes it and public code computes it"
    p_teacher = (z_teacher @ queue.T / teacher_temp).softmax(1)
    return -(p_teacher * (z_student @ queue.T / student_temp).log_softmax(1)).sum(1).mean()

losses = dict(published=published, ours=ressl_loss)

def embeddings(bs, size, dim):
    torch.manual_seed(0)
    zs,zt,queue = (F.normalize(torch.randn(n, dim), dim=1) for n in (bs, bs, size))
    return zs.requires_grad_(),zt,queue

def step(loss, zs, zt, queue):
    zs.grad = None
    loss(zs, zt, queue).backward()

def times(shape, n):
    "Seconds per call of both, taken in turns after one call each that does not count"
    args,res = embeddings(*shape),{k:[] for k in losses}
    for i in range(n+1):
        for k,loss in losses.items():
            start = time.perf_counter()
            step(loss, *args)
            if i: res[k].append(time.perf_counter()-start)
    return res

def peak(name, shape):
    "Megabytes by which forward and backward raise the process's memory, at most (Linux)"
    step(losses[name], *embeddings(64, 1024, shape[2]))  # what the libraries allocate once
    args = embeddings(*shape)
    Path('/proc/self/clear_refs').write_text('5')          # the peak so far is forgotten
    before = memory('VmRSS')
    step(losses[name], *args)
    return memory('VmHWM')-before

def peak_of(name, shape):
    out = subprocess.run([sys.executable, __file__, '--peak', name, *map(str, shape)], capture_output=True, text=True, check=True)
    return float(out.stdout)

def main():
    for shape in shapes:
        t,mb = times(shape, 15 if shape[1]<30000 else 5),{k:peak_of(k, shape) for k in losses}
        ms = {k:dict(median=round(1e3*statistics.median(v), 2), min=round(1e3*min(v), 2), max=round(1e3*max(v), 2)) for k,v in t.items()}
        receipt('loss', 0, bs=shape[0], queue_size=shape[1], dim=shape[2], ms=ms, mb={k:round(v, 1) for k,v in mb.items()},
                speedup=round(statistics.median(a/b for a,b in zip(t['published'], t['ours'])), 2))

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--peak', nargs=4, metavar=('NAME','BS','K','DIM'), help="print the peak of one case (used by the script itself)")
    args = p.parse_args()
    if args.peak: print(peak(args.peak[0], tuple(map(int, args.peak[1:]))))
    else: main()
