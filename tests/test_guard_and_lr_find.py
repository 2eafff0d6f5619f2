"""A bad batch leaves nothing behind, nor does `lr_find`; bfloat16 only where it computes rightly; clean predictions
of the training set."""

import math, re
from functools import partial

import numpy as np, pytest, torch
from fastai.vision.all import (Callback, CSVLogger, EarlyStoppingCallback, GradientAccumulation, ImageDataLoaders,
                               Recorder, Resize, SaveModelCallback, aug_transforms)
from helpers import Net, NoBN, Spoil, fit, mild_views, same, seed_all, state
from PIL import Image

from ressl_fastai import health
from ressl_fastai.checkpoint import Checkpoint
from ressl_fastai.data import digits_dls
from ressl_fastai.evaluate import embed
from ressl_fastai.health import Guard, HealthMonitor
from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import small_resnet
from ressl_fastai.views import strong_tfms

def make(bs=128, arch=None, **kwargs):
    seed_all()
    kw = dict(queue_size=200, n_hidden=16, dim=8, metrics=[], precision='float32')
    return ressl_learner(digits_dls(8, bs=bs), arch or Net(), **{**kw, **mild_views(), **kwargs})

class Before(Callback):
    "Keeps the model and the optimizer as they were before each batch, and counts"
    order,run_valid = -100,False
    def before_fit(self): self.n = 0
    def before_batch(self):
        self.n += 1
        self.model, self.opt_state = (
            state(self.learn),
            [
                {k: v.clone() if hasattr(v, 'clone') else v for k, v in s.items()}
                for s in self.learn.opt.state_dict()['state']
            ],
        )


class BadGradient(Callback):
    "A gradient that is not finite behind a finite loss"
    order,run_valid = 0,False
    def __init__(self, step, value): self.step,self.value = step,value
    def before_step(self):
        if self.train_iter==self.step: next(self.learn.model.encoder.parameters()).grad[0] = self.value

def assert_as_before(learn, before):
    assert same(before.model, state(learn)) and all(v.isfinite().all() for v in state(learn).values())
    for a,b in zip(before.opt_state, learn.opt.state_dict()['state']):
        assert a.keys()==b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    assert not any(p.grad.any() for p in learn.model.parameters() if p.grad is not None)

# the guard

# the teacher's third to fifth batch fill the queue
@pytest.mark.parametrize('kind,value', [('strong',math.nan), ('strong',1e38), ('weak',math.nan), ('weak',math.inf)])
def test_a_bad_batch_leaves_batch_norms_as_they_were(kind, value):
    spoil = Spoil(mild_views()[f'{kind}_tfms'], 6, value)  # the first views are tried before training
    learn,before = make(**{f'{kind}_tfms':spoil}),Before()
    fit(learn, cbs=before)
    assert before.n==(5 if kind=='strong' else 3) and len(learn.guard.alarms)==1
    assert_as_before(learn, before)
    fit(learn)
    assert len(learn.guard.alarms)==1 and math.isfinite(learn.recorder.values[-1][1])

@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('step', [0, 3, 10])  # 10 is the last step of the epoch
def test_a_bad_gradient_behind_a_finite_loss_is_not_used(step, value, tmp_path):
    learn,before = make(path=tmp_path),Before()
    fit(learn, cbs=[before, BadGradient(step, value), Checkpoint('run', every=1)])
    assert before.n==step+1 and 'the gradient of encoder.0.0.weight is not finite' in learn.guard.alarms[0]
    assert_as_before(learn, before)
    again = make(path=tmp_path)
    fit(again, cbs=Checkpoint('run', every=1))                 # what was kept is well, and the same line goes on
    assert again.guard.alarms==[] and all(v.isfinite().all() for v in state(again).values())

def test_a_bad_gradient_in_a_part_of_an_accumulated_batch():
    learn,before = make(bs=64),Before()
    fit(learn, cbs=[GradientAccumulation(128), before, BadGradient(4, math.nan)])
    assert before.n==5
    assert_as_before(learn, before)

