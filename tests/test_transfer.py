"A classifier in one line: scikit-learn's own predictions, in an ordinary fastai learner."
import subprocess, sys
from functools import partial

import numpy as np, pytest, torch
from fastai.vision.all import (CategoryBlock, DataBlock, ImageBlock, ImageDataLoaders, IndexSplitter,
                               MultiCategoryBlock, Normalize, PILImageBW, RegressionBlock, TensorImage, Transform,
                               accuracy, get_image_files)
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from helpers import Own, fit, make, same, state

from ressl_fastai import transfer
from ressl_fastai.data import digits_dls, tensor_dls
from ressl_fastai.evaluate import embed, fit_logistic
from ressl_fastai.label_efficiency import draw_labels, labelled_part
from ressl_fastai.loaders import normalize_stats, same_normalize
from ressl_fastai.models import ReSSLModel, small_resnet
from ressl_fastai.transfer import encoder_learner

arch = partial(small_resnet, widen=0.125)
digits = load_digits()
ims,y = (digits.images*255/16).astype(np.uint8),digits.target

def few(per_class=5, classes=range(10), vocab=range(10), n_test=300, bs=64, **kwargs):
    "`per_class` labelled digits of each of `classes`; of the last `n_test` digits those in `vocab` are for validation"
    test = np.arange(len(y)-n_test, len(y))
    test = test[np.isin(y[test], vocab)]
    idxs = np.concatenate([np.flatnonzero(y[:-n_test]==c)[:per_class] for c in classes])
    n,idxs = len(idxs),np.concatenate([idxs,test])
    block = CategoryBlock(vocab=list(vocab))
    return tensor_dls(ims[idxs], y[idxs], valid_idx=range(n, len(idxs)), bs=bs, y_block=block, **kwargs)

@pytest.fixture(scope='module')
def learn():
    "Trained for a moment, so that student and teacher differ"
    return fit(make(labelled_part(digits_dls(8, bs=64), range(300)), arch, queue_size=64), 2)

def probabilities(clf):
    with clf.no_bar(): return clf.get_preds()[0]

def by_hand(learn, dls, teacher=False, C=None):
    "scikit-learn's probabilities, in the columns of the vocabulary"
    (x,target),(vx,_) = embed(learn, dls.train, teacher),embed(learn, dls.valid, teacher)
    if C is None: model,mean,std = (pipe := fit_logistic(x, target))[-1],pipe[0].mean_,pipe[0].scale_
    else:
        mean,std = x.mean(0).numpy(),x.std(0, correction=0).numpy()
        std[std==0] = 1.  # dead features
        model = LogisticRegression(C=C, max_iter=1000).fit((x.numpy()-mean)/std, target.numpy())
    res = np.zeros((len(vx), len(dls.vocab)))
    res[:,model.classes_] = model.predict_proba((vx.numpy()-mean)/std)
    return torch.tensor(res)

# the same predictions

@pytest.mark.parametrize(
    'kw',
    [
        dict(),
        dict(classes=(3, 8), vocab=(3, 8)),
        dict(classes=(0, 1, 2, 3, 4, 5, 6, 7)),
        dict(classes=(4, 9)),
        dict(per_class=20, bs=16),
    ],
    ids=['ten', 'two', 'two_missing', 'two_of_ten', 'many'],
)
@pytest.mark.parametrize('teacher', [False, True])
def test_predictions_are_scikit_learns(learn, kw, teacher):
    dls = few(**kw)
    clf = learn.to_classifier(dls, teacher=teacher)
    got,want,other = probabilities(clf),by_hand(learn, dls, teacher),by_hand(learn, dls, not teacher)
    assert (got-want).abs().max()<1e-3 and (got.argmax(1)==want.argmax(1)).all()
    assert (got-other).abs().max()>1e-2  # control
    absent = [i for i,c in enumerate(dls.vocab) if c not in kw.get('classes', range(10))]
    assert got.shape[1]==len(dls.vocab) and bool((got[:,absent]<1e-12).all())
    assert (clf.model[1][-1].weight[absent]==0).all()
    assert all(np.isfinite(clf.validate()))

