"""Evaluation against scikit-learn and a plain-numpy reading of the papers' SGD; the kNN column and the callbacks
that watch it."""

import math

import numpy as np, pytest, torch
from fastai.vision.all import (Callback, DataBlock, EarlyStoppingCallback, ImageBlock, IndexSplitter,
                               MultiCategoryBlock, Normalize, PILImageBW, RegressionBlock, SaveModelCallback,
                               aug_transforms)
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, top_k_accuracy_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_info, threadpool_limits
from helpers import fit, make

from ressl_fastai import evaluate
from ressl_fastai.data import digits_dls, tensor_dls
from ressl_fastai.evaluate import KNNAccuracy, _sgd_epochs, embed, fit_logistic, linear_accuracy
from ressl_fastai.label_efficiency import labelled_part

def few(n=200, **kwargs): return make(labelled_part(digits_dls(8, bs=32), range(n)), queue_size=64, **kwargs)

def clusters(n, seed, n_classes=7, dim=6):
    "Overlapping clusters far from standardised"
    rng = np.random.RandomState(seed)
    y = rng.permutation(np.arange(n)%n_classes)
    x = np.random.RandomState(9).randn(n_classes, dim)[y]+1.2*rng.randn(n, dim)
    return torch.tensor(x*np.logspace(-1, 1, dim)+3).float(),torch.tensor(y)

# features

@pytest.mark.parametrize('teacher', [False, True])
def test_before_and_after_the_projector(teacher):
    learn = fit(few())
    x = torch.cat([b[0] for b in learn.dls.valid]).as_subclass(torch.Tensor)
    model = learn.model.eval()
    with torch.no_grad():
        before, after = (model.teacher[0](x), model.teacher(x)) if teacher else (model.encode(x), model(x))
    model.train()
    def both(teacher): return [embed(learn, learn.dls.valid, teacher, projected)[0] for projected in (False,True)]
    got = both(teacher)
    for a,b in zip(got, (before,after)): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(m.training for m in model.projector.modules())
    for a,b in zip(got, both(not teacher)): assert not torch.allclose(a, b)  # control


# kNN in the table

def reference_knn(learn, idxs, k=20):
    (x,y),(vx,vy) = embed(learn, learn.dls.train),embed(learn, learn.dls.valid)
    return (
        KNeighborsClassifier(k, metric='cosine', weights=lambda d: np.exp(-d / 0.1)).fit(x[idxs], y[idxs]).score(vx, vy)
    )


def test_bank_is_bounded_and_never_changes(monkeypatch):
    learn,metric,seen = few(400),KNNAccuracy(bank=60),[]
    monkeypatch.setattr(
        'ressl_fastai.evaluate.knn_accuracy',
        lambda *args, real=KNNAccuracy.value.fget.__globals__['knn_accuracy']: seen.append(args[:2]) or real(*args),
    )
    learn.metrics = metric
    fit(learn, 2)
    got = [learn.validate()[1] for _ in range(2)]
    ys = [y.tolist() for _,y in seen]
    assert len(ys[0])==60 and all(o==ys[0] for o in ys)
    all_x,all_y = embed(learn, learn.dls.train)
    idxs = [next(i for i in range(len(all_x)) if torch.allclose(all_x[i], o, atol=1e-5)) for o in seen[-1][0]]
    assert (
        len(set(idxs)) >= 58 and len(set(all_y[idxs].tolist())) == 10
    )  # spread over the training set; a few digits are alike
    assert got[0]==got[1]==pytest.approx(reference_knn(learn, idxs), abs=0.003)
    assert abs(got[0]-reference_knn(learn, slice(None)))>0.01              # control: the whole training set

