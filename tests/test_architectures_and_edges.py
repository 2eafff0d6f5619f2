"""Uncommon architectures give their own features, what is taken away is what the tools take, and data at the edge
(nothing held out, one image, one class, black) gives the right value or one sentence."""

from functools import partial

import numpy as np, pytest, timm, torch, torchvision.models as tv
from fastai.vision.all import (CategoryBlock, DataBlock, DataLoaders, EarlyStoppingCallback, ImageBlock,
                               RandomSplitter, Resize, SaveModelCallback, get_image_files, load_learner, parent_label,
                               xresnet18)
from helpers import Own, fit, quiet, same, state
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn

from ressl_fastai.data import tensor_dls
from ressl_fastai.evaluate import KNNAccuracy, embed, fit_logistic, knn_accuracy
from ressl_fastai.health import HealthMonitor, effective_rank
import ressl_fastai.curate
from ressl_fastai.label_efficiency import _fresh
from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import create_encoder, small_resnet
from ressl_fastai.views import multi_crop_tfms
from ressl_fastai import interpret, learner
import ressl_fastai.report  # `learn.report`

net,small = partial(small_resnet, widen=0.125),dict(queue_size=8, n_hidden=16, dim=8, metrics=[])

def some_images(n=16, h=32, w=32):
    "Pieces of scikit-learn's photographs, and their classes"
    rng,photos = np.random.default_rng(0),load_sample_images().images
    corners = rng.integers(0, 300, (n,2))
    return np.stack([photos[i%2][t:t+h,l:l+w] for i,(t,l) in enumerate(corners)]),np.arange(n)%2

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('images')
    for i,(im,c) in enumerate(zip(*some_images(16, 60, 60))):
        (path/'ab'[c]).mkdir(exist_ok=True)
        Image.fromarray(im).save(path/'ab'[c]/f'{i:02}.png')
    return path

def folder_dls(path, size=32, valid_pct=0.25, labels=True, **kwargs):
    block = DataBlock(
        (ImageBlock, CategoryBlock) if labels else ImageBlock,
        get_items=lambda o: get_image_files(o).sorted(),
        item_tfms=Resize(size),
        get_y=parent_label if labels else None,
        splitter=RandomSplitter(valid_pct, seed=0),
    )
    return block.dataloaders(path, **{**dict(bs=4, num_workers=0), **kwargs})

def make(dls=None, arch=net, **kwargs):
    torch.manual_seed(0)
    return ressl_learner(dls or tensor_dls(*some_images(), valid_pct=0.25, seed=0, bs=4), arch, **{**small, **kwargs})

@torch.no_grad()
def features(model, x): return (model.eval() if isinstance(model, nn.Module) else model)(x)

# architectures

swin = partial(
    timm.create_model,
    'swin_tiny_patch4_window7_224',
    embed_dim=16,
    depths=(1, 1),
    num_heads=(2, 2),
    window_size=4,
    img_size=32,
)
wholes = dict(
    torchvision=tv.resnet18,
    mobilenet=tv.mobilenet_v3_small,
    shufflenet=tv.shufflenet_v2_x0_5,
    xresnet=xresnet18,
    timm=partial(timm.create_model, 'resnet10t'),
    timm_vit=partial(timm.create_model, 'test_vit'),
)

@pytest.mark.parametrize('arch', wholes.values(), ids=wholes)
def test_a_classifier_left_on_a_module_is_taken_off(arch):
    "The features are what its last linear layer gets, and the user's network stays whole"
    model,x,seen = arch().eval(),torch.rand(2, 3, 160, 160),[]
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    hook = linear.register_forward_hook(lambda m,i,o: seen.append(i[0]))
    scores = features(model, x)
    hook.remove()
    enc = create_encoder(model, size=160)
    if 'mobilenet' in arch.__module__ and arch is tv.mobilenet_v3_small:
        assert enc.nf == 576  # before its two-layer classifier
    else: assert torch.allclose(features(enc, x), seen[0], atol=1e-5) and enc.nf==linear.in_features
    assert torch.equal(features(model, x), scores)  # control: nothing was taken from it


