"""Split batch norm against n copies of the layer, or of the whole network, each with one part of the batch, as on n
GPUs.
Every comparison is shown to flag something wrong before it is trusted."""

import pickle
from copy import deepcopy
from functools import partial

import numpy as np, pytest, torch, torchvision.models as tv
from fastai.layers import BatchNorm1dFlat
from fastai.torch_core import norm_bias_params
from fastai.vision.models.xresnet import xresnet18
from fastcore.basics import ifnone
from timm.layers.norm_act import BatchNormAct2d, convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ressl_fastai.batch_norm import BatchNormNd, SplitBatchNorm, set_batch_norm, shuffled
from ressl_fastai.models import ReSSLModel, create_encoder
from ressl_fastai.teacher import teacher_train, update_teacher


def split(m, n): return set_batch_norm(m, 'split', n)
def plain(m): return set_batch_norm(m, 'plain')
def norms(net): return [m for m in net.modules() if isinstance(m, _BatchNorm)]

def close(a, b, tol=1e-9):
    "Relative to the largest; everything in float64, where a wrong implementation is off by 1e-3 and more"
    return a.dtype==b.dtype and a.shape==b.shape and bool((a-b).abs().max() <= tol*(1+b.abs().max()))

def randomized(net):
    "`net` with random weights and running statistics in its batch norms"
    for m in norms(net):
        for t in (m.weight, m.running_var): t is None or nn.init.uniform_(t, 0.5, 2)
        for t in (m.bias, m.running_mean): t is None or nn.init.normal_(t)
    return net

def batches(*shape, n=3):
    return [
        3 * torch.randn(*shape, dtype=torch.double) + torch.randn(shape[0], *[1] * (len(shape) - 1)) for _ in range(n)
    ]


def passes(net, xs):
    """Outputs, and gradients of the inputs, of one training pass for each batch; the parameters' gradients pile up
    in `net`"""
    outs,grads = [],[]
    for x in xs:
        x = x.detach().clone().requires_grad_()
        y = net(x)
        (y*torch.linspace(-1, 2, y[0].numel(), dtype=y.dtype).view_as(y[0])).pow(2).sum().backward()
        outs.append(y.detach())
        grads.append(x.grad)
    return outs,grads

def differences(net, xs, n, make=split, tol=1e-9):
    "What `make(net, n)` does otherwise than `n` copies of `net` with a part of each batch, their statistics averaged"
    made,copies = make(deepcopy(net), n),[deepcopy(net) for _ in range(n)]
    got,want = passes(made, xs),[passes(c, [x[i::n] for x in xs]) for i,c in enumerate(copies)]
    wrong = [nm for j,nm in enumerate(('outputs', 'gradients'))
             if not all(close(o[i::n], w, tol) for i in range(n) for o,w in zip(got[j], want[i][j], strict=True))]
    for (k,p),*ps in zip(made.named_parameters(), *[c.parameters() for c in copies], strict=True):
        if not close(p.grad, sum(q.grad for q in ps), tol): wrong.append(f'{k}.grad')
    for (k,b),*bs in zip(made.named_buffers(), *[c.buffers() for c in copies], strict=True):
        if not (close(b, torch.stack(bs).mean(0), tol) if b.is_floating_point() else all(b.equal(o) for o in bs)):
            wrong.append(k)
    return wrong

# one layer

layers = [
    (nn.BatchNorm1d, (12, 5)),
    (nn.BatchNorm1d, (12, 5, 3)),
    (nn.BatchNorm2d, (12, 5, 3, 2)),
    (nn.BatchNorm3d, (12, 5, 2, 3, 2)),
]
options = [
    {},
    dict(momentum=0.3),
    dict(momentum=0.0),
    dict(momentum=None),
    dict(affine=False),
    dict(track_running_stats=False),
    dict(eps=0.1),
]
each_layer = pytest.mark.parametrize('cls,shape', layers, ids=['1d','1d-length','2d','3d'])
each_option = pytest.mark.parametrize(
    'kw', options, ids=lambda kw: '-'.join(f'{k}={v}' for k, v in kw.items()) or 'default'
)


