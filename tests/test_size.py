"""Views of `size` from images of another: `ressl_learner(dls, arch, size=...)`, and what all that follows sees."""
import json
from functools import partial

import numpy as np, pytest, torch
import torch.nn.functional as F
from fastai.vision.all import ImageDataLoaders, Resize, accuracy, load_learner, resnet18
from fastcore.script import CliError
from PIL import Image
from torch import nn, Tensor

from ressl_fastai.cli import ressl_embed, ressl_pretrain
from ressl_fastai.data import folder_dls, tensor_dls
from ressl_fastai.evaluate import embed
from ressl_fastai.learner import ressl_learner
from ressl_fastai.loaders import ResizeBatch, first_images, with_size
from ressl_fastai.models import small_resnet
from ressl_fastai.recipes import recipe
from ressl_fastai.transfer import encoder_learner, load_encoder, read_encoder
from ressl_fastai.views import RandomView

arch = partial(small_resnet, widen=0.125)

def images(n=48, size=(24,40)):
    "Smooth pictures, so that resizing leaves something of them"
    x = F.interpolate(torch.rand(n, 3, 4, 5, generator=torch.Generator().manual_seed(0)), size, mode='bilinear')
    return (x*255).byte(),(torch.arange(n)%3).numpy()

def make_dls(**kw):
    x,y = images(**kw)
    return tensor_dls(x, y, valid_pct=0.25, seed=0, bs=8)

def make(dls=None, size=12, seed=0, **kwargs):
    torch.manual_seed(seed)
    kw = {**dict(queue_size=16, n_hidden=16, dim=8), **kwargs}
    return ressl_learner(make_dls() if dls is None else dls, arch, size=size, **kw)