def test_a_users_module_that_ends_in_a_linear_layer_is_said():
    own = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    with pytest.warns(UserWarning, match=r'ends in a linear layer \(3, 5 outputs\)'): create_encoder(own)
    assert create_encoder(own[:-1]).nf==8

@pytest.mark.parametrize('pool', ['avg',''])
def test_channels_last_maps(pool):
    "A Swin's maps have their channels last: its own features, not its rows"
    torch.manual_seed(0)
    arch = partial(swin, num_classes=0, global_pool=pool)
    model,x = arch().eval(),torch.rand(2, 3, 32, 32)
    right = features(model.forward_features, x).mean((1,2))
    for given in (model, arch, swin):
        enc = create_encoder(given, size=32)
        assert enc.nf==32
    assert torch.allclose(features(create_encoder(model, size=32), x), right, atol=1e-5)

def test_stem_falls_back_where_the_changed_network_does_not_run():
    enc = create_encoder('repvgg_a0', size=64)
    assert enc.stem=='standard' and enc.nf==1280
    with pytest.raises(ValueError, match="try stem='standard'"): create_encoder('repvgg_a0', size=64, stem='small')
    assert create_encoder(tv.resnet18, size=64).stem == 'small_pool'  # control: others keep theirs


def test_no_second_outputs_in_training():
    "GoogLeNet's auxiliary classifiers"
    enc = create_encoder(partial(tv.googlenet, init_weights=False), size=64)
    out = enc.train()(torch.rand(2, 3, 64, 64))
    assert (
        isinstance(out, torch.Tensor)
        and out.shape == (2, 1024)
        and not any('aux' in nm for nm, _ in enc.named_parameters())
    )


