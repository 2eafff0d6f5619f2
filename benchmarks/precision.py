"""float32, bfloat16 and channels last: what a step costs, and what the encoder is worth, one JSON line per case in results/precision.jsonl.

    .venv/bin/python benchmarks/precision.py speed
    .venv/bin/python benchmarks/precision.py knn 42 1 2

speed: student forward and backward, teacher forward and optimizer step on ready-made images, batches of 64, one thread, images per second of *processor* time, so that
other processes on the machine matter less; the layouts take turns, the median counts. knn: `digits_dls`, 15 epochs, float32 against precision='auto'.
"""
import sys, time
from functools import partial
from statistics import median

import torch, torchvision.models as tv
from fastai.vision.all import set_seed

from common import receipt
from ressl_fastai.data import digits_dls
from ressl_fastai.evaluate import embed, knn_accuracy
from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import ReSSLModel, create_encoder, small_resnet
from ressl_fastai.views import strong_tfms, weak_tfms

torch.set_num_threads(1)
tiny = partial(small_resnet, widen=0.25)
ways = {'float32':(None,False), 'float32, channels last':(None,True), 'bfloat16':(torch.bfloat16,False), 'bfloat16, channels last':(torch.bfloat16,True)}
cases = {'tiny 8 px':(tiny,1,8), 'tiny 16 px':(tiny,1,16), 'small_resnet 16 px':(small_resnet,1,16), 'small_resnet 32 px':(small_resnet,3,32), 'resnet18 32 px':(tv.resnet18,3,32),
         'resnet18 64 px':(tv.resnet18,3,64)}

def stepper(arch, n_in, size, dtype, channels_last, bs=64):
    "A function that makes one step"
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = ReSSLModel(create_encoder(arch, n_in, size=size), 128, projector_bn=True).train().to(memory_format=layout)
    model.half_dtype = dtype
    x,opt = torch.rand(bs, n_in, size, size).contiguous(memory_format=layout),torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    def step():
        z = model(x)
        with torch.no_grad(), model.autocast(x): target = model.teacher(x)
        (z*target).sum().backward()
        opt.step(); opt.zero_grad()
    return step

def speed(nm, rounds=5, bs=64):
    steps,times = {w:stepper(*cases[nm], *how) for w,how in ways.items()},{w:[] for w in ways}
    for i in range(rounds+1):
        for w,step in steps.items():
            start = time.process_time()
            step()
            if i: times[w].append(time.process_time()-start)
    receipt('precision', case=nm, images_per_cpu_second={w:round(bs/median(t), 1) for w,t in times.items()}, rounds=rounds, bs=bs)

def knn(seed):
    for precision in ('float32','auto'):
        set_seed(seed, reproducible=True)
        views = dict(scale=(0.7,1.), flip_p=0.)
        learn = ressl_learner(digits_dls(), tiny, weak_tfms=weak_tfms(16, **views), strong_tfms=strong_tfms(16, **views), teacher_momentum=0.97, metrics=[],
                              precision=precision, channels_last='auto' if precision=='auto' else False)
        start = time.process_time()
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(15, 2e-3)
        seconds,(tx,ty),(vx,vy) = time.process_time()-start,embed(learn, learn.dls.train),embed(learn)
        receipt('precision', seed, case='digits, 15 epochs', precision=precision, chosen=repr(learn.precision), knn=round(knn_accuracy(tx, ty, vx, vy), 4), cpu_seconds=round(seconds, 1))

if __name__=='__main__':
    what,*args = sys.argv[1:]
    if what=='speed':
        for nm in args or cases: speed(nm)
    else:
        for seed in map(int, args or ('42','1','2')): knn(seed)
