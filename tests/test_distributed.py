"""Several processes train as one does that has their batches together. Each idea that this takes is left out once,
and is missed. Many cases run in each group of processes, since starting them costs most."""

import copy, os
from functools import partial

import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import SGD
from torch import nn

from processes import together
from ressl_fastai import distributed
from ressl_fastai.batch_norm import SyncedBatchNorm, set_batch_norm
from ressl_fastai.callback import InfoNCEWarmup
from ressl_fastai.data import tensor_dls
from ressl_fastai.distributed import Alone, Ranks, TrainTogether, exchange
from ressl_fastai.learner import ressl_learner

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

def make(bs, n=61, arch=None, shuffle=False, drop_last=False, cbs=None, **kwargs):
    "A learner whose course is the same wherever it runs; 61 images, of which 48 are for training"
    torch.manual_seed(0)
    x,y = images(n)
    dls = tensor_dls(x, y, valid_idx=range(n-13, n), bs=bs)
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
