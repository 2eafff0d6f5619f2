"""What a weak and a strong view cost per pixel, by the size of images and views: processor time of one thread, in
turns. One JSON line in
results/view_sizes.jsonl, a minute of CPU.

    cd benchmarks; python -W ignore view_sizes.py [--rounds 5]
"""

import argparse, statistics, time

import torch

from common import photographs, receipt
from ressl_fastai.views import strong_tfms, weak_tfms

sizes = (256,256), (320,320), (384,384), (500,500), (512,512), (256,224), (501,224), (64,64), (144,64)  # image, view

def cpu_seconds(f, least=0.2):
    start,n = time.process_time(),0
    while n==0 or time.process_time()-start<least:
        f()
        n += 1
    return (time.process_time()-start)/n

def main(rounds):
    torch.set_num_threads(1)
    torch.empty(31*2**18)  # as in views.py
    cases = {}
    for image,size in sizes:
        bs = 64 if image<200 else max(4, 16*256**2//image**2)
        x,tfms = photographs(bs, image),[weak_tfms(size), strong_tfms(size)]
        cases[image,size] = lambda x=x, tfms=tfms: [f(x) for f in tfms],bs*size**2
    times = {k:[] for k in cases}
    for _ in range(rounds+1):  # the first does not count
        for k,(f,n) in cases.items(): times[k].append(cpu_seconds(f)/n)
    ns = {k:round(1e9*statistics.median(v[1:]), 1) for k,v in times.items()}
    receipt('view_sizes', rounds=rounds, cpu_ns_per_pixel={f'{size} of {image}':v for (image,size),v in ns.items()},
            most_against_256=max(round(v/ns[256,256], 2) for (image,size),v in ns.items() if image==size>256))

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rounds', type=int, default=5)
    main(p.parse_args().rounds)