def test_overflow_of_statistics_alone_is_seen():
    "A variance beyond float32 makes the normalised map 0 and the loss finite"
    class Large(Callback):
        run_valid,order = False,0
        def before_step(self):
            if self.train_iter==3: self.learn.model.encoder[0][1].running_var[0] = math.inf
    learn = fit(make(), cbs=Large())
    assert 'encoder.0.1.running_var overflows' in learn.guard.alarms[0] and all(
        v.isfinite().all() for v in state(learn).values()
    )


def test_a_good_training_is_the_same_with_and_without_a_guard():
    assert same(state(fit(make())), state(fit(make(guard=False))))

def test_collapse_is_said_within_40_steps_by_the_default_guard(monkeypatch):
    monkeypatch.setattr(health, '_size_of_weights', lambda net: 1.)  # which would be said after 20 steps
    learn = fit(make(bs=32, arch=NoBN(), projector_bn=False, queue_size=100), 1, 30.)
    assert (
        'after 40 steps' in learn.guard.alarms[0]
        and 'all images get almost the same embedding' in learn.guard.alarms[0]
    )
    assert fit(make(bs=32, arch=NoBN(), projector_bn=False, queue_size=100), 1, 1e-3).guard.alarms==[]

resnet = partial(small_resnet, widen=0.25)

# measured in six epochs, two seeds each: nearest neighbours right .76 to .86 after 0.001 and 0.01, .53 to .68 after
# 0.3, 1 and 30, and .79 before the training
@pytest.mark.parametrize(
    'kw',
    [{}, dict(projector_bn=False), dict(predictor_layers=2), dict(wd=0.1)],
    ids=['plain', 'no bn', 'predictor', 'decay'],
)
@pytest.mark.parametrize('lr,said', [(1e-3,False), (1e-2,False), (3e-2,False), (0.3,True), (1.,True), (30.,True)])
def test_a_learning_rate_that_is_too_high_is_said(lr, said, kw):
    "What is not collapse: the embeddings differ, and are worse than those of a random network"
    learn = fit(make(bs=32, arch=resnet, **kw), 2, lr)
    assert len(learn.guard.alarms) == said and all(
        'times as large as' in o or 'not finite' in o for o in learn.guard.alarms
    )
    assert all('learning rate' in o for o in learn.guard.alarms)
    if said: assert int(re.search(r'after (\d+) steps', learn.guard.alarms[0])[1])<=50

def test_slow_growth_of_weights_is_no_alarm():
    "To ten times in 400 steps, as in long trainings: a hundred steps are looked at, not the whole of it"
    class Grow(Callback):
        order = Guard.order-1
        def after_step(self):
            with torch.no_grad():
                torch._foreach_mul_([p for p in self.model.parameters() if p.requires_grad], 10 ** (1 / 400))

    learn = fit(make(bs=16), 5, 1e-4, cbs=Grow())
    assert learn.guard.alarms==[] and learn.guard.n_steps>400

@pytest.mark.parametrize('lr', [math.inf, math.nan])
def test_a_learning_rate_that_is_no_number_is_not_used(lr):
    learn = make()
    before = state(learn)
    fit(learn, 1, lr)
    assert 'the learning rate is' in learn.guard.alarms[0]
    assert all(v.isfinite().all() for v in state(learn).values()) and torch.equal(
        before['encoder.0.0.weight'], state(learn)['encoder.0.0.weight']
    )


@pytest.mark.parametrize('nm', ['0.weight', '1.running_var'])
def test_an_encoder_that_is_not_finite_is_not_saved(nm, tmp_path):
    learn = make(path=tmp_path)
    for teacher in (False, True):
        dict((learn.model.teacher[0] if teacher else learn.model.encoder)[0].state_dict())[nm].view(-1)[0] = math.nan
        with pytest.raises(ValueError, match=f'{nm} holds values that are not finite'):
            learn.save_encoder('e', teacher=teacher)
    assert not list(tmp_path.rglob('*.pth*'))

# lr_find

def small(o): return {k:str(v) for k,v in vars(o).items() if isinstance(v, (int,float,str,bool,list,type(None)))}

