"One embedding of an image, whatever opens it, before and after export; what is checked before training."
from functools import partial

import numpy as np, pandas as pd, pytest, timm, torch, torchvision.models as tv
from fastai.learner import load_learner
from fastai.vision.all import (CategoryBlock, ColReader, DataBlock, DataLoaders, EarlyStoppingCallback, ImageBlock,
    PILImage, PILImageBW, RandomSplitter, ReduceLROnPlateau, Resize, SaveModelCallback, get_image_files)
from helpers import quiet
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn, Tensor

import ressl_fastai.report
from ressl_fastai.data import tensor_dls
from ressl_fastai.evaluate import KNNAccuracy, embed
import ressl_fastai.curate
from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import small_resnet
from ressl_fastai.views import multi_crop_tfms, strong_tfms, weak_tfms

net,small = partial(small_resnet, widen=0.125),dict(queue_size=8, n_hidden=16, dim=8)

def parity(f): return int(f.stem)%2

def make_dls(path, cls=PILImage, size=16, n=16, pixels=40, labels=False):
    "Pieces of scikit-learn's photographs"
    rng,ims = np.random.default_rng(0),load_sample_images().images
    for i in range(n):
        t,l = rng.integers(0, 300, 2)
        Image.fromarray(ims[i%2][t:t+pixels,l:l+pixels]).save(path/f'{i:02}.png')
    blocks,get_y = ((ImageBlock(cls),CategoryBlock), parity) if labels else (ImageBlock(cls), None)
    block = DataBlock(blocks, get_items=lambda p: get_image_files(p).sorted(), get_y=get_y, item_tfms=Resize(size),
                      splitter=RandomSplitter(seed=0))
    return block.dataloaders(path, bs=4, num_workers=0)

def make(dls, path, arch=net, **kwargs):
    learn = ressl_learner(dls, arch, path=path, **{**small, 'metrics':[], **kwargs})
    quiet(learn, learn.fit, 1, 1e-3)
    return learn

def exported(learn):
    learn.export('e.pkl')
    return load_learner(learn.path/'e.pkl')

def close(a, b): return torch.allclose(a.as_subclass(Tensor), b.as_subclass(Tensor), atol=1e-5)

# one embedding

@pytest.mark.parametrize('predictor_layers', [0, 2])
def test_predict_get_preds_and_embed_give_one_embedding(predictor_layers, tmp_path):
    learn = make(make_dls(tmp_path), tmp_path, predictor_layers=predictor_layers)
    files = learn.dls.valid_ds.items
    dl = learn.dls.test_dl(files)
    want = quiet(learn, learn.get_preds, dl=dl)[0]
    assert close(embed(learn, dl, projected=True)[0], want)
    assert close(torch.stack([quiet(learn, learn.predict, f)[0] for f in files]), want)
    with torch.no_grad():
        assert close(learn.model.eval()(dl.one_batch()[0]), want)
        before = nn.Sequential(learn.model.encoder, learn.model.projector, learn.model.norm)(dl.one_batch()[0])
    assert close(before, want)==(predictor_layers==0)  # control: without the predictor

def test_exported_learner_gives_features_to_all_that_need_them(tmp_path):
    learn = make(make_dls(tmp_path), tmp_path, predictor_layers=2)
    there,files = exported(learn),get_image_files(tmp_path).sorted()
    ours,dl = learn.dls.test_dl(files),there.dls.test_dl(files)
    for projected in (False,True):
        assert close(embed(there, dl, projected=projected)[0], embed(learn, ours, projected=projected)[0])
    assert not close(embed(there, dl)[0], embed(learn, ours, teacher=True)[0])
    assert there.find_outliers(3, dl=dl).equals(learn.find_outliers(3, dl=ours))
    assert there.suggest_labels(3, dl=dl).equals(learn.suggest_labels(3, dl=ours))
    assert len(there.find_duplicates(dl=dl))==len(learn.find_duplicates(dl=ours))
    there.show_neighbors(2, dl=dl)
    for f,why in ((lambda: embed(there, there.dls.valid), r'the validation set is empty: .*test_dl\(files\)'),
                  (lambda: embed(there, dl, teacher=True), 'no teacher'),
                  (lambda: there.find_outliers(3), r'dl=learn.dls.test_dl\(files\)')):
        with pytest.raises(ValueError, match=why): f()