def test_one_label_per_class_has_nothing_to_choose_a_penalty_with(learn):
    dls = few(1)
    got,want = probabilities(learn.to_classifier(dls)),by_hand(learn, dls, C=1e-2)   # the middle of fit_logistic's grid
    assert (got-want).abs().max()<1e-3
    assert (got-by_hand(learn, dls, C=1.)).abs().max()>1e-2  # control

def test_one_accuracy_for_one_encoder(learn):
    dls = digits_dls(8, bs=64)
    row = learn.label_efficiency(dls, 5, seeds=(3,), rows=('frozen features',)).iloc[0]
    part = labelled_part(dls, draw_labels(embed(learn, dls.train)[1], 5, seed=3))
    got = learn.to_classifier(part, metrics=accuracy).validate()[1]
    assert got==pytest.approx(learn.linear_probe(part.train, part.valid)['top1'])==pytest.approx(row.accuracy)
    other = labelled_part(dls, draw_labels(embed(learn, dls.train)[1], 5, seed=4))
    assert got!=pytest.approx(learn.to_classifier(other, metrics=accuracy).validate()[1])  # control

class Rolled(Transform):
    "An augmentation that is always the same: rows and columns moved"
    split_idx = 0
    def __init__(self, by): self.by = by
    def encodes(self, x:TensorImage): return x.roll(self.by, dims=(2,3))

def half_moved():
    "25 digits of each class, every other one moved by half: images, classes, positions of all but six for validation"
    idxs = np.concatenate([np.flatnonzero(y==c)[:25] for c in range(10)])
    x = ims[idxs].copy()
    x[1::2] = np.roll(x[1::2], (4,4), (1,2))
    return x,y[idxs],np.flatnonzero(np.arange(250)%25>=6)

@pytest.mark.parametrize('some_moved', [True, False])
def test_views_that_dls_gives_take_part_if_they_help(learn, some_moved):
    "Views move images by half, which helps only where every other image is moved so"
    by = (4,4)
    x,target,valid_idx = half_moved()
    if not some_moved: x[1::2] = np.roll(x[1::2], by, (1,2))  # back
    def images(x, **kwargs): return tensor_dls(x, target, valid_idx=valid_idx, bs=64, **kwargs)
    def classified(**kwargs):
        torch.manual_seed(0)
        clf = learn.to_classifier(images(x, batch_tfms=Rolled(by)), **kwargs)
        state = torch.get_rng_state()
        return probabilities(clf),state
    (got,state),(plain,state_without) = classified(),classified(n_views=0)
    assert torch.equal(state, state_without)
    dls,moved = images(x),images(np.roll(x, by, (1,2)))
    for o in (dls,moved): same_normalize(o, normalize_stats(learn.dls), 'the encoder')
    (z,t),(vz,_),(view,_) = embed(learn, dls.train),embed(learn, dls.valid),embed(learn, moved.train)
    without,likelier = fit_logistic(z, t),fit_logistic(z, t, views=[view]*8)
    def off(probabilities, pipe): return (probabilities-torch.tensor(pipe.predict_proba(vz.numpy()))).abs().max()
    assert off(plain, without)<1e-3 and off(got, likelier)<1e-3
    assert (off(got, without)>1e-2)==some_moved

def test_views_of_files_are_those_of_their_images(learn, tmp_path):
    "Shuffled files, opened by other processes, in the order of their labels; shuffled views would be of other classes"
    x,target,valid_idx = half_moved()
    files = [tmp_path/f'{i}.png' for i in range(len(x))]
    for f,o in zip(files, x): Image.fromarray(o).save(f)
    block = DataBlock((ImageBlock(PILImageBW),CategoryBlock), get_x=lambda i: files[i],
                      get_y=lambda i: str(target[i]), splitter=IndexSplitter(valid_idx), batch_tfms=Rolled((4,4)))
    of_files = block.dataloaders(range(len(x)), bs=16, num_workers=2)
    def of_images(): return tensor_dls(x, target, valid_idx=valid_idx, bs=16, batch_tfms=Rolled((4,4)))
    want,without = (probabilities(learn.to_classifier(of_images(), n_views=n)) for n in (8,0))
    got = probabilities(learn.to_classifier(of_files))
    assert (got-want).abs().max()<1e-3 and (got-without).abs().max()>1e-2

