"""Encoders, stems, the model, handing over, nearest neighbours: against their libraries' whole models, arithmetic
by hand and scikit-learn."""

import random
from copy import deepcopy
from functools import partial

import numpy as np, pytest, timm, torch, torchvision.models as tv
import torch.nn.functional as F
from fastai.torch_core import defaults
from fastai.vision.all import (CategoryBlock, DataBlock, Flip, ImageBlock, IndexSplitter, Normalize, PILImage,
                               PILImageBW, params, unet_learner, vision_learner)
from fastai.vision.models import xresnet
from sklearn.neighbors import KNeighborsClassifier
from helpers import close, families, fit, same, state
from torch import Tensor, nn

from ressl_fastai.checkpoint import Checkpoint
from ressl_fastai.data import digits_dls
from ressl_fastai.health import Guard
from ressl_fastai.loaders import get_normalize
from ressl_fastai.evaluate import embed, knn_accuracy
from ressl_fastai.learner import ressl_learner
from ressl_fastai.transfer import load_encoder
from ressl_fastai.models import ReSSLModel, body_stem, create_encoder, get_arch, set_stem, small_resnet

tiny_resnet = partial(small_resnet, widen=0.125)
vit = partial(tv.VisionTransformer, image_size=64, patch_size=16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64)
archs = dict(families, mobilenet_v3_small=tv.mobilenet_v3_small, shufflenet=tv.shufflenet_v2_x0_5,
             mnasnet=tv.mnasnet0_5, vit=vit, tiny_resnet=tiny_resnet, timm_resnet18='resnet18')

def arch_of(nm): return archs.get(nm) or getattr(tv, nm, nm)
def shapes(m): return [(k,v.shape) for k,v in m.state_dict().items()]

def image_dls(n_in=3, size=24, labels=True, n=24, norm=None):
    "Noise images with two labels, the last four for validation; `ims` holds them all"
    ims = np.random.RandomState(0).randint(0, 256, (n,size,size,3)[:3 if n_in==1 else 4], dtype=np.uint8)
    block = DataBlock(
        (ImageBlock(PILImage if n_in == 3 else PILImageBW), CategoryBlock)[: 1 + labels],
        get_x=ims.__getitem__,
        splitter=IndexSplitter(range(n - 4, n)),
        get_y=(lambda i: i % 3 % 2) if labels else None,
        batch_tfms=norm and Normalize.from_stats([norm] * n_in, [0.5] * n_in, cuda=False),
    )
    dls = block.dataloaders(range(n), bs=4, num_workers=0)
    dls.ims = torch.tensor(ims).view(n, size, size, -1).permute(0, 3, 1, 2)/255
    return dls

def make(arch=tiny_resnet, n_in=1, dls=None, **kwargs):
    return ressl_learner(
        dls or image_dls(n_in), arch, **{**dict(queue_size=8, n_hidden=16, dim=8, metrics=[]), **kwargs}
    )


def clf_of(path, arch=tiny_resnet, n_in=1, **kwargs):
    return vision_learner(image_dls(n_in, **kwargs), arch, pretrained=False, n_in=n_in, path=path)


# create_encoder

def headless(arch, n_in):
    "The whole model, as its library runs it, without its classifier"
    if isinstance(arch, str): return timm.create_model(arch, num_classes=0, in_chans=n_in)
    model = arch()
    setattr(
        model,
        next((nm for nm in ('fc', 'classifier', 'heads') if hasattr(model, nm)), str(len(list(model.children())) - 1)),
        nn.Flatten(),
    )
    nm,conv = next((nm,m) for nm,m in model.named_modules() if isinstance(m, nn.Conv2d))
    parent,_,child = nm.rpartition('.')
    new = nn.Conv2d(n_in, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=conv.bias is not None)
    setattr(model.get_submodule(parent), child, new)
    return model

def silent(encoder, x):
    "Parameters that no gradient of the features reaches"
    encoder.train()(x).square().sum().backward()
    return [k for k,p in encoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()]

