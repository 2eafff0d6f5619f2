"A fit that was interrupted and continued is the fit that was not: same tensors, same history, same random numbers."
import json, os, random, resource, shutil, subprocess, sys
from functools import partial
from pathlib import Path

import pandas as pd, pytest, torch
from fastai.vision.all import (Callback, CrossEntropyLossFlat, CSVLogger, EarlyStoppingCallback, GradientAccumulation,
                               Learner, MixedPrecision, RandomErasing, SaveModelCallback, SchedCos, SGD, accuracy)
from crashes import check, differences, everything, fit, make, seed_all, small_dls
from helpers import Crash, held
from torch import Tensor, nn

from ressl_fastai.same_fit import fit_settings
from ressl_fastai.callback import InfoNCEWarmup
from ressl_fastai.checkpoint import Checkpoint
from ressl_fastai.checkpoint_file import last_checkpoint, read_checkpoint, write_checkpoint
from ressl_fastai.evaluate import LinearProbe
from ressl_fastai.files import hold
from ressl_fastai.health import HealthMonitor
from ressl_fastai.models import small_resnet
from ressl_fastai.views import weak_tfms

# the same bits

@pytest.mark.parametrize('method', ['fit','fit_one_cycle','fit_flat_cos','fit_warmup_cos'])
def test_six_epochs_are_three_and_three(tmp_path, method, capsys):
    kw = dict(warmup_epochs=1) if method=='fit_warmup_cos' else {}
    check(tmp_path, 24, fit=partial(fit, method=method, **kw), n_crash=12)
    assert 'continuing from' in (out := capsys.readouterr().out) and 'epoch_0003_batch_000000.pth' in out

@pytest.mark.parametrize(
    'every,n_crash,at',
    [
        (3, 11, '0002_batch_000001'),
        (1, 8, '0002_batch_000000'),
        (4, 7, '0001_batch_000000'),
        (2, 3, '0000_batch_000002'),
    ],
)
def test_within_an_epoch(tmp_path, every, n_crash, at, capsys):
    check(tmp_path, 24, every=every, n_crash=n_crash)
    assert f'epoch_{at}.pth' in capsys.readouterr().out

def test_data_loading_processes_unlabelled_images_schedules_and_predictor(tmp_path):
    def new(seed=0):
        return make(
            seed,
            small_dls(num_workers=2, labels=False),
            predictor_layers=2,
            warmup=InfoNCEWarmup(1, ramp=2),
            opt_func=partial(SGD, mom=0.9),
            teacher_momentum=SchedCos(0.9, 1.0),
        )
    check(tmp_path, 12, make=new, fit=partial(fit, n=3), every=3, n_crash=7)

def test_accumulated_gradients_and_waiting_keys(tmp_path):
    "Steps of 80 images from batches of 32 end in the middle of batches and of epochs"
    for i,(every,n_crash) in enumerate(((None,9), (1,10))):
        check(
            tmp_path / str(i),
            16,
            fit=partial(fit, n=4),
            cbs=lambda: [GradientAccumulation(80)],
            every=every,
            n_crash=n_crash,
        )


class Scales(Callback):
    order,run_valid = 100,False
    def before_fit(self): self.seen = []
    def after_batch(self): self.seen.append(self.scaler.get_scale())

def test_mixed_precision_and_its_loss_scale(tmp_path):
    made = []
    def cbs():
        made.append(Scales())
        return [MixedPrecision(growth_interval=3, init_scale=2.**8), made[-1]]
    check(tmp_path, 12, fit=partial(fit, n=3), cbs=cbs, every=1, n_crash=8)
    assert made[0].seen==made[-1].seen and len(made[0].seen)==12 and len(set(made[0].seen))>3, made[0].seen

def test_other_callbacks_go_on_counting(tmp_path):
    def cbs():
        return [
            EarlyStoppingCallback('valid_loss', min_delta=1.0, patience=4),
            SaveModelCallback('valid_loss', fname='best'),
        ]

    def new(seed=0): return make(seed, path=tmp_path)

    with pytest.raises(AssertionError, match='^20'):
        check(tmp_path / 'a', 24, make=new, cbs=cbs)  # the patience ends it sooner,
    whole = fit(new(), cbs=cbs())
    n = len(whole.recorder.values)
    assert 3<n<6
    check(tmp_path / 'b', 4 * n, make=new, cbs=cbs)  # and at the same epoch after a crash


def test_a_plain_learner_whose_batches_are_augmented(tmp_path):
    def new(seed=0):
        seed_all(seed)
        net = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 10))
        return Learner(
            small_dls(batch_tfms=RandomErasing(p=1.0)), net, loss_func=CrossEntropyLossFlat(), metrics=accuracy
        )

    check(tmp_path, 24, make=new, every=3, n_crash=10)