def layer(cls=nn.BatchNorm2d, **kw): return randomized(cls(5, **kw).double())

@each_layer
@each_option
def test_is_n_layers_with_a_part_each(cls, shape, kw):
    for n in (1, 2, 3, 6): assert differences(layer(cls, **kw), batches(*shape), n)==[]

class OtherStats(nn.BatchNorm2d):
    "Normalises each part by itself, and leaves `how`'s running statistics behind"
    def forward(self, x):
        old,stats,ys = [b.clone() for b in self.buffers()],[],[]
        for i in range(self.n):
            if self.how!='of one part after the other': self.put(old)
            ys.append(super().forward(x[i::self.n]))
            stats.append([b.clone() for b in self.buffers()])
        mean,var,count = [torch.stack(o) for o in zip(*stats)]
        if self.how=='averaged': self.put([mean.mean(0), var.mean(0), count[0]])
        elif self.how=='of the first part': self.put(stats[0])
        elif self.how == 'of the whole batch':
            self.put(old)
            super().forward(x.detach())
        elif self.how == 'biased':
            m, share = x.numel() / 5 / self.n, ifnone(self.momentum, 1 / count[0])
            self.put(
                [mean.mean(0), old[1] * (1 - share) + (var.mean(0) - old[1] * (1 - share)) * (m - 1) / m, count[0]]
            )
        return torch.stack(ys, 1).flatten(0, 1)

    def put(self, vals):
        for b,v in zip(self.buffers(), vals): b.data.copy_(v)

def other_stats(m, n, how):
    m.__class__,m.n,m.how = OtherStats,n,how
    return m

@pytest.mark.parametrize('momentum', [0.1, None])
def test_other_statistics_are_flagged(momentum):
    def flagged(make): return differences(layer(momentum=momentum), batches(12, 5, 3, 2), 3, make)
    assert flagged(lambda m,n: m)==['outputs', 'gradients', 'weight.grad', 'bias.grad', 'running_var']
    assert flagged(lambda m,n: split(m, 2))==['outputs', 'gradients', 'weight.grad', 'bias.grad', 'running_var']
    assert flagged(partial(other_stats, how='averaged'))==[]
    assert flagged(partial(other_stats, how='of the first part'))==['running_mean', 'running_var']
    assert (
        flagged(partial(other_stats, how='of the whole batch'))
        == flagged(partial(other_stats, how='biased'))
        == ['running_var']
    )
    assert 'num_batches_tracked' in flagged(partial(other_stats, how='of one part after the other'))
    if momentum: assert 'running_mean' in flagged(partial(other_stats, how='of one part after the other'))

@each_layer
@each_option
def test_is_plain_in_evaluation_and_for_one_part(cls, shape, kw):
    bn,(x,) = layer(cls, **kw),batches(*shape, n=1)
    one,many = split(deepcopy(bn), 1),split(deepcopy(bn), 4)
    assert not torch.equal(many(x), bn(x)) and torch.equal(
        one(x), deepcopy(bn).train()(x)
    )  # control: training makes a difference
    many = split(deepcopy(bn), 4)
    assert torch.equal(many.eval()(x[:7]), bn.eval()(x[:7]))                                 # of any size
    assert all(torch.equal(a, b) for a,b in zip(many.buffers(), bn.buffers()))

def test_flags_are_read_at_each_call():
    "`track_running_stats` and `momentum` may be changed after the layer was made"
    bn,xs = layer(),batches(12, 5, 3, 2)
    bn.track_running_stats = False
    before = bn.running_mean.clone()
    assert differences(bn, xs, 3)==[] and torch.equal(bn.running_mean, before)
    bn.track_running_stats,bn.momentum = True,None
    assert differences(bn, xs, 3)==[]

