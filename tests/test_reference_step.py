"N training steps of `Learner` with `ReSSL` equal a plain-PyTorch loop, in weights, teacher, queue and losses."
from copy import deepcopy
from functools import partial

import pytest, torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException
from fastai.optimizer import SGD
from torch import nn

from ressl_fastai.callback import get_normalize
from ressl_fastai.data import digits_dls
from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import small_resnet

def weak(x): return x
def strong(x): return 1 - 0.8*x.roll(1, -1)

lr,m,size,n_steps = 0.05,0.9,100,8

def make_learner():
    torch.manual_seed(0)
    dls = digits_dls(8, bs=32, shuffle=False)
    return ressl_learner(dls, partial(small_resnet, widen=0.25), weak_tfms=weak, strong_tfms=strong, queue_size=size, n_hidden=32, dim=16, metrics=[],
                         teacher_momentum=m, opt_func=partial(SGD, mom=0.9), wd=0., moms=(0.9,0.9,0.9))

def plain_loop(learn, student_temp=0.1, teacher_temp=0.04, m=m, enqueue_first=False, teacher_in_eval=False, swap_views=False):
    "What the paper says, with nothing of this package but the initial networks"
    norm = get_normalize(learn.dls)
    batches = [(b[0].as_subclass(torch.Tensor)*norm.std+norm.mean).as_subclass(torch.Tensor) for b,_ in zip(learn.dls.train, range(n_steps))]
    def views(x): return tuple((v(x)-norm.mean)/norm.std for v in ((weak, strong) if swap_views else (strong, weak)))
    student = nn.Sequential(deepcopy(learn.model.encoder), deepcopy(learn.model.projector)).train()
    teacher = deepcopy(student)
    if teacher_in_eval: teacher.eval()
    opt,queue,losses = torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9),[],[]
    def embed_teacher(x):
        with torch.no_grad(): return F.normalize(teacher(x), dim=1)
    for b,_ in zip(learn.dls.train, range(-(-size//32))):  # the queue starts with embeddings of real images
        queue = [*queue, *embed_teacher(views((b[0]*norm.std+norm.mean).as_subclass(torch.Tensor))[1])][-size:]
    for x in batches:
        xs,xt = views(x)
        zs,zt = F.normalize(student(xs), dim=1),embed_teacher(xt)
        if enqueue_first: queue = [*queue, *zt][-size:]
        q = torch.stack(queue)
        loss = -((zt@q.T/teacher_temp).softmax(1) * (zs@q.T/student_temp).log_softmax(1)).sum(1).mean()
        opt.zero_grad(); loss.backward(); opt.step()
        for pt,ps in zip(teacher.parameters(), student.parameters()): pt.data = m*pt.data + (1-m)*ps.data
        if not enqueue_first: queue = [*queue, *zt][-size:]
        losses.append(loss.item())
    return student.state_dict(),teacher.state_dict(),torch.stack(queue),torch.tensor(losses)

class Steps(Callback):
    "Notes losses, stops after `n_steps`"
    def before_fit(self): self.losses = []
    def after_loss(self): self.losses.append(self.loss.item())
    def after_batch(self):
        if self.train_iter==n_steps: raise CancelFitException

@pytest.fixture(scope='module')
def trained():
    torch.set_num_threads(1)
    learn = make_learner()
    fresh = deepcopy(learn.model)
    steps = Steps()
    with learn.no_bar(): learn.fit(1, lr, cbs=steps)
    net = learn.model
    got = ({**{f'0.{k}':v for k,v in net.encoder.state_dict().items()}, **{f'1.{k}':v for k,v in net.projector.state_dict().items()}},
           net.teacher.state_dict(), net.queue.in_order, torch.tensor(steps.losses))
    learn.model = fresh
    return learn,{k.removeprefix('2.'):v for k,v in got[0].items()},*got[1:]

def distance(trained, reference):
    "Largest difference in student, teacher, queue and losses"
    _,*got = trained
    diffs = []
    for a,b in zip(got, reference):
        if isinstance(a, dict):
            assert a.keys()==b.keys()
            diffs.append(max((a[k].double()-b[k].double()).abs().max().item() for k in a))
        else: diffs.append((a-b).abs().max().item())
    return diffs

# 8 steps, each of which rounds to 2**-24 and passes earlier differences on through batch norm: 2**-24 * 8 * about 100
tol = 5e-5

def test_equals_the_plain_loop(trained):
    assert max(distance(trained, plain_loop(trained[0])))<tol

@pytest.mark.parametrize('wrong', [dict(student_temp=0.04, teacher_temp=0.1), dict(m=1-m), dict(enqueue_first=True), dict(teacher_in_eval=True),
                                   dict(swap_views=True)], ids=lambda d: next(iter(d)))
def test_wrong_loops_are_caught(trained, wrong):
    assert max(distance(trained, plain_loop(trained[0], **wrong)))>100*tol
