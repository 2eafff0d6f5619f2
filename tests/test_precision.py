"Half precision and channels last: in training alone, on the device of the data, with the loss in float32."
import json
from collections import defaultdict
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch, torchvision.models as tv
from fastai.callback.fp16 import AMPMode
from fastai.vision.all import Callback, MixedPrecision, SGD
from helpers import fit, make, same, state

from ressl_fastai import precision as P
from ressl_fastai.callback import ReSSL
from ressl_fastai.data import digits_dls
from ressl_fastai.evaluate import embed
from ressl_fastai.learner import _precision
from ressl_fastai.models import create_encoder, small_resnet
from ressl_fastai.precision import choose_precision, forward_flops

resnet = partial(small_resnet, widen=0.125)
def few(**kwargs): return make(digits_dls(8, bs=256), resnet, **kwargs)

class Watch(Callback):
    "What a step of training and a step of validation compute in"
    order = ReSSL.order+3
    def before_fit(self):
        self.seen,self.losses = {},set()
        net = self.model
        self.hooks = [
            m.register_forward_hook(partial(self.note, nm))
            for nm, m in (('student', net.projector), ('teacher', net.teacher[1]))
        ]

    def note(self, nm, m, x, out):
        self.seen.setdefault((nm, self.training), set()).add(out.dtype)
        self.last = x[0]

    def after_loss(self):
        self.losses.add(
            (self.loss.dtype, self.ressl.z_teacher.dtype, self.pred.dtype, torch.is_autocast_enabled('cpu'))
        )

    def after_fit(self): [h.remove() for h in self.hooks]

def watched(learn, **kwargs):
    watch = Watch()
    fit(learn, cbs=watch, **kwargs)
    assert watch.losses=={(torch.float32,torch.float32,torch.float32,False)}
    assert all(watch.seen[nm,False]=={torch.float32} for nm in ('student','teacher'))  # validation is exact
    assert watch.seen['student',True]==watch.seen['teacher',True]
    return watch.seen['student',True].pop()

half = dict(
    asked=lambda: few(precision='bfloat16'),
    to_bf16=lambda: few().to_bf16(),
    callback=lambda: few(cbs=MixedPrecision('bf16')),
    channelslast=lambda: few().to_channelslast(amp_mode=AMPMode.BF16),
)
full = dict(
    asked=lambda: few(precision='float32'),
    to_fp32=lambda: few(precision='bfloat16').to_fp32(),
    back=lambda: few(precision='bfloat16').to_bf16().to_fp32(),
    contiguous=lambda: few(precision='bfloat16').to_bf16().to_contiguous(to_fp32=True),
)

@pytest.mark.parametrize('nm', half)
def test_d12_bfloat16_on_the_cpu(nm): assert watched(half[nm]())==torch.bfloat16

@pytest.mark.parametrize('nm', full)
def test_float32_on_request(nm): assert watched(full[nm]())==torch.float32

@pytest.mark.filterwarnings('ignore:float16 is slow')
def test_d19_fp16_overflow_on_the_cpu_changes_neither_teacher_nor_queue():
    """A real overflow, with the gradient scaler of the device: the first steps overflow at a scale of 2**30, later
    ones do not"""
    learn = make(
        digits_dls(8, bs=256),
        cbs=MixedPrecision('fp16', init_scale=2.0**30, backoff_factor=2.0**-6),
        opt_func=partial(SGD, mom=0.0),
    )

    class Steps(Callback):
        order = MixedPrecision.order+20
        def before_fit(self): self.done,self.skipped = 0,0
        def before_batch(self): self.before = state(self.learn)

        def moved(self):
            return {
                k
                for k, v in state(self.learn).items()
                if not torch.equal(v, self.before[k]) and not ('running' in k or 'batches' in k)
            }

        def after_cancel_step(self):
            self.skipped += 1
            self.skip = True

        def after_batch(self):
            if not self.training: return
            moved = self.moved()
            if self.mixed_precision.skipped: assert not moved
            else:
                self.done += 1
                assert {'queue.feats','queue.ptr'}<=moved and any('teacher' in k for k in moved)
    steps = Steps()
    fit(learn, 5, cbs=steps)
    assert steps.skipped>1 and steps.done>3 and np.isfinite(learn.recorder.values[-1]).all()
    assert all(v.isfinite().all() for v in state(learn).values())
    assert watched(make(digits_dls(8, bs=512)).to_fp16())==torch.float16