def test_views_end_where_they_are_many(learn, monkeypatch):
    x,target,valid_idx = half_moved()
    def given(n_views):
        dls = tensor_dls(x, target, valid_idx=valid_idx, bs=16, batch_tfms=Rolled((4,4)))
        return probabilities(learn.to_classifier(dls, n_views=n_views))
    monkeypatch.setattr(transfer, '_most_views', 60*9)
    without = given(0)
    assert (given(8)-without).abs().max()>1e-2 and torch.equal(given(9), without)

def test_a_bar_for_images_and_for_views_that_take_long(learn, monkeypatch):
    shown,now = [],iter(np.arange(1e4)*1.5)
    class Bar:
        def __init__(self, gen, leave):
            self.start_t = 0.
            shown.append(self)
        def update(self, i): pass
    monkeypatch.setattr('ressl_fastai.evaluate.progress_bar', Bar)
    monkeypatch.setattr('ressl_fastai.evaluate.monotonic', lambda: next(now))
    def bars(n_views, per_class=5):
        shown.clear()
        learn.to_classifier(few(per_class, bs=8, batch_tfms=Rolled((4,4))), n_views=n_views)
        return [o.comment for o in shown]
    assert bars(3)==4*['embedding 50 images'] and bars(0)==['embedding 50 images']
    assert bars(3, per_class=1)==['embedding 10 images']  # no image to hold out, to judge views by
    with learn.no_bar(): assert bars(3)==[]

@pytest.mark.parametrize('n_views', [-1, 2.5])
def test_number_of_views_is_checked(learn, n_views):
    with pytest.raises(ValueError, match=f'n_views must be a whole number of at least 0, got {n_views}'):
        learn.to_classifier(few(), n_views=n_views)

def test_an_encoder_that_gives_features():
    learn,dls = fit(make(labelled_part(digits_dls(8, bs=64), range(128)), Own(1), queue_size=64)),few()
    assert (probabilities(learn.to_classifier(dls))-by_hand(learn, dls)).abs().max()<1e-3

# an ordinary learner

def test_handed_over_frozen_and_the_pretrained_learner_as_it_was(learn):
    before,dls = state(learn),few()
    clf = learn.to_classifier(dls, metrics=accuracy)
    assert same(before, state(learn)) and clf.opt.frozen_idx==len(clf.opt.param_lists)-1
    was = state(clf)
    fit(clf, lr=1e-3)
    convolutions = [k for k in was if 'weight' in k and was[k].ndim==4]
    assert all(torch.equal(was[k], state(clf)[k]) for k in convolutions)
    assert not torch.equal(was['1.2.weight'], state(clf)['1.2.weight'])
    clf.unfreeze()
    fit(clf, lr=1e-3)
    assert not any(torch.equal(was[k], state(clf)[k]) for k in convolutions) and same(before, state(learn))

def test_fewer_labels_than_the_batch_size_still_train(learn):
    dls = few(1, classes=(2,5,7), bs=64)
    clf = learn.to_classifier(dls)
    assert [len(dls.train),len(clf.dls.train),clf.dls.train.bs,clf.dls.valid.n]==[0,1,3,300]
    assert clf.dls.train_ds is dls.train_ds
    was = state(clf)
    clf.unfreeze()
    assert not same(was, state(fit(clf, lr=1e-3)))
    assert learn.to_classifier(few(bs=16)).dls.train.bs==16

def folder(path, n=6, size=16):
    "Noisy pictures in the folders of two classes"
    rng = np.random.RandomState(0)
    for c,base in (('dark',60), ('light',160)):
        (path/c).mkdir()
        for i in range(n): Image.fromarray(np.uint8(base+rng.randint(0, 60, (size,size,3)))).save(path/c/f'{i}.png')
    return path

