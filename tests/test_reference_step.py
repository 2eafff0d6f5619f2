"""Fifty training steps of `Learner` with `ReSSL` equal a plain-PyTorch loop, in weights, teacher, queue and losses:
one crop, several, the extension."""

from copy import deepcopy
from functools import partial
from math import cos, pi

import pytest, torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import SchedCos, SchedLin
from fastai.optimizer import SGD
from torch import nn

from ressl_fastai.callback import InfoNCEWarmup
from ressl_fastai.loaders import get_normalize
from ressl_fastai.data import digits_dls
from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import small_resnet

# float64 throughout: what differs is the method, not the rounding, which batch norm would multiply from step to step
def weak(x): return x.double()
def strong(x): return 1 - 0.8*x.double().roll(1, -1)
def small(x): return x.double()[...,1:7,2:8].flip(-1)

lr,size,n_steps,bs = 0.05,100,50,16
cases = dict(
    single=dict(),
    default=dict(warmup='auto'),
    crops=dict(strong_tfms=[strong, small, small]),
    extension=dict(
        strong_tfms=[strong, small],
        predictor_layers=2,
        teacher_momentum=SchedCos(0.9, 1.0),
        teacher_temp=SchedLin(0.04, 0.08),
        warmup=InfoNCEWarmup(0.2, ramp=0.2, end=0.1, temp=0.2, fraction=True),
    ),
)

def make_learner(**kwargs):
    torch.manual_seed(0)
    dls = digits_dls(8, bs=bs, shuffle=False)
    kw = dict(
        weak_tfms=weak,
        strong_tfms=strong,
        queue_size=size,
        n_hidden=32,
        dim=16,
        metrics=[],
        teacher_momentum=0.9,
        warmup=None,
        precision='float32',
        opt_func=partial(SGD, mom=0.9),
        wd=0.0,
        moms=(0.9, 0.9, 0.9),
    )
    learn = ressl_learner(dls, partial(small_resnet, widen=0.25), **{**kw, **kwargs})
    learn.model.double()
    return learn

def extension(t):
    "Momentum, teacher temperature and weight of InfoNCE at progress t"
    w = 1. if t<0.2 else 1-0.9*(t-0.2)/0.2 if t<0.4 else 0.1
    return 1.-(1-0.9)*(1+cos(pi*t))/2,0.04+0.04*t,w

def ramp(t): return 0.9,0.04,1-t