vit = partial(timm.create_model, 'vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)

def test_views_of_another_size_are_refused_before_training():
    crops = multi_crop_tfms(32)
    with pytest.raises(
        ValueError, match=r'strong_tfms makes views of \d+ x \d+ pixels, which create_model .*dynamic_img_size=True'
    ):
        make(arch=vit, strong_tfms=crops)
    learn = fit(
        make(arch=partial(vit, dynamic_img_size=True, dynamic_img_pad=True), strong_tfms=crops)
    )  # the remedies: they train
    assert learn.recorder.values
    fit(make(arch=vit, strong_tfms=multi_crop_tfms(32, sides=(1,)*5)))

def test_trying_views_leaves_no_trace(monkeypatch):
    torch.manual_seed(1)
    dls = tensor_dls(*some_images(), valid_pct=0.25, seed=0, bs=4)
    a,after = state(make(dls)),torch.rand(1)
    monkeypatch.setattr(learner, 'check_views', lambda *args, **kwargs: None)
    assert same(a, state(make(dls))) and after==torch.rand(1)

@pytest.mark.parametrize('arch', [net, tv.resnet18, vit], ids=['small_resnet','resnet18','vit'])
def test_the_exported_model_is_traced(arch):
    model,x = make(arch=arch).model.embedder.eval(),torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        right = model(x)
        assert torch.allclose(torch.jit.trace(model, x)(x), right, atol=1e-6)
        if arch is not vit: assert torch.allclose(torch.fx.symbolic_trace(model)(x), right, atol=1e-6)
        assert torch.allclose(right.norm(dim=1), torch.ones(3))

# what is taken away

def test_an_exported_learner_does_what_the_learner_does(folder, tmp_path):
    learn = fit(make(folder_dls(folder), predictor_layers=2))
    files = get_image_files(folder).sorted()
    learn.path = tmp_path
    learn.export('model.pkl')
    away = load_learner(tmp_path/'model.pkl')
    dl,own = away.dls.test_dl(files),learn.dls.test_dl(files)
    for projected in (False, True):
        assert torch.allclose(
            embed(away, dl, projected=projected)[0], embed(learn, own, projected=projected)[0], atol=1e-5
        )
    assert away.find_duplicates(dl=dl, threshold=0.5).equals(learn.find_duplicates(dl=own, threshold=0.5))
    assert away.find_outliers(3, dl=dl).equals(learn.find_outliers(3, dl=own))
    assert away.suggest_labels(3, dl=dl).equals(learn.suggest_labels(3, dl=own))
    with pytest.raises(ValueError, match='has no teacher'): embed(away, dl, teacher=True)
    with pytest.raises(ValueError, match='empty'): embed(away, away.dls.valid)

@pytest.mark.parametrize('predictor_layers', [0,2])
def test_one_embedding_of_an_image(folder, predictor_layers):
    learn = fit(make(folder_dls(folder), predictor_layers=predictor_layers))
    right = embed(learn, learn.dls.valid, projected=True)[0]
    with torch.no_grad():
        x,model = learn.dls.valid.one_batch()[0],learn.model.eval()
        assert torch.allclose(model.norm(model.predictor(model.projector(model.encoder(x)))), right[:len(x)], atol=1e-5)
    preds = quiet(learn, lambda: learn.get_preds()[0])
    one = quiet(learn, lambda: learn.predict(learn.dls.valid_ds.items[1])[0])
    assert torch.allclose(preds, right, atol=1e-5) and torch.allclose(one, right[1], atol=1e-5)
    without = model.norm(model.projector(model.encoder(x)))
    assert torch.allclose(without, right[: len(x)], atol=1e-5) == (
        predictor_layers == 0
    )  # control: the predictor counts


def test_larger_images_get_larger_views(folder):
    learn = fit(make(folder_dls(folder, 24), strong_tfms=multi_crop_tfms(24)))
    old = [o.size for o in learn.ressl.strong_tfms]
    learn.dls = folder_dls(folder, 48)
    assert learn.ressl.weak_tfms.size == (48, 48) and [o.size for o in learn.ressl.strong_tfms] == [
        tuple(2 * s for s in o) for o in old
    ]
    learn.dls = folder_dls(folder, 24)
    assert [o.size for o in learn.ressl.strong_tfms]==old
    assert fit(learn).recorder.values

def test_larger_images_that_the_model_does_not_take_are_refused():
    learn = make(arch=vit)
    dls,views = learn.dls,learn.ressl.strong_tfms
    with pytest.raises(ValueError, match='makes views of 64 x 64'):
        learn.dls = tensor_dls(*some_images(16, 64, 64), bs=4)
    assert learn.dls is dls and learn.ressl.strong_tfms is views

# fresh weights

def test_the_random_encoder_of_a_module_is_not_the_trained_one():
    own = Own()
    learn,x = fit(make(arch=own), 2),torch.rand(4, 3, 32, 32)
    trained,fresh = state(learn),_fresh(learn, own, 0).model
    assert not torch.allclose(fresh.eval().encode(x), learn.model.eval().encode(x))
    assert fresh.encoder[0].net[1].running_mean.abs().sum() == 0  # nor its running statistics
    assert not torch.equal(_fresh(learn, own, 1).model.encoder[0].net[0].weight, fresh.encoder[0].net[0].weight)
    assert same(trained, state(learn))  # the trained one stays


def test_a_module_whose_weights_cannot_be_drawn_is_refused_before_anything_is_trained():
    class Scaled(Own):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x): return self.net(x)*self.scale
    own = Scaled()
    learn = make(arch=own)
    with pytest.raises(ValueError, match=r'Scaled cannot be drawn anew: give that class a reset_parameters\(\)'):
        learn.label_efficiency(learn.dls, (1,), seeds=1, rows=('fine-tuned', 'random encoder'), arch=own)
    Scaled.reset_parameters = lambda self: nn.init.ones_(self.scale)                                # the remedy
    df = learn.label_efficiency(learn.dls, (1,), seeds=1, rows=('random encoder',), arch=own)
    assert len(df)==1 and 0<=df.accuracy[0]<=1

# many classes

@pytest.mark.parametrize('n_classes', [600, 1200])
def test_many_classes(n_classes):
    y = torch.arange(2400)*n_classes//2400
    x = torch.eye(64)[torch.randint(64, (n_classes,))][y]*3+torch.randn(n_classes, 64)[y]
    clf = (
        fit_logistic(x.numpy()[:, :8], y.numpy(), Cs=(1e-4, 1e-3))
        if n_classes > 600
        else fit_logistic(x.numpy(), y.numpy(), Cs=(0.1, 1.0))
    )
    assert len(clf.classes_)==n_classes