def test_above_so_many_images_the_bank_is_bounded_and_it_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr('ressl_fastai.evaluate.many', 60)
    learn,metric = few(400),KNNAccuracy()
    assert metric.bank==50_000
    def value(bank):
        learn.metrics = KNNAccuracy(bank=bank)
        return [learn.validate()[1] for _ in range(2)]
    with learn.no_bar(): bounded,asked = value(60),value(50)
    said = 'knn_accuracy compares with 60 of the 400 training images, always the same: KNNAccuracy(bank=None) takes all'
    assert capsys.readouterr().out.count(said)==1 and bounded[0]==bounded[1]
    with learn.no_bar(): exact = value(None)
    assert exact[0]==pytest.approx(reference_knn(learn, slice(None)), abs=0.003)
    assert bounded[0]!=exact[0] and 'compares' not in capsys.readouterr().out  # control

class Weights(Callback):
    "The weights after each epoch"
    order = 100
    def before_fit(self): self.all = []
    def after_epoch(self): self.all.append({k:v.clone() for k,v in self.learn.model.state_dict().items()})

def test_epochs_without_a_value_are_nan_and_never_the_best(tmp_path):
    learn,weights = few(metrics=KNNAccuracy(every=2), path=tmp_path),Weights()
    fit(learn, 5, cbs=[SaveModelCallback(monitor='knn_accuracy'), weights])
    values = [v[2] for v in learn.recorder.values]
    assert [math.isnan(v) for v in values]==[True,False,True,False,False]  # every second epoch, and the last
    best = int(np.nanargmax(values))
    saved = torch.load(tmp_path/'models'/'model.pth')
    def is_saved(epoch): return all(torch.equal(v, saved[k]) for k,v in weights.all[epoch].items())
    assert [is_saved(i) for i in range(5)]==[i==best for i in range(5)]

def test_early_stopping_counts_epochs_without_a_value():
    learn = few(metrics=KNNAccuracy(every=2))
    fit(
        learn, 9, lr=0.0, cbs=EarlyStoppingCallback(monitor='knn_accuracy', patience=4)
    )  # nothing is learnt (batch norm apart): no improvement after the first value
    assert len(learn.recorder.values)==6

def test_validation_outside_of_training_always_has_a_value():
    learn = few(metrics=KNNAccuracy(every=10))
    def value():
        with learn.no_bar(): return learn.validate()[1]
    assert 0<=value()<=1
    fit(learn, 3)
    values = [v[2] for v in learn.recorder.values]
    assert [math.isnan(v) for v in values]==[True,True,False] and value()==values[-1]

# linear

Cs = (1e-4,1e-3,1e-2,0.1,1.,10.)

def cross_validated(x, y):
    "C by hand, with scikit-learn's own cross-validation"
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    scores = [cross_val_score(LogisticRegression(C=C, max_iter=1000), x, y, cv=folds).mean() for C in Cs]
    return Cs[int(np.argmax(scores))]

def test_logistic_is_scikit_learns():
    (x,y),(vx,vy) = clusters(210, 0),clusters(140, 1)
    mean,std = x.mean(0),x.std(0, correction=0)
    C = cross_validated((x-mean)/std, y)
    clf = LogisticRegression(C=C, max_iter=1000).fit((x-mean)/std, y)
    got = linear_accuracy(x, y, vx, vy)
    scores = clf.predict_proba((vx-mean)/std)
    assert got['C']==C and got['top1']==pytest.approx(clf.score((vx-mean)/std, vy), abs=1e-6)
    assert got['top5']==pytest.approx(top_k_accuracy_score(vy, scores, k=5), abs=1e-6)
    unscaled = LogisticRegression(C=C, max_iter=1000).fit(x, y).score(vx, vy)
    assert got['top1'] != pytest.approx(unscaled, abs=1e-6) and got['top5'] != pytest.approx(
        top_k_accuracy_score(vy, scores, k=4), abs=1e-6
    )  # controls


def test_logistic_takes_its_statistics_from_all_images_and_works_with_one_label_per_class():
    (x,y),(vx,_) = clusters(7, 0),clusters(300, 1)
    clf = fit_logistic(x, y, scale_x=vx)
    torch.testing.assert_close(torch.tensor(clf[0].mean_).float(), vx.mean(0), rtol=1e-5, atol=1e-5)
    assert sorted(clf.predict(x).tolist())==list(range(7)) and clf[-1].C==0.01
    with pytest.raises(ValueError, match='two classes'): fit_logistic(x, torch.zeros(7, dtype=torch.long))

