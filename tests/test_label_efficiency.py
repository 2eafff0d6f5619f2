"Label efficiency: fixed balanced draws, only these labels used, each row from where it should start, one schedule."
from collections import Counter
from functools import partial

import numpy as np, pandas as pd, pytest, scipy.stats, torch
from fastai.vision.all import FlipItem, ImageDataLoaders, Learner, Normalize, Resize
from fastai.vision.learner import model_meta
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torchvision.models import resnet18
from helpers import fit, make, same, seed_all, state

from ressl_fastai.data import digits_dls
from ressl_fastai.evaluate import embed, measure_batch_norms
from ressl_fastai.images import open_image
from ressl_fastai.label_efficiency import (draw_labels, label_rows, labelled_part, plot_labels,
                                           summarize_labels)
from ressl_fastai.models import create_encoder, small_resnet
from ressl_fastai.loaders import clean_dl

arch = partial(small_resnet, widen=0.125)
dls = partial(digits_dls, 8, bs=64)
def few(arch=arch): return make(labelled_part(dls(), range(300)), arch, queue_size=64)
def pretrained(n=1): return fit(few(), n)

# draws

def test_draws_are_balanced_nested_fixed_and_differ_by_seed():
    y = torch.tensor(np.random.RandomState(0).choice(4, 400, p=[.1,.2,.3,.4]))
    for seed in range(3):
        draws = [draw_labels(y, n, seed=seed) for n in (1,2,5,20)]
        for n,o in zip((1,2,5,20), draws): assert y[o].bincount().tolist()==[n]*4 and len(set(o))==len(o)
        for a,b in zip(draws, draws[1:]): assert set(a)<set(b)
        assert (draw_labels(y, 5, seed=seed)==draws[2]).all() and not set(draws[2])<=set(draw_labels(y, 5, seed=seed+1))
    counts,tenth = y.bincount().numpy(),y[draw_labels(y, fraction=0.1)].bincount().numpy()
    assert (tenth==np.round(counts*0.1)).all() and y[draw_labels(y, fraction=1e-3)].bincount().tolist()==[1]*4
    often = np.bincount(np.concatenate([draw_labels(y, 5, seed=s) for s in range(300)]), minlength=400)
    want = 300*5/counts[y]
    assert abs((often-want)/want**0.5).mean()<1.1  # every image of a class as often as another; Poisson gives 0.8
    assert abs((np.bincount(np.repeat(draw_labels(y, 5), 300),
                            minlength=400)-want)/want**0.5).mean()>1.1  # control: one draw again and again

@pytest.mark.parametrize('kw,msg', [(dict(per_class=0),'per_class must be'), (dict(per_class=9),'is more than the 5'),
                                    (dict(fraction=0.),'fraction must be'),
    (dict(fraction=1.1),'fraction must be'), ({},'one of per_class and fraction'),
    (dict(per_class=1, fraction=.1),'one of per_class and fraction')])
def test_impossible_draws(kw, msg):
    with pytest.raises(ValueError, match=msg): draw_labels(torch.arange(10)%2, **kw)

def test_part_holds_those_images_and_keeps_the_rest():
    dls = digits_dls(8, bs=64, batch_tfms=Normalize.from_stats([0.2], [0.4], cuda=False))
    idxs = [3,100,7,1400]
    part = labelled_part(dls, idxs)
    def all_of(dl): return torch.cat([b[0] for b in clean_dl(dl)]),torch.cat([b[1] for b in clean_dl(dl)])
    for got,want in zip(all_of(part.train), all_of(dls.train)): assert torch.equal(got, want[idxs])
    assert (part.train.n, part.train.bs, part.train.shuffle)==(4, 4, True)
    assert dls.train.n==1437 and part.valid is dls.valid
    assert list(part.vocab)==list(dls.vocab)
    assert len(list(labelled_part(dls, range(65)).train))==1  # full batches: never one of a single image

# rows

class Fits(list):
    "What `fit_one_cycle` was asked for; nothing is trained"
    def __call__(self, learn, n_epoch, lr, **kwargs):
        learn.create_opt()
        items = sorted(i for tl in learn.dls.train_ds.tls[:1] for i in tl.items)
        self.append(dict(items=items, n_epoch=n_epoch, n_batches=len(learn.dls.train), lr=lr,
                         frozen=[n for n,p in learn.model.named_parameters() if not p.requires_grad],
            body={k:v.clone() for k,v in learn.model[0].state_dict().items()}, groups=len(learn.opt.hypers)))