def quietly(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn

def small(x, size=(12,12)): return F.interpolate(x.as_subclass(Tensor), size, mode='bilinear', antialias=True)

def normalised_batch(learn): return learn.dls.valid.one_batch()[0].as_subclass(Tensor)

def test_views_are_cut_from_the_whole_image_at_its_full_size():
    "Control: of images that were shrunk first, a small crop is a blur"
    learn = make(weak_tfms=None)
    assert learn.ressl.weak_tfms.size==(12,12) and learn.ressl.strong_tfms.size==(12,12)
    seen = []
    class Look(nn.Module):
        def forward(self, x):
            seen.append(x)
            return learn_view(x)
    learn_view,learn.ressl.weak_tfms = learn.ressl.weak_tfms,Look()
    quietly(learn)
    assert {tuple(x.shape[2:]) for x in seen}=={(24,40)}
    stripes = (torch.arange(40)//2%2).float().expand(4, 3, 24, 40)  # 4 pixels to a period
    crop = RandomView(12, scale=(0.0750,0.0751), ratio=(1,1), flip_p=0)  # 8.5 pixels to 12
    torch.manual_seed(0)
    sharp = crop(stripes)
    blurred = crop(small(stripes))
    assert sharp.std()>0.3 and blurred.std()<0.1

def test_the_stem_is_that_of_the_views():
    big = make_dls(size=(96,96))
    stems = {size: ressl_learner(big, resnet18, size=size, queue_size=16, n_hidden=16, dim=8).model.encoder.stem
             for size in (32,64,None)}
    assert stems=={32:'small', 64:'small_pool', None:'standard'}

def test_training_sees_views_and_evaluation_whole_images_at_their_size():
    learn = quietly(make())
    net,x = learn.model.eval(),normalised_batch(learn)
    want = net.encode(small(x))
    assert x.shape[2:]==(24,40)
    torch.testing.assert_close(net.encode(x), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(embed(learn, learn.dls.valid)[0][:len(x)], want, rtol=0, atol=1e-5)
    teacher = net.teacher[0](small(x))
    torch.testing.assert_close(embed(learn, learn.dls.valid, teacher=True)[0][:len(x)], teacher, rtol=0, atol=1e-5)
    net.view_size = None
    assert (net.encode(x)-want).abs().max()>1e-3  # control: as the images are

def test_validation_compares_images_at_the_size_of_the_views():
    learn = quietly(make(metrics=[]))
    with learn.no_bar(): loss = learn.validate()[0]
    shrunk = make(make_dls(), metrics=[])
    shrunk.dls = with_size(shrunk.dls, (12,12))
    shrunk.model.load_state_dict(learn.model.state_dict())
    shrunk.model.view_size = None
    with shrunk.no_bar():
        assert shrunk.validate()[0]==pytest.approx(loss, abs=1e-5)
        learn.model.view_size = None
        assert abs(learn.validate()[0]-loss)>1e-4  # control

def test_what_is_taken_away_knows_the_size(tmp_path):
    learn = quietly(make(path=tmp_path))
    want = embed(learn, learn.dls.valid)[0]
    learn.export('all.pkl')
    away = load_learner(tmp_path/'all.pkl')
    image = learn.dls.valid_ds[0][0]
    torch.testing.assert_close(away.predict(image)[0], learn.predict(image)[0], rtol=0, atol=1e-5)
    file = learn.save_encoder('enc')
    later = encoder_learner(file, make_dls(), arch)
    assert later.model.view_size==(12,12)
    torch.testing.assert_close(embed(later, later.dls.valid)[0], want, rtol=0, atol=1e-5)
    enc = load_encoder(make().model.encoder, file)
    assert enc.view_size==(12,12)
    old = torch.load(file, weights_only=True)
    assert old['view_size']==(12,12)

def test_a_classifier_sees_that_size_or_the_one_asked_for():
    learn = quietly(make())
    clf = learn.to_classifier(make_dls(), metrics=accuracy)
    assert clf.dls.one_batch()[0].shape[2:]==(12,12)
    features = nn.Sequential(clf.model[0], clf.model[1][:2]).eval()(normalised_batch(clf))
    torch.testing.assert_close(features, embed(learn, learn.dls.valid)[0][:len(features)], rtol=0, atol=1e-5)
    for make_clf in (learn.to_classifier, learn.to_vision_learner):
        assert make_clf(make_dls(), size=(20,16)).dls.one_batch()[0].shape[2:]==(20,16)
    plain = make(size=None)
    assert plain.to_vision_learner(make_dls(size=(32,32))).dls.one_batch()[0].shape[2:]==(32,32)

def test_learners_with_one_dls_keep_their_sizes():
    dls = make_dls()
    a,b = make(dls, 12),make(dls, 16)
    assert (a.model.view_size,b.model.view_size)==((12,12),(16,16))
    assert not [f for f in dls.valid.after_batch.fs if isinstance(f, ResizeBatch)]

def test_other_dls_keep_a_size_that_was_given():
    learn = quietly(make())
    learn.dls = make_dls(size=(48,48))
    assert learn.ressl.weak_tfms.size==(12,12) and learn.model.view_size==(12,12)
    grows = make(size=None)
    grows.dls = make_dls(size=(48,80))
    assert grows.ressl.weak_tfms.size==(48,80)

@pytest.mark.parametrize('size', [0, -3, 1.5, 'a', (3,), (3,4,5), (0,4), None])
def test_a_size_that_is_none_is_refused_by_name(size):
    if size is None: return make(size=None)
    with pytest.raises(ValueError, match='size must be a whole number of pixels'): make(size=size)
    with pytest.raises(ValueError, match='size must be a whole number of pixels'):
        make().to_classifier(make_dls(), size=size)

# from folders and on the command line

def wide_pictures(path, n=24, size=(96,64)):
    "Photographs-like files: noise with a red margin to the left and right"
    rng = np.random.default_rng(0)
    for i in range(n):
        im = np.repeat(np.repeat(rng.integers(0, 255, (size[1]//8, size[0]//8, 3), np.uint8), 8, 0), 8, 1)
        im[:,:12] = im[:,-12:] = 255,0,0
        (path/'ab'[i%2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(im).save(path/'ab'[i%2]/f'{i:02}.png')
    return path

def test_a_folder_gives_whole_pictures_as_large_as_most_files(tmp_path):
    path = wide_pictures(tmp_path/'images')
    Image.fromarray(np.zeros((9,9,3), np.uint8)).save(path/'a'/'small.png')
    def side(size, **kwargs): return first_images(folder_dls(path, size, 4, num_workers=0, **kwargs))[0].shape[2:]
    assert side(16)==(16,16) and side(16, max_size=36)==(36,36)
    assert side(16, max_size=72)==(64,64)  # the shorter side of most
    assert side(80, max_size=180)==(80,80)
    x = first_images(folder_dls(path, 32, 4, num_workers=0))[0]
    assert (x[0,0,:,0]>0.9).all() and (x[0,1,:,0]<0.1).all()  # the margin
    cropped = ImageDataLoaders.from_folder(path, valid_pct=0.1, item_tfms=Resize(32), num_workers=0)
    assert (first_images(cropped)[0][0,1,:,0]>0.1).any()  # control

def pretrain(path, out, **kwargs):
    small = dict(arch='small_resnet', size=16, epochs=1, bs=8, num_workers=0, no_report=True)
    ressl_pretrain(str(path), out=str(out), **{**small, **kwargs})
    return json.loads((out/'config.json').read_text()),read_encoder(out/'encoder.pth')

def test_the_command_cuts_views_from_larger_images_and_says_so(tmp_path, capsys):
    path = wide_pictures(tmp_path/'images')
    config,encoder = pretrain(path, tmp_path/'run')
    assert (config['size'],config['image_size'],encoder['view_size'],encoder['stem'])==(16, 36, (16,16), 'small')
    said = capsys.readouterr().out
    assert 'views of 16 pixels are cut from whole images of 36 x 36 pixels, so that the smallest crop' in said
    assert '--image-size=36' in config['command']
    config,encoder = pretrain(path, tmp_path/'small', image_size=16)
    assert (config['image_size'],encoder['view_size'])==(16, None) and 'are cut from' not in capsys.readouterr().out
    config,_ = pretrain(path, tmp_path/'as_files', size=48)
    assert config['image_size']==64 and 'as large as most files are' in capsys.readouterr().out
    with pytest.raises(CliError, match='image_size must be at least size=16, the side of the views, got 8'):
        pretrain(path, tmp_path/'no', image_size=8)

def test_a_recipe_of_the_command_cuts_views_from_larger_images(tmp_path, capsys):
    path = wide_pictures(tmp_path/'images')
    config,encoder = pretrain(path, tmp_path/'run', recipe='cifar10', epochs=6, queue_size=16)
    assert (config['image_size'],encoder['view_size'])==(36, (16,16))
    assert [recipe(nm).image_size for nm in ('cifar10','stl10','imagenet')]==[72,144,501]

def test_evaluation_sees_the_size_that_is_asked_for(tmp_path, capsys, monkeypatch):
    path = wide_pictures(tmp_path/'images')
    pretrain(path, tmp_path/'run')
    seen = []
    def at_size(x, size): return seen.append(size) or small(x, size)
    monkeypatch.setattr('ressl_fastai.models._at_size', at_size)
    def embedded(**kwargs):
        out = tmp_path/f'{len(list(tmp_path.iterdir()))}.pt'
        ressl_embed(str(tmp_path/'run'), str(path), str(out), num_workers=0, **kwargs)
        return torch.load(out)['vectors']
    a,b = embedded(),embedded(size=24)
    assert not seen  # the files are opened at that size, nothing is resized twice
    learn = encoder_learner(tmp_path/'run'/'encoder.pth', folder_dls(path, 24, 8, num_workers=0, split=False))
    assert not torch.allclose(a, b, atol=1e-3)
    shrunk = learn.embed()[0]
    assert seen and (shrunk-a).norm()<0.5*(shrunk-b).norm()  # control: the encoder shrinks what is larger