def test_autocast_follows_the_device_of_the_images():
    net = few().model.train()
    net.half_dtype = torch.bfloat16
    with net.autocast(torch.rand(1)) as a: assert a.device=='cpu' and torch.is_autocast_enabled('cpu')
    assert net.autocast(type('Image', (), {'device':torch.device('cuda')})()).device=='cuda'
    with net.eval().autocast(torch.rand(1)): assert not torch.is_autocast_enabled('cpu')

def test_other_learners_keep_fastais_mixed_precision():
    from fastai.test_utils import synth_learner
    learn = synth_learner(cbs=MixedPrecision('bf16'))
    class Look(Callback):
        order = 60
        def after_batch(self): self.device = self.mixed_precision.autocast.device
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=(look := Look()))
    assert look.device=='cuda'

@pytest.mark.parametrize('channels_last', [False, True])
def test_channels_last_in_student_and_teacher(channels_last):
    "And the same gradients, in float64, where rounding is no excuse"
    learn = fit(few(channels_last=channels_last, precision='float32'))
    net = learn.model

    def layout(net):
        return {
            m.weight.is_contiguous(memory_format=torch.channels_last)
            for m in net.modules()
            if isinstance(m, torch.nn.Conv2d) and min(m.weight.shape[1:]) > 1
        }

    assert layout(net.encoder)==layout(net.teacher)=={channels_last}
    a,x = net.double().train(),torch.rand(16, 1, 8, 8, dtype=torch.float64)
    b = deepcopy(a).to(memory_format=torch.contiguous_format)
    for m in (a, b):
        m.zero_grad()
        (m(x) * torch.arange(8)).sum().backward()
    for p, q in zip(a.student.parameters(), b.student.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-10)


def test_what_is_measured_is_measured_in_float32():
    "embed, kNN and validation do not depend on the precision of training"
    learn = fit(few(precision='bfloat16'))
    a,loss = embed(learn, learn.dls.valid)[0],learn.validate()[0]
    learn.to_fp32()
    assert torch.equal(a, embed(learn, learn.dls.valid)[0]) and loss==learn.validate()[0]
    with torch.autocast('cpu', torch.bfloat16): assert not torch.equal(a, embed(learn, learn.dls.valid)[0])  # control

def test_auto_asks_the_processor(monkeypatch):
    has = P.has_bfloat16
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'avx2':True})
    monkeypatch.setattr(P.platform, 'machine', lambda: 'AMD64')
    assert not has('cpu') and choose_precision('auto', 'auto', 'cpu')==(None,True)
    assert choose_precision('auto', False, 'cpu')==(None,False)
    monkeypatch.setattr(P.platform, 'machine', lambda: 'arm64')  # not measured
    assert choose_precision('auto', 'auto', 'cpu')==(None,False)
    assert choose_precision('bfloat16', True, 'cpu')==(torch.bfloat16,True)  # who asks gets it
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'avx512_bf16':True})
    assert has('cpu') and choose_precision('auto', 'auto', 'cpu')==(torch.bfloat16,True)
    assert choose_precision('auto', 'auto', 'meta') == (None, False) and choose_precision('float32', False, 'cpu') == (
        None,
        False,
    )
    assert not has('meta') and not has('mps')
    for arch, dtype in (
        (tv.resnet18, torch.bfloat16),
        (tv.mobilenet_v3_small, None),
        (tv.efficientnet_b0, None),
        (tv.resnext50_32x4d, torch.bfloat16),
        (tv.convnext_tiny, torch.bfloat16),
    ):
        with torch.device('meta'):
            net = arch(weights=None)
        assert choose_precision('auto', 'auto', 'cpu', net) == (dtype, True) and choose_precision(
            'bfloat16', 'auto', 'cpu', net
        ) == (torch.bfloat16, True)


def test_auto_on_a_gpu_asks_for_the_work_of_a_batch(monkeypatch):
    "Little work is done before the casts are asked for; a CPU does not mind"
    monkeypatch.setattr(P, 'has_bfloat16', lambda device: True)
    little,much = 2e11,1e12
    chosen = [choose_precision('auto', 'auto', 'cuda', flops=n)[0] for n in (little,much,None)]
    assert chosen==[None,torch.bfloat16,torch.bfloat16]
    assert choose_precision('auto', 'auto', 'cuda', flops=little)[1]
    assert choose_precision('bfloat16', 'auto', 'cuda', flops=little)[0]==torch.bfloat16
    assert choose_precision('auto', 'auto', 'cpu', flops=little)[0]==torch.bfloat16

def gpu_steps(name):
    "Milliseconds of the last run of each step: {(network, size, bs): {precision: ms}}"
    file,steps = Path(__file__).parents[1]/'benchmarks'/'results'/f'{name}.jsonl',defaultdict(dict)
    for line in map(json.loads, file.read_text().splitlines()):
        if line.get('section')=='step' and line.get('ms') and not line.get('graphed'):
            steps[line['case'],line['size'],line['bs']][line['precision']] = line['ms']
    return {k:v for k,v in steps.items() if len(v)==2}

