"""Every kind of architecture and number of channels trains for a few steps and hands its encoder over, in both
directions."""

from functools import partial

import numpy as np, pytest, timm, torch, torchvision.models as tv
from fastai.vision.all import (Callback, CategoryBlock, DataBlock, IndexSplitter, TensorImage, TransformBlock,
                               imagenet_stats, vision_learner)
from helpers import Own, families, fit
from sklearn.datasets import load_sample_images

from ressl_fastai.loaders import get_normalize
from ressl_fastai.learner import ressl_learner
from ressl_fastai.transfer import load_encoder
from ressl_fastai.models import create_encoder

vit = partial(tv.VisionTransformer, image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64)

archs = dict(families, resnet34=tv.resnet34, mobilenet_v3_large=tv.mobilenet_v3_large, vit=vit, own=Own,
             shufflenet_v2=tv.shufflenet_v2_x1_0, timm_cnn='mobilenetv3_small_050')

def make_dls(n_in=3, size=32, n=12):
    "Pieces of scikit-learn's photographs with `n_in` channels"
    ims = np.concatenate(load_sample_images().images, 2).transpose(2,0,1)/255
    rng = np.random.default_rng(0)
    def get_x(i):
        t,l = rng.integers(0, 300, 2)
        return TensorImage(torch.tensor(np.resize(ims[:,t:t+size,l:l+size], (n_in,size,size)), dtype=torch.float32))

    block = DataBlock(
        (TransformBlock, CategoryBlock), get_x=get_x, get_y=lambda i: i % 2, splitter=IndexSplitter(range(n - 4, n))
    )
    return block.dataloaders(range(n), bs=4, num_workers=0)

def make(arch, n_in=3, size=32, **kwargs):
    torch.manual_seed(0)
    kw = dict(queue_size=8, n_hidden=16, dim=8, metrics=[])
    return ressl_learner(make_dls(n_in, size), arch(n_in) if arch is Own else arch, **{**kw, **kwargs})

def params(m): return {k:v.detach().clone() for k,v in m.named_parameters()}
def still(before, m): return {k for k,v in m.named_parameters() if torch.equal(before[k], v)}

class WithGradient(Callback):
    "Names of the encoder's parameters that got a gradient"
    def before_fit(self): self.names = set()

    def after_backward(self):
        self.names |= {k for k, p in self.model.encoder.named_parameters() if p.grad is not None and p.grad.any()}


def learns(learn):
    "Parameters with a gradient, and of these: those of the student and of the teacher that four steps left alone"
    encoder,teacher,cb = learn.model.encoder,learn.model.teacher[0],WithGradient()
    before = params(encoder),params(teacher)
    fit(learn, 2, 1e-3, cbs=cb)
    assert np.isfinite(learn.recorder.values).all()
    return len(cb.names)/len(before[0]),*(still(b, m)&cb.names for b,m in zip(before, (encoder,teacher)))

@pytest.mark.parametrize('nm', archs)
def test_architecture_trains_and_is_handed_over(nm, tmp_path):
    size = timm.create_model('test_vit').default_cfg['input_size'][-1] if nm=='timm_vit' else 32
    learn = make(archs[nm], size=size, path=tmp_path)
    share,student,teacher = learns(learn)
    assert (
        share >= (0.8 if nm == 'timm_cnn' else 1) and not student and not teacher
    )  # timm's mobilenetv3 keeps a head that maps do not pass through
    learn.save_encoder('enc')
    x,net = torch.rand(2,3,size,size),learn.model.eval()
    other = make(archs[nm], size=size, path=tmp_path, stem=net.encoder.stem)  # into another pretraining,
    with torch.no_grad():
        assert not torch.allclose(other.model.eval().encode(x), net.encode(x))
        torch.testing.assert_close(other.load_encoder('enc').model.encode(x), net.encode(x), rtol=0, atol=0)
    if nm in (
        'resnet18',
        'resnet50',
        'efficientnet_b0',
        'convnext_tiny',
        'xresnet18',
        'timm_cnn',
    ):  # and into fastai's own learner
        clf = vision_learner(
            make_dls(size=size), archs[nm], pretrained=False, n_out=2, path=tmp_path, normalize=False
        ).load_encoder('enc')
        with torch.no_grad():
            torch.testing.assert_close(create_encoder(clf.model[0]).eval()(x), net.encode(x), rtol=1e-4, atol=1e-5)
        fit(clf, 1)
        back = make(clf.model[0], size=size)  # and from there back
        with torch.no_grad():
            torch.testing.assert_close(
                back.model.eval().encode(x), clf.model[0].eval()(x).mean((2, 3)), rtol=1e-4, atol=1e-5
            )


def test_what_does_not_learn_is_flagged():
    learn = make(tv.resnet18, teacher_momentum=1.)
    _,student,teacher = learns(learn)
    assert not student and len(teacher)>50

@pytest.mark.parametrize('n_in', [1, 2, 3, 4, 13])
@pytest.mark.parametrize('nm', ['resnet18', 'efficientnet_b0', 'vit', 'timm_cnn', 'own'])
@pytest.mark.filterwarnings('ignore:images have')
def test_any_number_of_channels(nm, n_in, tmp_path):
    learn = fit(make(archs[nm], n_in, path=tmp_path), 1)
    assert learn.model.encoder.n_in==n_in and get_normalize(learn.dls).mean.numel()==n_in
    with torch.no_grad(): assert learn.model.eval().encode(torch.rand(2,n_in,32,32)).shape==(2,learn.model.encoder.nf)
    file = learn.save_encoder('enc')
    with pytest.raises(ValueError, match='does not fit|has [0-9]+ channel'):
        load_encoder(create_encoder(archs[nm] if nm != 'own' else Own(n_in + 1), n_in + 1, size=32), file)


def test_left_out_colours_are_said_once():
    with pytest.warns(UserWarning, match='images have 4 channels') as said: fit(make(Own, 4))
    assert len([o for o in said if 'images have' in str(o.message)])==1

def test_pretrained_weights_bring_their_statistics(monkeypatch):
    "timm's ViT was trained with mean and deviation 0.5, a torchvision network with ImageNet's"
    create = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda nm, pretrained=False, **kw: create(nm, **kw))  # no download
    size = create('test_vit').default_cfg['input_size'][-1]
    for pretrained,stats in ((True, create('test_vit').default_cfg['mean']), (False, imagenet_stats[0])):
        norm = get_normalize(make('test_vit', size=size, pretrained=pretrained).dls)
        assert norm.mean.flatten().tolist()==pytest.approx(list(stats))

def test_timm_modules_bring_their_statistics():
    "They may hold pretrained weights, which ImageNet's statistics would not suit; other networks say none"
    net = timm.create_model('tf_efficientnet_lite0')
    assert net.default_cfg['mean']!=imagenet_stats[0]
    for arch,mean in ((net, net.default_cfg['mean']), (Own(), imagenet_stats[0])):
        norm = get_normalize(make(arch, size=32).dls)
        assert norm.mean.flatten().tolist()==pytest.approx(list(mean))
