"""Thousands of random cases: the queue against a deque, the loss against its formula, configurations that work or
say which argument is wrong."""

from collections import deque
from functools import partial
from itertools import count
from re import search

import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

from ressl_fastai.callback import InfoNCEWarmup
from ressl_fastai.data import digits_dls
from ressl_fastai.feature_queue import FeatureQueue
from ressl_fastai.learner import ressl_learner
from ressl_fastai.losses import info_nce_loss, relation, ressl_loss
from ressl_fastai.recipes import recipe
from ressl_fastai.views import RandomView

def cases(n, **strategies):
    "`n` cases, the same in every run"
    return lambda f: settings(
        max_examples=n, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )(given(**strategies)(f))


def documented(call, names):
    "What `call` gives; a mistake must be a ValueError or TypeError that names one of `names`"
    try:
        return call()
    except (ValueError, TypeError) as e:
        assert any(search(rf'\b{nm}\b', str(e)) for nm in names), f"{type(e).__name__} names none of {names}: {e}"


# queue

class Counted:
    "Rows that tell themselves apart"
    def __init__(self): self.rows = count(1)

    def __call__(self, n, dim):
        return torch.tensor([[next(self.rows)] * dim for _ in range(n)], dtype=torch.float32).view(n, dim)


def run_queue(size, dim, ns, queue=None):
    queue,expected,new = queue or FeatureQueue(size, dim),deque(maxlen=size),Counted()
    for n in ns:
        z = new(n, dim)
        queue.enqueue(z)
        expected.extend(z[:, 0].tolist())
        assert int(queue.count)==len(expected)==len(queue.filled) and queue.in_order[:,0].tolist()==list(expected)
        assert 0<=int(queue.ptr)<size and sorted(queue.filled[:,0].tolist())==sorted(expected)
        assert (queue.filled==queue.filled[:,:1]).all()  # rows stay whole

sizes = st.integers(1, 12)
@cases(800, size=sizes, dim=st.integers(1, 4), ns=st.lists(st.integers(0, 30), max_size=12))
def test_queue_is_a_deque(size, dim, ns): run_queue(size, dim, ns)

def test_control_a_queue_that_drops_what_crosses_its_end_is_found():
    "The defect of lightly's memory bank"
    class Dropping(FeatureQueue):
        def enqueue(self, z):
            n = min(len(z), self.size-int(self.ptr))
            super().enqueue(z[:n])
    run_queue(4, 2, [2,2,4], Dropping(4, 2))  # where nothing crosses it, it is right
    with pytest.raises(AssertionError): cases(800, size=sizes, ns=st.lists(st.integers(0, 30), max_size=12))(
        lambda size, ns: run_queue(size, 1, ns, Dropping(size, 1)))()

