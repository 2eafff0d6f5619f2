"`FusedAdam` is fastai's `Adam`: the same weights, the same state, in few launches."
from functools import partial

import pytest, torch
from fastai.callback.core import Callback
from fastai.optimizer import Adam, OptimWrapper, SGD
from torch.profiler import profile

from ressl_fastai.callback import ReSSL
from ressl_fastai.optimizer import FusedAdam
from crashes import check
from crashes import make as small
from helpers import quiet

def same(x): return x
def darker(x): return x*0.5

class Everywhere(FusedAdam):
    "Fused on a CPU, too"
    fused_on = 'cuda','cpu'

class Double(Callback):
    "Images in float64, so that 20 steps do not blow up a difference of rounding"
    order = ReSSL.order+0.5
    def before_batch(self):
        self.learn.xb = tuple(o.double() for o in self.xb)
        self.ressl.x_teacher = self.ressl.x_teacher.double()
    def after_loss(self): self.learn.loss = self.loss.float()

def learner(opt_func, **kwargs):
    learn = small(opt_func=opt_func, weak_tfms=same, strong_tfms=darker, cbs=Double(), **kwargs)
    with torch.no_grad():
        learn.model.queue.enqueue(torch.nn.functional.normalize(torch.randn(learn.model.queue.size, 8), dim=1))
    learn.model.double()
    return learn

def schedules(learn): quiet(learn, learn.fit_one_cycle, 5, 1e-2, wd=0.1)
def groups(learn): quiet(learn, learn.fit_one_cycle, 5, slice(1e-4, 1e-2))
def frozen(learn):
    learn.freeze()
    quiet(learn, learn.fit_one_cycle, 2, 1e-2)
    for p in learn.model.parameters():
        p.grad = None  # fastai's zeros would let weight decay act on what is frozen later
    learn.unfreeze()
    quiet(learn, learn.fit_flat_cos, 3, slice(1e-3, 1e-2))

def weights(opt_func, run, **kwargs):
    learn = learner(opt_func, **kwargs)
    run(learn)
    assert len(learn.recorder.lrs) in (12, 20)
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

@pytest.mark.parametrize('run', [schedules, groups, frozen])
def test_twenty_steps_are_fastais(run):
    adam = weights(Adam, run)
    assert (weights(Everywhere, run)-adam).abs().max()<1e-6
    assert torch.equal(weights(FusedAdam, run), adam)  # on a CPU it is `Adam`
    for wrong in (partial(Everywhere, eps=1e-3), partial(Everywhere, sqr_mom=0.9)):
        assert (weights(wrong, run) - adam).abs().max() > 1e-6  # control


def test_no_weight_decay_on_batch_norms_and_biases():
    run = schedules
    adam = weights(Adam, run)
    assert (weights(Everywhere, run, wd_bn_bias=True)-weights(Adam, run, wd_bn_bias=True)).abs().max()<1e-6
    assert (weights(Everywhere, run, wd_bn_bias=True)-adam).abs().max()>1e-6  # control: it does matter

def test_a_step_is_a_few_operations_however_many_parameters():
    def calls(opt_func):
        learn = learner(opt_func)
        quiet(learn, lambda: learn.fit(1, 1e-3))
        for p in learn.model.student.parameters(): p.grad = torch.ones_like(p)
        with profile() as prof:
            learn.opt.step()
            learn.opt.zero_grad()
        assert all(p.grad is None for p in learn.model.parameters()) or opt_func is Adam
        n = sum(len(ps) for ps in learn.opt.param_lists)
        ours = [e for e in prof.key_averages() if e.key.startswith('aten::')]
        return sum(e.count for e in ours if 'fused' in e.key),sum(e.count for e in ours),n
    fused,every,n = calls(Everywhere)
    assert fused==2, (fused, every, n)                            # with weight decay and without
    fused,every,n = calls(Adam)
    assert not fused and every>7*n, (fused, every, n)             # control

def test_what_the_user_gives_is_left_alone():
    assert small().opt_func is FusedAdam
    for opt_func, cls in (
        (Adam, type(Adam([torch.zeros(1)], 1e-3))),
        (partial(OptimWrapper, opt=torch.optim.AdamW), OptimWrapper),
        (SGD, type(SGD([torch.zeros(1)], 1e-3))),
    ):
        learn = small(opt_func=opt_func)
        learn.create_opt()
        assert type(learn.opt) is cls

def test_a_crash_and_a_new_start_give_the_same_bits(tmp_path):
    check(tmp_path, 24, make=partial(small, opt_func=Everywhere), every=3)


@pytest.mark.parametrize('first,then', [(Adam, Everywhere), (Everywhere, Adam), (Everywhere, FusedAdam)])
def test_state_goes_from_one_to_the_other(tmp_path, first, then):
    "As from a GPU to a CPU and back; also when weights have got another layout"
    def two(a, b):
        learn = learner(a)
        learn.path = tmp_path
        quiet(learn, lambda: learn.fit(1, 1e-3))
        learn.save('m', with_opt=True)
        other = learner(b)
        other.path = tmp_path
        other.load('m', with_opt=True)
        other.model.to(memory_format=torch.channels_last)
        quiet(other, lambda: other.fit(1, 1e-3))
        return torch.cat([p.detach().flatten() for p in other.model.parameters()])
    assert (two(first, then)-two(Adam, Adam)).abs().max()<1e-6