@pytest.mark.parametrize('name', ['gpu', 'gpu_slower_host'])
def test_auto_takes_what_was_faster_on_a_gpu(monkeypatch, name):
    """In each pair of receipts, but for 5 %; control: pixels, as the rule was, cannot tell 1,024 images of 32 pixels
    from 256 of 64"""
    monkeypatch.setattr(P, 'has_bfloat16', lambda device: True)
    archs,steps = dict(small=small_resnet, r18=tv.resnet18, r50=tv.resnet50),gpu_steps(name)
    assert len(steps)>=6
    by_pixels = {}
    for (case,size,bs),ms in steps.items():
        flops = bs*forward_flops(create_encoder(archs[case], size=size), (3,size,size))
        auto = choose_precision('auto', 'auto', 'cuda', flops=flops)[0]
        assert ms['bfloat16' if auto else 'float32']<1.05*min(ms.values()), (case,size,bs)
        by_pixels.setdefault(bs*size**2, set()).add(min(ms, key=ms.get))
    assert by_pixels[1024*32**2]=={'float32','bfloat16'}

def test_a_learner_on_a_gpu_counts_the_work_of_its_batch(monkeypatch):
    "Its own network, channels, size and batch; a stand-in for the loaders says that they are on a GPU"
    monkeypatch.setattr(P, 'has_bfloat16', lambda device: True)
    learn = few()
    per_image = forward_flops(learn.model.encoder, (1,8,8))
    def chosen(bs):
        dls = SimpleNamespace(device=torch.device('cuda'), train=SimpleNamespace(bs=bs))
        return _precision('auto', 'auto', dls, learn.model, (8,8), []).dtype
    border = 2**39//per_image
    assert chosen(border-1) is None and chosen(border+2)==torch.bfloat16

def test_operations_are_those_of_convolutions_and_products():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.BatchNorm2d(5), torch.nn.Dropout(),
                              torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(5, 7)).train()
    before,random = deepcopy(net.state_dict()),torch.get_rng_state()
    assert forward_flops(net, (3,8,6))==2*(8*6*5*3*9+5*7)
    assert net.training and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())

def fake_gpu(monkeypatch, capability, bfloat16):
    def supported(including_emulation=True): return bfloat16 or including_emulation
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', supported)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)

def test_auto_takes_float16_where_a_gpu_has_no_bfloat16(monkeypatch):
    "By what a device says of itself: V100 7.0, T4 7.5, P100 6.0, A100 8.0; none of them was at hand"
    for capability in ((7,0),(7,5)):
        fake_gpu(monkeypatch, capability, False)
        assert not P.has_bfloat16('cuda') and P.needs_float16('cuda') and not P.needs_float16('cpu')
        assert choose_precision('auto', 'auto', 'cuda', flops=1e12)==(torch.float16,True)
        assert choose_precision('auto', 'auto', 'cuda', flops=1e9)==(torch.float16,True)
        assert choose_precision('float32', 'auto', 'cuda')==(None,True)
        assert choose_precision('auto', False, 'cuda')==(torch.float16,False)
        assert 'has no bfloat16' in P.why_precision('auto', torch.float16, 'cuda')
    fake_gpu(monkeypatch, (6,0), False)
    assert choose_precision('auto', 'auto', 'cuda', flops=1e12)==(None,False)
    fake_gpu(monkeypatch, (8,0), True)  # control
    assert choose_precision('auto', 'auto', 'cuda', flops=1e12)==(torch.bfloat16,True)

@pytest.mark.filterwarnings('ignore:float16 is slow')
def test_chosen_float16_is_that_of_to_fp16_with_a_scaler():
    def trained(make):
        learn = make()
        assert watched(learn)==torch.float16
        return learn
    chosen,called = trained(lambda: few(precision='float16')),trained(lambda: few(precision='float32').to_fp16())
    assert isinstance(chosen.mixed_precision, MixedPrecision) and same(state(chosen), state(called))
    assert not same(state(chosen), state(fit(few(precision='float32'))))  # control
    assert watched(chosen.to_fp32())==torch.float32

def test_impossible_arguments_are_refused():
    for kw, text in (
        (dict(precision='half'), "precision must be 'auto'"),
        (dict(precision=None), 'precision must be'),
        (dict(channels_last='yes'), 'channels_last must be'),
    ):
        with pytest.raises(ValueError, match=text): few(**kw)