@cases(
    300,
    before=st.lists(st.integers(0, 9), max_size=5),
    after=st.lists(st.integers(0, 9), max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_a_saved_queue_goes_on_as_it_would_have(before, after, dtype):
    a,b,new = FeatureQueue(5, 2, dtype),FeatureQueue(5, 2, dtype),Counted()
    for n in before: a.enqueue(new(n, 2))
    b.load_state_dict({k:v.clone() for k,v in a.state_dict().items()})
    for n in after:
        z = new(n, 2)
        for q in (a,b): q.enqueue(z)
    assert all(torch.equal(v, b.state_dict()[k]) for k,v in a.state_dict().items())

# losses

dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
temps = st.floats(0.01, 5.)
shapes = dict(
    bs=st.integers(1, 9),
    views=st.integers(1, 3),
    k=st.integers(1, 70),
    dim=st.integers(1, 9),
    dtype=dtypes,
    scale=st.floats(0.1, 8.0),
    seed=st.integers(0, 10**6),
)


def embeddings(bs, views, k, dim, dtype, scale, seed):
    "As the model makes them (of length 1), times `scale`"
    g = torch.Generator().manual_seed(seed)
    return [
        (scale * nn.functional.normalize(torch.randn(n, dim, generator=g, dtype=torch.float64), dim=1)).to(dtype)
        for n in (bs * views, bs, k)
    ]


def value_and_gradient(loss, z, *args):
    z = z.detach().clone().requires_grad_()
    res = loss(z, *args)
    res.sum().backward()
    return res.detach(),z.grad

def formula(z, z_teacher, queue, student_temp, teacher_temp):
    "Per row, from the definition, in float64"
    z,t,q = (o.double() for o in (z, z_teacher.repeat(len(z)//len(z_teacher), 1), queue))
    return -((t@q.T/teacher_temp).softmax(1)*(z@q.T/student_temp).log_softmax(1)).sum(1)

def nce_formula(z, z_teacher, queue, temp):
    z,t,q = (o.double() for o in (z, z_teacher.repeat(len(z)//len(z_teacher), 1), queue))
    return -torch.cat([(z*t).sum(1, keepdim=True), z@q.T], 1).div(temp).log_softmax(1)[:,0]

def check_loss(loss, formula, zs, temps, scale):
    (got, grad), (want, want_grad) = (
        value_and_gradient(partial(loss, reduction='none'), zs[0], *zs[1:], *temps),
        value_and_gradient(formula, zs[0], *zs[1:], *temps),
    )
    wide = zs[0].dtype==torch.float64
    size = 1 + scale**2/min(temps)  # of the logits, whose rounding is what differs
    assert (
        got.dtype == (torch.float64 if wide else torch.float32)
        and grad.dtype == zs[0].dtype
        and torch.isfinite(got).all()
    )
    eps = 1e-13 if wide else 1e-6
    assert (got-want).abs().max() <= 8*eps*size
    half = {torch.bfloat16:2**-7, torch.float16:2**-9}.get(zs[0].dtype, 0)  # the gradient is rounded to the type of z
    bound = size*(8*eps*size+half)
    assert torch.isfinite(grad).all() and (grad.double()-want_grad.double()).abs().max() <= bound

@cases(500, **shapes, student_temp=temps, teacher_temp=temps)
def test_relational_loss_and_its_gradient_are_the_formulas(student_temp, teacher_temp, **shape):
    check_loss(ressl_loss, formula, embeddings(**shape), (student_temp, teacher_temp), shape['scale'])

@cases(300, **shapes, temp=temps)
def test_info_nce_loss_and_its_gradient_are_the_formulas(temp, **shape):
    check_loss(info_nce_loss, nce_formula, embeddings(**shape), (temp,), shape['scale'])


def test_control_swapped_temperatures_are_found():
    def swapped(z, t, q, student_temp, teacher_temp, reduction):
        return ressl_loss(z, t, q, teacher_temp, student_temp, reduction)

    with pytest.raises(AssertionError):
        cases(20, **shapes)(
            lambda **shape: check_loss(swapped, formula, embeddings(**shape), (0.1, 0.04), shape['scale'])
        )()


@cases(200, **shapes, temp=temps)
def test_a_relation_is_a_distribution(temp, **shape):
    _,t,q = embeddings(**shape)
    p = relation(t, q, temp)
    assert p.shape==(len(t), len(q)) and (p>=0).all() and (p.sum(1)-1).abs().max()<1e-5

@cases(
    600,
    a=st.tuples(st.integers(0, 4), st.integers(0, 3)),
    b=st.tuples(st.integers(0, 4), st.integers(0, 3)),
    q=st.tuples(st.integers(0, 4), st.integers(0, 3)),
    temp=st.one_of(st.floats(-1, 1), st.just(float('nan'))),
    other=st.floats(-1, 1),
    reduction=st.sampled_from(['mean', 'sum', 'none', 'max', None]),
)
def test_losses_take_what_fits_and_name_what_does_not(a, b, q, temp, other, reduction):
    zs, bad = (
        [torch.ones(o) for o in (a, b, q)],
        not a[1] == b[1] == q[1]
        or not q[0]
        or not b[0]
        or not a[0]
        or a[0] % b[0]
        or reduction not in ('mean', 'sum', 'none'),
    )
    for call, wrong in (
        (lambda: ressl_loss(*zs, temp, other, reduction), bad or not (temp > 0 and other > 0)),
        (lambda: info_nce_loss(*zs, temp, reduction), bad or not temp > 0),
    ):
        res = documented(
            call, ['z_student', 'embeddings', 'queue', 'temp', 'student_temp', 'teacher_temp', 'reduction']
        )
        assert (res is None)==bool(wrong)

# configurations

numbers = st.one_of(st.floats(-2, 2), st.integers(-2, 300), st.just(float('nan')))
hundredths = st.integers(-20, 150).map(lambda i: i/100)
pairs = st.one_of(st.tuples(hundredths, hundredths), st.tuples(hundredths, hundredths).map(sorted).map(tuple))
shares = st.one_of(st.floats(0, 1), st.floats(-1, 2), st.just(float('nan')))

view_args = dict(
    size=st.one_of(st.integers(-1, 9), st.tuples(st.integers(0, 9), st.integers(1, 9))),
    scale=pairs,
    ratio=pairs,
    flip_p=shares,
    jitter=st.one_of(
        st.just((0.4, 0.4, 0.4, 0.1)), st.tuples(*[st.one_of(st.floats(-0.2, 1), st.just(float('nan')))] * 4)
    ),
    jitter_p=shares,
    gray_p=shares,
    blur_p=shares,
    blur_sigma=pairs,
)

@cases(
    900,
    kwargs=st.fixed_dictionaries(
        {'size': view_args['size']}, optional={k: v for k, v in view_args.items() if k != 'size'}
    ),
    c=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_views_are_images_or_name_the_argument(kwargs, c, seed):
    if (tfm := documented(lambda: RandomView(**kwargs), kwargs)) is None: return
    torch.manual_seed(seed)
    x = torch.rand(3, c, 7, 5)
    y = tfm(x)
    assert y.shape==(3, c, *tfm.size) and torch.isfinite(y).all() and y.min()>=-1e-6 and y.max()<=1+1e-6

@cases(
    300,
    hold=numbers,
    ramp=numbers,
    shape=st.sampled_from(['linear', 'cosine', 'step', 'flat']),
    end=shares,
    temp=st.one_of(st.none(), numbers),
    fraction=st.booleans(),
    n_epoch=st.integers(1, 9),
)
def test_warmups_weigh_between_0_and_1_or_name_the_argument(n_epoch, **kwargs):
    if (w := documented(lambda: InfoNCEWarmup(**kwargs), kwargs)) is None: return
    weights = [w(i/20, n_epoch) for i in range(21)]
    assert all(0<=o<=1 for o in weights) and weights==sorted(weights, reverse=True)

dls = digits_dls(8, bs=32)
class Tiny(nn.Sequential):
    def __init__(self): super().__init__(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU())

learner_args = dict(
    teacher_momentum=shares,
    student_temp=numbers,
    teacher_temp=numbers,
    queue_size=st.one_of(st.none(), st.integers(-3, 1600), st.just(64.0)),
    n_hidden=st.integers(1, 9),
    dim=st.integers(-1, 9),
    projector_layers=st.integers(-1, 3),
    projector_bn=st.booleans(),
    predictor_layers=st.integers(-1, 3),
    predictor_hidden=st.one_of(st.none(), st.integers(1, 9)),
    predictor_bn=st.booleans(),
    batch_norm=st.sampled_from(['auto', 'plain', 'split', 'sync', 'frozen', 'group']),
    n_splits=st.integers(-1, 40),
    stem=st.sampled_from(['auto', 'standard', 'small', 'small_pool', 'tiny']),
    queue_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
also = {
    'queue_size': ['size'],
    'projector_layers': ['n_layers', 'n_layers=0'],
    'predictor_layers': ['n_layers'],
}


@cases(300, kwargs=st.fixed_dictionaries({}, optional=learner_args))
def test_learners_train_a_step_or_name_the_argument(kwargs):
    names = [*kwargs, *(o for k in kwargs for o in also.get(k, []))]
    learn = documented(
        lambda: ressl_learner(dls, Tiny(), **{**dict(n_hidden=8, dim=4, queue_size=64), **kwargs}), names
    )
    if learn is None: return
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad(): z = learn.model.eval()(x)
    assert z.shape==(2, learn.model.queue.feats.shape[1]) and (z.norm(dim=1)-1).abs().max()<1e-4

recipe_args = dict(
    bs=st.sampled_from([32, 64, 0, -8]),
    n_splits=st.integers(-1, 9),
    queue_size=st.one_of(st.none(), st.integers(-3, 1600)),
    size=st.integers(-1, 16),
    scale=pairs,
    flip_p=shares,
    jitter_p=shares,
    blur_p=shares,
    teacher_momentum=shares,
    student_temp=numbers,
    lr=numbers,
    dim=st.integers(1, 9),
    stem=st.sampled_from(['auto', 'small', 'odd']),
    norm_stats=st.sampled_from([None, ((0.3,), (0.3,)), ((0.3, 0.3, 0.3), (0.3, 0.3, 0.3))]),
    n_epochs=st.just(3),
)
fitting = dict(n_hidden=8, predictor_hidden=8, bs=32, n_splits=1, queue_size=64, norm_stats=None, stem='auto')

@cases(
    150,
    name=st.sampled_from(['cifar10', 'stl10_plus', 'imagenet_multicrop', 'cifar']),
    kwargs=st.fixed_dictionaries({}, optional=recipe_args),
)
def test_recipes_give_a_learner_or_name_the_value(name, kwargs):
    names = ['name', *kwargs, *(o for k in kwargs for o in also.get(k, []))]
    r = documented(lambda: recipe(name, **{'arch':Tiny(), **fitting, **kwargs}), names)
    if r is None: return
    assert str(r) and all(getattr(r, k) is v or getattr(r, k)==v or v!=v for k,v in kwargs.items())
    learn = documented(lambda: r.learner(dls), names)
    if learn is not None: assert learn.model.queue.size==r.queue_size or r.queue_size is None