@pytest.mark.parametrize('n_features,threads', [(100,1), (130,2)])
def test_logistic_takes_several_threads_only_for_much_work(monkeypatch, n_features, threads):
    "Work is images times features times classes, here 210 x 100 x 7 and 210 x 130 x 7"
    seen,usual = [],LogisticRegression.fit
    def fit(self, *args):
        seen.append(max(o['num_threads'] for o in threadpool_info() if o['user_api']=='blas'))
        return usual(self, *args)
    monkeypatch.setattr(evaluate, '_wide', 210*7*120)
    monkeypatch.setattr(LogisticRegression, 'fit', fit)
    x,y = torch.randn(210, n_features),torch.arange(210)%7
    with threadpool_limits(2, 'blas'): fit_logistic(x, y, Cs=(0.01,0.1))
    assert set(seen)=={threads} and len(seen)==5*2+1

def test_logistic_takes_the_strongest_of_equal_penalties_and_the_middle_one_without_a_choice():
    y = torch.arange(70)%7
    x = 50*torch.eye(7)[y]+torch.randn(70, 7)
    assert fit_logistic(x, y, Cs=(1.,0.1))[-1].C==0.1  # both are always right
    assert fit_logistic(x[:7], y[:7], Cs=(10.,1e-3,1.))[-1].C==1.

@pytest.mark.parametrize('off,taken', [(0,True), (1,False)], ids=['of the class','of another'])
def test_logistic_takes_views_that_make_held_out_images_likelier(off, taken):
    "scikit-learn's own folds and weights; with the other choice the coefficients are far off"
    (x,y),(more_x,more_y) = clusters(21, 0),clusters(140, 1)
    views = [torch.stack([more_x[more_y==(c+off)%7][i] for c in y]) for i in range(8)]
    clf,(z,*zs) = fit_logistic(x, y, Cs=Cs, views=views),[(o-x.mean(0))/x.std(0, correction=0) for o in (x,*views)]
    def fitted(C, rows, sets):
        w = np.full(len(rows)*len(sets), 1/len(sets))
        z = torch.cat([o[rows] for o in sets])
        return LogisticRegression(C=C, max_iter=1000).fit(z, y[rows].repeat(len(sets)), w)
    def best(sets):
        "Coefficients at the most accurate C, and the likelihood at the likeliest"
        accuracy,likelihood,folds = [],[],StratifiedKFold(3, shuffle=True, random_state=0)
        for C in Cs:
            nets = [(fitted(C, i, sets),j) for i,j in folds.split(x, y)]
            accuracy.append(np.mean([net.score(z[j], y[j]) for net,j in nets]))
            likelihood.append(-np.mean([log_loss(y[j], net.predict_proba(z[j]), labels=range(7)) for net,j in nets]))
        return fitted(Cs[int(np.argmax(accuracy))], range(len(y)), sets).coef_,max(likelihood)
    (plain,without),(augmented,likelihood) = best([z]),best([z,*zs])
    want,other = (augmented,plain) if taken else (plain,augmented)
    assert (likelihood>without)==taken
    assert abs(clf[-1].coef_-want).max()<5e-3 and abs(clf[-1].coef_-other).max()>5e-2

