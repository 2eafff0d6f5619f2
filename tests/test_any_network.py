"Networks however they are given: with channels last, a classifier, branches, second outputs; odd data."
import subprocess, sys, warnings
from copy import deepcopy
from functools import partial

import numpy as np, pytest, timm, torch, torchvision.models as tv
from fastai.vision.models.xresnet import XResNet
from fastai.layers import ResBlock
from helpers import Own, close, fit
from torch import nn, Tensor

from ressl_fastai.loaders import get_normalize
from ressl_fastai.data import tensor_dls
from ressl_fastai.evaluate import embed, fit_logistic
from ressl_fastai.label_efficiency import _fresh
from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import Encoder, create_encoder, small_resnet

net,small = partial(small_resnet, widen=0.125),dict(queue_size=8, n_hidden=16, dim=8, metrics=[])
swin = partial(timm.models.swin_transformer.SwinTransformer, img_size=32, patch_size=2, window_size=4, embed_dim=16,
               depths=(1,1), num_heads=(2,2))
tiny_vit = partial(tv.VisionTransformer, image_size=32, patch_size=8, num_layers=1, num_heads=2, hidden_dim=32,
                   mlp_dim=64)
timm_resnet = partial(timm.create_model, 'resnet18')

@torch.no_grad()
def features(net, x): return net.eval()(x)

# channels last

class Maps(nn.Module):
    "Convolutions whose maps come with their channels last"

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)

    def forward(self, x): return self.conv(x).permute(0, 2, 3, 1)

@pytest.mark.parametrize('size', [32, (32,64), (48,20), 5])
def test_maps_with_channels_last_are_averaged_over_positions(size):
    body,shape = Maps(),size if isinstance(size, tuple) else (size,size)
    enc,x = create_encoder(body, size=size),torch.randn(2, 3, *shape)
    want = features(body.conv, x).mean((2,3))
    assert enc.nf==8 and close(features(enc, x), want)
    first = create_encoder(body.conv, size=size)  # channels first stay so
    assert first.nf==8 and close(features(first, x), want)
    again = create_encoder(enc[0], size=size)
    assert again.nf==8 and close(features(again, x), want)  # they come to the front once

def test_swin_as_partial_and_as_module():
    whole,x = swin(num_classes=5),torch.randn(2, 3, 32, 32)
    bare = deepcopy(whole)
    bare.reset_classifier(0)
    want = features(bare, x)
    assert want.shape==(2,whole.num_features)
    unpooled = deepcopy(whole)
    unpooled.reset_classifier(0, global_pool='')
    for m in (lambda: deepcopy(whole), deepcopy(whole), bare, unpooled):
        assert close(features(create_encoder(m, size=32), x), want)

def test_a_cut_that_computes_something_else_is_not_taken():
    make = partial(timm.models.nest.Nest, img_size=32, embed_dims=(8,16,24), num_heads=(1,1,1), depths=(1,1,1))
    whole,x = make(),torch.randn(2, 3, 32, 32)
    enc = create_encoder(lambda: deepcopy(whole), size=32)
    bare = deepcopy(whole)
    bare.reset_classifier(0)
    assert close(features(enc, x), features(bare, x)) and enc.nf==24

class Between(nn.Module):
    "As timm's networks, with something between its layers that is no layer"
    def __init__(self):
        super().__init__()
        self.conv,self.act,self.pool,self.head = nn.Conv2d(3, 8, 3),nn.ReLU(),nn.AdaptiveAvgPool2d(1),nn.Linear(8, 5)
    def forward_features(self, x): return self.act(1-self.conv(x))
    def forward(self, x): return self.head(self.pool(self.forward_features(x)).flatten(1))
    def reset_classifier(self, num_classes): self.head = nn.Identity()

def test_a_cut_that_loses_what_is_no_layer_is_not_taken():
    whole,x = Between(),torch.randn(2, 3, 32, 32)
    want = whole.forward_features(x).mean((2,3)).detach()
    assert close(features(create_encoder(lambda: deepcopy(whole), size=32, stem='standard'), x), want)

# a classifier left on

def xresnet(): return XResNet(ResBlock, 1, [1,1], n_out=7)

wholes = dict(resnet=(tv.resnet18,512), xresnet=(xresnet,128), squeezenet=(tv.squeezenet1_1,512), vit=(tiny_vit,32),
    densenet=(partial(tv.DenseNet, 4, (1,1)),38), mobilenet=(tv.mobilenet_v3_small,576), timm=(timm_resnet,512),
    timm_vit=(partial(timm.create_model, 'test_vit', img_size=32),64),
    timm_convnext=(partial(timm.create_model, 'test_convnext'),64))