@pytest.mark.parametrize(
    'nm,n_in',
    [(k, 3) for k in archs] + [(k, n) for k in archs if k not in ('vit', 'resnet50', 'convnext_tiny') for n in (1, 5)],
)
def test_features_are_those_of_the_whole_model(nm, n_in):
    enc, ref, x = (
        create_encoder(archs[nm], n_in, stem='standard').eval(),
        headless(archs[nm], n_in).eval(),
        torch.randn(2, n_in, 64, 64),
    )
    with torch.no_grad():
        got = enc(x)
        assert got.shape==(2,enc.nf) and got.isfinite().all() and not close(got[0], got[1])
        assert not close(got, ref(x))  # control: other weights
        for a,b in zip(ref.state_dict().values(), enc.state_dict().values(), strict=True): a.copy_(b)
        assert close(got, ref(x))
    assert silent(enc, x)==[]

def test_a_wrong_cut_is_flagged():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Conv2d(5, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x): return self.used(x)
    x = torch.randn(2, 5, 64, 64)
    assert silent(create_encoder(Unused(), 5), x)==['0.unused.weight', '0.unused.bias']
    assert silent(create_encoder(Unused().used, 5), x)==[]
    # fastai's own body of this network stops before its last convolution; ours is the same, to be handed over
    assert silent(create_encoder('mobilenetv3_small_100', 5), x)==['0.model.conv_head.weight', '0.model.conv_head.bias']

def test_transformers_take_the_size_they_are_made_for():
    enc = create_encoder('vit_tiny_patch16_224', 1, size=224)
    assert (enc.nf,enc.stem)==(192,'standard') and silent(enc, torch.randn(2, 1, 224, 224))==[]
    for arch,kw,why in (('vit_tiny_patch16_224',{},'does not take images'), (vit,dict(size=32),'does not take images')):
        with pytest.raises(ValueError, match=why): create_encoder(arch, **kw)

@pytest.mark.parametrize(
    'nm',
    [k for k in archs if k not in ('vit', 'shufflenet', 'mnasnet', 'mobilenet_v2')]
    + ['mobilenetv3_small_100', 'densenet121'],
)
def test_body_is_vision_learners(nm, tmp_path):
    "The same tensors in the same order, for the networks that `vision_learner` can cut"
    body = clf_of(tmp_path, arch_of(nm)).model[0]
    assert shapes(create_encoder(arch_of(nm), 1, stem='standard')[0])==shapes(body)
    assert shapes(create_encoder(arch_of(nm), 5, stem='standard')[0])!=shapes(body)  # control

def test_get_arch_finds_every_library():
    assert (
        get_arch('resnet18') is tv.resnet18
        and get_arch('xse_resnet18') is xresnet.xse_resnet18
        and get_arch('small_resnet') is small_resnet
    )
    assert get_arch('test_vit')=='test_vit' and get_arch('convnext_tiny') is tv.convnext_tiny
    for nm, near in (
        ('mobilenet_v4', 'mobilenet_v'),
        ('smal_resnet', 'small_resnet'),
        ('tf_efficentnet_b0', 'tf_efficientnet_b0'),
    ):
        with pytest.raises(ValueError, match=f"got '{nm}'; did you mean .*{near}"): get_arch(nm)
    with pytest.raises(ValueError, match="got '%%%'$"): get_arch('%%%')

# stems

shrinks = dict(
    resnet18=(32, 16, 8),
    xresnet18=(32, 16, 8),
    timm_resnet18=(32, 16, 8),
    mobilenet_v2=(32, 16, 16),
    efficientnet_b0=(32, 16, 16),
)  # two have no max-pool


def last_map(enc, x):
    "Height and width of the last feature map, whoever pools it"
    maps = []
    hooks = [
        m.register_forward_hook(lambda m, i, o: maps.append(tuple(o.shape[2:])))
        for m in enc.modules()
        if isinstance(m, nn.Conv2d)
    ]
    with torch.no_grad(): enc.eval()(x)
    for h in hooks: h.remove()
    return maps[-1]