@pytest.mark.parametrize('fmt', ['channels_last', 'transposed', 'strided'])
def test_memory_formats(fmt):
    xs = batches(12, 5, 3, 2)
    if fmt=='channels_last': xs = [x.contiguous(memory_format=torch.channels_last) for x in xs]
    if fmt=='transposed': xs = [x.transpose(2, 3) for x in xs]
    if fmt=='strided': xs = [torch.stack([x, -x], -1)[...,0] for x in xs]
    assert not xs[0].is_contiguous()
    assert differences(layer(), xs, 3)==[]
    assert close(*[split(nn.BatchNorm2d(5).double(), 3)(x) for x in (xs[0], xs[0].contiguous())])

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    "Output in the input's type, statistics in the layer's, under autocast and without"
    net = randomized(nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)))
    x,eps = torch.randn(12, 3, 6, 6),torch.finfo(dtype).eps
    with torch.autocast('cpu', dtype): assert net[0](x).dtype==dtype and differences(net, [x], 3, tol=4*eps)==[]
    with torch.autocast('cpu', dtype): assert 'outputs' in differences(net, [x], 3, lambda m,n: m, tol=4*eps)  # control
    made,h = split(deepcopy(net[1]), 3),x[:,:,:5].repeat(1,2,1,1)[:,:5].to(dtype)
    assert made(h).dtype==net[1](h).dtype==dtype and made.running_mean.dtype==torch.float32

def test_batches_it_cannot_split():
    bn = split(nn.BatchNorm1d(5), 8)
    for n in (1, 7, 12):  # 8 does not divide it
        with pytest.raises(ValueError, match=f'n_splits=8 must divide the batch, got a batch of {n}'):
            bn(torch.randn(n, 5))
    with pytest.raises(ValueError, match='n_splits=8 parts of a batch of 8'): bn(torch.randn(8, 5))
    with pytest.raises(ValueError, match='expected 2D or 3D'): bn(torch.randn(16, 5, 2, 2))
    split(nn.BatchNorm2d(5), 8)(torch.randn(8, 5, 2, 2))  # an image has more than one value
    with pytest.raises(ValueError, match='one value'): split(nn.BatchNorm2d(5), 8)(torch.randn(8, 5, 1, 1))

# whole networks

class Mixed(nn.Sequential):
    "All three layers of torch in one network"

    def __init__(self):
        super().__init__(
            nn.Conv3d(3, 4, 3),
            nn.BatchNorm3d(4),
            nn.Flatten(3),
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32, 6),
            nn.BatchNorm1d(6),
        )

    size = 3,4,4,4

archs = dict(
    resnet18=tv.resnet18, xresnet18=xresnet18, efficientnet_b0=tv.efficientnet_b0, timm_mobilenet='mobilenetv2_035'
)


def encoder(nm): return randomized(create_encoder(archs[nm], size=32, stem='standard').double())

@pytest.mark.parametrize('nm', archs)
def test_is_n_networks_with_a_part_each(nm):
    net = teacher_train(encoder(nm))  # no dropout and no stochastic depth, whose random numbers would differ
    assert len(norms(net))>=20 and (nm!='timm_mobilenet' or any(isinstance(m, BatchNormAct2d) for m in norms(net)))
    xs = batches(8, 3, 32, 32, n=1)
    assert differences(net, xs, 2, tol=1e-6)==[]

    but_one,all_split = [split(deepcopy(net), 2) for _ in range(2)]  # control: one layer of many is not split
    nm = [k for k,m in but_one.named_modules() if isinstance(m, SplitBatchNorm)][10]
    but_one.set_submodule(nm, plain(but_one.get_submodule(nm)))
    with torch.no_grad(): assert not close(but_one(xs[0]), all_split(xs[0]), tol=1e-3)