def plain_loop(
    learn,
    crops=(strong,),
    weak=weak,
    student_temp=0.1,
    teacher_temp=0.04,
    m=0.9,
    schedule=None,
    nce_temp=0.2,
    enqueue_first=False,
    teacher_in_eval=False,
    shift=0,
    image_major=False,
):
    "What the papers say, with nothing of this package but the initial networks"
    norm = get_normalize(learn.dls)
    images = [b[0].as_subclass(torch.Tensor) for b in digits_dls(8, bs=bs, shuffle=False).train]

    def normal(x):
        return (x - norm.mean) / norm.std

    student = nn.Sequential(deepcopy(learn.model.encoder), deepcopy(learn.model.projector)).train()
    predictor, teacher = deepcopy(learn.model.predictor).train(), deepcopy(student)
    if teacher_in_eval:
        teacher.eval()
    opt = torch.optim.SGD([*student.parameters(), *predictor.parameters()], lr=lr, momentum=0.9)
    queue, losses = [], []

    def embed_teacher(x):
        with torch.no_grad():
            return F.normalize(teacher(normal(weak(x))), dim=1)

    for x in images[: -(-size // bs)]:
        queue = [*queue, *embed_teacher(x)][-size:]  # the queue starts with embeddings of real images
    for i, x in enumerate(images[:n_steps]):
        w = 0.0
        if schedule:
            m, teacher_temp, w = schedule((i + shift) / len(images))
        zs, zt = [F.normalize(predictor(student(normal(v(x)))), dim=1) for v in crops], embed_teacher(x)
        if image_major:
            zs = [torch.stack(zs, 1).flatten(0, 1)[j * bs : (j + 1) * bs] for j in range(len(zs))]
        if enqueue_first:
            queue = [*queue, *zt][-size:]
        q, loss = torch.stack(queue), 0.0
        for z in zs:
            rel = -((zt @ q.T / teacher_temp).softmax(1) * (z @ q.T / student_temp).log_softmax(1)).sum(1).mean()
            nce = F.cross_entropy(
                torch.cat([(z * zt).sum(1, keepdim=True), z @ q.T], 1) / nce_temp, torch.zeros(bs, dtype=torch.long)
            )
            loss = loss + (w * nce + (1 - w) * rel) / len(zs)
        opt.zero_grad()
        loss.backward()
        opt.step()
        for pt, ps in zip(teacher.parameters(), student.parameters()):
            pt.data = m * pt.data + (1 - m) * ps.data
        if not enqueue_first:
            queue = [*queue, *zt][-size:]
        losses.append(loss.item())
    return (
        {**student.state_dict(), **{f'predictor.{k}': v for k, v in predictor.state_dict().items()}},
        teacher.state_dict(),
        torch.stack(queue),
        torch.tensor(losses, dtype=torch.float64),
    )


loops = dict(
    single={},
    default=dict(schedule=ramp, nce_temp=0.1),
    crops=dict(crops=(strong, small, small)),
    extension=dict(crops=(strong, small), schedule=extension),
)


class Steps(Callback):
    "Notes losses, stops after `n_steps`"
    def before_fit(self): self.losses = []
    def after_loss(self):
        self.losses.append(self.loss.item())
        self.learn.loss = self.loss.float()  # fastai's Recorder takes no float64; the gradient comes from loss_grad
    def after_batch(self):
        if self.train_iter==n_steps: raise CancelFitException

@pytest.fixture(scope='module')
def trained():
    "Name of the case to the learner as it was before training, and what 50 steps made of it; made when asked for"
    torch.set_num_threads(1)
    done = {}
    def get(nm):
        if nm not in done:
            learn,steps = make_learner(**cases[nm]),Steps()
            fresh = deepcopy(learn.model)
            with learn.no_bar(): learn.fit(1, lr, cbs=steps)
            net,parts = learn.model,('encoder','projector','predictor')
            weights = {f'{p}.{k}':v for p in parts for k,v in getattr(net, p).state_dict().items()}
            weights = {k.replace('encoder', '0').replace('projector', '1'):v for k,v in weights.items()}
            done[nm] = (
                learn,
                weights,
                {k.removeprefix('2.'): v for k, v in net.teacher.state_dict().items()},
                net.queue.in_order,
                torch.tensor(steps.losses, dtype=torch.float64),
            )
            learn.model = fresh
        return done[nm]
    return get

def distance(got, reference):
    "Largest difference in student, teacher, queue and losses"
    diffs = []
    for a,b in zip(got, reference):
        if isinstance(a, dict):
            assert a.keys()==b.keys()
            diffs.append(max((a[k].double()-b[k].double()).abs().max().item() for k in a))
        else: diffs.append((a.double()-b.double()).abs().max().item())
    return max(diffs)

tol = 1e-7  # float64 rounding, 1e-16, and room for growing by a factor of 10**9 in 50 steps

@pytest.mark.parametrize('nm', cases)
def test_fifty_steps_equal_the_plain_loop(trained, nm):
    learn,*got = trained(nm)
    assert len(got[-1])==n_steps
    losses = got.pop()
    *reference,want = plain_loop(learn, **loops[nm])
    assert distance(got, reference)<tol
    torch.testing.assert_close(losses, want, rtol=1e-6, atol=1e-6)

@pytest.mark.parametrize(
    'nm,wrong',
    [
        ('single', dict(student_temp=0.04, teacher_temp=0.1)),
        ('single', dict(m=0.1)),
        ('single', dict(enqueue_first=True)),
        ('single', dict(teacher_in_eval=True)),
        ('single', dict(weak=strong, crops=(weak,))),
        ('default', dict(schedule=None)),
        ('default', dict(shift=1)),
        ('crops', dict(crops=(strong, small))),
        ('crops', dict(image_major=True)),
        ('crops', dict(weak=strong)),
        ('extension', dict(shift=1)),
        ('extension', dict(nce_temp=0.1)),
        ('extension', dict(schedule=lambda t: (*extension(t)[:2], 0.0))),
        ('extension', dict(schedule=lambda t: (0.9, *extension(t)[1:]))),
    ],
    ids=lambda o: o if isinstance(o, str) else next(iter(o)),
)
def test_wrong_loops_are_caught(trained, nm, wrong):
    learn,*got = trained(nm)
    assert distance(got, plain_loop(learn, **{**loops[nm], **wrong}))>1e4*tol