def numpy_sgd(x, y, w, b, lrs, orders, nesterov=True):
    "SGD with momentum as in Sutskever et al. in PyTorch's form, gradients by hand"
    vw,vb,onehot = np.zeros_like(w),np.zeros_like(b),np.eye(len(b))
    for lr,order in zip(lrs, orders):
        for idxs in np.split(order, range(256, len(order), 256)):
            z = x[idxs]@w.T+b
            p = np.exp(z - z.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            d = (p-onehot[y[idxs]])/len(idxs)
            gw,gb = d.T@x[idxs],d.sum(0)
            vw,vb = 0.9*vw+gw,0.9*vb+gb
            w,b = w-lr*(gw+0.9*vw if nesterov else vw),b-lr*(gb+0.9*vb if nesterov else vb)
    return w,b

@pytest.mark.parametrize('protocol', ['step','cosine'])
def test_sgd_is_the_papers(protocol):
    x,y = clusters(300, 0)
    x,lr,n = ((x-x.mean(0))/x.std(0)).double(),0.5,10
    torch.set_default_dtype(torch.float64)
    try: *_,net = _sgd_epochs(x, y, 7, protocol, lr, n, 3)
    finally: torch.set_default_dtype(torch.float32)
    rng = torch.Generator().manual_seed(3)
    w = torch.empty(7, 6, dtype=torch.float64).normal_(std=0.01, generator=rng).numpy()
    orders = [torch.randperm(300, generator=rng).numpy() for _ in range(n)]
    lrs = [lr*0.1**((i>=6)+(i>=8)) if protocol=='step' else lr*(1+math.cos(math.pi*i/n))/2 for i in range(n)]
    want = numpy_sgd(x.numpy(), y.numpy(), w, np.zeros(7), lrs, orders)
    np.testing.assert_allclose(net.weight.detach().numpy(), want[0], rtol=1e-9)
    np.testing.assert_allclose(net.bias.detach().numpy(), want[1], rtol=1e-9)
    for wrong in (
        numpy_sgd(x.numpy(), y.numpy(), w, np.zeros(7), lrs, orders, nesterov=False),
        numpy_sgd(x.numpy(), y.numpy(), w, np.zeros(7), [lr] * n, orders),
    ):
        assert abs(wrong[0]-want[0]).max()>1e-3  # controls: no Nesterov, no schedule

def test_sgd_headline_is_the_last_epoch():
    (x,y),(vx,vy) = clusters(300, 0),clusters(140, 1)
    x,vx = (x-x.mean(0))/x.std(0),(vx-x.mean(0))/x.std(0)
    got = linear_accuracy(x, y, vx, vy, 'step', n_epoch=8)
    nets = [(net.weight.clone(),net.bias.clone()) for net in _sgd_epochs(x, y, 7, 'step', None, 8, 0)]
    scores = [(vx@w.T+b).detach() for w,b in nets]
    tops = [(s.argmax(1)==vy).float().mean().item() for s in scores]
    assert got['top1']==tops[-1] and got['best']==max(tops) and max(tops)>tops[-1]
    assert got['top5']==pytest.approx(top_k_accuracy_score(vy, scores[-1], k=5), abs=1e-6)

def test_linear_probe_is_on_clean_images_of_any_dataloader():
    learn = fit(few())
    part = learn.dls.train.new(get_idxs=lambda: list(range(0, 200, 3)))
    for kw in (dict(teacher=True), dict(projected=True)):
        (x,y),valid = embed(learn, learn.dls.train, **kw),embed(learn, learn.dls.valid, **kw)
        assert learn.linear_probe(part, **kw)==linear_accuracy(x[::3], y[::3], *valid)

def test_embed_sees_clean_images_in_the_order_of_the_items():
    """Against the encoder applied to the stored pixels, normalised by hand; control: what the loader itself gives
    is augmented and shuffled"""
    dls = digits_dls(8, batch_tfms=aug_transforms(size=8, max_rotate=30., p_affine=1.))
    learn = make(dls, queue_size=64)
    norm = next(f for f in learn.dls.train.after_batch.fs if isinstance(f, Normalize))
    x = (learn.dls.train.images[learn.dls.train.rows].as_subclass(torch.Tensor)/255-norm.mean)/norm.std
    with torch.no_grad(): want = learn.model.encoder.eval()(x.as_subclass(torch.Tensor))
    torch.testing.assert_close(embed(learn, learn.dls.train)[0].as_subclass(torch.Tensor), want, rtol=1e-4, atol=1e-4)
    with torch.no_grad(): loaded = learn.model.encoder(learn.dls.train.one_batch()[0].as_subclass(torch.Tensor))
    assert not torch.allclose(loaded, want[:len(loaded)], atol=1e-2)

def test_embed_refuses_another_normalization():
    learn = make(digits_dls(8), queue_size=64)
    with pytest.raises(ValueError, match='must have the Normalize of the learner'):
        embed(learn, digits_dls(8, batch_tfms=Normalize.from_stats([0.9], [0.9], cuda=False)).valid)

def test_classes_that_training_lacks_are_never_right():
    (x,y),(vx,vy) = clusters(210, 0),clusters(140, 1)
    keep = y!=3
    for protocol in ('logistic','step'):
        a = linear_accuracy(x[keep], y[keep], vx, vy, protocol, n_epoch=10)
        b = linear_accuracy(x[keep], y[keep], vx[vy!=3], vy[vy!=3], protocol, n_epoch=10)
        assert a['top1']*140==pytest.approx(b['top1']*120, abs=1e-3)

# targets that have no accuracy

def other_dls(block, get_y):
    ims = (np.random.RandomState(0).rand(40, 8, 8)*255).astype(np.uint8)
    return DataBlock(
        (ImageBlock(PILImageBW), block), get_x=ims.__getitem__, get_y=get_y, splitter=IndexSplitter(range(30, 40))
    ).dataloaders(range(40), bs=8, num_workers=0)


@pytest.mark.parametrize(
    'block,get_y',
    [(MultiCategoryBlock, lambda i: ['a', 'b'] if i % 2 else ['b']), (RegressionBlock, lambda i: i + 0.5)],
    ids=['multi-label', 'regression'],
)
def test_other_targets_are_refused_in_words(block, get_y):
    learn = make(other_dls(block(), get_y), queue_size=16)
    with pytest.raises(ValueError, match='train_y must hold one category per image'): learn.linear_probe()
    learn.metrics = KNNAccuracy()
    with (
        pytest.raises(ValueError, match="the validation set's targets must hold one category per image"),
        learn.no_bar(),
        learn.no_logging(),
    ):
        learn.fit(1)


def test_impossible_arguments_raise():
    learn = few()
    for f, kw, nm in (
        (KNNAccuracy, dict(every=0), 'every'),
        (KNNAccuracy, dict(bank=0), 'bank'),
        (KNNAccuracy, dict(k=0), 'k'),
        (learn.linear_probe, dict(lr=0, protocol='step'), 'lr'),
        (learn.linear_probe, dict(n_epoch=0), 'n_epoch'),
        (learn.linear_probe, dict(protocol='sgd'), 'protocol'),
    ):
        with pytest.raises(ValueError, match=f'{nm} must be'): f(**kw)

def test_a_part_of_a_loader_is_not_taken_for_the_whole():
    "fastai's `new(n=)` goes through the first items; what was kept of all is another thing"
    learn = fit(make(digits_dls(8, bs=64)))
    whole = embed(learn, learn.dls.valid)[0]
    assert len(learn.embed(learn.dls.valid)[0])==len(whole)  # kept from now on
    part = learn.embed(learn.dls.valid.new(n=20))[0]
    torch.testing.assert_close(part, whole[:20], rtol=0, atol=1e-5)

def test_images_without_labels_have_no_accuracy_of_neighbours():
    "A learner that gets other images goes on, its column says NaN; labels that are no categories are an error still"
    learn = fit(make(digits_dls(8, bs=64), metrics=[KNNAccuracy()]))
    assert 0<=learn.recorder.values[-1][-1]<=1
    x = np.random.default_rng(0).integers(0, 256, (200,8,8), dtype=np.uint8)
    learn.dls = tensor_dls(x, bs=64)
    assert math.isnan(fit(learn).recorder.values[-1][-1])
    learn.dls = tensor_dls(x, np.linspace(0, 1, 200), y_block=RegressionBlock, bs=64)
    with pytest.raises(ValueError, match='must hold one category per image'): fit(learn)