@pytest.mark.parametrize('nm', wholes)
def test_a_module_with_its_classifier_is_taken_without(nm):
    (make,nf),size = wholes[nm],64 if nm=='squeezenet' else 32  # whose own forward would flatten the maps
    module = make()
    weights = {k:v.clone() for k,v in module.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        enc = create_encoder(module, size=size)
    by_function,after = create_encoder(make, size=size, stem='standard'),module.state_dict()
    assert enc.nf==by_function.nf==nf
    assert [o.shape for o in enc.state_dict().values()]==[o.shape for o in by_function.state_dict().values()]
    assert list(after)==list(weights) and all(torch.equal(after[k], v) for k,v in weights.items())  # stays whole

def test_a_module_without_classifier_is_trained_in_place():
    module = tv.resnet18()
    module.fc = nn.Identity()
    assert create_encoder(module, size=32)[0] is module

def test_a_module_of_ones_own_that_ends_in_a_linear_layer_is_named():
    for own in (nn.Sequential(tv.resnet18()), lambda: nn.Sequential(tv.resnet18())):
        with pytest.warns(UserWarning, match=r'ends in a linear layer \(0.fc, 1000 outputs\).*nn.Identity'):
            assert create_encoder(own).nf==1000
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3*64*64, 8))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for o in (nn.Sequential(linear, nn.ReLU()), Encoder(linear, 'own'), Maps()): create_encoder(o)

# stems, second outputs, fixed sizes

def test_auto_stem_falls_back_where_the_changed_network_would_not_run():
    for nm in ('repvgg_a0', 'mobileone_s0'):
        enc = create_encoder(nm, size=32)
        assert enc.stem=='standard' and enc.nf==create_encoder(nm, size=32, stem='standard').nf
        with pytest.raises(ValueError, match="try stem='standard'"): create_encoder(nm, size=32, stem='small')
    assert create_encoder(net, size=32).stem=='small'

@pytest.mark.parametrize('make,size,nf', [(tv.GoogLeNet, 64, 1024), (tv.Inception3, 80, 2048)])
def test_second_classifiers_and_the_change_of_normalisation_inside(make, size, nf):
    whole = make(transform_input=True, init_weights=False)
    plain,x = deepcopy(whole),torch.rand(2, 3, size, size)
    plain.fc = nn.Identity()
    want = features(plain, x)
    plain.transform_input = False
    assert not close(features(plain, x), want)  # control
    for o in (lambda: deepcopy(whole), whole):
        enc = create_encoder(o, size=size, stem='standard')
        assert enc.nf==nf and close(features(enc, x), want)
        out = enc.train()(x)
        assert out.shape==(2,nf) and not any('aux' in k.lower() for k,_ in enc.named_parameters())

def test_blocks_in_a_list():
    whole = tv.MaxVit(input_size=(28,28), stem_channels=8, partition_size=7, block_channels=[8], block_layers=[1],
                      head_dim=4, stochastic_depth_prob=0.)
    x = torch.randn(2, 3, 28, 28)
    enc = create_encoder(lambda: deepcopy(whole), size=28)
    bare = deepcopy(whole)
    bare.classifier = nn.Identity()
    assert enc.nf==8 and close(features(enc, x), features(bare, x).mean((2,3)))

@pytest.mark.parametrize('as_module', [False, True])
def test_pretrained_weights_of_timm_bring_their_statistics_however_given(as_module):
    "Mean 0.5, not ImageNet's"
    def vit(pretrained=False): return timm.create_model('test_vit', img_size=32)
    def cnn(pretrained=False): return timm.create_model('resnet18', pretrained_cfg_overlay=dict(mean=(0.5,0.5,0.5)))
    for fn in (vit, cnn):
        dls = image_dls(size=32)
        ressl_learner(dls, fn() if as_module else fn, pretrained=True, **small)
        assert get_normalize(dls).mean.flatten().tolist()==[0.5]*3

# weights for the baselines

def image_dls(labels=True, n=40, size=16, images=None, bs=8, **kwargs):
    x = np.random.default_rng(0).integers(0, 255, (n,size,size,3), dtype=np.uint8) if images is None else images
    return tensor_dls(x, np.arange(len(x))%2 if labels else None, bs=bs, **{**dict(valid_pct=0.25, seed=0), **kwargs})

def test_a_modules_random_encoder_is_not_the_trained_one():
    own,x = Own(),torch.rand(4, 3, 16, 16)
    learn = fit(ressl_learner(image_dls(), own, **small), 2)
    trained = features(learn.model.encoder, x)
    assert close(features(own, x), trained)  # trained in place
    fresh = [features(_fresh(learn, own, seed).model.encoder, x) for seed in (0,1,0)]
    assert not close(fresh[0], trained) and not close(fresh[0], fresh[1]) and close(fresh[0], fresh[2])
    bn = _fresh(learn, own, 0).model.encoder[0].net[1]
    assert bn.running_mean.eq(0).all() and bn.num_batches_tracked==0
    assert close(features(learn.model.encoder, x), trained) and close(features(own, x), trained)

