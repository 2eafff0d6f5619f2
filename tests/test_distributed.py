"""Several processes train as one does that has their batches together. Each idea that this takes is left out once,
and is missed. Many cases run in each group of processes, since starting them costs most."""

import copy, io, math, os, random, shutil, subprocess, sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import distributed_kill, numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import lr_find
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import SGD
from torch import nn
from torch.multiprocessing import ProcessRaisedException

from processes import together
from ressl_fastai import distributed
from ressl_fastai.callback import InfoNCEWarmup
from ressl_fastai.checkpoint import Checkpoint
from ressl_fastai.data import tensor_dls
from ressl_fastai.distributed import Alone, Ranks, TrainTogether, ranks_of
from ressl_fastai.evaluate import KNNAccuracy, LinearProbe
from ressl_fastai.health import HealthMonitor
from ressl_fastai.learner import ressl_learner
from ressl_fastai.loaders import get_normalize
from ressl_fastai.models import ReSSLModel
from ressl_fastai.views import strong_tfms, weak_tfms

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")

# views without chance, in the precision of the model
def weak(x): return x.to(torch.get_default_dtype())
def strong(x): return 1 - 0.8*weak(x).roll(1, -1)
def small(x): return weak(x)[...,1:7,2:8].flip(-1)

def net(bn=True, nf=8):
    def layers(i, o): return [nn.Conv2d(i, o, 3, stride=2, padding=1), *([nn.BatchNorm2d(o)] if bn else []), nn.ReLU()]
    return nn.Sequential(*layers(3, nf), *layers(nf, 2*nf))

def images(n):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n,8,8,3), dtype=np.uint8),np.arange(n)%3

class Doubles(Callback):
    "float64 for validation images, which have no views, and back for fastai's recorder, which takes none"
    order = -5
    def before_batch(self):
        if not self.training: self.learn.xb = (weak(self.learn.xb[0]),)
    def after_loss(self): self.learn.loss = self.loss.float()

def make(bs, n=61, n_valid=13, arch=None, shuffle=False, drop_last=False, cbs=None, **kwargs):
    "A learner whose course is the same wherever it runs; 61 images, of which 48 are for training"
    torch.manual_seed(0)
    x,y = images(n)
    dls = tensor_dls(x, y, valid_idx=range(n-n_valid, n), bs=bs)
    dls.train.shuffle,dls.train.drop_last = shuffle,drop_last
    kw = dict(weak_tfms=weak, strong_tfms=strong, queue_size=20, n_hidden=16, dim=8, metrics=[], precision='float32',
              opt_func=partial(SGD, mom=0.9), teacher_momentum=0.9)
    learn = ressl_learner(dls, net() if arch is None else arch, cbs=[Doubles(), *(cbs or [])], **{**kw, **kwargs})
    learn.model.to(torch.get_default_dtype())
    return learn

def trained(learn, n_epoch=2, lr=0.05, **kwargs):
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(**kwargs): learn.fit(n_epoch, lr)
    return {k:v.clone() for k,v in learn.model.state_dict().items()}

def warmup(): return InfoNCEWarmup(0.3, ramp=0.3, end=0.2, temp=0.2, fraction=True)

