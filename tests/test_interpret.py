"What interpretation shows, against scikit-learn and loops; embeddings are made once, never stale; nothing changes."
import random, sys, types

import matplotlib, numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import (CategoryBlock, ColReader, DataBlock, DataLoaders, ImageBlock, ImageDataLoaders,
                               IndexSplitter, Learner, MultiCategoryBlock, Normalize, PILImage, RandomSplitter,
                               RegressionBlock, Resize, TensorImage, TfmdDL, get_image_files, noop)
from matplotlib import pyplot as plt
from sklearn.neighbors import NearestNeighbors
from torch import nn

from looks import NoBN, folder, make, trained
from ressl_fastai.all import show_items
from ressl_fastai.evaluate import at_once, embed, fixed_choice
from ressl_fastai.interpret import nearest
from ressl_fastai.loaders import clean_dl, subset
from ressl_fastai.models import Encoder

@pytest.fixture(scope='module')
def learn(tmp_path_factory): return trained(tmp_path_factory.mktemp('learn'))

# similarities

@pytest.mark.parametrize('chunk', [1, 1000, 2**24])
def test_nearest_is_scikit_learns(chunk):
    x,bank = (torch.randn(n, 5, dtype=torch.float64) for n in (70,50))
    dist,idxs = NearestNeighbors(n_neighbors=4, metric='cosine').fit(bank).kneighbors(x)
    sims,near = nearest(x, bank, k=4, chunk=chunk)
    assert near.tolist()==idxs.tolist() and np.allclose(1-dist, sims)
    dist,idxs = NearestNeighbors(n_neighbors=4, metric='cosine').fit(x).kneighbors()  # without the images themselves
    sims,near = nearest(x, k=4, chunk=chunk)
    assert near.tolist()==idxs.tolist() and np.allclose(1-dist, sims)
    assert nearest(x, x, k=1)[1].flatten().tolist()==list(range(70))  # control: a bank that holds the image itself

@pytest.mark.parametrize('chunk', [1, 1000, None])
def test_nearest_of_some_images_leaves_out_the_image_itself(chunk):
    x = torch.randn(70, 5, dtype=torch.float64)
    some = fixed_choice(30, 70)
    sims,near = nearest(x, k=4, chunk=chunk, most=30)
    for i in range(70):
        others = [j for j in some if j!=i]
        cosines = torch.cosine_similarity(x[i:i+1], x[others])
        best = cosines.topk(4)
        assert near[i].tolist()==[others[j] for j in best.indices]
        torch.testing.assert_close(sims[i], best.values)
    assert some==fixed_choice(30, 70)==sorted(set(some))
    assert nearest(x, k=4, most=70)[1].equal(nearest(x, k=4)[1])
    assert not nearest(x, k=4)[1].equal(near)  # control
    with pytest.raises(ValueError, match='at most the 29 other'): nearest(x, k=30, most=30)

def test_pieces_are_as_large_as_memory_allows(monkeypatch):
    def free(n): monkeypatch.setattr('ressl_fastai.evaluate.free_memory', lambda device='cpu': n)
    free(2**40)
    assert at_once(10_000)==2**24 and at_once(1_281_167)//1_281_167==256  # 13 rows with pieces of one size
    free(2**30)
    assert at_once(1_281_167)//1_281_167==13 and at_once(10**9)==10**9
    free(None)
    assert at_once(10_000)==2**24

# relations

def reference_relation(model, x, idx, temp, teacher):
    "One image, one other image at a time"
    model.eval()
    with torch.no_grad():
        bank = [model.teacher(o[None])[0].double() for o in x]
        z = bank[idx] if teacher else model(x[idx][None])[0].double()
    weights = [0. if j==idx else float((z@b/temp).exp()) for j,b in enumerate(bank)]
    return torch.tensor(weights)/sum(weights)