def everything(learn, folder, generator):
    net = learn.model
    return dict(
        model=[str(v.double().sum().item()) for v in net.state_dict().values()],
        grads=[None if p.grad is None else p.grad.sum().item() for p in net.parameters()],
        modes=[m.training for m in net.modules()],
        half=net.half_dtype,
        opt=learn.opt and (type(learn.opt.state), str(learn.opt.hypers)),
        random=torch.rand(1, generator=torch.default_generator.clone_state()).item(),
        generator=generator.get_state().tolist(),
        loaders=[dl.rng.getstate() for dl in learn.dls.loaders],
        cbs=[type(cb) for cb in learn.cbs],
        memory=[small(cb) for cb in learn.cbs if not isinstance(cb, Recorder)],
        learn={k: v for k, v in small(learn).items()},
        path=(learn.path, learn.model_dir),
        loss_func=learn.loss_func,
        logger=learn.logger,
        names=set(vars(learn)),
        files={f: f.is_file() and f.read_bytes() for f in folder.rglob('*')},
    )

class CtrlC(Callback):
    def after_step(self):
        if self.train_iter==3: raise KeyboardInterrupt

@pytest.mark.parametrize('interrupted', [False, True])
@pytest.mark.parametrize('trained', [False, True])
def test_lr_find_leaves_no_trace(trained, interrupted, tmp_path):
    g,folder = torch.Generator().manual_seed(3),tmp_path/'here'
    folder.mkdir()
    cbs = [
        CSVLogger(),
        CSVLogger(tmp_path / 'far.csv'),
        GradientAccumulation(200),
        HealthMonitor(),
        SaveModelCallback(fname='best', reset_on_fit=False),
        EarlyStoppingCallback(reset_on_fit=False),
    ]
    learn = make(path=folder, precision='bfloat16', strong_tfms=strong_tfms(8, generator=g), cbs=cbs)
    if trained: fit(learn, 1)
    if interrupted: learn.add_cb(CtrlC())
    with learn.no_bar():
        before = everything(learn, tmp_path, g)
        if interrupted:
            with pytest.raises(KeyboardInterrupt): learn.lr_find(num_it=6, show_plot=False)
        else: assert learn.lr_find(num_it=16, show_plot=False).valley>0 and len(learn.recorder.losses)==16
        after = everything(learn, tmp_path, g)
    for k in before: assert before[k]==after[k], k

def test_lr_find_writes_nothing_where_the_learner_is(tmp_path):
    learn = make(path=tmp_path/'file'/'no folder')
    (tmp_path/'file').touch()                                  # not even root can write below a file
    with learn.no_bar(): assert learn.lr_find(num_it=16, show_plot=False).valley>0
    assert [o.name for o in tmp_path.iterdir()]==['file']

# the training set without augmentation

def test_predictions_of_the_training_set_are_of_clean_images(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(16): Image.fromarray(rng.integers(0, 255, (16,16,3), dtype=np.uint8)).save(tmp_path/f'{i:02}.png')
    dls = ImageDataLoaders.from_name_func(
        tmp_path,
        sorted(tmp_path.glob('*.png')),
        lambda f: str(int(f[-5]) % 2),
        bs=5,
        item_tfms=Resize(16),
        batch_tfms=aug_transforms(),
        num_workers=0,
    )
    learn = ressl_learner(dls, partial(small_resnet, widen=0.125), queue_size=8, n_hidden=16, dim=8, metrics=[])
    fit(learn)
    with learn.no_bar(), learn.no_logging():
        a,b = (learn.get_preds(ds_idx=0) for _ in range(2))
        losses = [learn.validate(ds_idx=0)[0] for _ in range(2)]
        random = learn.get_preds(dl=dls.train.new(shuffle=False, drop_last=False))[
            0
        ]  # control: whoever asks for augmented images gets them
    z,y = embed(learn, dls.train, projected=True)
    assert torch.equal(a[0], b[0]) and losses[0]==losses[1] and len(z)==len(dls.train_ds)
    torch.testing.assert_close(a[0], z, atol=1e-4, rtol=0)
    assert (random-z).abs().max()>1e-2