@pytest.fixture
def fits(monkeypatch):
    fits = Fits()
    monkeypatch.setattr(Learner, 'fit_one_cycle', lambda *args, **kwargs: fits(*args, **kwargs))
    return fits

def body_of(model): return {k:v for k,v in model[0].state_dict().items()}

@pytest.mark.parametrize('teacher', [False, True])
def test_fine_tuned_and_scratch_differ_only_in_where_they_start(fits, teacher):
    learn = pretrained()
    df = learn.label_efficiency(learn.dls, (2,7), seeds=2, rows=('fine-tuned','from scratch'), n_steps=10, lr=0.01,
                          arch=arch, teacher=teacher)
    tuned,scratch = fits[:4],fits[4:]
    assert len(scratch)==4 and df.n_labels.tolist()==[20,70]*4
    train_items,y = learn.dls.train_ds.items,embed(learn, learn.dls.train)[1]
    for i,(a,b) in enumerate(zip(tuned, scratch)):
        for k in ('items','n_epoch','n_batches','lr','frozen'): assert a[k]==b[k]
        assert a['items']==sorted(train_items[j] for j in draw_labels(y, (2,7)[i%2], seed=i//2)) and a['frozen']==[]
        assert a['lr']==0.01 and a['n_epoch']*a['n_batches']==10
        assert same(a['body'], body_of(learn.model.teacher[0] if teacher else learn.model.encoder))
        assert not same(a['body'], body_of(learn.model.encoder if teacher else learn.model.teacher[0]))  # control
        assert a['body'].keys()==b['body'].keys() and not same(a['body'], b['body'])
    assert same(scratch[0]['body'], scratch[1]['body'])
    assert not same(scratch[0]['body'], scratch[2]['body'])  # fresh weights by seed

def test_frozen_and_pixels_are_logistic_regression_on_the_drawn_labels():
    learn = pretrained()
    df = learn.label_efficiency(learn.dls, 1, seeds=2, rows=('frozen features','raw pixels'))
    (tx,ty),(vx,vy) = embed(learn, learn.dls.train),embed(learn, learn.dls.valid)
    def pixels(dl): return torch.cat([b[0].flatten(1) for b in clean_dl(dl)]).as_subclass(torch.Tensor)
    def by_hand(x, valid_x, seed, scale_by_all):
        idxs = draw_labels(ty, 1, seed=seed)
        scale_x = x if scale_by_all else x[idxs]
        mean,std = scale_x.mean(0),scale_x.std(0, correction=0)
        std[std<1e-5] = 1.  # pixels that never change
        clf = LogisticRegression(C=0.01, max_iter=1000)  # nothing to cross-validate with: the middle of C's grid
        clf.fit(((x-mean)/std)[idxs], ty[idxs])
        return clf.score((valid_x-mean)/std, vy)
    rows = (tx,vx,False),(pixels(learn.dls.train),pixels(learn.dls.valid),True)
    want = [by_hand(*o, s, scale) for *o,scale in rows for s in (0,1)]
    np.testing.assert_allclose(df.accuracy, want, atol=0.006)  # two images: float32 and pixels that hardly change
    assert abs(df.accuracy-np.roll(want, 1)).max()>0.02  # control

def test_each_file_is_opened_once_or_twice(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for i in range(60):
        (tmp_path/'abc'[i%3]).mkdir(exist_ok=True)
        im = Image.fromarray(rng.integers(0, 80, (12,12,3), np.uint8)+np.uint8(60*(i%3)))
        im.save(tmp_path/'abc'[i%3]/f'{i}.png')
    def files(*tfms): return ImageDataLoaders.from_folder(tmp_path, valid_pct=0.5, seed=0, bs=8, num_workers=0,
                                                          item_tfms=[*tfms, Resize(12)])
    learn = make(files(), arch, queue_size=16)
    opened = Counter()
    def counted(file, *args): return opened.update([file]) or open_image(file, *args)
    monkeypatch.setattr('ressl_fastai.images.open_image', counted)
    how = dict(labels_per_class=(2,5), seeds=2, n_steps=4, arch=arch)
    got = learn.label_efficiency(files(), **how)
    assert sum(opened.values())<=2*60+20  # decoded once, and a few looked at
    opened.clear()
    again = learn.label_efficiency(files(FlipItem(1.)), **how)  # control: random transforms take effect each time
    assert sum(opened.values())>5*60
    monkeypatch.setattr('ressl_fastai.label_efficiency.cached_dls', lambda dls, **kwargs: dls)
    want = learn.label_efficiency(files(), **how)
    pd.testing.assert_frame_equal(got, want)
    assert not again.equals(want)

def test_random_encoder_is_the_untrained_network():
    "With the batch statistics of the images, without which it would be a worse baseline"
    learn = pretrained(2)
    df = learn.label_efficiency(learn.dls, 3, seeds=1, rows=('frozen features','random encoder'), arch=arch)
    untrained = few()
    seed_all()
    untrained.model.encoder.load_state_dict(create_encoder(arch, 1, size=8).state_dict())
    def frozen(): return untrained.label_efficiency(untrained.dls, 3, seeds=1, rows=('frozen features',)).accuracy[0]
    as_it_begins = frozen()
    measure_batch_norms(untrained)
    assert df.accuracy[1]==frozen() not in (df.accuracy[0], as_it_begins)

def test_training_learns_and_nothing_else_changes():
    learn = pretrained()
    before,rng = state(learn),torch.get_rng_state()
    a,b = (learn.label_efficiency(learn.dls, 10, seeds=1, rows=label_rows, n_steps=25, lr=0.02, arch=arch)
           for _ in range(2))
    pd.testing.assert_frame_equal(a, b)                           # fixed by its seeds
    assert same(before, state(learn)) and torch.equal(rng, torch.get_rng_state())
    got = dict(zip(a.row, a.accuracy))
    assert tuple(got)==label_rows and got['raw pixels']>0.6 and got['fine-tuned']>0.2
    np.testing.assert_allclose(a.accuracy, a.balanced_accuracy, atol=0.03)     # the digits are balanced

def test_imagenet_row_asks_the_library_for_weights(monkeypatch):
    asked = []
    def resnet(weights=None):
        asked.append(weights)
        return resnet18()
    monkeypatch.setitem(model_meta, resnet, model_meta[resnet18])
    learn = make(digits_dls(16, bs=16), resnet18, queue_size=16)
    df = learn.label_efficiency(learn.dls, 1, seeds=1, rows=('ImageNet',), n_steps=1, arch=resnet)
    assert len(df)==1 and asked==[model_meta[resnet18]['weights']]

# mistakes

@pytest.mark.parametrize('kw,msg', [(dict(rows=('pixels',)),'rows must be of'),
                                    (dict(labels_per_class=(1,1000), rows=('frozen features',)),'is more than'),
                                    (dict(rows=('from scratch',)),'arch must make'),
    (dict(rows=('random encoder',), arch=small_resnet),'arch must make')])
def test_mistakes_are_told_before_training(fits, kw, msg):
    learn = make()
    with pytest.raises(ValueError, match=msg): learn.label_efficiency(learn.dls, **{'labels_per_class':(1,), **kw})
    assert fits==[]

def test_another_normalisation_is_refused():
    learn = make()
    other = digits_dls(8, batch_tfms=Normalize.from_stats([0.9], [0.1], cuda=False))
    with pytest.raises(ValueError, match='[Nn]ormalize'): learn.label_efficiency(other, 1)
    with pytest.raises(ValueError, match='[Nn]ormalize'): embed(learn, other.valid)
    with pytest.raises(ValueError, match='[Nn]ormalize'):
        embed(learn, digits_dls(8).valid)  # none at all: features would be wrong, silently

# summary

def test_intervals_are_students():
    rng = np.random.RandomState(0)
    df = pd.DataFrame([dict(row=r, labels=n, seed=s, accuracy=rng.rand(), balanced_accuracy=rng.rand())
                       for r in 'ab' for n in (1,5) for s in range(4)])
    for value in ('accuracy','balanced_accuracy'):
        for (row,n),o in summarize_labels(df, value).iterrows():
            v = df[(df.row==row)&(df.labels==n)][value]
            low,high = scipy.stats.t.interval(0.95, 3, v.mean(), scipy.stats.sem(v))
            np.testing.assert_allclose([o['mean'],o.low,o.high,o.seeds], [v.mean(),low,high,4])
            assert abs(high-(v.mean()+1.96*scipy.stats.sem(v)))>1e-2  # control: the normal's
    assert summarize_labels(df[df.seed==0]).low.isna().all()
    assert [t.get_text() for t in plot_labels(df).get_legend().get_texts()]==['a','b']
