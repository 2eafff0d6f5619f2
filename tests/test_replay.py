"""A step that was not finite, run again: the same to the bit, whatever draws random numbers, and the learner is left
as it was."""

import math
from copy import deepcopy

import numpy as np, pytest, torch
from fastai.vision.all import Callback, GradientAccumulation, SaveModelCallback, get_random_states
from PIL import Image
from torch import nn

import ressl_fastai.replay
from ressl_fastai.callback import InfoNCEWarmup
from ressl_fastai.checkpoint import Checkpoint
from ressl_fastai.checkpoint_file import last_checkpoint
from ressl_fastai.data import digits_dls, folder_dls, tensor_dls
from ressl_fastai.health import Guard
from ressl_fastai.learner import ressl_learner
from ressl_fastai.views import strong_tfms, weak_tfms


class Net(nn.Sequential):
    "Small, with batch norm and dropout"
    def __init__(self, n_in=1, *more):
        super().__init__(nn.Conv2d(n_in, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3),
                         nn.Conv2d(8, 16, 3), *more)

mild = dict(scale=(0.7,1.), flip_p=0.)

def make(arch=None, dls=None, bs=64, size=8, **kwargs):
    torch.manual_seed(0)
    kw = dict(weak_tfms=weak_tfms(size, **mild), strong_tfms=strong_tfms(size, **mild), queue_size=100, n_hidden=16,
              dim=8, metrics=[], precision='float32')
    return ressl_learner(dls or digits_dls(size, bs=bs), arch or Net(), **{**kw, **kwargs})

def fit(learn, n=1, lr=1e-2, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, **kwargs)
    return learn

class Spoil(Callback):
    "A gradient that is not finite in one step; remembers what the loss was, and the images"
    order,run_valid = 0,False
    def __init__(self, epoch, step): self.epoch_,self.step_ = epoch,step
    def before_batch(self): self.before = self.learn.xb[0].clone()
    def before_step(self):
        if (self.epoch,self.iter)!=(self.epoch_,self.step_): return
        self.loss_then,self.images = self.learn.loss.item(),self.before
        next(self.learn.model.encoder.parameters()).grad[0] = math.nan

def state(learn): return {k:v.clone() for k,v in learn.model.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def own_generator():
    g = torch.Generator().manual_seed(3)
    return dict(strong_tfms=strong_tfms(8, **mild, generator=g))

cases = {
    'plain': ({}, []), 'own generator': (own_generator(), []),
    'schedules': (dict(warmup=InfoNCEWarmup(1, 1), teacher_temp=lambda p: 0.04+0.02*p), []),
    'accumulated': (dict(bs=32), [GradientAccumulation(64)])}

@pytest.mark.parametrize('nm', cases)
def test_the_step_is_the_same_to_the_bit(nm):
    kw,cbs = cases[nm]
    learn,spoil = make(**kw),Spoil(1, 5)
    fit(learn, 3, cbs=[spoil, *cbs])
    step = learn.guard.bad_step
    assert (step.start.epoch,step.start.iter)==(1,5) and len(step.names)==learn.dls.train.bs
    found = learn.replay()
    assert found.same_views and found.loss==spoil.loss_then
    assert 'Everything was finite this time' in str(found)  # what spoilt it is gone
    fit(learn, 1)  # on from there: what was kept stays
    assert learn.replay().loss==spoil.loss_then

@pytest.mark.parametrize('what', ['random', 'model', 'pct_train'])
def test_everything_kept_is_needed(what):
    "Control: another random state, other weights or another place in the schedule give another loss"
    learn,spoil = make(warmup=InfoNCEWarmup(0, 3)),Spoil(1, 5)
    fit(learn, 3, cbs=spoil)
    step = learn.guard.bad_step
    if what=='random': step.start.random['torch_state'] = torch.Generator().manual_seed(9).get_state()
    if what=='model': step.model['encoder.0.0.weight'] += 0.01
    if what=='pct_train': step.start.pct_train = 0.9
    found = learn.replay()
    assert found.loss!=spoil.loss_then and found.same_views==(what!='random')
    if what=='random': assert 'not those of then' in str(found)

def test_the_images_are_those_of_the_batch():
    learn,spoil = make(),Spoil(0, 7)
    fit(learn, cbs=spoil)
    dl,step = learn.dls.train,learn.guard.bad_step
    images = np.stack([np.asarray(dl.dataset[int(i)][0]) for i in step.start.idxs])[:,None]
    np.testing.assert_allclose(spoil.images, images/255, atol=1e-6)
    assert step.names==[f'image {i}' for i in step.start.idxs]

class FullContrast:
    "0/0 for a blank picture"
    def __init__(self): self.crop = strong_tfms(16)
    def __call__(self, x):
        low,high = x.amin((1,2,3), keepdim=True),x.amax((1,2,3), keepdim=True)
        return self.crop((x-low)/(high-low))

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder,rng = tmp_path_factory.mktemp('pictures'),np.random.default_rng(0)
    for i in range(60): Image.fromarray(rng.integers(0, 256, (16,16,3), dtype=np.uint8)).save(folder/f'{i}.png')
    (folder/'sub').mkdir()
    Image.new('RGB', (16,16), 'gray').save(folder/'sub'/'blank.png')
    return folder

@pytest.mark.parametrize('workers', [0, 2])
def test_the_picture_is_named_where_one_has_no_contrast(pictures, workers):
    dls = folder_dls(pictures, size=16, bs=8, num_workers=workers, valid_pct=0.05, seed=2)
    assert 'blank.png' not in [o.name for o in dls.valid.items]
    learn = fit(make(Net(3), dls, size=16, strong_tfms=FullContrast(), queue_size=16), 5)
    found = learn.replay()
    assert found.images==['sub/blank.png'] and found.same_views and math.isnan(found.loss)
    assert 'The views of sub/blank.png are not finite' in str(found)

class Log(nn.Module):
    def forward(self, x): return x.log()

class Root(nn.Module):
    def forward(self, x):
        x = x*(x>0)
        return x.square().mean((2,3)).sqrt()

def test_the_module_is_named_that_makes_nan_of_numbers():
    found = fit(make(Net(1, Log()))).replay()
    assert found.module=='encoder.0.5 (Log)' and found.images==[] and math.isnan(found.loss)

def test_the_line_is_named_whose_gradient_is_nan():
    found = fit(make(Net(1, Root()))).replay()
    assert 'x.square().mean((2,3)).sqrt()' in found.backward and found.module is None and math.isfinite(found.loss)
    assert 'test_replay.py' in found.backward

def test_gradients_that_are_infinite_are_named():
    "Anomaly detection looks for NaN alone"
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g): return torch.full_like(g, 1e38)
    class Slope(nn.Module):
        def forward(self, x): return Steep.apply(x)
    found = fit(make(Net(1, Slope()))).replay()
    assert 'encoder.0.0.weight' in found.gradients or found.backward

