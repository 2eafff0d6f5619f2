"""Measures against numpy and scipy; every alarm provoked, and silent where nothing is wrong; the monitor changes
nothing."""

import math, random
from collections import deque
from functools import partial

import numpy as np, pytest, torch
import torch.nn.functional as F
from fastai.vision.all import Callback, CSVLogger, GradientAccumulation, SaveModelCallback, ShortEpochCallback
from helpers import NoBN, Skip, Spoil, fit, mild_views, same, seed_all, state
from scipy import stats

from ressl_fastai.callback import InfoNCEWarmup, ReSSL
from ressl_fastai.data import digits_dls
from ressl_fastai.health import (Guard, HealthMonitor, _age, effective_neighbors, effective_rank, entropy, feature_std,
                                 student_teacher_kl, teacher_distance)
from ressl_fastai.learner import ressl_learner
from ressl_fastai.losses import relation
from ressl_fastai.models import small_resnet

def make(seed=0, arch=None, bs=64, guard=None, **kwargs):
    "A learner with a guard that looks often"
    seed_all(seed)
    kw = dict(queue_size=200, n_hidden=16, dim=8, metrics=[], guard=False)
    learn = ressl_learner(digits_dls(8, bs=bs), arch or NoBN(), **{**kw, **mild_views(), **kwargs})
    return learn.add_cb(guard or Guard(every=2))

def unit(*shape): return F.normalize(torch.randn(*shape), dim=1)

class Steps(Callback):
    "Counts the batches of a training, and keeps the model as it was before each"
    order = -100
    def before_fit(self): self.n = 0
    def before_batch(self):
        if self.training:
            self.n += 1
            self.before = state(self.learn)


# measures

def test_entropy_and_effective_neighbors():
    z,queue = unit(30, 8),unit(200, 8)
    for temp in (0.01, 0.04, 1.):
        logits = z.double().numpy() @ queue.double().numpy().T/temp
        want = stats.entropy(np.exp(logits-logits.max(1, keepdims=True)), axis=1)
        np.testing.assert_allclose(entropy(relation(z, queue, temp)), want, atol=1e-4)
        np.testing.assert_allclose(effective_neighbors(z, queue, temp), np.exp(want), rtol=1e-4)
        assert not np.allclose(effective_neighbors(z, queue, temp), 2**want, rtol=1e-2)  # control: nats taken for bits
    assert effective_neighbors(z, unit(1, 8).repeat(200, 1), 0.04).sub(200).abs().max()<1e-2

def test_feature_std():
    z = torch.randn(50, 16)+1
    n = z.numpy()/np.linalg.norm(z.numpy(), axis=1, keepdims=True)
    assert feature_std(z).item()==pytest.approx(n.std(0).mean()*4, rel=1e-5)
    assert abs(feature_std(torch.randn(4000, 64))-1)<0.02 and feature_std(torch.ones(9, 4))<1e-6
    assert abs(z.std(0).mean()*4-feature_std(z))>0.1  # control: not normalised

@pytest.mark.parametrize('shape', [(64,16), (16,64)])
def test_effective_rank(shape):
    z = torch.randn(*shape)+0.5
    s = np.linalg.svd(z.double().numpy(), compute_uv=False)
    assert effective_rank(z).item()==pytest.approx(math.exp(stats.entropy(s)), rel=1e-4)
    assert abs(effective_rank(z).item()-math.exp(stats.entropy(s**2)))>0.5  # control: eigenvalues
    for r in (1, 3):
        assert effective_rank(
            torch.linalg.qr(torch.randn(40, r))[0] @ torch.linalg.qr(torch.randn(20, r))[0].T
        ).item() == pytest.approx(r, rel=1e-3)
    assert effective_rank(z.index_fill(0, torch.tensor(0), math.nan)).isnan()

def test_student_teacher_kl():
    zs,zt,queue = unit(60, 8),unit(30, 8),unit(200, 8)
    log_s,log_t = ((z @ queue.T/t).log_softmax(1) for z,t in ((zs,0.1), (zt.repeat(2, 1),0.04)))
    want = F.kl_div(log_s, log_t, log_target=True, reduction='batchmean')
    torch.testing.assert_close(student_teacher_kl(zs, zt, queue), want)
    assert abs(F.kl_div(log_t, log_s, log_target=True, reduction='batchmean')-want)>0.1  # control: the other way round

def test_teacher_distance():
    a,b = NoBN(),NoBN()
    va,vb = (np.concatenate([p.detach().numpy().ravel() for p in m.parameters()]) for m in (a,b))
    assert teacher_distance(a, b).item()==pytest.approx(np.linalg.norm(va-vb)/np.linalg.norm(vb), rel=1e-5)
    assert teacher_distance(a, a) == 0 and not np.isclose(
        teacher_distance(a, b), np.linalg.norm(va - vb) / np.linalg.norm(va), rtol=1e-4
    )