def test_relations_are_the_softmax_of_the_loss(learn):
    x = torch.cat([b[0] for b in clean_dl(learn.dls.valid)]).as_subclass(torch.Tensor)
    p = learn.image_relations(11, learn.dls.valid)
    for who,temp in (('teacher',0.04), ('student',0.1)):
        expected = reference_relation(learn.model, x, 11, temp, who=='teacher')
        torch.testing.assert_close(p[who].double(), expected.double(), atol=1e-5, rtol=1e-3)
        assert p[who][11]==0
        other_temp = reference_relation(learn.model, x, 11, 0.14-temp, who=='teacher')
        other_net = reference_relation(learn.model, x, 11, temp, who!='teacher')
        for wrong in (other_temp, other_net):
            assert (p[who]-wrong).abs().max()>1e-4  # controls: temperatures swapped, networks swapped

def test_relations_of_a_saved_model(learn):
    now,then = learn.image_relations(3, learn.dls.valid),learn.image_relations(3, learn.dls.valid, before='start')
    start = make(predictor_layers=2)
    expected = start.image_relations(3, start.dls.valid)
    for who in now:
        torch.testing.assert_close(then[who], expected[who])
        assert (then[who]-now[who]).abs().max()>1e-4
    learn.show_relations(3, k=4, dl=learn.dls.valid, before='start')
    titles,rows = ([f(ax) for ax in plt.gcf().axes] for f in (lambda ax: ax.get_title(), lambda ax: ax.get_ylabel()))
    assert rows[::5]==['teacher then', 'student then', 'teacher now', 'student now'] and titles[::5]==['image']*4
    assert titles[11:15]==[f'{o:.3f}' for o in now['teacher'].topk(4).values]

# any data, nothing changed

def use_all(learn, **kwargs):
    dl = kwargs.get('dl', learn.dls.train)
    learn.show_neighbors(2, k=3, **kwargs)
    show_items(dl, [0, dl.n-1], ['a','b'], ['r',None])
    learn.show_relations(1, k=3, dl=dl)
    learn.plot_embeddings('pca', thumbnails=4, **kwargs)
    learn.plot_embeddings('tsne', n=20, **kwargs)
    return learn.find_duplicates(0.9999, **kwargs),learn.find_outliers(k=3, **kwargs),learn.suggest_labels(3, **kwargs)

def everything(learn):
    "What must stay: weights, modes, gradients wanted, random states, transforms, what fastai keeps"
    rng = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(),
           learn.dls.train.rng.getstate())
    model = learn.model
    return ({k:v.clone() for k,v in model.state_dict().items()}, [m.training for m in model.modules()],
            [p.requires_grad for p in model.parameters()], rng, [list(dl.after_batch.fs) for dl in learn.dls],
            list(map(str, learn.cbs)), learn.loss_func, learn.path, learn.opt is None)

def same(a, b): return all(torch.equal(a[0][k], b[0][k]) for k in a[0]) and a[1:]==b[1:]

def test_a_map_embeds_the_images_it_draws(learn, monkeypatch):
    "Control: of features that are there it takes the same rows"
    seen = []
    def embedded(learn, dl, *args, **kwargs):
        x,y = embed(learn, dl, *args, **kwargs)
        seen.append(len(x))
        return x,y
    monkeypatch.setattr('ressl_fastai.evaluate.embed', embedded)
    drawn = []
    def project(x, method, seed):
        drawn.append(x)
        return x[:,:2].numpy()
    monkeypatch.setattr('ressl_fastai.interpret._project', project)
    learn = Learner(learn.dls, learn.model, loss_func=noop)  # of which nothing is kept
    for _ in range(2): learn.plot_embeddings(n=20)
    assert seen==[20]  # and the second time they are there
    learn.plot_embeddings(n=20, features=learn.embed())
    assert seen==[20,140]
    torch.testing.assert_close(drawn[0], drawn[2], rtol=0, atol=1e-5)
    learn.plot_embeddings(n=1000)
    assert seen==[20,140] and len(drawn[3])==140
    plt.close('all')

@pytest.mark.parametrize('training', [True,False])
def test_nothing_is_changed(learn, training):
    learn.model.train(training)
    before = everything(learn)
    use_all(learn, dl=learn.dls.valid)
    learn.show_relations(0, before='start')
    assert same(before, everything(learn))
    learn.model.train(not training)
    assert not same(before, everything(learn))  # control
    learn.model.train(training)
    torch.rand(1)
    assert not same(before, everything(learn))