cases = {  # name: what to make, given the number of processes
    'batch norm':lambda n: make(12//n),
    'no batch norm':lambda n: make(12//n, arch=net(bn=False), projector_bn=False),
    'predictor, InfoNCE':lambda n: make(12//n, predictor_layers=2, warmup=warmup()),
    'crops':lambda n: make(12//n, strong_tfms=[strong, small, small]),
    'accumulation':lambda n: make(12//n, cbs=[GradientAccumulation(24//n)]),
    'uneven':lambda n: make(12//n, n=67),  # 54 for training: the last batch has 6
    'left over':lambda n: make(18//n, n=67),  # 54 for training, and no more than fill batches
    'queue smaller than a batch':lambda n: make(12//n, queue_size=7),
    'parts':lambda n: make(24//n, batch_norm='split', n_splits=6//n, drop_last=True)}

seed = 5

def same_permutations(self, f, x, step):
    "`shuffled` of one process, as several with this seed have it"
    perm = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed+step))
    return f(x[perm])[perm.argsort()]

def as_one(nm, dtype=torch.float64):
    torch.set_default_dtype(dtype)
    try:
        with pytest.MonkeyPatch.context() as m:
            m.setattr(Alone, 'shuffled', same_permutations)
            return trained(cases[nm](1))
    finally: torch.set_default_dtype(torch.float32)

def distance(a, b):
    assert a.keys()==b.keys()
    return max((a[k].double()-b[k].double()).abs().max().item() for k in a)

def fixed_seed(self): self.seed = seed

def run_cases(names, n, dtype=torch.float64):
    torch.set_default_dtype(dtype)
    Ranks.fork_random = fixed_seed
    return {nm:trained(cases[nm](n)) for nm in names}

# each idea, left out in all processes
def in_order_of_processes(self, x):
    res = x.new_empty(self.size*len(x), *x.shape[1:])
    torch.distributed.all_gather_into_tensor(res, x.contiguous())
    return res

def divided_once(self, dl, whole=False):
    "As fastai's `DistributedDL`: each process has a part of the epoch"
    n = dl.n//self.size
    res = dl.new(n=n, get_idxs=lambda: list(range(self.rank*n, (self.rank+1)*n)))
    res.n_all = n*self.size
    return res

def own_shuffle(self, f, x, step): return same_permutations(self, f, x, step)

def not_wrapped(net, **kwargs): return net

as_it_is = staticmethod(lambda ctx, grad: grad)
never = property(lambda self: False, lambda self, value: None)

mutations = {  # name: case, class, attribute, what to put there
    'keys of this process alone':('batch norm', Ranks, 'gather', lambda self, x: x),
    'keys in the order of processes':('batch norm', Ranks, 'gather', in_order_of_processes),
    'an epoch divided once':('batch norm', Ranks, 'share', divided_once),
    'gradients not averaged':('no batch norm', distributed, 'DistributedDataParallel', not_wrapped),
    'statistics of this process alone':('batch norm', TrainTogether, 'sync_bn', never),
    'sums without a gradient':('batch norm', 'ressl_fastai.batch_norm._Sum', 'backward', as_it_is),
    'shuffled within processes':('parts', Ranks, 'shuffled', own_shuffle),
    'statistics not averaged':('parts', Ranks, 'average_statistics', lambda self, net: None)}

def run_mutations(n):
    from importlib import import_module
    torch.set_default_dtype(torch.float64)
    Ranks.fork_random,res = fixed_seed,{}
    for nm,(case,where,attr,what) in mutations.items():
        if isinstance(where, str):
            module,_,cls = where.rpartition('.')
            where = getattr(import_module(module), cls)
        with pytest.MonkeyPatch.context() as m:
            m.setattr(where, attr, what, raising=False)
            res[nm] = trained(cases[case](n))
    return res

@pytest.fixture(scope='module')
def alone():
    torch.set_num_threads(1)
    return {nm:as_one(nm) for nm in cases}

def job(n): return run_cases(cases, n),run_mutations(n) if n==2 else {}

@pytest.fixture(scope='module')
def groups(): return {n:together(n, job, n) for n in (2,3)}

@pytest.mark.parametrize('n', [2,3])
@pytest.mark.parametrize('nm', cases)
def test_several_processes_are_one(alone, groups, nm, n):
    for res,_ in groups[n]: assert distance(res[nm], alone[nm])<1e-10

@pytest.mark.parametrize('nm', mutations)
def test_what_is_left_out_is_missed(alone, groups, nm):
    worst = max(distance(res[nm], alone[mutations[nm][0]]) for _,res in groups[2])
    assert worst>1e-6

def test_float32(groups):
    one = as_one('batch norm', torch.float32)
    for res in together(2, run_cases, ['batch norm'], 2, torch.float32): assert distance(res['batch norm'], one)<1e-5


# what is decided is decided by all

class Broken:
    "Weak views, of which the third batch of process 1 has a NaN"
    def __init__(self): self.n = 0
    def __call__(self, x):
        self.n += 1
        x = weak(x)
        # the first tries its size, two fill the queue
        if self.n==6 and os.environ.get('RANK')=='1': x[0,0,0,0] = torch.nan
        return x

def guarded():
    learn = make(6, weak_tfms=Broken())
    with learn.no_bar(), learn.distrib_ctx(): learn.fit(2, 0.05)
    return dict(alarms=learn.guard.alarms, n_steps=learn.guard.n_steps, model=learn.model.state_dict())

def watched(folder, n):
    "Whatever fastai and this package decide by, or write"
    cbs = [HealthMonitor('effective_rank', n=8), CSVLogger(), SaveModelCallback('knn_accuracy', fname='best'),
           EarlyStoppingCallback('valid_loss', min_delta=100, patience=2)]
    learn = make(12//n, n=60, n_valid=12, metrics=KNNAccuracy(k=5, bank=31), path=folder, cbs=cbs)
    with learn.no_bar(), learn.distrib_ctx(): learn.fit(4, 0.05)
    return dict(values=learn.recorder.values, health=learn.health_monitor.history, model=learn.model.state_dict())

def probed(n):
    learn = make(12//n, n=60, n_valid=12, cbs=[probe := LinearProbe()])
    with learn.no_bar(), learn.distrib_ctx(): learn.fit(3, 0.05)
    return dict(column=[float(o[-1]) for o in learn.recorder.values], counts=probe.counts.tolist())

def looked_at(n):
    "In the context the processes share the work, outside each is alone"
    learn = make(12//n)
    with learn.no_bar(), learn.distrib_ctx():
        preds,targs = learn.get_preds()
        inside = learn.embed(learn.dls.train)[0]
    with learn.no_bar():
        outside = learn.get_preds()[0] if os.environ.get('RANK', '0')=='0' else preds
        learn.embed(learn.dls.train)
    return dict(preds=preds, targs=targs, inside=inside, outside=outside)

def found(n):
    learn = make(12//n)
    before = copy.deepcopy(learn.model.state_dict())
    with learn.no_bar(), learn.distrib_ctx(): lr = learn.lr_find(num_it=12, show_plot=False)
    assert distance(before, learn.model.state_dict())==0
    return lr.valley,[float(o) for o in learn.recorder.losses]

def decide(folder, n):
    res = dict(watched=watched(folder, n), looked_at=looked_at(n), found=found(n))
    if n==2:
        with redirect_stdout(said := io.StringIO()): res['guarded'] = guarded()
        res['said'] = said.getvalue()
        res['probed'] = probed(n)
    return res

@pytest.fixture(scope='module')
def decided(tmp_path_factory):
    folders = [tmp_path_factory.mktemp(nm) for nm in ('one','two')]
    Ranks_fork,Ranks.fork_random = Ranks.fork_random,fixed_seed
    try: return decide(folders[0], 1),together(2, decide, folders[1], 2),folders
    finally: Ranks.fork_random = Ranks_fork

def test_a_probe_has_one_accuracy_in_all_processes(decided):
    "Of all validation images: what stops by it stops everywhere. Each process has counted its own"
    a,b = (o['probed'] for o in decided[1])
    (right,seen),(other_right,other_seen) = a['counts'],b['counts']
    assert seen==other_seen==6 and a['column']==b['column']
    assert a['column'][-1]==pytest.approx((right+other_right)/12)

def test_all_stop_when_one_has_nan(decided):
    a,b = (o['guarded'] for o in decided[1])
    assert a['alarms']==b['alarms'] and len(a['alarms'])==1 and 'hold NaN' in a['alarms'][0]
    assert a['n_steps']==b['n_steps']==2
    assert distance(a['model'], b['model'])==0 and all(o.isfinite().all() for o in a['model'].values())
    assert 'hold NaN' in decided[1][0]['said'] and decided[1][1]['said']==''

def test_values_are_those_of_one_process(decided):
    one,(a,b),folders = decided
    for o in (a,b): assert distance(one['watched']['model'], o['watched']['model'])<1e-4
    values = [torch.tensor(o['watched']['values']) for o in (one,a,b)]
    assert len(values[0])==3 and torch.equal(values[1], values[2])  # of four epochs: stopped early
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-4)
    for h,k in zip(one['watched']['health'], a['watched']['health']):
        assert h==pytest.approx(k, rel=1e-3, abs=1e-4, nan_ok=True)
    tables = [pd.read_csv(o/'history.csv') for o in folders]
    assert len(tables[1])==3 and [*tables[0]]==[*tables[1]]
    assert all((o/'models'/'best.pth').exists() for o in folders)

def test_predictions_and_embeddings_are_of_all_images_once(decided):
    one,both,_ = decided
    for o in both:
        for nm,want in one['looked_at'].items(): torch.testing.assert_close(o['looked_at'][nm], want)

def test_lr_find(decided):
    one,(a,b),_ = decided
    assert a['found']==b['found']
    torch.testing.assert_close(*(torch.tensor(o['found'][1]) for o in (a, one)), rtol=1e-3, atol=0)


# checkpoints

class Crash(Callback):
    "Ctrl-C after `n` steps"
    order = 100
    def __init__(self, n): self.n = n
    def after_step(self):
        if self.train_iter==self.n: raise KeyboardInterrupt

def fitted(folder, n, bs=12, crash=None, chance=True, steps=2, **kwargs):
    "Three epochs of four steps with a checkpoint every two"
    folder.mkdir(parents=True, exist_ok=True)
    kw = dict(weak_tfms=weak_tfms(8), strong_tfms=strong_tfms(8)) if chance else {}
    learn = make(bs//n, shuffle=True, path=folder, cbs=[HealthMonitor('effective_rank', n=8)], **kw, **kwargs)
    cbs = [Checkpoint('run', every=steps), CSVLogger(), *([Crash(crash)] if crash else [])]
    try:
        with learn.no_bar(), learn.distrib_ctx(): learn.fit_one_cycle(3, 0.05, cbs=cbs)
    except KeyboardInterrupt: assert crash
    return dict(model=learn.model.state_dict(), values=learn.recorder.values)

def goes_on(folder, n, **kwargs):
    fitted(folder, n, crash=7, **kwargs)
    random.seed(1)  # a process that begins anew begins elsewhere
    torch.manual_seed(1)
    return fitted(folder, n, **kwargs)

def resumed(folder, n):
    kinds = dict(plain={}, parts=dict(batch_norm='split', n_splits=3, drop_last=True))
    return {nm:(fitted(folder/nm/'whole', n, **kw), goes_on(folder/nm/'cut', n, **kw)) for nm,kw in kinds.items()}

def before_another_number(folder, n):
    "A whole fit, and one that is cut, without chance in views"
    return fitted(folder/'whole', n, chance=False),fitted(folder/'cut', n, chance=False, crash=7)

def refused(folder, n):
    with pytest.raises(ValueError, match='bs: in the checkpoint 12, now 24'): fitted(folder, n, bs=24, chance=False)
    return True

def test_resume_is_bit_for_bit(tmp_path):
    a,b = together(2, resumed, tmp_path, 2)
    for nm,(whole,cut) in a.items():
        assert distance(whole['model'], cut['model'])==0, nm
        assert distance(whole['model'], b[nm][1]['model'])==0, nm
        assert torch.equal(torch.tensor(whole['values']), torch.tensor(cut['values'])), nm
        lines = [[o[:-6] for o in (tmp_path/nm/o/'history.csv').read_text().split()] for o in ('whole','cut')]
        assert len(lines[0])==4 and lines[0]==lines[1]

def test_another_number_of_processes_goes_on(tmp_path):
    (whole,_),_ = together(2, before_another_number, tmp_path, 2)
    folders = {n:shutil.copytree(tmp_path/'cut', tmp_path/f'by{n}') for n in (1,3)}
    got = {1:fitted(folders[1], 1, chance=False), 3:together(3, partial(fitted, folders[3], 3, chance=False))[2]}
    for o in got.values(): assert distance(o['model'], whole['model'])<1e-4
    assert all(together(2, refused, tmp_path/'cut', 2))


# what is sent, who has which image, what is refused

def sent(learn):
    "How many numbers each collective of the last of three steps has, by kind, and the number of weights"
    class Profile(Callback):
        order = -20
        def before_batch(self):
            if self.train_iter==2 and self.training:
                self.profile = torch.profiler.profile(record_shapes=True)
                self.profile.__enter__()
        def before_validate(self): self.profile.__exit__(None, None, None)
    profile = Profile()
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(): learn.fit(1, 0.05, cbs=profile)
    res = {}
    for e in profile.profile.events():
        if e.name.startswith('gloo:'): res.setdefault(e.name, []).append(math.prod(e.input_shapes[0]))
    return res,sum(p.numel() for p in learn.model.parameters() if p.requires_grad)

def counted():
    kw = dict(n=49, n_valid=13, arch=net(bn=False), projector_bn=False)  # three steps
    return {nm:sent(make(6, **kw, **o)) for nm,o in dict(guard={}, alone=dict(guard=False)).items()}

def order_and_views():
    "Which images each process has in two epochs, and the noise that its views draw"
    class Look(Callback):
        order = 20
        def before_fit(self): self.seen,self.noise = [],torch.rand(4)
        def before_batch(self):
            if self.training: self.seen.append(self.learn.ressl.x_teacher[:,0].mean((1,2)))
    learn,look = make(6, shuffle=True),Look()
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(): learn.fit(2, 0.05, cbs=look)
    means = weak(torch.as_tensor(images(61)[0])[:48,:,:,0]/255).mean((1,2))
    seen = [(o[:,None]-normal(learn, means)).abs().argmin(1) for o in look.seen]
    return torch.cat(seen).view(2, -1),look.noise

def normal(learn, x):
    norm = get_normalize(learn.dls)
    return (x-norm.mean.flatten()[0])/norm.std.flatten()[0]

def without_context():
    with pytest.raises(ValueError, match='2 processes were started.*with learn.distrib_ctx'):
        with (learn := make(6)).no_bar(): learn.fit(1)
    with learn.no_bar(): return learn.get_preds()[0]

def fails_in_one():
    class Fail(Callback):
        def after_step(self):
            if self.train_iter==1 and os.environ['RANK']=='1': raise KeyError('broken here')
    with make(6).no_bar() as learn, learn.distrib_ctx(): learn.fit(1, cbs=Fail())

def fails_in_0():
    learn = make(6)
    with learn.distrib_ctx():
        error = OSError if learn.ranks.rank==0 else RuntimeError
        with pytest.raises(error, match='disk full'): learn.ranks.from_rank0(full)
        return learn.ranks.from_rank0(lambda: 3)

def full(): raise OSError('disk full')

def small_checks(): return dict(counted=counted(), images=order_and_views(), alone=without_context(), all=fails_in_0())

@pytest.fixture(scope='module')
def checked(): return together(2, small_checks)

def test_gradients_and_keys_are_sent_and_nothing_else(checked):
    "Beside them the loss for the table and two flags for `Guard`, one number each; no queue, no teacher"
    for nm,flags in dict(guard=[1,1], alone=[]).items():
        found,n_weights = checked[0]['counted'][nm]
        assert sorted(found['gloo:all_gather'])==[1,6*8]
        assert sorted(found['gloo:all_reduce'])==[*flags,n_weights] and len(found)==2

def test_one_order_and_views_of_each_its_own(checked):
    (a,noise_a),(b,noise_b) = (o['images'] for o in checked)
    for epoch in zip(a, b): assert sorted(torch.cat(epoch).tolist())==list(range(48))
    assert not torch.equal(a[0], a[1]) and not torch.equal(noise_a, noise_b)

def test_training_without_the_context_is_refused(checked):
    assert all(len(o['alone'])==13 for o in checked)  # each can still look at images

def test_an_error_of_process_0_is_one_of_all(checked): assert [o['all'] for o in checked]==[3,3]

def test_an_error_of_one_ends_all_and_names_it(capfd):
    with pytest.raises(ProcessRaisedException, match='broken here'): together(2, fails_in_one)
    assert "process 1 of 2: KeyError" in capfd.readouterr().err

def test_data_parallel_is_refused():
    class Parallel(Callback):
        "As fastai's `ParallelTrainer`, in a module that needs accelerate"
        def before_fit(self): self.learn.model = nn.DataParallel(self.learn.model)
    with (learn := make(12)).no_bar(), pytest.raises(ValueError, match='DataParallel would pair views'):
        learn.fit(1, cbs=Parallel())

def test_one_process_has_no_ranks():
    learn = make(12)
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx():
        learn.fit(1)
        assert not hasattr(learn, 'ranks') and type(learn.model) is ReSSLModel
    assert ranks_of(learn) is distributed.alone

def test_a_killed_process_ends_the_job_and_the_restarted_one_arrives(tmp_path):
    folders = [tmp_path/'whole',tmp_path/'killed']
    for o in folders: o.mkdir()
    together(2, distributed_kill.train, folders[0])
    how = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', '--max-restarts=1',
           '--monitor-interval=0.2', distributed_kill.__file__, str(folders[1])]
    path = os.pathsep.join(filter(None, [str(Path(distributed.__file__).parents[1]), os.environ.get('PYTHONPATH')]))
    done = subprocess.run(how, capture_output=True, text=True, timeout=600, env={**os.environ, 'PYTHONPATH':path})
    assert done.returncode==0, done.stderr
    assert 'local_rank: 1' in done.stderr and 'continuing from' in done.stdout
    assert distance(*(torch.load(o/'weights.pth') for o in folders))==0
