"""What only a CUDA device can show. Skipped where there is none; run alone, since the other tests hide it: `pytest
tests/test_cuda.py`."""

from functools import partial

import numpy as np, pytest, torch
import torch.nn.functional as F
from fastai.optimizer import Adam
from fastai.vision.all import set_seed

from ressl_fastai import data
from ressl_fastai.data import tensor_dls
from ressl_fastai.evaluate import embed, knn_accuracy
from ressl_fastai.learner import ressl_learner
from ressl_fastai.losses import ressl_loss
from ressl_fastai.models import small_resnet
from ressl_fastai.optimizer import FusedAdam
from ressl_fastai.views import strong_tfms, weak_tfms

pytestmark = pytest.mark.cuda

x = np.random.default_rng(0).integers(0, 256, (512,32,32,3), dtype=np.uint8)

@pytest.fixture(autouse=True)
def exact(monkeypatch):
    for backend in (torch.backends.cudnn, torch.backends.cuda.matmul): monkeypatch.setattr(backend, 'allow_tf32', False)

def make(y=None, **kwargs):
    set_seed(0, reproducible=True)
    dls = tensor_dls(x, y, valid_pct=0.2, seed=0, bs=64, device=torch.device('cuda', 0))
    return ressl_learner(dls, partial(small_resnet, widen=0.25), **{**dict(metrics=[], queue_size=128), **kwargs})

def fit(learn, n=1, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n, 1e-3, **kwargs)
    return learn

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

def test_there_is_one(): assert torch.zeros(1, device='cuda').is_cuda

@pytest.mark.parametrize('src,size', [(32,32), (64,48), (300,64), (600,224)])
@pytest.mark.parametrize('tfms', [weak_tfms, strong_tfms])
def test_views_are_those_of_the_cpu(src, size, tfms):
    ims = torch.randint(0, 256, (16,3,src,src), dtype=torch.uint8)

    def view(x):
        torch.manual_seed(3)
        return tfms(size)(x).cpu()

    assert (view(ims)-view(ims.cuda())).abs().max()<1e-4

def test_the_loss_is_that_of_the_cpu():
    z = [F.normalize(torch.randn(n, 64), dim=1) for n in (32,32,3000)]
    assert torch.allclose(ressl_loss(*z), ressl_loss(*(o.cuda() for o in z)).cpu(), rtol=1e-5)

@pytest.mark.parametrize('labels', [False, True])
@pytest.mark.parametrize('kept', [True, False])
def test_nothing_waits(labels, kept, monkeypatch):
    from fastai.callback.core import Callback
    if not kept: monkeypatch.setattr(data, 'free_memory', lambda device: 0)
    class Strict(Callback):
        order = 1000

        def after_batch(self):
            last = 5 if self.epoch==0 else 3  # at its tenth step, the fourth of the second epoch, `Guard` looks
            strict = self.training and 2<=self.train_iter<last
            torch.cuda.set_sync_debug_mode('error' if strict else 'default')

        def after_train(self): torch.cuda.set_sync_debug_mode('default')
    learn = make(np.arange(512)%4 if labels else None)
    assert f"kept on {'cuda:0' if kept else 'cpu'}" in repr(learn.dls.train)
    try: fit(learn, 2, cbs=Strict())
    finally: torch.cuda.set_sync_debug_mode('default')
    assert len(learn.recorder.losses)==12 and all(o.device.type=='cpu' for o in learn.recorder.losses)

def test_the_fused_optimizer_is_fastais():
    """Weights after 20 steps along the same gradients; float32 trainings differ from run to run, so none is
    compared. The control has another epsilon."""

    def stepped(opt_func):
        torch.manual_seed(0)
        ps = [torch.randn(s, device='cuda', requires_grad=True) for s in ((64,3,3,3), (64,), (10,64))]
        opt = opt_func([ps], lr=1e-2, wd=0.1)
        for _ in range(20):
            for p in ps: p.grad = torch.randn_like(p)
            opt.step()
        return torch.cat([p.detach().flatten() for p in ps]),opt
    (ours,opt),(adam,_),(other,_) = map(stepped, (FusedAdam, Adam, partial(Adam, eps=1e-2)))
    assert (
        (ours - adam).abs().max() < 1e-5 < (other - adam).abs().max()
    )  # weights of up to 4 have steps of 4e-7, of which 20 are added
    assert all(opt.state[p]['step'].is_cuda for ps in opt.param_lists for p in ps)

@pytest.mark.parametrize('opt_func', [FusedAdam, Adam])
@pytest.mark.parametrize('action', ['stop', 'warn'])
def test_a_gradient_that_is_not_finite_changes_no_weight(opt_func, action):
    """The loss is finite, so that only the gradients tell, one step later. The control is a step before, which does
    change them."""
    from fastai.callback.core import Callback
    from ressl_fastai.health import Guard

    class Spoil(Callback):
        order = Guard.order-1

        def before_step(self):
            if self.train_iter==3: self.learn.model.encoder[0][0][0].weight.grad[0] = torch.nan

    class Note(Callback):
        order = 1000
        def before_fit(self): self.seen = []
        def after_batch(self): self.seen.append(weights(self.learn))
    learn = make(guard=False, opt_func=opt_func)
    note = Note()
    fit(learn, cbs=[Guard(action), Spoil(), note])
    students = [torch.equal(a, b) for a,b in zip(note.seen, note.seen[1:])]
    assert not students[1] and all(o.isfinite().all() for o in note.seen)
    assert len(note.seen)==(4 if action=='stop' else 6)
    if opt_func is FusedAdam and action=='warn':
        student = sum(p.numel() for p in learn.model.student.parameters())
        assert torch.equal(note.seen[2][:student], note.seen[3][:student])

def test_features_and_neighbours():
    learn = fit(make(np.arange(512)%4, metrics=None))
    z,y = embed(learn, learn.dls.valid)
    assert len(z)==102 and np.isfinite(learn.recorder.values[-1][-1])
    assert abs(knn_accuracy(z, y, z, y)-knn_accuracy(*(o.cuda() for o in (z, y, z, y))))<0.02