def _data(path, kind):
    files = folder(path)
    tags,sizes = ['a b' if i%3 else 'b' for i in range(40)],[i/40 for i in range(40)]
    df = pd.DataFrame(dict(name=[f.name for f in files], tags=tags, size=sizes))
    x,split,kw = ImageBlock,RandomSplitter(0.3, seed=0),dict(bs=8, num_workers=0)
    def block(blocks, **kwargs): return DataBlock(blocks, splitter=split, **kwargs)
    if kind=='unlabelled, sizes':
        return block(x, get_items=get_image_files, item_tfms=Resize(16)).dataloaders(path, **kw)
    get_x = ColReader('name', pref=path)
    if kind=='data frame': made = block((x,CategoryBlock), get_x=get_x, get_y=ColReader('tags'))
    elif kind=='many labels':
        made = block((x,MultiCategoryBlock), get_x=get_x, get_y=ColReader('tags', label_delim=' '))
    else: made = block((x,RegressionBlock), get_x=get_x, get_y=ColReader('size'))
    return made.dataloaders(df, **kw)

@pytest.mark.parametrize('kind', ['unlabelled, sizes', 'data frame', 'many labels', 'regression'])
def test_any_data(tmp_path, kind):
    learn = make(_data(tmp_path, kind), 3)
    for kwargs in ({}, dict(dl=learn.dls.valid, teacher=True)):
        dups,odd,suggested = use_all(learn, **kwargs)
        assert len(dups)==0 and len(suggested)==3
        items = kwargs.get('dl', learn.dls.train).items
        if kind=='unlabelled, sizes': assert list(odd.path)==[items[i] for i in odd['index']]
        else: assert list(odd.name)==[items.name.iloc[i] for i in odd['index']]

def test_teacher_and_student_differ_and_features_are_used_again(learn):
    a,b = (learn.find_outliers(dl=learn.dls.valid, teacher=t).score for t in (False,True))
    assert not np.allclose(a, b)
    assert learn.find_outliers(dl=learn.dls.valid, features=embed(learn, learn.dls.valid, teacher=True)).score.equals(b)
    with pytest.raises(ValueError, match="dl's 140 images, got 60"):
        learn.find_outliers(features=embed(learn, learn.dls.valid))

def test_frames_are_green_for_the_same_class(learn):
    x,y = embed(learn, learn.dls.valid)
    learn.show_neighbors([5], k=8, dl=learn.dls.valid)
    drawn = [ax.spines['left'].get_edgecolor() for ax in plt.gcf().axes][1:]
    near = NearestNeighbors(n_neighbors=9, metric='cosine').fit(x).kneighbors()[1][5][:8]
    expected = [matplotlib.colors.to_rgba('tab:green' if y[i]==y[5] else 'tab:red') for i in near]
    assert drawn==expected and len(set(expected))==2

def test_pictures_are_those_of_the_positions(learn):
    show_items(learn.dls.train, [7, 139, 7])
    shown = [ax.images[0].get_array()[...,0] for ax in plt.gcf().axes]
    for im,i in zip(shown, (7,139,7)): assert np.allclose(im, np.asarray(learn.dls.train_ds[i][0])/255, atol=1e-6)

def test_umap_is_used_if_there_and_asked_for_if_not(learn, monkeypatch):
    monkeypatch.setitem(sys.modules, 'umap', None)
    with pytest.raises(ImportError, match='pip install umap-learn'): learn.plot_embeddings('umap', dl=learn.dls.valid)
    class UMAP:
        def __init__(self, random_state): assert random_state==4
        def fit_transform(self, x): return x[:,:2]
    monkeypatch.setitem(sys.modules, 'umap', types.SimpleNamespace(UMAP=UMAP))
    ax = learn.plot_embeddings('umap', seed=4, dl=learn.dls.valid)
    assert max(len(o.get_offsets()) for o in ax.collections)==60 and len(ax.get_legend().get_texts())==10

