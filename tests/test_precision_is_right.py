"""bfloat16 is chosen by what it computes on this machine for these shapes.

Some processors give gradients of convolutions that are memory nobody wrote to, where maps are smaller than their
kernels. Here such a processor is put in the place of
the real one: the weight gradient of such a convolution under autocast is NaN."""

from functools import partial

import pytest, torch, torchvision.models as tv
from torch import nn
from helpers import fit, same, state

from ressl_fastai import precision
from ressl_fastai.data import digits_dls
from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import create_encoder, small_resnet
from ressl_fastai.precision import half_fault
from ressl_fastai.views import multi_crop_tfms


class Unwritten(torch.autograd.Function):
    "Weights as they are, and a gradient that nobody wrote"
    @staticmethod
    def forward(ctx, w): return w.clone()
    @staticmethod
    def backward(ctx, grad): return grad*torch.nan

@pytest.fixture
def faulty(monkeypatch):
    "A processor that is made for bfloat16 and wrong on maps of one pixel"
    forward = nn.Conv2d._conv_forward
    def wrong(self, x, weight, bias):
        if torch.is_autocast_enabled('cpu') and max(x.shape[2:]) == 1 and self.kernel_size[0] > 1:
            weight = Unwritten.apply(weight)
        return forward(self, x, weight, bias)
    monkeypatch.setattr(nn.Conv2d, '_conv_forward', wrong)
    monkeypatch.setattr(precision, 'has_bfloat16', lambda device: True)

resnet = partial(small_resnet, widen=0.125)  # a small stem and two strides: an image of 4 pixels has maps of 1
def learner(size, **kwargs):
    return ressl_learner(
        digits_dls(size, bs=64),
        resnet,
        **{**dict(queue_size=32, n_hidden=16, dim=8, metrics=[], stem='small'), **kwargs},
    )


def sides(size):
    """Sides of the maps that convolutions with a kernel above 1 see, by hooks: independent of the function that is
    tested"""
    enc,seen = create_encoder(resnet, 1, stem='small', size=size),set()
    for m in enc.modules():
        if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1:
            m.register_forward_hook(lambda m, x, out: seen.add(x[0].shape[-1]))
    enc.eval()(torch.zeros(2, 1, size, size))
    return seen

small = next(o for o in (2,3,4,6,8) if 1 in sides(o))
large = next(o for o in (8,12,16,24) if 1 not in sides(o))

def test_auto_takes_what_is_right_and_says_why(faulty):
    right,wrong = learner(large),learner(small)
    assert right.precision.dtype==torch.bfloat16 and 'bfloat16' in repr(right) and 'made for it' in repr(right)
    assert wrong.precision.dtype is None and 'float32' in repr(wrong)
    assert 'on maps of 1 x 1 has wrong gradients in bfloat16 on this machine' in repr(wrong)
    fit(wrong, 1)
    assert wrong.guard.alarms==[] and all(v.isfinite().all() for v in state(wrong).values())

def test_control_without_the_trial_the_weights_are_ruined(faulty, monkeypatch):
    "The same fault reaches the training, where nobody looks: what the test before relies on"
    monkeypatch.setattr(precision, 'half_fault', lambda *args: '')
    learn = learner(small, guard=False)
    fit(learn, 1)
    assert not all(v.isfinite().all() for v in state(learn).values())

def test_asked_for_by_name_it_is_refused_before_training(faulty):
    with pytest.raises(
        ValueError, match=r"1 x 1 has wrong gradients in bfloat16 on this machine: use precision='float32'"
    ):
        learner(small, precision='bfloat16')
    assert learner(large, precision='bfloat16').precision.dtype==torch.bfloat16
    learn = learner(small).to_bf16()
    with pytest.raises(ValueError, match='has wrong gradients in bfloat16'): fit(learn, 1)
    assert fit(learner(small).to_bf16().to_fp32(), 1).recorder.values

def test_every_size_of_views_is_tried(faulty):
    crops = multi_crop_tfms(large, sides=(1,*[small/large]*4))
    assert learner(large, strong_tfms=crops).precision.dtype is None

def test_views_of_an_unknown_size_are_tried_when_they_come(faulty, capsys):
    "A view of one's own has no `size` to ask for"
    def shrink(x): return nn.functional.interpolate(x.float()/(255 if x.dtype==torch.uint8 else 1), size=small)
    learn = learner(large, weak_tfms=shrink, strong_tfms=shrink)
    assert learn.precision.dtype==torch.bfloat16
    fit(learn, 1)
    assert 'Training goes on in float32' in capsys.readouterr().out and learn.precision.dtype is None
    assert all(v.isfinite().all() for v in state(learn).values())

def test_a_trial_leaves_no_trace(faulty):
    enc = create_encoder(resnet, 1, stem='small', size=small).train()
    before, modes, rng = (
        {k: v.clone() for k, v in enc.state_dict().items()},
        [m.training for m in enc.modules()],
        torch.get_rng_state(),
    )
    assert half_fault(enc, [(1,small,small)], torch.bfloat16) and not half_fault(enc, [(1,large,large)], torch.bfloat16)
    assert (
        same(before, enc.state_dict())
        and modes == [m.training for m in enc.modules()]
        and torch.equal(rng, torch.get_rng_state())
    )
    assert all(p.grad is None for p in enc.parameters()) and not any(m._forward_pre_hooks for m in enc.modules())

@pytest.mark.parametrize('size,stem', [(32,'small'), (64,'standard')])
def test_this_machine_computes_ordinary_sizes_rightly(size, stem):
    """No false alarm: rounding to 8 bits is an error of 2^-9 for each number, of some thousandths for a sum, far
    from 2 %"""
    assert half_fault(create_encoder(tv.resnet18, 3, stem=stem, size=size), [(3,size,size)], torch.bfloat16, True)==''
