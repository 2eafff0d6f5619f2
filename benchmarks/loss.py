"""The relational loss as attention against the published formula: seconds for forward and backward, side by side in
one process, and peak memory beyond
the embeddings, each case in its own process. One JSON line per shape in results/loss.jsonl.

    .venv/bin/python benchmarks/loss.py
"""

import torch
import torch.nn.functional as F

from common import answer_peak, in_turns, peak, peaks, ratio, receipt, spread
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

def memory(name, *shape):
    "Megabytes that forward and backward take"
    bs,size,dim = map(int, shape)
    step(losses[name], *embeddings(64, 1024, dim))  # what the libraries allocate once
    args = embeddings(bs, size, dim)
    return peak(lambda: step(losses[name], *args))

def main():
    for bs,size,dim in shapes:
        args = embeddings(bs, size, dim)
        t = in_turns({k:lambda loss=loss: step(loss, *args) for k,loss in losses.items()}, 15 if size<30000 else 5)
        receipt(
            'loss',
            0,
            bs=bs,
            queue_size=size,
            dim=dim,
            ms={k: spread(v) for k, v in t.items()},
            mb=peaks(losses, bs, size, dim),
            speedup=ratio(t['published'], t['ours']),
        )


if __name__=='__main__':
    answer_peak(memory)
    main()