def test_split_teacher_in_the_model():
    "Split with the encoder or later, copied to the teacher, in training with it, averaged with it"
    x = torch.randn(8, 3, 16, 16)
    early = ReSSLModel(
        split(create_encoder(tv.resnet18, size=16), 4),
        queue_size=4,
        n_hidden=8,
        dim=4,
        projector_bn=True,
        predictor_layers=2,
    )
    assert all(isinstance(m, SplitBatchNorm) for m in norms(early.encoder)+norms(early.teacher[0]))
    assert not any(
        isinstance(m, SplitBatchNorm) for m in norms(early.projector) + norms(early.predictor) + norms(early.teacher[1])
    )
    split(early, 2)
    assert all(isinstance(m, SplitBatchNorm) and m.n_splits==2 for m in norms(early))
    early.train()
    assert {type(m).__name__ for m in early.teacher.modules() if m.training}=={'SplitBatchNorm'}
    z = early.teacher(x)
    other = plain(deepcopy(early)).teacher
    assert not torch.allclose(z, other(x), atol=1e-3)
    torch.testing.assert_close(z[::2], other(x[::2]))
    update_teacher(early.teacher, early.student, 0.)
    assert all(torch.equal(a, b) for a,b in zip(early.teacher.parameters(), early.student.parameters()))

# changing a model

def frozen(net):
    for p in list(net.parameters())[::3]: p.requires_grad_(False)
    for m in list(net.modules())[::2]: m.training = False
    for m in norms(net): m.register_forward_hook(lambda *_: None)
    return net

def snapshot(net):
    "All of `net` but which objects its batch norms are, their classes and what belongs to these"

    def tensors(d):
        return [
            (k, id(t), t.dtype, getattr(t, 'requires_grad', None), t.detach().double().sum().item())
            for k, t in d.items()
            if t is not None
        ]

    own = lambda m: {k:str(v) for k,v in vars(m).items() if k not in ('n_splits', 'process_group') and k[0]!='_'}
    return {
        nm: (
            not isinstance(m, _BatchNorm) and id(m),
            own(m),
            len(m._forward_hooks),
            tensors(m._parameters),
            tensors(m._buffers),
        )
        for nm, m in net.named_modules()
    }


def classes(net): return [(type(m), set(vars(m))) for m in net.modules()]

nets = dict(
    mixed=Mixed,
    half=lambda: Mixed().half(),
    root=lambda: nn.BatchNorm1d(5),
    none=lambda: nn.Linear(2, 2),
    act=lambda: BatchNormAct2d(5),
    tied=lambda: nn.Sequential(
        *[nn.BatchNorm2d(5, affine=False, momentum=None)] * 2, nn.BatchNorm2d(5, track_running_stats=False)
    ),
    xresnet18=lambda: create_encoder(xresnet18, size=32),
    timm=lambda: create_encoder('mobilenetv3_small_050', size=32),
)


@pytest.mark.parametrize('nm', nets)
def test_there_and_back(nm):
    net = frozen(randomized(nets[nm]()))
    before,types,n = snapshot(net),classes(net),len(norms(net))
    for kind in (
        'split',
        'sync',
        'split',
        'plain',
        'sync',
        'plain',
        'plain',
        'split',
        'split',
        'sync',
        'sync',
        'plain',
    ):
        made = set_batch_norm(net, kind, n_splits=3)
        assert made is net or isinstance(net, _BatchNorm)
        net = made
        assert snapshot(net) == before and len(norms(net)) == n
        assert all(
            isinstance(m, SplitBatchNorm) == (kind == 'split') and isinstance(m, nn.SyncBatchNorm) == (kind == 'sync')
            for m in norms(net)
        )
        assert all(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) for m in norms(net))
        assert (classes(net) == types) == (kind == 'plain' or not n)


def test_a_lossy_conversion_is_flagged():
    "torch's own makes new layers, without hooks, and fastai no longer sees that they are norms"
    net = frozen(Mixed())
    before,n = snapshot(net),len(norm_bias_params(net, with_bias=False))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(split(deepcopy(net), 2))
    assert {type(m) for m in norms(converted)}=={nn.SyncBatchNorm}  # as fastai's `to_distributed` does
    assert n==6 and len(norm_bias_params(converted, with_bias=False))==0
    assert [v[1:3] for v in snapshot(converted).values()] != [v[1:3] for v in before.values()]
    for kind in ('split', 'sync'): assert len(norm_bias_params(set_batch_norm(net, kind), with_bias=False))==n
    assert snapshot(net)==before
    net[1].eps = 1.
    assert snapshot(net)!=before

