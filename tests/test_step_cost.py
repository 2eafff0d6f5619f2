"What a step must not do: wait for the device, copy the queue, or work through images one by one. Counted with torch's profiler, not timed."
import numpy as np, pytest, torch
import torch.nn.functional as F
from fastai.learner import Learner
from torch import nn
from torch.profiler import profile

from ressl_fastai.callback import ReSSL
from ressl_fastai.data import tensor_dls
from ressl_fastai.learner import ressl_learner
from ressl_fastai.views import strong_tfms, weak_tfms

x = np.random.default_rng(0).integers(0, 256, (256,12,12,3), dtype=np.uint8)

def net(): return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3))
def same(x): return x

def learner(n=256, views=(same, same), bs=32, queue_size=64):
    kw = dict(n_hidden=16, dim=8, queue_size=queue_size, metrics=[], guard=False)  # the guard reads a copy that was made without waiting
    return ressl_learner(tensor_dls(x[:n], valid_pct=0, bs=bs), net(), weak_tfms=views[0], strong_tfms=views[1], **kw)

def fit(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(1)

def counts(make, *ops):
    "How often `ops` run in a step: an epoch of 8 steps less one of 4"
    res = []
    for n in (128,256):
        learn = make(n)
        fit(learn)
        with profile() as prof: fit(learn)
        res.append(sum(e.count for e in prof.key_averages() if e.key in ops))
    return (res[1]-res[0])/4

read_back = 'aten::_local_scalar_dense','aten::nonzero'

class Plain(Learner):
    "A learner that finds targets where there are none"
    def _split(self, b):
        super()._split(b)
        self.yb = (torch.zeros(len(self.xb[0])),)

def plain(n):
    "fastai alone, on the same data"
    return Plain(tensor_dls(x[:n], valid_pct=0, bs=32), net(), loss_func=lambda pred, y: pred.square().mean()+0*y.sum())

def test_a_step_waits_for_the_device_no_more_often_than_fastais_own(monkeypatch):
    monkeypatch.setattr('ressl_fastai.callback.check_images', same)  # on a CPU, where nothing waits, it looks at every batch
    ours,fastais = counts(learner, *read_back),counts(plain, *read_back)
    assert ours<=fastais
    asked = ReSSL._loss
    def asking(self, *args): self.full = False; return asked(self, *args)
    monkeypatch.setattr(ReSSL, '_loss', asking)
    assert counts(learner, *read_back)>=ours+1                # control: the fill of the queue, read at each step

@pytest.mark.parametrize('views', [(same, same), (weak_tfms(12), strong_tfms(12))], ids=['nothing','ours'])
def test_no_work_is_done_image_by_image(views):
    "A batch twice as large runs about as many operations"
    def ops(bs):
        learn = learner(256, views, bs)
        fit(learn)
        with profile() as prof: fit(learn)
        return sum(e.count for e in prof.key_averages())/len(learn.dls.train)
    small,large = ops(32),ops(64)
    assert large<1.1*small
    if views[0] is not same: return
    def one_by_one(x): return torch.cat([views[0](o[None]) for o in x])
    learn = learner(256, (one_by_one, views[1]), 64)
    fit(learn)
    with profile() as prof: fit(learn)
    assert sum(e.count for e in prof.key_averages())/4>large+64  # control

def test_nothing_of_the_queues_size_is_copied():
    queue = learner().model.queue
    before = queue.feats.data_ptr()
    queue.enqueue(F.normalize(torch.randn(64, 8), dim=1))
    with profile(profile_memory=True) as prof:
        queue.enqueue(F.normalize(torch.randn(8, 8), dim=1))
        filled = queue.filled
    assert filled.data_ptr()==queue.feats.data_ptr()==before
    assert not any(e.key in ('aten::clone','aten::cat') and e.count for e in prof.key_averages())