# controls: what is not kept is found

@pytest.fixture(scope='module')
def crashed(tmp_path_factory):
    "The whole fit, and the folder of one that ended within its second epoch, with keys and gradients waiting"
    torch.set_num_threads(1)
    tmp = tmp_path_factory.mktemp('crashed')
    def cbs(): return [GradientAccumulation(80)]
    whole = everything(fit(make(), n=3, cbs=cbs()))
    with pytest.raises(KeyboardInterrupt): fit(make(), n=3, cbs=[*cbs(), Checkpoint(tmp/'run', 1), Crash(7)])
    return tmp/'run',whole

def drop(training, state):
    "Ways to forget one thing, by name"

    def buffers(part):
        return {k: torch.full_like(v, 0.5) if part in k and 'running' in k else v for k, v in training['model'].items()}

    return {
        'nothing': {},
        'teacher_batch_norm': dict(model=buffers('teacher')),
        'student_batch_norm': dict(model=buffers('encoder')),
        'queue': dict(
            model={k: torch.flip(v, (0,)) if k == 'queue.feats' else v for k, v in training['model'].items()}
        ),
        'pointer': dict(model={k: v * 0 if k == 'queue.ptr' else v for k, v in training['model'].items()}),
        'optimizer': dict(
            opt={
                **training['opt'],
                'state': [
                    {k: v * 0 if isinstance(v, Tensor) else v for k, v in o.items()} for o in training['opt']['state']
                ],
            }
        ),
        'gradients': dict(grads=[0] * len(training['grads'])),
        'keys': dict(keys=[]),
        'progress': dict(pct_train=0.0),
        'callbacks': dict(others={}),
    }

forgotten = [
    'nothing',
    'teacher_batch_norm',
    'student_batch_norm',
    'queue',
    'pointer',
    'optimizer',
    'gradients',
    'keys',
    'progress',
    'callbacks',
    'random',
    'order',
]


@pytest.mark.parametrize('what', forgotten)
def test_control_forgetting_one_thing_is_found(crashed, tmp_path, what):
    folder,whole = crashed
    file,state = last_checkpoint(folder)
    assert state['batch']>0 and len(state['training']['keys'])==1
    if what=='random': state['random'][0]['process']['torch_state'] = torch.get_rng_state()
    elif what=='order': state['start'][0]['dls'][0] = random.getstate()
    else: state['training'].update(drop(state['training'], state)[what])
    write_checkpoint(tmp_path/'run'/file.name, state)
    got = everything(fit(make(1), n=3, cbs=[GradientAccumulation(80), Checkpoint(tmp_path/'run', 1)]))
    assert bool(differences(whole, got))==(what!='nothing')

# killed

def test_a_process_killed_at_random_moments_and_in_the_middle_of_saves(tmp_path):
    res = subprocess.run(
        [sys.executable, Path(__file__).with_name('checkpoint_kill.py'), tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'},
    )
    assert res.returncode==0, res.stdout+res.stderr
    print(res.stdout)
    whole, *others = (
        torch.load(f, weights_only=True)
        for f in (tmp_path / 'whole.pt', *sorted(set(tmp_path.glob('*.pt')) - {tmp_path / 'whole.pt'}))
    )
    assert len(others)>=2
    for o in others: assert differences(whole, o)==[]

# around it

def test_the_table_and_the_csv_are_whole(tmp_path, capsys):
    def table(learn, cbs, n_crash=None):
        learn.path = tmp_path
        with learn.no_bar():
            try: learn.fit(4, cbs=[CSVLogger('history.csv'), *cbs])
            except KeyboardInterrupt: pass
        rows = [l.split(', \'')[0] for l in capsys.readouterr().out.splitlines() if l.startswith('[')]
        return rows,pd.read_csv(tmp_path/'history.csv').drop(columns='time')
    rows,csv = table(make(), [])
    assert len(rows)==4
    table(make(), [Checkpoint('run'), Crash(9)])
    again,csv_again = table(make(1), [Checkpoint('run')])
    assert again==rows
    pd.testing.assert_frame_equal(csv, csv_again, check_exact=True)

@pytest.mark.parametrize('n_crash', [None, 9])
def test_rows_stay_under_their_columns(tmp_path, n_crash, capsys):
    "What was shown with another callback's column: `effective_rank`, then without it, then with it again"
    def valid_losses(learn):
        at = list(learn.recorder.metric_names).index('valid_loss')-1  # its rows have no epoch
        return pd.Series([o[at] for o in learn.recorder.values])
    def fitted(seed, cbs):
        learn = make(seed)
        learn.path = tmp_path
        with learn.no_bar():
            try: learn.fit(4, cbs=[CSVLogger('history.csv'), Checkpoint(tmp_path/'run'), *cbs])
            except KeyboardInterrupt: pass
        table = pd.read_csv(tmp_path/'history.csv')
        assert list(table)==list(learn.recorder.metric_names)
        pd.testing.assert_series_equal(table.valid_loss, valid_losses(learn), check_names=False)
        lines = [l[1:-1].split(', ') for l in capsys.readouterr().out.splitlines() if l.startswith('[')]
        return learn.recorder,[dict(zip(learn.recorder.metric_names, o)) for o in lines]
    crash = [Crash(n_crash)] if n_crash else []
    rec,shown = fitted(0, [HealthMonitor('effective_rank'), *crash])
    kept = len(rec.values)
    again,less = fitted(1, [])
    assert 'effective_rank' in shown[0] and 'effective_rank' not in again.metric_names
    assert [{k:v for k,v in o.items() if k!='effective_rank'} for o in shown]==less[:len(shown)]
    names = rec.metric_names[1:-1]
    for a,b in zip(rec.values[:kept], again.values):
        assert {k:v for k,v in zip(names, a) if k!='effective_rank'}==dict(zip(again.metric_names[1:-1], b))
    third,more = fitted(2, [HealthMonitor('effective_rank')])
    assert len(more)==4 and [o['valid_loss'] for o in more]==[o['valid_loss'] for o in less]
    assert len(third.values)==4 and all(len(o)==len(names) for o in third.values)

def test_a_finished_fit_is_brought_back_and_not_trained(tmp_path, capsys):
    a = everything(fit(make(), n=2, cbs=Checkpoint(tmp_path/'run')))
    learn = make(1)
    steps = []
    class Count(Callback):
        def after_step(self): steps.append(1)
    assert differences(a, everything(fit(learn, n=2, cbs=[Checkpoint(tmp_path/'run'), Count()])))==[] and steps==[]
    assert 'nothing to do' in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / 'run').iterdir()) == [
        'epoch_0001_batch_000000.pth',
        'epoch_0002_batch_000000.pth',
        'lock',
    ]


