"""What a step must not do: wait for the device, copy the queue, or work through images one by one. Counted with
torch's profiler, not timed."""

import math
from contextlib import nullcontext

import numpy as np, pytest, torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from torch import nn
from torch.profiler import profile

from ressl_fastai import data, views
from ressl_fastai.callback import ReSSL
from ressl_fastai.data import tensor_dls
from ressl_fastai.learner import ressl_learner
from ressl_fastai.views import multi_crop_tfms, resize_taps, strong_tfms, weak_tfms
from replaced import replaced

x = np.random.default_rng(0).integers(0, 256, (256,12,12,3), dtype=np.uint8)

def net(): return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3))
def same(x): return x

def learner(n=256, views=(same, same), bs=32, queue_size=64):
    kw = dict(
        n_hidden=16, dim=8, queue_size=queue_size, metrics=[], guard=False,
        precision='float32', channels_last=False
    )  # the guard reads a copy that was made without waiting; another layout or type is a copy of the network's
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
    monkeypatch.setattr(
        'ressl_fastai.callback.check_images', same
    )  # on a CPU, where nothing waits, it looks at every batch
    ours,fastais = counts(learner, *read_back),counts(plain, *read_back)
    assert ours<=fastais
    asked = ReSSL._loss

    def asking(self, *args):
        self.full = False
        return asked(self, *args)

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

# with another device in the place of a GPU

class Steps(Callback):
    "What happened on the device in each step but the first two"
    order = 1000
    def __init__(self, device): self.device,self.seen = device,[]
    def after_batch(self):
        if not self.training: return
        d = self.device
        if self.train_iter>2: self.seen.append((list(d.to), list(d.waits), list(d.mixed), d.launches))
        d.clear()

def on_device(kept=True, bar=False, labels=False, views=None, **kwargs):
    "Steps of a training on the device"
    with replaced() as device, pytest.MonkeyPatch.context() as m:
        m.setattr(data, 'free_memory', lambda device: 10**9*kept)
        dls = tensor_dls(x, np.arange(256)%4 if labels else None, valid_pct=0, bs=32, device=torch.device('meta'))
        assert f"kept on {'meta' if kept else 'cpu'}; bs=32" in repr(dls.train)
        weak,strong = views or (weak_tfms(12), strong_tfms(12))
        kw = dict(n_hidden=16, dim=8, queue_size=64, metrics=[], guard=False)
        learn,steps = ressl_learner(dls, net(), weak_tfms=weak, strong_tfms=strong, **{**kw, **kwargs}),Steps(device)
        with nullcontext() if bar else learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=steps)
    assert len(steps.seen)>=5
    return steps.seen

@pytest.mark.parametrize('labels', [False, True])
@pytest.mark.parametrize('bar', [False, True])
def test_on_a_device_a_step_waits_for_nothing_and_three_small_copies_go_there(bar, labels, capsys):
    "Numbers of the images, and of the weak and of the strong views; none of them pixels"
    for to,waits,mixed,launches in on_device(bar=bar, labels=labels):
        assert waits==mixed==[] and len(to)==3 and all(later for *_,later in to)
        assert sum(math.prod(shape)*dtype.itemsize for shape,dtype,_ in to)<32*100
        assert launches<340  # 304 of a plain step, 15 of InfoNCE, 3 of labels

def test_on_a_device_larger_images_are_sent_with_each_batch():
    for to,waits,mixed,_ in on_device(kept=False):
        assert (
            waits == mixed == []
            and len(to) == 4
            and all(later for *_, later in to)
            and ((32, 3, 12, 12), torch.uint8, True) in to
        )


def test_on_a_device_batches_of_files_are_sent_without_waiting(tmp_path, monkeypatch):
    for i in range(128): Image.fromarray(x[i]).save(tmp_path/f'{i}.png')
    def steps():
        with replaced() as device:
            dls = ImageDataLoaders.from_path_func(
                tmp_path,
                sorted(tmp_path.glob('*.png')),
                lambda f: int(f.stem) % 2,
                valid_pct=0,
                bs=16,
                num_workers=0,
                device=torch.device('meta'),
            )
            learn, steps = (
                ressl_learner(dls, net(), n_hidden=16, dim=8, queue_size=64, metrics=[], guard=False),
                Steps(device),
            )
            with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=steps)
            assert len(steps.seen)==6 and dls.train.device.type=='meta'
        return steps.seen

    for to, waits, mixed, _ in steps():
        assert waits == mixed == [] and len(to) == 4 and all(later for *_, later in to)  # images, targets, two views
    monkeypatch.setattr('ressl_fastai.callback._send_without_waiting', lambda dl: None)
    assert all(sum(not later for *_,later in to)==2 for to,*_ in steps())  # control

@pytest.mark.parametrize('src,size', [(12,12), (12,8), (12,(8,10))])
def test_on_a_device_views_of_any_size_wait_for_nothing(src, size, monkeypatch):
    for most in (512, 8):  # weights that are looked up, and such that are made there
        if most == 8:
            monkeypatch.setattr(
                'ressl_fastai.views._look_up',
                lambda start, length, flipped, n, size, k=None: resize_taps(start, length, size, flipped, k),
            )
        for to, waits, mixed, _ in on_device(
            views=(weak_tfms(size), multi_crop_tfms(12)[:2] if size == 12 else strong_tfms(size))
        ):
            assert waits==mixed==[] and len(to)==3+(size==12)

def test_what_waits_or_copies_is_found(monkeypatch):
    """Controls: the loss read by the recorder, constants that are sent each time, numbers that are read where they
    were sent"""
    monkeypatch.setattr(ReSSL, 'after_batch', lambda self: None)
    assert all(len(waits)==1 for _,waits,_,_ in on_device())
    monkeypatch.undo()
    monkeypatch.setattr(
        'ressl_fastai.views._constants',
        lambda device: [o.to(device) for o in (views._luma, views._gray, views._chroma)],
    )
    assert all(len(to)==6 and sum(not later for *_,later in to)==3 for to,*_ in on_device())
    monkeypatch.undo()
    taps = views.blur_taps
    monkeypatch.setattr('ressl_fastai.views.blur_taps', lambda sigma, n, reach: taps(sigma, n))
    assert all('item' in waits[0] or 'local_scalar' in waits[0] for _,waits,*_ in on_device())

def test_on_a_cpu_views_copy_no_more_than_before_there_were_devices():
    "Calls of a step beyond those of a step without views; what they were before numbers were sent in one"
    def beyond(op): return counts(lambda n: learner(n, (weak_tfms(12), strong_tfms(12))), op)-counts(learner, op)
    assert beyond('aten::_to_copy')<=20 and beyond('aten::copy_')<=33