def test_age_of_the_oldest_embedding():
    "A queue of step numbers, in which some steps add nothing"
    for size in (1, 7, 64, 200):
        queue,joined = deque([0]*size, maxlen=size),[]
        for step in range(1, 40):
            joined.append(0 if step%5==0 else random.Random(step).randint(1, 30))
            queue.extend([step]*joined[-1])
            assert _age(joined, size)==(step-queue[0]+1 if queue[0] else step)

# the guard

def test_impossible_settings_are_refused():
    for kw, text in (
        (dict(action='halt'), "action must be 'stop' or 'warn'"),
        (dict(every=0), 'every must be'),
        (dict(patience=1.5), 'patience must be'),
    ):
        with pytest.raises(ValueError, match=text): Guard(**kw)
    with pytest.raises(ValueError, match="columns must be among .*, got rank"):
        HealthMonitor(columns=['feature_std', 'rank'])
    with pytest.raises(ValueError, match='n must be'): HealthMonitor(n=1)

@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_nan_stops_before_it_reaches_the_weights(value, capsys):
    steps = Steps()
    learn = make(
        strong_tfms=Spoil(mild_views()['strong_tfms'], 8, value), projector_bn=False
    )  # the first views are tried before training
    lf = learn.loss_func
    fit(learn, cbs=steps)
    assert steps.n==7 and same(steps.before, state(learn))
    assert 'the loss is nan' in capsys.readouterr().out and 'The images of this batch' in learn.guard.alarms[0]
    assert learn.loss_func is lf
    fit(learn, cbs=steps)                                     # the learner is as good as new: no gradient is left over
    assert steps.n==22 and len(learn.guard.alarms)==1
    assert all(v.isfinite().all() for v in state(learn).values())

def test_nan_in_a_part_of_an_accumulated_batch():
    learn,steps = make(bs=32, strong_tfms=Spoil(mild_views()['strong_tfms'], 6), projector_bn=False),Steps()
    fit(learn, cbs=[GradientAccumulation(128), steps])
    assert steps.n==5 and len(learn.guard.alarms)==1 and all(v.isfinite().all() for v in state(learn).values())

def test_nan_says_where_it_comes_from():
    learn = fit(make())

    def cause():
        fit(learn)
        return learn.guard.alarms[-1]

    with torch.no_grad(): learn.model.queue.feats[3] = math.nan
    assert 'The queue holds' in cause()
    learn.model.queue.count.zero_()
    with torch.no_grad(): learn.model.teacher[1][0].weight[0,0] = math.inf
    assert 'weights of the teacher' in cause()
    with torch.no_grad(): learn.model.projector[0].weight[0,0] = math.nan
    assert 'weights of the student' in cause()

def test_without_a_guard_nan_goes_everywhere():
    learn = make(strong_tfms=Spoil(mild_views()['strong_tfms'], 7))
    learn.remove_cb(learn.guard)
    assert not all(p.isfinite().all() for p in fit(learn).model.parameters())

def test_a_guard_is_there_unless_it_is_switched_off():
    dls = digits_dls(8)

    def guards(**kw):
        return [cb for cb in ressl_learner(dls, NoBN(), n_hidden=16, dim=8, **kw).cbs if isinstance(cb, Guard)]

    assert len(guards())==1 and guards(guard=False)==[] and len(guards(guard=False, cbs=Guard('warn')))==1

def test_uniform_relations_are_said():
    learn = fit(make(teacher_temp=20.))
    assert 'all 200 images of the queue alike' in learn.guard.alarms[0] and 'ln K is 5.30' in learn.guard.alarms[0]

class Constant(Callback):
    "Fills the queue with one embedding after each step"
    order = ReSSL.order+1
    def after_step(self): self.model.queue.feats.copy_(F.normalize(torch.ones(200, 8), dim=1))

def test_d3_a_dead_or_stale_queue_is_said():
    assert 'the queue is dead' in fit(make(), cbs=Constant()).guard.alarms[0]
    learn = fit(make(), cbs=Skip())
    assert 'no embedding has joined the queue for 6 steps' in learn.guard.alarms[0]
    assert fit(learn).guard.alarms[1:]==[]                     # without what broke it, the same learner trains on

def test_collapse_is_said():
    "Without batch norm: a teacher that is the student itself"
    learn = fit(make(projector_bn=False, teacher_momentum=0.), 1, 1e-2)
    assert 'all images get almost the same embedding' in learn.guard.alarms[0]

def test_a_warning_is_said_once_and_training_goes_on(capsys):
    learn,steps = make(teacher_temp=20., guard=Guard('warn', every=2)),Steps()
    fit(learn, cbs=steps)
    assert steps.n==22 and len(learn.guard.alarms)==1 and capsys.readouterr().out.count('Warning in epoch')==1

healthy = dict(
    plain={},
    no_bn=dict(projector_bn=False),
    slow=dict(teacher_momentum=0.999),
    warmup=dict(warmup=InfoNCEWarmup(1)),
    predictor=dict(predictor_layers=2),
    short_queue=dict(queue_size=64),
    bf16=dict(queue_dtype=torch.bfloat16),
)