def test_ctrl_c_and_the_same_line_in_the_same_session(tmp_path):
    whole = everything(fit(make(), n=3))
    learn,cb = make(),Checkpoint(tmp_path/'run', every=1)
    for n in (2, 5, 9):
        with pytest.raises(KeyboardInterrupt): fit(learn, n=3, cbs=[cb, Crash(n)])
        with learn.no_bar(): learn.validate()  # neither a row nor an end
    assert differences(whole, everything(fit(learn, n=3, cbs=cb)))==[]

def test_lr_find_and_get_preds_leave_a_checkpoint_callback_alone(tmp_path):
    learn = make()
    learn.add_cb(Checkpoint(tmp_path/'run'))
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=5, show_plot=False)
        learn.get_preds()
        learn.validate()
    assert not (tmp_path/'run').exists()
    fit(learn, n=1)
    assert (tmp_path/'run'/'epoch_0001_batch_000000.pth').exists()

# files

def test_only_plain_types_and_any_flipped_bit_is_found(crashed, tmp_path):
    file = sorted(crashed[0].glob('*.pth'))[-1]
    assert torch.load(file, weights_only=True)['epoch']==1
    data,missed = file.read_bytes(),0
    bad,rng = tmp_path/'epoch_1.pth',random.Random(0)
    whole = torch.load(file, weights_only=True)
    for _ in range(60):
        b = bytearray(data)
        b[rng.randrange(len(b))] ^= 1 << rng.randrange(8)
        bad.write_bytes(b)
        try: read_checkpoint(bad)
        except ValueError as e: assert 'epoch_1.pth is' in str(e)
        else:  # padding between the parts
            missed += 1
            assert (
                differences(json.loads(json.dumps(torch.load(bad, weights_only=True)['settings'])), whole['settings'])
                == []
            )
            assert differences(torch.load(bad, weights_only=True)['training'], whole['training'])==[]
    assert missed<30

def test_a_damaged_or_foreign_file_is_passed_over(crashed, tmp_path):
    folder,whole = crashed
    def go_on(): return everything(fit(make(1), n=3, cbs=[GradientAccumulation(80), Checkpoint(tmp_path/'run', 1)]))

    damages = {
        'cut': lambda f: f.write_bytes(f.read_bytes()[:-5000]),
        'empty': lambda f: f.write_bytes(b''),
        'foreign': lambda f: torch.save({'weight': torch.ones(2)}, f),
        'other': lambda f: f.write_text('epoch,loss'),
    }
    for nm,damage in damages.items():
        shutil.copytree(folder, tmp_path/'run')
        files = sorted((tmp_path/'run').glob('*.pth'))
        assert len(files)==2
        damage(files[1])
        with pytest.warns(UserWarning, match=f'{files[1].name} is .*Using .*{files[0].name} instead'):
            file, _ = last_checkpoint(tmp_path / 'run')
        if nm=='cut':
            with pytest.warns(UserWarning, match='instead'): assert differences(whole, go_on())==[]
            assert len(list((tmp_path / 'run').glob('*.pth'))) == 2 and [
                read_checkpoint(f) for f in (tmp_path / 'run').glob('*.pth')
            ]
        else:
            damage(files[0])
            with pytest.raises(ValueError, match='no checkpoint can be read.*delete'): go_on()
        shutil.rmtree(tmp_path/'run')