def test_weights_that_were_not_finite_are_named():
    learn = make()
    with torch.no_grad(): learn.model.projector[0].weight[0] = math.nan
    found = fit(learn).replay()
    assert found.weights==['projector.0.weight'] and 'Before the step, projector.0.weight is not finite' in str(found)

def everything(learn):
    "What a replay must leave alone"
    return (state(learn), deepcopy(learn.opt.state_dict()), get_random_states(), list(learn.cbs.attrgot('name')),
            list(learn.recorder.values), list(learn.recorder.losses), learn.epoch, learn.model.training)

def test_the_learner_is_left_as_it_was(tmp_path):
    learn = make(path=tmp_path, cbs=SaveModelCallback('train_loss', fname='best'))
    fit(learn, 2, cbs=Spoil(1, 5))
    before,files = everything(learn),sorted(tmp_path.rglob('*'))
    learn.replay()
    after = everything(learn)
    assert same(before[0], after[0]) and before[3:]==after[3:] and files==sorted(tmp_path.rglob('*'))
    assert str(before[1])==str(after[1])
    assert all(np.array_equal(np.array(a, dtype=object), np.array(b, dtype=object)) if k=='random_state' else True
               for (k,a),b in zip(before[2].items(), after[2].values()))
    assert torch.equal(before[2]['torch_state'], after[2]['torch_state'])
    assert not any(m._forward_hooks for m in learn.model.modules())
    assert not torch.is_anomaly_enabled()

def test_a_guard_that_warns_keeps_the_first_as_it_was_before_the_step():
    learn,spoil = make(guard=False),Spoil(0, 3)
    learn.add_cb(Guard('warn'))
    fit(learn, 1, cbs=spoil)
    assert not all(v.isfinite().all() for v in state(learn).values())  # the step was taken
    found = learn.replay()
    assert found.loss==spoil.loss_then and found.weights==[]

def test_what_a_gpu_says_one_step_later():
    class Late(Callback):
        order,run_valid = Guard.order+0.5,False
        def before_step(self):
            if self.iter==4: self.learn.guard._undo("said late.", late=True)
    learn = fit(make(), cbs=Late())
    step = learn.guard.bad_step
    assert step.late and step.start.iter==3 and step.views is None
    found = learn.replay()
    assert found.same_views is None and 'one step later' in str(found)

def test_checkpoints_do_not_grow(tmp_path):
    learn = make(path=tmp_path)
    fit(learn, 1, cbs=Spoil(0, 3))
    fit(learn, 1, cbs=Checkpoint('run', every=1))
    kept = last_checkpoint(tmp_path/'models'/'run')[1]['training']['others']['guard 0'].plain
    assert learn.guard.bad_step is not None and not {'bad_step','start','earlier'}&set(kept)

def test_refused():
    learn = make()
    with pytest.raises(ValueError, match='there is nothing to replay'): learn.replay()
    fit(learn, cbs=Spoil(0, 3))
    step = learn.guard.bad_step
    few = tensor_dls(np.arange(200*64, dtype=np.uint8).reshape(200, 8, 8), valid_idx=range(50), bs=16)
    with pytest.raises(ValueError, match='other images than then'): make(dls=few).replay(step)
    step.names = None
    with pytest.raises(ValueError, match='does not tell its images'): learn.replay()