# data at the edge

@pytest.mark.parametrize('one', [False,True])
def test_nothing_held_out(folder, tmp_path, one):
    """Training, the report and the features of the training images work; what needs a validation set says so before
    it trains"""
    dls = folder_dls(folder, valid_pct=0.25 if one else 0.)
    if one: dls = DataLoaders(dls.train)
    learn = fit(make(dls, path=tmp_path))
    assert embed(learn, learn.dls.train)[0].shape==(dls.train.n, 64)
    if not one: assert 'no validation images' in learn.report().read_text()
    before = state(learn)
    for f in (lambda: embed(learn, learn.dls.valid), learn.linear_probe):
        with pytest.raises(ValueError, match='the validation set is empty'): f()
    for cbs in (HealthMonitor(), EarlyStoppingCallback(patience=2), SaveModelCallback()):
        with pytest.raises(ValueError, match='valid'): fit(learn, cbs=cbs)
    with pytest.raises(ValueError, match='empty'): learn.label_efficiency(learn.dls, (1,), seeds=1)
    assert same(before, state(learn))
    assert fit(learn, cbs=EarlyStoppingCallback(monitor='train_loss')).recorder.values               # the remedy

def test_one_image(folder):
    learn = fit(make(folder_dls(folder)))
    dl = learn.dls.test_dl(get_image_files(folder)[:1])
    assert embed(learn, dl)[0].shape==(1,64)
    assert len(learn.find_duplicates(dl=dl))==0
    with pytest.raises(ValueError): learn.plot_embeddings(dl=dl)

def test_one_class():
    x,_ = some_images()
    learn = make(tensor_dls(x, np.zeros(16, dtype=int), valid_pct=0.25, bs=4))
    with pytest.raises(ValueError, match='two classes'): learn.linear_probe()
    assert knn_accuracy(*embed(learn, learn.dls.train), *embed(learn, learn.dls.valid))==1

@pytest.mark.parametrize('method', ['tsne','pca'])
def test_equal_features_are_said_before_scikit_learn_is_called(method, monkeypatch):
    "Its t-SNE ends the process with SIGSEGV on equal rows"
    for nm in ('TSNE','PCA'): monkeypatch.setattr(interpret, nm, None)
    learn = make(tensor_dls(np.zeros((60,16,16,3), dtype=np.uint8), valid_pct=0.25, bs=16))
    with pytest.raises(ValueError, match='the 45 images must differ, all have the same features'):
        learn.plot_embeddings(method=method)


def test_rank_of_nothing():
    assert effective_rank(torch.zeros(5, 4)).isfinite() and effective_rank(torch.eye(4)).item() == pytest.approx(4)


def test_one_image_a_batch():
    assert fit(
        make(
            tensor_dls(*some_images(), valid_pct=0.25, bs=1),
            projector_bn=False,
            arch=nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()),
        )
    ).recorder.values
    with pytest.raises(ValueError, match='bs must be at least 2'):
        make(tensor_dls(*some_images(), valid_pct=0.25, bs=1), projector_bn=True)


def test_float64_arrays():
    "What they hold, in what networks compute in"
    x,y = some_images()
    res = []
    for dtype in (np.float32, np.float64):
        learn = make(tensor_dls((x/255).astype(dtype), y, valid_idx=range(4), bs=4))
        assert learn.dls.one_batch()[0].dtype==torch.float32
        res.append(embed(learn, learn.dls.valid)[0])
        assert fit(learn).recorder.values
    assert torch.allclose(*res, atol=1e-4)

def test_early_stopping_between_two_values():
    "`KNNAccuracy(every=2)` has NaN between: patience 1 would stop there"
    learn = make(metrics=KNNAccuracy(every=2))
    before = state(learn)
    with pytest.raises(ValueError, match='patience must be at least 2'):
        fit(learn, 4, cbs=EarlyStoppingCallback('knn_accuracy', patience=1))
    assert same(before, state(learn))
    assert (
        len(
            fit(
                make(metrics=KNNAccuracy(every=2)), 4, cbs=EarlyStoppingCallback('knn_accuracy', patience=4)
            ).recorder.values
        )
        == 4
    )
