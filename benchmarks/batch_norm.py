"""What split batch norm costs: processor time of a forward and backward pass of a ResNet-18 in bfloat16 with channels
last, with plain batch norm and with batch norm in 8 parts, in turns. One JSON line in results/batch_norm.jsonl.

    cd benchmarks; python -W ignore batch_norm.py [--size 64] [--bs 64] [--rounds 9]
"""

import argparse, statistics, time

import torch
from torchvision.models import resnet18

from common import receipt
from ressl_fastai.batch_norm import set_batch_norm

def make(kind):
    torch.manual_seed(0)
    return set_batch_norm(resnet18(num_classes=128), kind, 8).to(memory_format=torch.channels_last).train()

def step(net, x):
    with torch.autocast('cpu', torch.bfloat16): y = net(x)
    y.float().square().sum().backward()

def main(size, bs, rounds):
    x = torch.randn(bs, 3, size, size).to(memory_format=torch.channels_last)
    nets,seconds = {kind:make(kind) for kind in ('plain','split')},{'plain':[], 'split':[]}
    for _ in range(rounds+1):  # the first does not count
        for kind,net in nets.items():
            start = time.process_time()
            step(net, x)
            seconds[kind].append(time.process_time()-start)
    ms = {k:round(1e3*statistics.median(v[1:]), 1) for k,v in seconds.items()}
    receipt('batch_norm', 0, size=size, bs=bs, rounds=rounds, cpu_ms=ms, ratio=round(ms['split']/ms['plain'], 3))

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--size', type=int, default=64)
    p.add_argument('--bs', type=int, default=64)
    p.add_argument('--rounds', type=int, default=9)
    args = p.parse_args()
    main(args.size, args.bs, args.rounds)
