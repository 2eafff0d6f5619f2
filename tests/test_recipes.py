"Recipes hold what was read in the official code (a table typed in once more, here), and train as it does."
import math
from functools import partial

import numpy as np, pytest, torch
from fastai.data.block import DataBlock
from fastai.data.transforms import Normalize, RandomSplitter
from fastai.torch_core import norm_bias_params
from fastai.vision.core import imagenet_stats
from fastai.vision.data import ImageBlock
from torch import nn

from ressl_fastai.batch_norm import SplitBatchNorm
from ressl_fastai.callback import InfoNCEWarmup
from ressl_fastai.loaders import get_normalize
from ressl_fastai.data import digits_dls
from ressl_fastai.models import create_encoder, small_resnet
from ressl_fastai.recipes import recipe, recipes

# PAPER.md, section 2; the small ones from cywinski/ressl_audio@9dff2db, ImageNet's from mingkai-zheng/ReSSL@4d67daa
views = dict(scale=(0.2, 1), flip_p=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=0.5,
             blur_sigma=(0.1, 2))
every = dict(views, bs=256, batch_norm='split', n_splits=8, student_temp=0.1, teacher_temp=0.04, projector_layers=2,
             projector_bn=False, predictor_layers=0, warmup=None, mom=0.9, decouple_wd=False, n_epoch=200,
             warmup_epochs=5)