@pytest.mark.parametrize('cls', [PILImage, PILImageBW])
def test_predict_takes_an_image_however_it_is_opened(cls, tmp_path):
    learn = make(make_dls(tmp_path, cls), tmp_path)
    file = learn.dls.valid_ds.items[0]
    rgb = Image.open(file).convert('RGB')
    gray = rgb.convert('L')
    colours = dict(text=str(file), bytes=file.read_bytes(), opened=Image.open(file), rgb=rgb, rgba=rgb.convert('RGBA'),
                   array=np.array(rgb), rgba_array=np.array(rgb.convert('RGBA')), fastai=PILImage.create(file),
                   cmyk=rgb.convert('CMYK'), palette=rgb.quantize(256))
    grays = dict(fastai=PILImageBW.create(file), with_alpha=gray.convert('LA'), array=np.array(gray),
                 palette=gray.quantize(256), cmyk=gray.convert('RGB').convert('CMYK'))
    for le in (learn, exported(learn)):
        def seen(o): return quiet(le, le.predict, o, with_input=True)
        (x,z,*_),(gray_x,gray_z,*_) = seen(file),seen(gray)
        for want,kinds in (((x,z),colours), ((gray_x,gray_z),grays)):
            for nm,o in kinds.items():
                got = seen(o)
                off = (got[0]-want[0]).abs().mean()
                assert off<0.08 if nm in ('palette','cmyk') else off==0 and torch.equal(got[1], want[1]), nm
        assert (x-gray_x).abs().mean()>0.12 or cls is PILImageBW  # control
    assert type(rgb) is Image.Image and rgb.mode=='RGB'  # what the user had stays as it was
    with pytest.raises(ValueError, match=r'uint8, got float64'): learn.predict(np.array(rgb)/255)

def test_predict_follows_the_pipeline_of_tables_and_arrays(tmp_path):
    make_dls(tmp_path)
    df = pd.DataFrame(dict(name=[f'{i:02}.png' for i in range(16)]))
    get_x,splitter = ColReader('name', pref=tmp_path),RandomSplitter(seed=0)
    table = DataBlock(ImageBlock, get_x=get_x, splitter=splitter, item_tfms=Resize(16))
    learn,file = make(table.dataloaders(df, bs=4, num_workers=0), tmp_path),tmp_path/'03.png'
    a,b,c = (quiet(learn, learn.predict, o)[0] for o in (df.iloc[3], file, Image.open(file)))
    assert close(a, b) and close(a, c)
    ims = np.random.default_rng(0).integers(0, 255, (40,16,16,3), dtype=np.uint8)
    learn = make(tensor_dls(ims, bs=4), tmp_path)
    assert close(*(quiet(learn, learn.predict, o)[0] for o in (3, ims[3])))

class Own(nn.Module):
    "Features, or maps with channels last"
    def __init__(self, maps=False):
        super().__init__()
        self.net,self.maps = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU()),maps
    def forward(self, x): return self.net(x).permute(0, 2, 3, 1) if self.maps else self.net(x).mean((2,3))

@pytest.mark.parametrize('arch', [net, tv.resnet18, Own(), Own(True)],
                         ids=['small_resnet','resnet18','own','channels_last'])
def test_exported_model_becomes_a_graph(arch, tmp_path):
    learn = make(make_dls(tmp_path, size=32), tmp_path, arch, predictor_layers=2)
    model,x = exported(learn).model.eval(),torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        want = model(x)
        assert close(want, learn.model.eval()(x))
        for make_graph in (torch.fx.symbolic_trace, torch.jit.script, partial(torch.jit.trace, example_inputs=x)):
            assert close(make_graph(model)(x), want)

def test_unit_length_in_float32_or_better():
    from ressl_fastai.models import L2Norm
    for dtype,want in ((torch.bfloat16,torch.float32), (torch.float32,torch.float32), (torch.float64,torch.float64)):
        assert L2Norm()(torch.ones(2, 3, dtype=dtype)).dtype==want

# views and checks before training

def sizes(learn): return [o.size for o in (learn.ressl.weak_tfms, *learn.ressl.strong_tfms)]

def test_views_follow_larger_images(tmp_path):
    small_dls,large = make_dls(tmp_path, size=16),make_dls(tmp_path, size=48)
    given = multi_crop_tfms(16, (1,0.5), (0.2,0.2), (1.,1.))
    learn = make(small_dls, tmp_path, strong_tfms=given)
    learn.dls = large
    assert sizes(learn)==[(48,48),(48,48),(24,24)] and [o.size for o in given]==[(16,16),(8,8)]  # the user's own stay
    quiet(learn, learn.fit, 1, 1e-3)
    learn.dls = make_dls(tmp_path, size=(16,32))
    assert sizes(learn)==[(16,32),(16,32),(8,16)]
    def own(x): return x[...,:8,:8]
    learn = make(small_dls, tmp_path, strong_tfms=own)
    learn.dls = large
    assert learn.ressl.strong_tfms is own and learn.ressl.weak_tfms.size==(48,48)
    with pytest.raises(ValueError, match='images with 3 channel'): learn.dls = make_dls(tmp_path, PILImageBW)
    assert learn.dls is large