def test_number_of_parts_can_be_changed():
    net = split(Mixed(), 3)
    assert [m.n_splits for m in norms(split(net, 2))]==[2,2,2]
    assert 'n_splits=2' in repr(net) and [m.n_splits for m in norms(set_batch_norm(net, 'split'))]==[8,8,8]

@pytest.mark.parametrize('nm', ['mixed', 'act', 'timm'])
@pytest.mark.parametrize('kind', ['split', 'sync'])
def test_copied_and_pickled(nm, kind):
    net = randomized(nets[nm]()).train()
    set_batch_norm(net, kind, n_splits=2)
    x = torch.randn(4, *dict(mixed=Mixed.size, act=(5,3,3), timm=(3,32,32))[nm])
    for other in (deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert classes(other) == classes(net) and not {id(p) for p in other.parameters()} & {
            id(p) for p in net.parameters()
        }
        assert torch.equal(other(x), deepcopy(net)(x))
        assert not any(torch.equal(a, b) for a,b in zip(other.buffers(), net.buffers()))  # its statistics are its own
    assert plain(net).load_state_dict(other.state_dict()) and torch.equal(net.eval()(x), other.eval()(x))

@pytest.mark.parametrize('kind', ['split', 'sync'])
def test_activations_stay(kind):
    "timm's layer applies one after the norm; torch's conversion drops it"
    bn,(x,) = randomized(BatchNormAct2d(5).double()),batches(12, 5, 3, 2, n=1)
    made = set_batch_norm(deepcopy(bn), kind, n_splits=1)
    for mode in (True, False):
        y = made.train(mode)(x)
        assert torch.equal(y, bn.train(mode)(x)) and y.min()==0
    assert differences(bn.train(), [x], 3)==[]
    assert (nn.SyncBatchNorm.convert_sync_batchnorm(bn)(x)<0).any()  # control

def test_synchronised_elsewhere():
    """fastai's `to_distributed` leaves layers that do not tell what they were; numbers and fastai's view of them
    come back"""
    net,x = randomized(Mixed().double()),torch.randn(8, *Mixed.size, dtype=torch.double)
    foreign = nn.SyncBatchNorm.convert_sync_batchnorm(deepcopy(net))
    assert {type(m) for m in norms(set_batch_norm(foreign, 'sync'))}=={nn.SyncBatchNorm}
    back = plain(foreign)
    assert {type(m) for m in norms(back)}=={BatchNormNd} and len(norm_bias_params(back, with_bias=False))==6
    assert torch.equal(back(x), deepcopy(net)(x))
    back = plain(nn.SyncBatchNorm.convert_sync_batchnorm(deepcopy(net.train())))
    assert differences(back, [x], 2)==[] and torch.equal(split(back, 2)(x), split(deepcopy(net), 2)(x))
    assert {type(m) for m in norms(plain(convert_sync_batchnorm(nn.Sequential(BatchNormAct2d(5)))))}=={BatchNormAct2d}
    class Other(nn.SyncBatchNorm): pass
    with pytest.raises(ValueError, match='what a Other was'): plain(Other(5))
    assert type(set_batch_norm(Other(5), 'sync')) is Other

def test_refused():
    "And nothing is changed halfway"
    class Own(nn.BatchNorm2d):
        def forward(self, x): return super().forward(x).relu()
    class Renamed(nn.BatchNorm2d): pass

    for last, error in (
        (Own(5), 'Own has a forward of its own'),
        (BatchNorm1dFlat(5), 'forward of its own'),
        (nn.LazyBatchNorm2d(), 'no parameters yet'),
    ):
        net = nn.Sequential(nn.BatchNorm2d(5), last)
        for kind in ('split', 'sync'):
            with pytest.raises(ValueError, match=error):
                set_batch_norm(net, kind)
            assert type(net[0]) is nn.BatchNorm2d and type(net[1]) is type(last)
    assert type(plain(nn.Sequential(Own(5)))[0]) is Own
    assert differences(layer(Renamed), batches(12, 5, 3, 2), 3)==[]
    for kind in ('Split', '', None):
        with pytest.raises(ValueError, match='kind must be one of plain, split, sync, got'):
            set_batch_norm(nn.BatchNorm2d(5), kind)
    for n in (0, -1, 2.0, None):
        with pytest.raises(ValueError, match='n_splits must be'): set_batch_norm(nn.BatchNorm2d(5), 'split', n)
    assert set_batch_norm(nn.BatchNorm2d(5), 'split', np.int64(2)).n_splits==2

# shuffled

def wrong_order(shuffled):
    "Whether rows go to others than their own, or gradients do, or nothing is shuffled, on `shuffled`"
    x,seen,wrong = torch.randn(20, 3, requires_grad=True),[],[]

    def f(o):
        seen.append(o.detach())
        return o * o

    for _ in range(3): y = shuffled(f, x)
    if not torch.equal(y, x*x): wrong.append('rows')
    y[4].sum().backward()
    if not (x.grad[4].all() and x.grad.count_nonzero()==3): wrong.append('gradients')
    if any(torch.equal(o, x) for o in seen) or torch.equal(*seen[1:]): wrong.append('order')
    if any(not torch.equal(o.sort(0).values, x.detach().sort(0).values) for o in seen): wrong.append('content')
    return wrong

def test_shuffled():
    assert wrong_order(shuffled)==[]

    def undone_wrongly(f, x):
        perm = torch.randperm(len(x))
        return f(x[perm])[perm]

    def always_the_same(f, x):
        perm = torch.arange(len(x)).flip(0)
        return f(x[perm])[perm]

    def drawn_with_replacement(f, x):
        perm = torch.randint(len(x), (len(x),))
        return f(x[perm])[perm.argsort()]

    assert wrong_order(undone_wrongly)==['rows', 'gradients']
    assert wrong_order(always_the_same)==wrong_order(lambda f,x: f(x))==['order']
    assert 'content' in wrong_order(drawn_with_replacement)

def test_shuffled_draws_from_torchs_generator():
    bn,x = split(layer(), 3),batches(12, 5, 3, 2, n=1)[0]
    torch.manual_seed(1)
    a, b = shuffled(bn, x), shuffled(bn, x)
    torch.manual_seed(1)
    c, perm = shuffled(bn, x), torch.randperm(12)
    assert torch.equal(a, c) and not torch.allclose(a, b)
    want = torch.empty_like(x)
    want[perm] = bn(x[perm]).detach()
    assert torch.equal(b, want)
    assert not torch.allclose(b, bn(x))  # control: in another order the parts are others

# layout

@pytest.mark.parametrize('shape', [(8,3,5,4), (12,1,3,3), (8,6,1,1)])
@pytest.mark.parametrize('n', [1, 2, 4])
def test_channels_last_stays_so_and_changes_no_value(shape, n):
    bn = split(randomized(nn.BatchNorm2d(shape[1]).double()), n)
    x = torch.randn(shape, dtype=torch.double)
    last = x.to(memory_format=torch.channels_last)
    if x.is_contiguous() and last.is_contiguous(): assert 1 in (shape[1], *shape[2:])  # both layouts at once
    other = deepcopy(bn)
    (ys,),(gs,) = passes(bn, [x])
    (yl,),(gl,) = passes(other, [last])
    assert close(ys, yl) and close(gs, gl)
    assert all(close(a, b) for a,b in zip(bn.buffers(), other.buffers()) if a.is_floating_point())
    assert all(close(a.grad, b.grad) for a,b in zip(bn.parameters(), other.parameters()))
    assert yl.is_contiguous(memory_format=torch.channels_last) and ys.is_contiguous()
    swapped = [1, 0, *range(2, len(x))]
    wrong = bn(last[swapped])[swapped]
    assert n==1 or not close(wrong, yl)  # control: other parts

def test_a_split_network_keeps_channels_last_to_the_end():
    net = split(tv.resnet18(), 2).to(memory_format=torch.channels_last).train()
    kept = []
    def look(m, x, y): kept.append(y.is_contiguous(memory_format=torch.channels_last))
    for m in norms(net): m.register_forward_hook(look)
    net(torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last))
    assert len(kept)==20 and all(kept)