def test_what_cannot_work_is_refused(learn):
    for f,name in ((lambda: learn.find_duplicates(1.5), 'threshold'), (lambda: learn.find_outliers(k=0), 'k must'),
                   (lambda: learn.plot_embeddings('lda'), 'method'), (lambda: learn.show_neighbors([-1]), 'idxs'),
                   (lambda: learn.show_neighbors([]), 'idxs'), (lambda: show_items(learn.dls.train, [140]), 'idxs'),
                   (lambda: learn.image_relations(-1), 'idx'), (lambda: learn.suggest_labels(0), 'n must')):
        with pytest.raises(ValueError, match=name): f()
    plain = Learner(learn.dls, NoBN(), loss_func=noop)
    with pytest.raises(ValueError, match='encoder'): plain.find_outliers()
    with pytest.raises(ValueError, match='ReSSL callback'): plain.show_relations()
    with pytest.raises(FileNotFoundError, match='before'): learn.show_relations(before='never')

# embeddings are made once, and never stale

@pytest.fixture
def passes(monkeypatch):
    "How many images went through an encoder, by call"
    counted,forward = [],Encoder.forward
    def count(self, x):
        counted.append(len(x))
        return forward(self, x)
    monkeypatch.setattr(Encoder, 'forward', count)
    return counted

def again(passes, f):
    "Images that go through an encoder in `f`"
    passes.clear()
    f()
    return sum(passes)

def test_every_look_uses_what_is_kept(passes):
    learn = make()
    assert again(passes, learn.embed)==140 and again(passes, lambda: learn.embed(teacher=True))==140
    looks = [learn.embed, learn.show_neighbors, learn.show_relations, learn.plot_embeddings, learn.find_duplicates,
             learn.find_outliers, learn.find_clusters, lambda: learn.suggest_labels(3),
             lambda: learn.find_outliers(teacher=True)]
    assert [again(passes, o) for o in looks]==[0]*len(looks)
    for teacher in (False,True):
        for a,b in zip(learn.embed(teacher=teacher), embed(learn, learn.dls.train, teacher)): assert torch.equal(a, b)
    assert again(passes, lambda: learn.embed(learn.dls.valid))==60
    learn.embed()[0].zero_()  # what is given away is a copy
    assert learn.embed()[0].abs().sum()>0

def in_place(learn):
    p = next(learn.model.encoder.parameters())
    version = p._version
    p.data.add_(1e-3)  # as fastai's optimizers do it
    assert p._version==version  # PyTorch's counter sees nothing