def test_exported_to_another_process(tmp_path):
    "It needs the package for its opener of images, and nothing that was run here"
    path = folder(tmp_path)
    dls = partial(ImageDataLoaders.from_folder, path, valid_pct=0.3, seed=0, num_workers=0)
    learn = fit(make(dls(bs=4), arch, queue_size=8))
    clf = learn.to_classifier(dls(bs=64), metrics=accuracy)
    clf.export(path/'clf.pkl')
    files = sorted(map(str, get_image_files(path)))
    with clf.no_bar(): want = [(c,p.tolist()) for c,_,p in map(clf.predict, files[::3])]
    code = f"""
import sys, json
from fastai.learner import load_learner
clf = load_learner({str(path/'clf.pkl')!r})
with clf.no_bar(): print(json.dumps([(c,p.tolist()) for c,_,p in map(clf.predict, {files[::3]!r})]))
print('ressl_fastai' in sys.modules)"""
    run = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True)
    said = run.stdout.splitlines()
    for (c,p),(cw,pw) in zip(eval(said[-2]), want, strict=True): assert c==cw and p==pytest.approx(pw, abs=1e-6)
    assert said[-1]=='True' and {c for c,_ in want}=={'dark','light'}

def test_from_a_file(tmp_path, learn):
    dls = few()
    learn.path = tmp_path
    for teacher in (False,True):
        file = learn.save_encoder('enc', teacher=teacher)
        want = probabilities(learn.to_classifier(few(), teacher=teacher))
        loaded = encoder_learner(file, dls := few(), arch)
        if learn.precision.channels_last: loaded.model.to(memory_format=torch.channels_last)  # else rounding differs
        assert (probabilities(loaded.to_classifier(dls))-want).abs().max()<1e-5
        embedded = embed(loaded, loaded.dls.valid)[0]
        assert isinstance(loaded.model, ReSSLModel) and torch.equal(embedded, embed(learn, dls.valid, teacher)[0])
    untrained = encoder_learner(file, dls, arch, trained=False)
    assert (embed(untrained, untrained.dls.valid)[0]-embedded).abs().max()>1e-2  # control
    with pytest.raises(ValueError, match='does not fit'): encoder_learner(file, dls)   # the name does not say the width

# mistakes

several = np.array([[str(o)] for o in y], dtype=object)

@pytest.mark.parametrize(
    'block,labels',
    [(RegressionBlock, y.astype(float)), (MultiCategoryBlock, several), (None, None)],
    ids=['numbers', 'several', 'none'],
)
def test_other_targets_are_refused_before_anything_is_computed(learn, monkeypatch, block, labels):
    monkeypatch.setattr('ressl_fastai.transfer.embed', lambda *args: pytest.fail('images were embedded'))
    dls = tensor_dls(ims, labels, y_block=block, valid_idx=range(100))
    with pytest.raises(ValueError, match='needs one category per image.*to_vision_learner'): learn.to_classifier(dls)

def test_other_mistakes(learn):
    with pytest.raises(ValueError, match='at least two classes'): learn.to_classifier(few(classes=(3,)))
    other = few(batch_tfms=Normalize.from_stats([0.9], [0.1], cuda=False))
    with pytest.raises(ValueError, match='pretrained with Normalize'): learn.to_classifier(other)
    with pytest.raises(TypeError, match='n_out'): learn.to_classifier(few(), n_out=3)
    with pytest.raises(ValueError, match='only a ressl_learner'): learn.to_classifier(few()).to_classifier(few())