small = dict(every, arch='resnet18', n_hidden=2048, dim=128, lr=0.06, wd=5e-4, wd_bn_bias=True)
cifar = dict(small, size=32, stem='small', queue_size=4096, teacher_momentum=0.99)
medium = dict(small, size=64, stem='small_pool', queue_size=16384, teacher_momentum=0.996)
imagenet = dict(every, arch='resnet50', n_hidden=4096, dim=512, lr=0.05, wd=1e-4, wd_bn_bias=False, size=224,
                stem='standard', queue_size=131072, teacher_momentum=0.999,
                norm_stats=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
official = {
    'cifar10': dict(cifar, norm_stats=((.4914,.4822,.4465),(.2023,.1994,.2010))),
    'cifar100': dict(cifar, norm_stats=((.5071,.4867,.4408),(.2675,.2565,.2761))),
    'stl10': dict(medium, norm_stats=((.4408,.4279,.3867),(.2682,.2610,.2686))),
    'tiny_imagenet': dict(medium, norm_stats=((.4802,.4481,.3975),(.2302,.2265,.2262))),
    'imagenet': imagenet,
    'imagenet_multicrop': dict(imagenet, sides=(224,192,160,128,96), min_scales=(.2,.172,.143,.114,.086),
                               max_scales=(1,.86,.715,.571,.429))}
train_sets = dict(cifar10='50,000', cifar100='50,000', stl10='105,000', tiny_imagenet='100,000', imagenet='1,281,167',
                  imagenet_multicrop='1,281,167')


def plain(o):
    if isinstance(o, (tuple,list)): return tuple(map(plain, o))
    return getattr(o, '__name__', o)

def differences(name, values):
    "Names whose value is not that of the table; also of those that only one of the two has"
    want = dict(official[name])
    if 'sides' in want: want['sides'] = tuple(o/224 for o in want['sides'])
    have = {k:plain(v) for k,v in values.items() if k!='train_set' and (v is not None or k=='warmup')}
    return sorted(k for k in want.keys()|have.keys() if k not in want or k not in have or plain(want[k])!=have[k])

other = {
    bool: lambda v: not v,
    str: lambda v: v + 'x',
    int: lambda v: v + 1,
    float: lambda v: v * 1.01,
    tuple: lambda v: (*v[:-1], 0.123),
    type(None): lambda v: InfoNCEWarmup(5),
}

@pytest.mark.parametrize('name', official)
def test_values_are_the_official_ones(name):
    r = recipe(name)
    assert differences(name, r.values)==[]
    assert train_sets[name] in r.train_set
    for k,v in official[name].items():  # the control: every single change is seen
        wrong = small_resnet if k=='arch' else other[type(v)](v)
        assert differences(name, recipe(name, **{k:wrong}).values)==[k]
    assert differences(name, {k:v for k,v in r.values.items() if k!='lr'})==['lr']

def test_every_shown_value_has_a_source_and_only_the_extension_is_ours():
    ours = {name: {k for k,s in recipe(name).sources.items() if s.startswith('ours')} for name in recipes}
    for name in recipes:
        r = recipe(name)
        assert all(r.sources.values()) and r.sources.keys()<=r.values.keys()
        assert {k for k,v in r.values.items() if v is not None}<=r.sources.keys()
        assert not any('recall' in s for s in r.sources.values())
        base,added = name.removesuffix('_plus'),{'predictor_layers','predictor_hidden','predictor_bn','warmup'}
        if base in official: assert ours[name]==(added if name.endswith('_plus') else set())
        else: assert ours[name]==r.sources.keys()
        if name.endswith('_plus'):
            assert {k for k in r.values if plain(r.values[k])!=plain(recipe(base).values[k])}==added
            assert (r.predictor_layers, r.predictor_hidden, r.predictor_bn)==(2, r.n_hidden, True)
            assert (r.warmup(0.024, 200), r.warmup(0.025, 200))==(1, 0)  # of 200 epochs 5

def test_overrides_one_at_a_time():
    base = recipe('stl10')
    for k, v in dict(
        lr=1.0, queue_size=7, arch='resnet34', teacher_momentum=0.5, stem='small', predictor_hidden=9
    ).items():
        r = recipe('stl10', **{k: v})
        assert [o for o in r.values if plain(r.values[o]) != plain(base.values[o])] == [k]
        assert [o for o in r.sources if r.sources[o] != base.sources.get(o)] == [k] and r.sources[k].startswith('yours')
        assert 'yours' in next(l for l in repr(r).splitlines() if l.startswith(k + ' '))
        assert sum('yours' in l for l in r._repr_markdown_().splitlines())==1
    assert 'instead of 0.06 (official' in recipe('stl10', lr=1.).sources['lr']
    assert recipe('stl10', arch='resnet34').arch.__name__=='resnet34'
    assert recipe('stl10').lr==0.06  # nothing sticks

def test_tables_show_every_value():
    for name in recipes:
        r = recipe(name)
        assert [l.split()[0] for l in repr(r).splitlines()[1:]] == [
            l.split('|')[1].strip() for l in r._repr_markdown_().splitlines()[2:]
        ]
        assert {row[0] for row in r.rows}==r.sources.keys()

@pytest.mark.parametrize('call, error, text', [
    (lambda: recipe('cifar_10'), ValueError, 'did you mean cifar10'),
    (lambda: recipe('zzz'), ValueError, 'imagenet_multicrop'),
    (lambda: recipe('cifar10', quue_size=3), TypeError, 'did you mean queue_size'),
    (lambda: recipe('cifar10', zzz=3), TypeError, 'fit_warmup|n_epoch'),
    (lambda: recipe('cifar10').zzz, AttributeError, 'zzz'),
    (lambda: setattr(recipe('cifar10'), 'lr', 1), AttributeError, "cannot assign to field 'lr'"),
    (lambda: recipe('cifar10', arch='resnet81'), ValueError, 'did you mean')])
def test_errors(call, error, text):
    with pytest.raises(error, match=text): call()


def dls(n=24, bs=8, tfms=None):
    "Coloured noise, 8 images of which are held out"
    ims = np.random.default_rng(0).integers(0, 256, (n,16,16,3), dtype=np.uint8)
    block = DataBlock(ImageBlock, get_x=ims.__getitem__, splitter=RandomSplitter(8/n, seed=0), batch_tfms=tfms)
    return block.dataloaders(range(n), bs=bs, num_workers=0)

tiny = dict(arch=partial(small_resnet, widen=0.125), bs=8, n_splits=2, queue_size=12, n_hidden=16, dim=8, size=16)

def weights(learn): return {k:v.clone() for k,v in learn.model.encoder.state_dict().items()}

def fit(r, learn, **kwargs):
    with learn.no_bar(), learn.no_logging(): r.fit(learn, **kwargs)
    return learn

def test_two_steps_train():
    r = recipe('cifar10', **tiny)
    learn = r.learner(dls())
    before = weights(learn)
    fit(r, learn, n_epoch=1, warmup_epochs=0, cbs=[])
    assert learn.train_iter==2 and all(math.isfinite(o) for o in learn.recorder.losses)
    assert any(not torch.equal(v, before[k]) for k,v in weights(learn).items())
    model = learn.model
    bns = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert (
        bns and all(isinstance(m, SplitBatchNorm) and m.n_splits == 2 for m in bns) and learn.ressl.shuffle
    )  # the teacher's, too
    assert model.encoder.stem=='small' and model.queue.size==12 and model.queue.feats.shape==(12,8)
    assert [type(o) for o in model.projector]==[nn.Linear,nn.ReLU,nn.Linear]
    assert model.projector[0].out_features==16 and len(model.predictor)==0
    assert (learn.ressl.teacher_momentum, learn.ressl.student_temp, learn.ressl.teacher_temp, learn.ressl.warmup) == (
        0.99,
        0.1,
        0.04,
        None,
    )
    strong,weak = learn.ressl.strong_tfms,learn.ressl.weak_tfms
    assert (weak.size, weak.scale, weak.jitter_p, weak.gray_p, weak.blur_p, weak.flip_p) == (
        (16, 16),
        (0.2, 1.0),
        0,
        0,
        0,
        0.5,
    )
    assert {k:getattr(strong, k) for k in views}==views and strong.size==(16,16)
    torch.testing.assert_close(get_normalize(learn.dls).mean.flatten().cpu(), torch.tensor(r.norm_stats[0]))
    torch.testing.assert_close(get_normalize(learn.dls).std.flatten().cpu(), torch.tensor(r.norm_stats[1]))

def test_all_values_reach_the_learner():
    "What is given to `ressl_learner` is what the recipe says, value by value"
    looks = dict(
        scale=(0.3, 0.9),
        flip_p=0.25,
        jitter=(0.1, 0.2, 0.3, 0.4),
        jitter_p=0.3,
        gray_p=0.6,
        blur_p=0.1,
        blur_sigma=(0.2, 0.3),
    )
    r = recipe(
        'cifar10_plus',
        **tiny,
        **looks,
        student_temp=0.2,
        teacher_temp=0.05,
        teacher_momentum=0.9,
        predictor_hidden=5,
        predictor_bn=False,
        projector_bn=True,
        stem='small_pool',
        wd=0.1,
        lr=0.7,
        mom=0.8,
        batch_norm='plain',
    )
    learn = r.learner(dls())
    cb,model = learn.ressl,learn.model
    assert (cb.student_temp, cb.teacher_temp, cb.teacher_momentum, cb.warmup)==(0.2, 0.05, 0.9, r.warmup)
    assert [type(o) for o in model.projector]==[nn.Linear,nn.BatchNorm1d,nn.ReLU,nn.Linear]
    assert [type(o) for o in model.predictor]==[nn.Linear,nn.ReLU,nn.Linear] and model.predictor[0].out_features==5
    assert not learn.ressl.shuffle and not any(isinstance(m, SplitBatchNorm) for m in model.modules())
    assert model.encoder.stem=='small_pool' and (learn.lr, learn.wd, learn.moms)==(0.7, 0.1, (0.8,)*3)
    assert {k:getattr(cb.strong_tfms, k) for k in looks}==looks
    off = dict(jitter=(0,)*4, jitter_p=0, gray_p=0, blur_p=0, blur_sigma=(0.1,2.))
    assert {k:getattr(cb.weak_tfms, k) for k in looks}=={**looks, **off}
    learn.create_opt()
    assert learn.opt.hypers[0]['mom']==0.8

def test_multicrop_gives_the_five_crops():
    r = recipe('imagenet_multicrop', **{**tiny, 'size':224})
    tfms = r.learner_kwargs()['strong_tfms']
    assert [t.size for t in tfms]==[(s,s) for s in (224,192,160,128,96)]
    assert [t.scale for t in tfms]==[(.2,1.), (.172,.86), (.143,.715), (.114,.571), (.086,.429)]
    assert all(
        {k: getattr(t, k) for k in views if k != 'scale'} == {k: v for k, v in views.items() if k != 'scale'}
        for t in tfms
    )
    assert r.learner_kwargs()['weak_tfms'].size==(224,224)
    r = recipe('imagenet_multicrop', **tiny)
    learn = fit(r, r.learner(dls()), n_epoch=1, warmup_epochs=0)
    assert len(learn.ressl.strong_tfms)==5 and model_rows(learn)==5*8
    near = recipe('imagenet_multicrop', min_scales=(0.08,)*5, jitter=(0.8,0.8,0.8,0.2)).learner_kwargs()['strong_tfms']
    assert [(t.scale[0], t.jitter[0]) for t in near]==[(0.08, 0.8)]*5
    one = recipe('imagenet_multicrop', **tiny, sides=None).learner_kwargs()['strong_tfms']
    assert one.size==(16,16) and one.scale==(0.2,1.)
    assert [t.size[0] for t in recipe('cifar10', sides=(1,)*5).learner_kwargs()['strong_tfms']]==[32]*5

def model_rows(learn):
    x = torch.rand(8, 3, 16, 16)
    return len(learn.model(*[t(x) for t in learn.ressl.strong_tfms]))


# -- the optimizer, against torch's
def sgd_distance(name, steps=5, **changed):
    """Largest difference of the weights after steps on equal gradients: the recipe's optimizer, and torch's as the
    official code makes it"""
    r = recipe(name, **{**tiny, **changed})
    learn = r.learner(dls())
    learn.create_opt()
    learn.opt.set_hypers(lr=0.05, wd=r.wd*100)  # 100: loud
    named = [(k,p) for k,p in learn.model.named_parameters() if p.requires_grad]
    g = torch.Generator().manual_seed(0)
    for _,p in named: p.data = torch.randn(p.shape, generator=g)
    theirs = [nn.Parameter(p.data.clone()) for _,p in named]
    norms = {
        id(p) for m in learn.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters()
    }
    free = [name.startswith('imagenet') and (k.endswith('bias') or id(p) in norms) for k,p in named]
    groups = {wd:[p for p,f in zip(theirs, free) if f==(wd==0)] for wd in (0., official[name]['wd']*100)}
    opt = torch.optim.SGD([dict(params=ps, weight_decay=wd) for wd,ps in groups.items() if ps], lr=0.05, momentum=0.9)
    for _ in range(steps):
        for (_,p),q in zip(named, theirs):
            q.grad = torch.randn(p.shape, generator=g)
            p.grad = q.grad.clone()
        learn.opt.step()
        opt.step()
    return max((p-q).abs().max().item() for (_,p),q in zip(named, theirs))

@pytest.mark.parametrize('name', ['cifar10', 'imagenet'])
def test_optimizer_steps_are_torchs(name): assert sgd_distance(name)<1e-5

@pytest.mark.parametrize(
    'changed', [dict(decouple_wd=True), dict(mom=0.85), dict(mom=0.0), dict(wd_bn_bias=False), dict(wd=1e-4)], ids=str
)
def test_other_optimizers_are_caught(changed): assert sgd_distance('cifar10', **changed)>1e-3

def test_imagenet_decays_no_norm_and_no_bias():
    assert sgd_distance('imagenet', wd_bn_bias=True)>1e-3
    for name in ('imagenet_efficientnet_b0', 'imagenet_mobilenet_v3_large'):
        r = recipe(name)
        assert r.wd_bn_bias is False
        encoder = create_encoder(r.arch, size=32)
        free = {id(p) for p in norm_bias_params(encoder)}
        assert all((id(p) in free)==(p.ndim==1) for p in encoder.parameters())
        assert encoder.nf==dict(imagenet_efficientnet_b0=1280, imagenet_mobilenet_v3_large=960)[name]


# -- the schedule, against the official formula
def official_lr(base_lr, n_epoch, per_epoch, warmup_epochs=5):
    lrs = []
    for epoch in range(n_epoch):
        for i in range(per_epoch):
            t = epoch*per_epoch + i
            if epoch<warmup_epochs:
                lrs.append(base_lr * t / (warmup_epochs * per_epoch))
            else:
                lrs.append(
                    0.5
                    * base_lr
                    * (
                        1
                        + math.cos((t - warmup_epochs * per_epoch) / ((n_epoch - warmup_epochs) * per_epoch) * math.pi)
                    )
                )
    return torch.tensor(lrs, dtype=torch.float64)

def test_learning_rate_follows_the_official_formula():
    r = recipe('cifar10', **tiny, n_epoch=9)
    learn = fit(r, r.learner(dls()))
    lrs = torch.tensor(learn.recorder.hps['lr'], dtype=torch.float64)
    assert len(lrs)==18 and lrs[0]==0
    torch.testing.assert_close(lrs, official_lr(0.06, 9, 2), atol=1e-7, rtol=0)  # fastai keeps float32
    assert 'mom' not in learn.recorder.hps and learn.opt.hypers[0]['mom']==0.9 and learn.opt.hypers[0]['wd']==5e-4
    for wrong in (official_lr(0.06, 9, 2, 4), official_lr(0.05, 9, 2), official_lr(0.06, 10, 2)[:18]):
        assert (lrs - wrong).abs().max() > 1e-3


# -- what does not fit is refused
def stats_tfms(mean, std): return [Normalize.from_stats(mean, std, cuda=False)]

@pytest.mark.parametrize(
    'r, data, text',
    [
        (
            recipe('cifar10', **{**tiny, 'bs': 4}),
            dls,
            r'bs is 8, not 4.*the 2 parts .* have 4 images, not 2.*, bs=8, n_splits=4\)',
        ),
        (recipe('cifar10', **{**tiny, 'bs': 4}, batch_norm='plain'), dls, r'recipe\(.cifar10., bs=8\)'),
        (recipe('cifar10', **{**tiny, 'queue_size': 17}), dls, '16 training images cannot fill queue_size=17'),
        (recipe('cifar10'), dls, r'bs=8, n_splits=1, queue_size=16\)'),
        (
            recipe('cifar10', **{**tiny, 'bs': 64, 'n_splits': 2}),
            partial(dls, n=104, bs=96),
            r'recipe\(.cifar10., bs=96, n_splits=3\)',
        ),
        (recipe('cifar10', **{**tiny, 'n_splits': 3}), dls, r'8 images cannot be 3 equal parts.*n_splits=4\)'),
        (recipe('cifar10', **{**tiny, 'n_splits': 8}), dls, r'cannot be 8 equal parts of two.*n_splits=4\)'),
        (recipe('cifar10', **{**tiny, 'bs': 16, 'n_splits': 4}), partial(dls, bs=14), r'bs=14, n_splits=2\)'),
        (recipe('cifar10', **tiny), partial(dls, bs=10), r'^(?!.*n_splits).*recipe\(.cifar10., bs=10\)'),
        (recipe('cifar10', **tiny), partial(digits_dls, bs=8), r'1 channels.*norm_stats=None'),
        (
            recipe('cifar10', **tiny),
            partial(dls, tfms=stats_tfms(*imagenet_stats)),
            'Normalize has .*0.485.*norm_stats=None',
        ),
    ],
)
def test_data_that_contradict_a_recipe_are_refused(r, data, text):
    data = data()
    before = list(data.train.after_batch.fs)
    with pytest.raises(ValueError, match=text): r.learner(data)
    assert list(data.train.after_batch.fs)==before  # and nothing was added to them

def test_data_that_fit_are_taken():
    recipe('cifar10', **{**tiny, 'queue_size':16}).learner(dls())
    learn = recipe('cifar10', **tiny).learner(dls(tfms=stats_tfms(*official['cifar10']['norm_stats'])))
    assert sum(isinstance(f, Normalize) for f in learn.dls.train.after_batch.fs)==1
    gray = recipe('cifar10', **tiny, norm_stats=None).learner(digits_dls(bs=8))
    assert gray.model.encoder.n_in==1
    with pytest.raises(
        TypeError, match=r'lr and queue_size belong to the recipe: recipe\(.cifar10., lr=\.\.\., queue_size=\.\.\.\)'
    ):
        recipe('cifar10', **tiny).learner(dls(), lr=1., queue_size=3)
    with pytest.raises(TypeError, match='path_'): recipe('cifar10', **tiny).learner(dls(), path_='x')

def test_batch_size_counts_all_processes(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '4')
    learn = recipe('cifar10', **{**tiny, 'bs':32, 'n_splits':8}).learner(dls())
    assert {m.n_splits for m in learn.model.modules() if isinstance(m, SplitBatchNorm)}=={2}
    with pytest.raises(ValueError, match='bs is 32, not 8'): recipe('cifar10', **tiny).learner(dls())

def test_too_few_epochs_are_refused():
    r = recipe('cifar10_plus', **tiny)
    learn = r.learner(dls())
    with pytest.raises(ValueError, match='warmup_epochs must be'): fit(r, learn, n_epoch=6, warmup_epochs=6)
    with pytest.raises(ValueError, match='leaves no epoch for the relational loss'):
        fit(r, learn, n_epoch=5, warmup_epochs=0)
    nce = recipe(
        'cifar10', **tiny, warmup=InfoNCEWarmup(end=1.0), n_epoch=1, warmup_epochs=0
    )  # InfoNCE alone, on purpose
    fit(nce, nce.learner(dls()))