def vit(): return timm.create_model('test_vit', img_size=32, dynamic_img_size=False)

def test_views_that_a_network_does_not_take_are_refused_before_training(tmp_path):
    dls = make_dls(tmp_path, size=32)
    def corner(x): return x[...,:16,:16]
    for nm,tfms in (('strong_tfms',multi_crop_tfms(32)), ('weak_tfms',weak_tfms(48)), ('strong_tfms',corner)):
        with pytest.raises(ValueError, match=f'{nm} makes views of .*dynamic_img_size=True'):
            make(dls, tmp_path, vit, **{nm:tfms})
    dynamic = partial(timm.create_model, 'test_vit', img_size=32, dynamic_img_size=True, dynamic_img_pad=True)
    learn = make(dls, tmp_path, dynamic, strong_tfms=multi_crop_tfms(32))  # the remedy
    assert np.isfinite(learn.recorder.values).all()
    learn = make(dls, tmp_path, vit)
    with pytest.raises(ValueError, match='makes views of 48 x 48'): learn.dls = make_dls(tmp_path, size=48)
    assert learn.dls is dls and learn.ressl.weak_tfms.size==(32,32)

def test_trying_leaves_no_trace(tmp_path):
    dls,g = make_dls(tmp_path),torch.Generator().manual_seed(3)
    tfms = strong_tfms(16, generator=g)
    torch.manual_seed(1)
    learn = ressl_learner(dls, net, strong_tfms=tfms, **small)
    after = torch.rand(1)
    torch.manual_seed(1)
    with pytest.MonkeyPatch.context() as m:
        m.setattr('ressl_fastai.learner.check_views', lambda *args, **kwargs: None)
        other = ressl_learner(dls, net, strong_tfms=tfms, **small)
    assert torch.equal(after, torch.rand(1)) and g.get_state().equal(torch.Generator().manual_seed(3).get_state())
    a,b = (list(o.model.state_dict().values()) for o in (learn, other))
    assert all(map(torch.equal, a, b)) and len(a)==len(b)
    assert learn.model.training==other.model.training

def test_bs_1(tmp_path):
    dls = make_dls(tmp_path)
    dls.train.bs = dls.valid.bs = 1
    with pytest.raises(ValueError, match='bs must be at least 2'): make(dls, tmp_path)
    learn = make(dls, tmp_path, projector_bn=False)
    assert np.isfinite(learn.recorder.values).all() and embed(learn, learn.dls.valid)[0].shape==(3,64)

# without validation images

def test_no_validation_set(tmp_path):
    labelled = make_dls(tmp_path, labels=True)
    alone = DataLoaders(labelled.train)
    empty = labelled.valid.new(labelled.valid_ds.new_empty())
    for dls in (alone, DataLoaders(labelled.train, empty)):
        learn = make(dls, tmp_path, metrics=None)
        assert learn.recorder.values[-1][1:]==[None,None] and len(embed(learn, learn.dls.train)[0])==13
        for f in (lambda: embed(learn, learn.dls.valid), lambda: learn.linear_probe()):
            with pytest.raises(ValueError, match='the validation set is empty'): f()
        for cb in (EarlyStoppingCallback(), SaveModelCallback('knn_accuracy')):
            with pytest.raises(ValueError, match='needs validation images'): learn.fit(1, cbs=cb)
        page = learn.report().read_text()
        assert 'there are no validation images' in page and 'clean training images' in page
        assert 'section failed' not in page
        assert len(exported(learn).dls.valid_ds)==0

def test_epochs_without_a_value_do_not_stop_early(tmp_path, monkeypatch):
    monkeypatch.setattr(
        'ressl_fastai.evaluate.knn_accuracy', lambda *args, **kwargs: 0.5
    )  # batch norms move at learning rate 0 too
    learn = make(make_dls(tmp_path, labels=True), tmp_path, metrics=KNNAccuracy(every=3))
    for cb in (EarlyStoppingCallback('knn_accuracy', patience=2), ReduceLROnPlateau('knn_accuracy', patience=1)):
        with pytest.raises(ValueError, match='patience must be at least 3'): learn.fit(6, cbs=cb)
    cbs = [EarlyStoppingCallback('knn_accuracy', patience=3), SaveModelCallback('knn_accuracy')]
    quiet(learn, learn.fit, 6, 0., cbs=cbs)
    assert len(learn.recorder.values)==6  # first value in epoch 3, the same one in epoch 6
    quiet(learn, learn.fit, 9, 0., cbs=EarlyStoppingCallback('knn_accuracy', patience=3))
    assert len(learn.recorder.values)==6