def test_a_path_to_an_encoder_file_is_taken_as_it_is_given(tmp_path, monkeypatch):
    "`models/models/encoder.pth` is not looked for where `models/encoder.pth` is there"
    monkeypatch.chdir(tmp_path)
    learn,other = (make(digits_dls(size=8), small_resnet, queue_size=32) for _ in range(2))
    for o in (learn,other): o.path = tmp_path

    def same():
        return all(
            torch.equal(a, b) for a, b in zip(learn.model.encoder.parameters(), other.model.encoder.parameters())
        )

    learn.save_encoder('encoder')
    for file in ('encoder', 'models/encoder', 'models/encoder.pth', tmp_path/'models'/'encoder'):
        with torch.no_grad(): next(other.model.encoder.parameters()).add_(1)
        assert not same()                                    # control
        other.load_encoder(file)
        assert same(), file
    other.save_encoder(tmp_path/'encoder')                  # a name alone is that in `models`, whatever lies beside it
    with torch.no_grad(): next(learn.model.encoder.parameters()).add_(1)
    learn.save_encoder(tmp_path/'encoder')
    assert not same()
    learn.load_encoder('encoder')
    assert same()
    learn.save_encoder(tmp_path/'beside')
    other.load_encoder('beside')                           # a name that `models` does not have
    with pytest.raises(FileNotFoundError): other.load_encoder('nowhere')
    (tmp_path/'models'/'runs').mkdir()
    learn.save_encoder('runs/encoder')
    assert (tmp_path/'models'/'runs'/'encoder.pth').exists() and not (tmp_path/'runs').exists()
    other.load_encoder('runs/encoder')                     # and a folder within `models` goes on to be found
    with pytest.raises(FileNotFoundError, match='models/nowhere/encoder.pth'): learn.load_encoder('nowhere/encoder')


# where files go

@pytest.mark.parametrize('method', ['to_classifier','to_vision_learner'])
def test_files_go_where_those_of_the_learner_go(method, learn, tmp_path):
    dls = few()
    dls.path = tmp_path/'images'                                        # not there, where the labelled images are
    learn.path,learn.model_dir = tmp_path,'weights'
    clf = getattr(learn, method)(dls)
    assert (clf.path,clf.model_dir)==(tmp_path,'weights')
    clf.export()
    assert (tmp_path/'export.pkl').exists()
    assert getattr(learn, method)(dls, path=tmp_path/'mine').path==tmp_path/'mine'

@pytest.mark.parametrize('how', ['to_classifier', 'to_vision_learner', 'label_efficiency'])
def test_a_hand_over_at_another_size_leaves_the_loaders_as_they_are(how):
    "A size for one learner is none for the next, nor for the pretraining that goes on"
    dls = digits_dls(16, bs=64)
    before = make(digits_dls(16, bs=64), arch, size=8, queue_size=64)
    fit(before, 1)
    with before.no_bar(): want = before.dls.after_batch.fs.map(type)
    if how=='label_efficiency': before.label_efficiency(before.dls, 1, seeds=1, rows=('frozen features',))
    else: getattr(before, how)(before.dls)
    assert before.dls.after_batch.fs.map(type)==want and before.dls.one_batch()[0].shape[2:]==(16,16)
    if how=='label_efficiency': return
    first = getattr(before, how)(dls, metrics=accuracy)
    with first.no_bar(): value = first.validate()
    second = getattr(before, how)(dls, size=16)
    with first.no_bar(): assert first.validate()==value
    assert first.dls.one_batch()[0].shape[2:]==(8,8) and second.dls.one_batch()[0].shape[2:]==(16,16)
    assert all(normalize_stats(o.dls)==normalize_stats(before.dls) for o in (first,second))

def test_a_hand_over_at_another_size_keeps_the_weights_of_its_images():
    "Weighted loaders draw as before; `new` alone forgets it"
    from fastai.callback.data import WeightedDL
    learn = fit(make(labelled_part(digits_dls(16, bs=64), range(300)), arch, size=8, queue_size=64), 1)
    block = DataBlock((ImageBlock(PILImageBW),CategoryBlock), get_x=lambda i: ims[i].repeat(2, 0).repeat(2, 1),
                      get_y=lambda i: y[i], splitter=IndexSplitter(range(200, 260)))
    wgts = [1.]+199*[0.]
    dls = block.weighted_dataloaders(range(260), wgts, bs=16, num_workers=0)
    dls.valid = dls.valid.new(cls=type(dls.valid).__mro__[1])
    clf = learn.to_vision_learner(dls)
    assert type(clf.dls.train) is WeightedDL and set(clf.dls.train.get_idxs())=={0}
    assert clf.dls.one_batch()[0].shape[2:]==(8,8)