def test_a_full_disk_names_the_file_and_leaves_the_last_one(crashed, tmp_path):
    shutil.copytree(crashed[0], tmp_path/'run')
    before = {f.name:f.read_bytes() for f in (tmp_path/'run').glob('*.pth')}
    soft,hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(min(before.values(), key=len))//2, hard))
        with pytest.raises(OSError, match=r'cannot write checkpoint .*epoch_0001_batch_\d+.pth'):
            fit(make(), n=3, cbs=[GradientAccumulation(80), Checkpoint(tmp_path / 'run', 1)])
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {f.name:f.read_bytes() for f in (tmp_path/'run').glob('*.pth')}==before
    assert (
        differences(
            crashed[1], everything(fit(make(), n=3, cbs=[GradientAccumulation(80), Checkpoint(tmp_path / 'run', 1)]))
        )
        == []
    )


# settings

changes = {
    'n_epoch': dict(fit=dict(n=3)),
    'schedule of lr': dict(fit=dict(pct_start=0.5)),
    'wd': dict(fit=dict(wd=0.1)),
    'arch': dict(arch=small_resnet),
    'stem': dict(stem='small'),
    'queue_size': dict(queue_size=60),
    'dim': dict(dim=9),
    'student_temp': dict(student_temp=0.2),
    'teacher_temp': dict(teacher_temp=0.05),
    'teacher_momentum': dict(teacher_momentum=0.9),
    'weak_tfms': dict(weak_tfms=weak_tfms(8, flip_p=0.0)),
    'warmup': dict(warmup=InfoNCEWarmup(1)),
    'bs': dict(dls=dict(bs=16)),
    'training_images': dict(dls=dict(n=160)),
    'opt_func': dict(opt_func=partial(SGD, mom=0.9)),
    'projector': dict(projector_layers=3),
    'queue_dtype': dict(queue_dtype=torch.bfloat16),
    'precision.dtype': dict(precision='bfloat16'),
    'gradient_accumulation.n_acc': dict(cbs=[GradientAccumulation(64)]),
    'mixed_precision.amp_mode': dict(cbs=[MixedPrecision('bf16')]),
}

@pytest.fixture(scope='module')
def other(tmp_path_factory):
    torch.set_num_threads(1)
    tmp = tmp_path_factory.mktemp('other')
    with pytest.raises(KeyboardInterrupt): fit(make(), n=2, cbs=[Checkpoint(tmp/'run'), Crash(2)])
    return tmp/'run'

@pytest.mark.parametrize('nm', changes)
def test_another_setting_is_refused_by_name(other, nm):
    kw = dict(changes[nm])
    dls,fit_kw,cbs = kw.pop('dls', {}),kw.pop('fit', {}),kw.pop('cbs', [])
    learn = make(3, small_dls(**dls), **kw)
    with pytest.raises(ValueError, match=rf'other settings: .*{nm}: in the checkpoint .+, now ') as e:
        fit(learn, **{**dict(n=2), **fit_kw}, cbs=[Checkpoint(other), *cbs])
    wrong = str(e.value).split('other settings: ')[1].split('. Use')[0].split('; ')
    assert len(wrong)<=6, wrong
    assert 'epoch_0000' in str(e.value)

def test_the_same_settings_in_another_session_are_the_same(other):
    assert differences(last_checkpoint(other)[1]['settings'], settings_of(make(7)))==[]

def settings_of(learn):
    seen = {}
    class Look(Callback):
        def before_fit(self):
            seen.update(fit_settings(self.learn))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt): fit(learn, n=2, cbs=Look())
    return seen

def test_mistakes_and_a_folder_in_use(tmp_path):
    for every in (0, -1, 1.5):
        with pytest.raises(ValueError, match='every must be'): Checkpoint('run', every=every)
    with held(tmp_path):
        with pytest.raises(ValueError, match='is in use'): fit(make(), n=1, cbs=Checkpoint(tmp_path))
    hold(tmp_path).close()

@pytest.mark.parametrize('every', [None, 3])
def test_a_probe_beside_the_training_goes_on(tmp_path, every):
    "Its classifier and its Adam, too: the column is that of a fit without interruption"
    learn = check(tmp_path, 24, cbs=lambda: [LinearProbe()], every=every)
    assert learn.recorder.metric_names[-2]=='linear_accuracy'