def test_what_cannot_be_drawn_anew_is_said_before_anything_is_trained(monkeypatch):
    class Token(Own):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.ones(32))

        def forward(self, x): return self.net(x)+self.token
    token = Token()
    learn = fit(ressl_learner(image_dls(), token, **small))
    monkeypatch.setattr('ressl_fastai.label_efficiency._predictor', lambda *args: pytest.fail('trained'))
    wrong = 'arch must make the network'
    for arch,why in ((token,'Token cannot be drawn anew'), (None,wrong), (net,wrong)):
        with pytest.raises(ValueError, match=why): learn.label_efficiency(image_dls(), (1,), seeds=1, arch=arch)
    x = torch.rand(2, 3, 16, 16)
    fresh = _fresh(learn, Token, 0)  # the function that makes it will do
    assert not close(features(learn.model.encoder, x), features(fresh.model.encoder, x))
    fixed = fit(ressl_learner(image_dls(size=32), tiny_vit, **small))
    _fresh(fixed, tiny_vit, 0)  # a network of a fixed size is made for it

# one image, one class, black images, many classes, other numbers

def test_black_images_end_in_words_not_in_a_dead_process():
    code = """
import numpy as np
from ressl_fastai.interpret import _project
import torch
for x in (torch.zeros(60, 8), torch.ones(60, 8), torch.ones(60, 8)+1e-9*torch.rand(60, 8)):
    for method in ('tsne','pca'):
        try: _project(x, method, 0)
        except ValueError as e: print(str(e)[:26])
x = torch.ones(60, 8); x[0,0] = 1.001; print(_project(x, 'tsne', 0).shape)
"""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert done.returncode==0 and done.stdout.splitlines()==['the 60 images must differ,']*6+['(60, 2)'], done

@pytest.mark.parametrize('dtype', [np.float64, np.float16, np.float32])
def test_arrays_of_any_float_are_computed_in_float32(dtype):
    x = (np.random.default_rng(0).integers(0, 255, (24,16,16,3))/255).astype(dtype)
    learn = fit(ressl_learner(image_dls(images=x), net, **small))
    got,y = embed(learn, learn.dls.valid)
    assert got.dtype==torch.float32 and np.isfinite(learn.recorder.values).all()
    norm,idxs = get_normalize(learn.dls),list(learn.dls.valid.items)
    want = features(learn.model.encoder, (torch.tensor(x[idxs].astype(np.float32)).permute(0,3,1,2)-norm.mean)/norm.std)
    assert torch.allclose(got.as_subclass(Tensor), want.as_subclass(Tensor), atol=1e-4)

def test_float64_images_of_ones_own_are_named():
    from fastai.vision.all import DataBlock, RandomSplitter, TransformBlock
    block = DataBlock(TransformBlock, get_x=lambda i: np.random.rand(3, 16, 16), splitter=RandomSplitter(seed=0))
    dls = block.dataloaders(range(16), bs=4, num_workers=0)
    with pytest.raises(ValueError, match='images must be float32, .* dls gives torch.float64'):
        ressl_learner(dls, net, **small)

def test_a_fifth_that_cannot_hold_every_class(monkeypatch):
    from ressl_fastai import evaluate
    seen = {}
    def held_out(sets, y, parts, Cs):
        seen.update(classes=[len(np.unique(y[o])) for o in parts], held=len(parts[1]))
        return np.zeros((2, len(Cs)))
    monkeypatch.setattr(evaluate, '_held_out', held_out)
    for n,k,held in ((2400,600,600), (2400,1200,1200), (2401,100,481)):
        y = torch.arange(n)%k
        fit_logistic(torch.randn(n, 4), y)
        assert seen=={'classes':[k,k], 'held':held}

class Viewed(nn.Module):
    "Flattens maps by `view`, which does not go with channels last"
    def __init__(self, n_in=3):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(n_in, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.last = nn.LazyLinear(16)
    def forward(self, x):
        x = self.body(x)
        return self.last(x.view(len(x), -1))

@pytest.mark.parametrize('n_in', [1, 3])
def test_modules_that_flatten_by_view_train_by_default(monkeypatch, n_in):
    "On processors and GPUs where channels last pay; who asks for them is told"
    monkeypatch.setattr('ressl_fastai.precision.likes_channels_last', lambda device: True)
    x = np.random.default_rng(0).integers(0, 256, (24,n_in,16,16), dtype=np.uint8)
    def module():
        res = Viewed(n_in)
        res(torch.zeros(2, n_in, 16, 16))
        return res
    learn = ressl_learner(tensor_dls(x, bs=8), module(), precision='float32', **small)
    assert not learn.precision.channels_last and embed(fit(learn))[0].isfinite().all()
    assert ressl_learner(tensor_dls(x, bs=8), Own(n_in), precision='float32', **small).precision.channels_last
    with pytest.raises(ValueError, match='channels_last=True does not go with Viewed'):
        ressl_learner(tensor_dls(x, bs=8), module(), channels_last=True, **small)