@pytest.mark.parametrize('nm', shrinks)
@pytest.mark.parametrize('size', [32,64])
def test_resolution_that_a_stem_leaves(nm, size):
    x = torch.randn(1, 3, size, size)
    for stem,by in zip(('standard','small_pool','small'), shrinks[nm]):
        enc = create_encoder(archs[nm], stem=stem, size=size)
        assert last_map(enc, x)==(size//by,size//by) and enc.stem==body_stem(enc[0])==stem
    if nm == 'resnet18':
        enc[0][0].padding = (2, 2)
        assert last_map(enc, x) == (size // 8 + 1, size // 8 + 1)  # control: the known mistake (D30)


def test_stem_auto_follows_the_shorter_side():
    for size, stem in (
        (32, 'small'),
        (40, 'small'),
        (41, 'small_pool'),
        (80, 'small_pool'),
        (81, 'standard'),
        ((32, 128), 'small'),
        ((128, 64), 'small_pool'),
    ):
        assert create_encoder(tiny_resnet, size=size).stem==stem, size
    for arch in (vit, tv.convnext_tiny, tiny_resnet()): assert create_encoder(arch).stem=='standard'

def test_stems_that_cannot_be_are_refused():
    for body, stem, why in (
        (tiny_resnet(), 'tiny', 'must be one of'),
        (nn.Flatten(), 'small', 'has none'),
        (tv.convnext_tiny(), 'small', 'patches of 4'),
        (set_stem(tiny_resnet(), 'small'), 'small_pool', 'already has'),
    ):
        before = shapes(body)
        with pytest.raises(ValueError, match=why):
            set_stem(body, stem)
        assert shapes(body)==before

def test_pretrained_weights_keep_their_stem(monkeypatch):
    "Mock weights: grey images have the features of the same images in three equal channels"
    calls,x = [],torch.randn(2, 1, 32, 32)

    def mock(pretrained):
        calls.append(pretrained)
        torch.manual_seed(5)
        return tiny_resnet()

    def by_weights(*, weights=None, **kwargs): return mock(weights)
    def by_flag(pretrained=False): return mock(pretrained)
    def by_none(): return mock(None)
    colour = create_encoder(by_weights, pretrained=True, size=32).eval()(x.expand(-1, 3, -1, -1))
    for arch in (by_weights, by_flag, partial(by_weights, progress=False)):
        enc = create_encoder(arch, 1, pretrained=True, size=32).eval()
        assert enc.stem=='standard' and close(enc(x), colour)
        assert not close(
            create_encoder(arch, 1, stem='standard', size=32).eval()(x), colour
        )  # control: a new first layer
    assert create_encoder(by_weights, pretrained=True, stem='small', size=32).stem=='small'    # asked for
    assert calls==['DEFAULT', 'DEFAULT', None, True, False, 'DEFAULT', None, 'DEFAULT']
    with pytest.raises(ValueError, match='neither a weights nor a pretrained'): create_encoder(by_none, pretrained=True)
    create = timm.create_model
    monkeypatch.setattr(
        timm,
        'create_model',
        lambda nm, pretrained, **kw: (calls.append(pretrained), create(nm, pretrained=False, **kw))[1],
    )
    assert [create_encoder('test_resnet', pretrained=o, size=32).stem for o in (True, False)] == [
        'standard',
        'small',
    ] and calls[-2:] == [True, False]


# ReSSLModel

def mlp(m, x):
    "Linear, batch norm in training mode if there is one, ReLU, linear"
    first,*bn,_,last = m
    h = x@first.weight.T + (0 if bn else first.bias)
    if bn: h = (h-h.mean(0))/(h.var(0, unbiased=False)+bn[0].eps).sqrt()*bn[0].weight+bn[0].bias
    return h.clamp(min=0)@last.weight.T+last.bias

def unit(z): return z/z.pow(2).sum(1, keepdim=True).sqrt()
def storages(*ms): return {t.untyped_storage().data_ptr() for m in ms for t in (*m.parameters(), *m.buffers())}

@pytest.mark.parametrize('bn', [False,True])
@pytest.mark.parametrize('predictor', [False,True])
def test_model_by_hand(bn, predictor):
    model = ReSSLModel(
        create_encoder(tiny_resnet, 1, size=16), 8, n_hidden=16, dim=6, projector_bn=bn, predictor_layers=2 * predictor
    ).train()
    x = torch.rand(8, 1, 16, 16)
    h = mlp(model.projector, model.encode(x))
    torch.testing.assert_close(model.teacher(x), unit(h))
    torch.testing.assert_close(model(x), unit(mlp(model.predictor, h) if predictor else h))
    assert close(model(x), unit(h))==(not predictor)  # control: without the predictor
    # the teacher is a copy, and has no predictor
    assert [p.shape for p in model.teacher.parameters()] == [
        p.shape for m in (model.encoder, model.projector) for p in m.parameters()
    ]
    assert not storages(model.teacher)&storages(model.encoder, model.projector)
    assert storages(model.student)==storages(model.encoder, model.projector)  # control: a view, no copy

@pytest.mark.parametrize(
    'arch', [tiny_resnet, vit, 'test_resnet', tv.mobilenet_v3_small], ids=['tiny_resnet', 'vit', 'timm', 'mobilenet']
)
def test_copies_of_the_model(arch, tmp_path):
    "State dict, deepcopy and pickle bring back student, teacher and queue"
    x, (model, other) = (
        torch.randn(4, 3, 64, 64),
        (ReSSLModel(create_encoder(arch), 8, n_hidden=16, dim=6, predictor_layers=2).eval() for _ in range(2)),
    )

    def out(m): return torch.cat([m(x), m.teacher(x), m.queue.filled])
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            if t.is_floating_point(): t.add_(0.1*torch.rand_like(t))
        model.queue.enqueue(unit(torch.randn(5, 6)))
    torch.save(model, tmp_path/'whole.pth')
    assert not close(model(x), model.teacher(x)) and not close(other(x), model(x))  # controls
    other.load_state_dict(model.state_dict())
    for m in (other, deepcopy(model), torch.load(tmp_path/'whole.pth', weights_only=False)):
        assert same(state(m), state(model)) and torch.equal(out(m), out(model)) and not storages(m)&storages(model)
        assert m.encoder.extra_repr() == model.encoder.extra_repr() and not any(
            p.requires_grad for p in m.teacher.parameters()
        )


def test_stochastic_depth_is_off_in_the_teacher():
    encoder,x = create_encoder(tv.efficientnet_b0, size=32),torch.randn(8, 3, 32, 32)
    model = ReSSLModel(encoder, 8, n_hidden=16, dim=6, projector_bn=False)
    def repeats(net):
        with torch.no_grad(): return torch.equal(net(x), net(x))
    model.train()
    assert (
        repeats(model.teacher)
        and not repeats(model)
        and all(m.training for m in (*model.encoder.modules(), *model.projector.modules()))
    )
    assert {type(m) for m in model.teacher.modules() if m.training}=={nn.BatchNorm2d}
    model.teacher.train()
    assert not repeats(model.teacher)  # control: what `train` alone would do
    model.eval()
    assert repeats(model.teacher) and repeats(model) and not any(m.training for m in model.modules())


def test_teacher_takes_no_gradient_whatever_is_frozen():
    def opened(learn):
        learn.freeze()
        learn.unfreeze()
        return any(p.requires_grad for p in learn.model.teacher.parameters())
    learn = make()
    assert not opened(learn) and all(p.requires_grad for p in learn.model.student.parameters())
    assert opened(make(splitter=lambda m: [params(m)]))  # control: the optimizer is given the teacher

# handing over

@pytest.mark.parametrize(
    'nm,n_in',
    [
        ('tiny_resnet', 1),
        ('resnet18', 3),
        ('mobilenet_v3_small', 1),
        ('efficientnet_b0', 3),
        ('xresnet18', 3),
        ('test_resnet', 3),
    ],
)
def test_encoder_is_handed_over(nm, n_in, tmp_path):
    learn = fit(make(arch_of(nm), n_in, path=tmp_path))
    for teacher in (False,True):
        learn.save_encoder('enc', teacher=teacher)
        want,other = (embed(learn, learn.dls.valid, teacher=o)[0] for o in (teacher, not teacher))
        assert not close(want, other)  # control
        clf = clf_of(tmp_path, arch_of(nm), n_in)
        def features(body):
            with torch.no_grad():
                return torch.cat([body.eval()(b[0].as_subclass(Tensor)).mean((2, 3)) for b in clf.dls.valid])

        assert not close(features(clf.model[0]), want)
        assert close(features(clf.load_encoder('enc').model[0]), want)  # weights, stem and normalisation
        assert close(
            features(load_encoder(create_encoder(arch_of(nm), n_in, size=24), tmp_path / 'models' / 'enc')[0]), want
        )
        again = make(arch_of(nm), n_in, path=tmp_path).load_encoder('enc')
        for o in (False,True): assert close(embed(again, again.dls.valid, o)[0], want)
    fit(clf)

def loads(learn, file):
    "Whether `file` is loaded; a refusal leaves model, normalisation and optimizer as they were"
    before,fs,opt = state(learn.model),list(learn.dls.after_batch.fs),learn.opt
    try: learn.load_encoder(file)
    except ValueError as e: assert str(learn.path/learn.model_dir/file) in str(e) or 'already has stem' in str(e), e
    else: return not same(before, state(learn.model))
    assert same(before, state(learn.model)) and fs==list(learn.dls.after_batch.fs) and learn.opt is opt
    return False

def test_what_does_not_fit_is_refused(tmp_path):
    make(path=tmp_path).save_encoder('enc')
    assert loads(clf_of(tmp_path), 'enc')  # control
    for nm, learn in dict(
        arch=clf_of(tmp_path, tv.resnet18),
        width=make(small_resnet, path=tmp_path),
        channels=clf_of(tmp_path, n_in=3),
        stem=make(stem='small_pool', path=tmp_path),
        normalisation=clf_of(tmp_path, norm=0.1),
    ).items(): assert not loads(learn, 'enc'), nm
    make(tv.shufflenet_v2_x0_5, path=tmp_path).save_encoder('shuffle')
    assert not loads(clf_of(tmp_path, tv.shufflenet_v2_x0_5), 'shuffle')  # fastai keeps only its first block

def test_files_of_another_kind_are_refused(tmp_path):
    learn,clf,models = fit(make(path=tmp_path)),clf_of(tmp_path),tmp_path/'models'
    good = learn.save_encoder('good').read_bytes()
    for i, b in enumerate((b'', b'words', good[:-200], good[: len(good) // 2], good[len(good) // 2 :])):
        (models / f'damaged{i}.pth').write_bytes(b)
    for nm, o in dict(
        dict={'body': learn.model.encoder[0].state_dict()}, list=[1], tensor=torch.ones(2), model=learn.model
    ).items():
        torch.save(o, models / f'{nm}.pth')
    learn.save('with_opt')
    learn.save('alone', with_opt=False)
    files = sorted(p.stem for p in models.glob('*.pth'))
    assert [f for f in files if loads(clf, f)]==['good'] and len(files)==12

def test_suffix_is_added_if_missing(tmp_path):
    learn = make(path=tmp_path)
    assert learn.save_encoder('v1.2.pth')==learn.save_encoder('v1.2')==tmp_path/'models'/'v1.2.pth'
    assert loads(clf_of(tmp_path), learn.save_encoder('v1.2'))

# evaluation

def clusters(n, seed, dim=6, n_classes=5):
    "Clusters that overlap, rows of any length"
    rng = np.random.RandomState(seed)
    y = rng.randint(0, n_classes, n)
    return torch.tensor(
        (2 * np.random.RandomState(9).randn(n_classes, dim)[y] + 3 * rng.randn(n, dim)) * rng.uniform(0.2, 5, (n, 1))
    ), torch.tensor(y)


def test_knn_is_scikit_learns():
    "Every prediction, not the accuracy alone: the targets are what scikit-learn predicts"
    (bank,labels),(x,y) = clusters(200, 0),clusters(80, 1)
    def neighbours(k, temp=None, metric='cosine'):
        weights = (lambda d: np.exp(-d/temp)) if temp else 'uniform'
        return KNeighborsClassifier(min(k, len(bank)), metric=metric, weights=weights).fit(bank.numpy(), labels.numpy())
    for k in (1,3,20,199,1000):
        for temp in (0.02,0.1,1.):
            knn = neighbours(k, temp)
            p = np.sort(knn.predict_proba(x), 1)
            assert (p[:, -1] - p[:, -2]).min() > 1e-9  # no ties
            for chunk in (1,3*200,7*200+5,2**24):
                got = [
                    knn_accuracy(bank, labels, x, torch.tensor(t.tolist()), k, temp, chunk) for t in (knn.predict(x), y)
                ]
                assert got==[1,knn.score(x, y)], (k,temp,chunk)
    def agreement(knn): return knn_accuracy(bank, labels, x, torch.tensor(knn.predict(x).tolist()), 20, 0.1)
    assert agreement(neighbours(20, 0.1))==1
    wrong = neighbours(20),neighbours(20, 0.1, 'euclidean'),neighbours(20, 1.),neighbours(3, 0.1)
    assert (
        max(map(agreement, wrong)) < 1
    )  # controls: equal votes, lengths that count, other temperature, fewer neighbours
    assert knn_accuracy(bank, labels, x, y+5)==0  # classes that the bank lacks (D36)

def test_embeddings_are_in_the_items_order():
    dls = image_dls()
    dls.add_tfms([Flip(p=1.)], 'after_batch')  # in training, not in embeddings
    learn,norm = fit(make(dls=dls)),get_normalize(dls)
    with torch.no_grad(): want = learn.model.eval().encode(((dls.ims-norm.mean)/norm.std).as_subclass(Tensor))
    assert dls.train.shuffle and dls.train.drop_last
    for dl, rows in (
        (dls.train, slice(20)),
        (dls.train.new(bs=7), slice(20)),
        (dls.valid, slice(20, 24)),
        (None, slice(20)),
        (dls.test_dl([3, 1, 2]), [3, 1, 2]),
    ):
        got, y = embed(learn, dl)
        assert close(got, want[rows])
        assert y is None if isinstance(rows, list) else y.tolist()==[i%3%2 for i in range(24)[rows]]
    assert not close(got, want[[1,2,3]])  # control
    assert embed(make(dls=image_dls(labels=False)))[1] is None

def test_embedding_leaves_no_trace():
    learn = fit(make(n_in=3))
    for m in learn.model.modules(): m.training = random.random()<0.5
    def everything():
        dl,rec = learn.dls.train,learn.recorder
        return (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
            dl.rng.getstate(),
            [m.training for m in learn.model.modules()],
            [id(o) for o in (learn.dls, dl, learn.model, learn.opt, learn.loss_func, *learn.cbs, *learn.metrics)],
            [dl.shuffle, dl.drop_last, dl.bs, dl.n],
            [
                str(f)
                for o in learn.dls
                for nm in ('after_item', 'before_batch', 'after_batch')
                for f in getattr(o, nm).fs
            ],
            list(rec.log),
            str(rec.values),
            len(rec.losses),
        )
    before,weights = everything(),state(learn.model)
    for teacher in (False,True): embed(learn, learn.dls.train, teacher)
    assert everything()==before and same(weights, state(learn.model))
    random.random()
    assert everything() != before  # control


# faults that once were

@pytest.mark.parametrize('arch', [tv.resnet18, tiny_resnet], ids=['resnet18','tiny_resnet'])
def test_stem_reaches_the_whole_model(arch, tmp_path):
    make(arch, stem='small', path=tmp_path).save_encoder('enc')
    assert load_encoder(create_encoder(arch, 1, stem='standard'), tmp_path/'models'/'enc').stem=='small'
    model,x = make(arch, stem='standard', path=tmp_path).load_encoder('enc').model.eval(),torch.randn(2, 1, 24, 24)
    assert model.encoder.stem == model.teacher[0].stem == 'small' and not any(
        p.requires_grad for p in model.teacher.parameters()
    )
    assert close(model.teacher[0](x), model.encode(x))

def test_frozen_stays_frozen(tmp_path):
    make(tv.resnet18, stem='small', path=tmp_path).save_encoder('enc')
    clf = clf_of(tmp_path, tv.resnet18)
    clf.freeze()
    def frozen(): return clf.opt.frozen_idx,[p.requires_grad for p in clf.model.parameters()]

    before = frozen()
    clf.load_encoder('enc')
    assert frozen() == before


def test_added_normalize_is_on_the_device_of_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(defaults, 'use_cuda', None)  # else fastai's `to_device` takes all to the CPU
    make(path=tmp_path).save_encoder('enc')
    clf = clf_of(tmp_path)
    clf.dls.device = torch.device('meta')  # stands for any device but the CPU
    assert clf.load_encoder('enc').dls.valid.one_batch()[0].device.type=='meta'

def test_versions_of_modules_are_kept(tmp_path):
    make(tv.mnasnet0_5, path=tmp_path).save_encoder('enc')
    assert loads(make(tv.mnasnet0_5, path=tmp_path), 'enc')

def test_encoder_is_handed_over_to_a_unet(tmp_path):
    make(tv.resnet18, 3, stem='standard', path=tmp_path).save_encoder('enc')
    unet = unet_learner(image_dls(3, size=32), tv.resnet18, n_out=2, pretrained=False, path=tmp_path)
    unet.model(torch.randn(2, 3, 32, 32))  # its hooks now hold feature maps, which deepcopy refuses
    assert loads(unet, 'enc')

def test_knn_with_a_small_temperature():
    x,y,q = torch.randn(200, 64),torch.arange(200)%5+1,torch.randn(50, 64)
    sims,idxs = (F.normalize(q, dim=1)@F.normalize(x, dim=1).T).double().topk(5)
    want = torch.zeros(50, 6, dtype=torch.double).scatter_add_(1, y[idxs], ((sims-sims.max())/0.005).exp()).argmax(1)
    assert knn_accuracy(x, y, q, want, k=5, temp=0.005)==1

def test_maps_with_channels_last():
    nm,x = 'swin_tiny_patch4_window7_224',torch.randn(1, 3, 224, 224)
    enc,ref = create_encoder(nm, size=224).eval(),timm.create_model(nm, num_classes=0).eval()
    ref.load_state_dict(enc[0].model.state_dict())
    with torch.no_grad(): assert enc.nf==768 and close(enc(x), ref(x))

def test_squeezenet_has_fastais_body(tmp_path):
    enc = create_encoder(tv.squeezenet1_1, 1, stem='standard')
    assert enc.nf==512 and shapes(enc[0])==shapes(clf_of(tmp_path, tv.squeezenet1_1, size=64).model[0])

def test_auto_keeps_the_stem_of_a_module(): assert create_encoder(create_encoder(tiny_resnet, size=32)[0]).stem=='small'

def test_a_refused_module_stays_in_training_mode():
    net = tiny_resnet().train()
    with pytest.raises(ValueError, match='does not take images'): create_encoder(net, 1)
    assert net.training

def test_numpys_whole_numbers_are_whole_numbers(tmp_path):
    "As from `len(df)//2` or an array of settings; also into a checkpoint and back"
    n = np.int64
    def make():
        widths = dict(queue_size=n(64), n_hidden=n(16), dim=n(8), projector_layers=n(2), predictor_layers=n(2))
        dls,arch = digits_dls(size=n(8), bs=64),partial(small_resnet, widen=0.125)
        return ressl_learner(dls, arch, size=n(8), batch_norm='split', n_splits=n(2), guard=Guard(every=n(10)),
                             path=tmp_path, metrics=[], **widths)
    learn = make()
    assert learn.model.queue.feats.shape==(64,8)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=Checkpoint('run', every=n(5)))
    learn.save_encoder('encoder')
    x = torch.ones(2, 1, 8, 8)
    encoders = [o.model.encoder.eval() for o in (learn, make().load_encoder('encoder'))]
    assert torch.equal(encoders[0](x), encoders[1](x))