@pytest.mark.parametrize('seed', [0, 1, 2])
def test_a_healthy_run_raises_no_alarm(seed):
    learn = make(seed, partial(small_resnet, widen=0.25), dim=32, n_hidden=64, guard=Guard(every=1, patience=1))
    assert fit(learn, 1, 2e-3).guard.alarms==[]

@pytest.mark.parametrize('kw', healthy.values(), ids=healthy)
def test_no_variant_raises_an_alarm(kw):
    assert fit(make(dim=32, guard=Guard(every=1, patience=2), **kw), 1, 2e-3).guard.alarms == []


def test_d18_keys_that_wait_for_a_step_are_no_stale_queue():
    assert fit(make(bs=16, guard=Guard(every=1, patience=2)), cbs=GradientAccumulation(256)).guard.alarms==[]

def test_d11_lr_find_diverges_as_before():
    def run(guarded):
        guard = Guard(every=1, patience=1)
        learn = make(guard=guard)
        if not guarded: learn.remove_cb(guard)
        before = state(learn)
        with learn.no_bar(): learn.lr_find(end_lr=1e30, num_it=25, show_plot=False, stop_div=False)
        assert same(before, state(learn)) and guard.alarms==[]
        return [float(o) for o in learn.recorder.losses],learn
    (a,learn),(b,_) = run(True),run(False)
    assert len(a)>=25 and np.array_equal(a, b, equal_nan=True)
    assert fit(learn, 1, 1e30).guard.alarms                     # control: in a fit it would have spoken

def test_validation_and_predictions_are_not_guarded():
    learn = fit(make())
    with torch.no_grad(): learn.model.projector[0].weight.fill_(math.nan)
    with learn.no_bar():
        learn.validate()
        learn.get_preds()
    assert learn.guard.alarms==[]

# the monitor

def test_monitor_measures_what_the_functions_say():
    learn,mon = make(),HealthMonitor()
    fit(learn, 2, cbs=mon)
    row,net = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1])),learn.model.eval()
    x = torch.cat([b[0] for b in learn.dls.valid])
    with torch.no_grad(): zs,zt = net(x),net.teacher(x)
    queue = net.queue.filled
    want = dict(
        teacher_entropy=entropy(relation(zt, queue, 0.04)).mean(),
        effective_neighbors=effective_neighbors(zt, queue, 0.04).mean(),
        student_teacher_kl=student_teacher_kl(zs, zt, queue),
        feature_std=feature_std(zs),
        effective_rank=effective_rank(zs),
        queue_age=4,
        teacher_distance=teacher_distance(net.teacher, net.student),
    )
    for k,v in want.items(): assert row[k]==pytest.approx(float(v), rel=1e-3), k
    assert row['valid_loss']==pytest.approx(row['teacher_entropy']+row['student_teacher_kl'], rel=1e-3)
    assert (
        list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', *mon.names, 'time']
        and len(mon.history) == 2
    )


def test_monitor_changes_nothing():
    assert same(state(fit(make(), 2)), state(fit(make(), 2, cbs=HealthMonitor())))

def test_freshness_and_distance():
    still, moving, fast = (
        fit(make(teacher_momentum=m, projector_bn=False, guard=Guard('warn'), warmup=None), cbs=mon) and mon.history[-1]
        for m, mon in ((1.0, HealthMonitor()), (0.9, HealthMonitor()), (0.0, HealthMonitor()))
    )
    assert (
        still['queue_freshness'] == pytest.approx(1, abs=1e-5)
        and fast['queue_freshness'] < moving['queue_freshness'] < 1 - 1e-5
    )
    assert fast['teacher_distance']<1e-6<moving['teacher_distance']<still['teacher_distance']

def test_age_grows_when_steps_are_skipped():
    mon = HealthMonitor()
    fit(make(guard=Guard('warn')), cbs=[mon, Skip()])
    assert mon.history[-1]['queue_age']==22  # all of them, where a healthy queue of 200 has 4

def test_monitor_drives_save_model_callback_and_csv(tmp_path):
    learn,mon = make(path=tmp_path),HealthMonitor(columns=['effective_rank'])
    fit(learn, 2, cbs=[mon, SaveModelCallback(monitor='effective_rank', fname='best'), CSVLogger(tmp_path/'log.csv')])
    assert (tmp_path / 'models' / 'best.pth').exists() and (tmp_path / 'log.csv').read_text().startswith(
        'epoch,train_loss,valid_loss,effective_rank,time'
    )
    assert len(mon.history)==2 and len(mon.plot())==8

def test_monitor_keeps_out_of_the_way():
    learn,mon = make(),HealthMonitor()
    learn.add_cb(mon)
    with pytest.raises(ValueError, match='nothing to draw'): mon.plot()
    with learn.no_bar(): learn.lr_find(num_it=6, show_plot=False)
    assert mon.history==[]
    fit(learn)
    with learn.no_bar():
        assert len(learn.validate()) == 1
        learn.get_preds()
    assert len(mon.history)==1
    fit(learn, cbs=ShortEpochCallback())
    assert mon.history==[]  # no validation, no row
    fit(learn)
    assert len(mon.history) == 1