def a_step(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
def loaded(learn): learn.load('start')
def a_setting(learn): next(m for m in learn.model.encoder.modules() if isinstance(m, nn.Conv2d)).stride = (1,1)

@pytest.mark.parametrize('change', [in_place, a_step, loaded, a_setting])
def test_other_weights_are_embedded_again(change, passes, tmp_path):
    learn = make(path=tmp_path)
    learn.save('start')
    next(learn.model.encoder.parameters()).data.mul_(1.5)
    before = learn.embed()[0]
    change(learn)
    after = learn.embed()[0]
    assert not torch.equal(before, after) and torch.equal(after, embed(learn, learn.dls.train)[0])
    assert again(passes, learn.embed)==0

def test_other_images_labels_and_transforms_are_embedded_again(passes, tmp_path):
    files = folder(tmp_path)
    def dls_of(items, size=16, tfms=(), label=lambda f: int(f.stem)%2):
        block = DataBlock((ImageBlock,CategoryBlock), get_y=label, splitter=IndexSplitter([0]),
                          item_tfms=Resize(size), batch_tfms=tfms)
        return block.dataloaders(items, bs=8, num_workers=0)
    learn = make(dls_of(files), 3)
    learn.embed()
    assert again(passes, learn.embed)==0 and again(passes, lambda: learn.embed(learn.dls.train.new()))==0
    others = dict(items=dls_of(files[::-1]), size=dls_of(files, 12), label=dls_of(files, label=lambda f: int(f.stem)%3))
    for dls in others.values():
        for dl in dls.loaders: dl.after_batch.fs += [o for o in learn.dls.after_batch.fs if isinstance(o, Normalize)]
    assert [again(passes, lambda: learn.embed(o.train)) for o in others.values()]==[39]*3
    part = learn.dls.train.new(get_idxs=lambda: [3,1])
    assert again(passes, lambda: learn.embed(part))==2
    assert again(passes, learn.embed)==0
    learn.dls.train.dataset.items[0] = learn.dls.train.dataset.items[5]  # in place
    assert again(passes, learn.embed)==39
    rewritten = learn.dls.train.dataset.items[7]
    PILImage.create(np.zeros((20,20,3), np.uint8)).save(rewritten)
    x = learn.embed()[0]
    assert torch.equal(x, embed(learn, learn.dls.train)[0]) and again(passes, learn.embed)==0
    learn.dls.train.after_item.add(Resize(10))
    assert again(passes, learn.embed)==39

class Squares:
    "A data set that is not fastai's: where its images come from is not known"
    def __len__(self): return 10
    def __getitem__(self, i): return TensorImage(torch.full((1,8,8), i/10)),0

def test_what_cannot_be_described_is_not_kept_and_nothing_is_exported(passes, tmp_path):
    learn = make(DataLoaders(TfmdDL(Squares(), bs=5), TfmdDL(Squares(), bs=5)), 1, guard=False, path=tmp_path)
    assert [again(passes, lambda: learn.embed(learn.dls.train)) for _ in range(2)]==[10,10]
    learn = make(path=tmp_path)
    learn.export('before.pkl')
    for dl in learn.dls.loaders: learn.embed(dl)
    learn.export('after.pkl')
    assert abs((tmp_path/'after.pkl').stat().st_size-(tmp_path/'before.pkl').stat().st_size)<1000

def test_a_bar_comes_only_when_there_is_something_to_wait_for(monkeypatch):
    shown,now = [],[0.]
    class Bar:
        def __init__(self, gen, leave):
            self.at,self.start_t = [],100.
            shown.append(self)
        def update(self, i): self.at.append(i)
    def clock():
        now[0] += step
        return now[0]
    monkeypatch.setattr('ressl_fastai.evaluate.progress_bar', Bar)
    monkeypatch.setattr('ressl_fastai.evaluate.monotonic', clock)
    for step,n in ((0.01,0), (1.5,1)):
        make().embed()
        assert len(shown)==n
    assert shown[0].comment=='embedding 140 images' and shown[0].at==[0,2,3,4,5]
    assert 90<shown[0].start_t<100  # it began before it was drawn
    with (learn := make()).no_bar(): learn.embed()
    assert len(shown)==1

# what is drawn

def test_titles_do_not_overlap(learn):
    titles = ['a class with a very long name indeed', 'Pneumonoultramicroscopic', '$x$', '']
    show_items(learn.dls.train, range(8), titles*2)
    plt.gcf().canvas.draw()
    boxes = [ax.title.get_window_extent() for ax in plt.gcf().axes if ax.get_title()]
    assert len(boxes)==6 and not any(a.overlaps(b) for i,a in enumerate(boxes) for b in boxes[:i])
    fig,axs = plt.subplots(1, 2, figsize=(1.6,1))  # control
    for ax in axs: ax.set_title('a class with a very long name indeed')
    fig.canvas.draw()
    a,b = (ax.title.get_window_extent() for ax in axs)
    assert a.overlaps(b)

def test_a_class_keeps_its_colour(learn):
    def colors(dl):
        legend = learn.plot_embeddings('pca', dl=dl).get_legend()
        return {t.get_text():tuple(h.get_facecolor()[0]) for t,h in zip(legend.get_texts(), legend.legend_handles)}
    every = colors(learn.dls.valid)
    y = learn.embed(learn.dls.valid)[1]
    some = colors(subset(learn.dls.valid, (y>=5).nonzero()[:,0].tolist()))
    assert len(some)==5 and len(every)==10 and some.items()<=every.items() and len(set(every.values()))==10

def test_many_classes_are_pictures(tmp_path):
    files = folder(tmp_path)
    dls = ImageDataLoaders.from_path_func(tmp_path, files, lambda f: int(f.stem)%25, valid_pct=0.1, seed=0, bs=8,
                                          num_workers=0)
    ax = make(dls, 3).plot_embeddings('pca')
    assert ax.get_legend() is None and len(ax.artists)>5
