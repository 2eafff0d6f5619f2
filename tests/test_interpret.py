"What interpretation shows and suggests, against scikit-learn and loops; that it finds what was planted, and changes nothing."
import random, sys, types
from functools import partial

import matplotlib, numpy as np, pandas as pd, pytest, torch
matplotlib.use('agg')
from fastai.vision.all import (CategoryBlock, ColReader, DataBlock, ImageBlock, ImageDataLoaders, IndexSplitter, Learner, MultiCategoryBlock, PILImage, PILImageBW,
    RandomResizedCrop, RandomSplitter, RegressionBlock, Resize, get_image_files, noop)
from matplotlib import pyplot as plt
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits, make_blobs
from sklearn.neighbors import NearestNeighbors
from torch import nn

from ressl_fastai.evaluate import embed
from ressl_fastai.interpret import (find_duplicates, find_outliers, image_relations, nearest, plot_embeddings, show_items, show_neighbors, suggest_labels, typiclust)
from ressl_fastai.learner import ressl_learner
from ressl_fastai.loaders import clean_dl

class NoBN(nn.Sequential):
    def __init__(self, n_in=1): super().__init__(nn.Conv2d(n_in, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3))

def few_digits():
    "140 images for training and 60 for validation; the items are 100, 101, ..."
    digits = load_digits()
    block = DataBlock((ImageBlock(PILImageBW),CategoryBlock), get_x=(digits.images*15).astype(np.uint8).__getitem__, get_y=digits.target.__getitem__,
                      splitter=IndexSplitter(range(140, 200)))
    return block.dataloaders(range(100, 300), bs=32, num_workers=0)

def make(dls=None, n_in=1, **kwargs):
    random.seed(0); np.random.seed(0); torch.manual_seed(0)
    return ressl_learner(dls or few_digits(), NoBN(n_in), **{**dict(queue_size=8, n_hidden=16, dim=8, metrics=[]), **kwargs})

@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')

@pytest.fixture(scope='module')
def learn(tmp_path_factory):
    "Trained for an epoch, so that teacher and student differ; 'start' holds what it was before"
    learn = make(predictor_layers=2, path=tmp_path_factory.mktemp('learn'))
    learn.save('start')
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    return learn

def blobs(n=10, seed=0): return make_blobs(60*n, 16, centers=np.random.default_rng(5).normal(size=(n,16))*10, random_state=seed)

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
    assert nearest(x, x, k=1)[1].flatten().tolist()==list(range(70))                  # control: an image is its own neighbour in a bank that holds it

def test_planted_duplicates_are_found_and_nothing_else(learn):
    x = torch.randn(140, 16)
    x[90] = x[3]*2 + 0.001*torch.randn(16); x[101] = x[5]
    pairs = find_duplicates(learn, 0.999, features=(x,None), chunk=140*50)
    assert list(zip(pairs['index'], pairs.other_index))==[(5,101), (3,90)]
    unit = x/x.norm(dim=1, keepdim=True)
    sims = (unit@unit.T).numpy()
    many = find_duplicates(learn, 0.5, features=(x,None), chunk=140*50)
    assert set(zip(many['index'], many.other_index))==set(zip(*np.where(np.triu(sims>=0.5, 1)))) and len(many)>10
    assert many.similarity.is_monotonic_decreasing
    assert list(many.path)==[learn.dls.train_ds.items[i] for i in many['index']]
    with pytest.raises(ValueError, match='raise the threshold'): find_duplicates(learn, 0.01, features=(x,None), max_pairs=100)

def test_a_copied_file_is_found(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40): PILImage.create(rng.integers(0, 255, (20,20,3), dtype=np.uint8)).save(tmp_path/f'{i:02}.png')
    (tmp_path/'copy.png').write_bytes((tmp_path/'07.png').read_bytes())
    dls = DataBlock(ImageBlock, get_items=get_image_files, splitter=IndexSplitter([]), item_tfms=RandomResizedCrop(16, min_scale=0.2)).dataloaders(tmp_path, bs=8, num_workers=0)
    pairs = find_duplicates(make(dls, 3), 0.99999)
    assert [{o.path.name,o.other_path.name} for o in pairs.itertuples()]==[{'07.png','copy.png'}]

def test_planted_outlier_ranks_first(learn):
    x = torch.randn(16)+torch.randn(140, 16)*0.1
    x[77] = -x[77]
    odd = find_outliers(learn, k=6, features=(x,None))
    assert odd['index'][0]==77 and odd.path[0]==learn.dls.train_ds.items[77] and len(odd)==140
    reference = NearestNeighbors(n_neighbors=6, metric='cosine').fit(x).kneighbors()[0].mean(1)
    assert np.allclose(odd.sort_values('index').score, reference, atol=1e-5) and odd.score.is_monotonic_decreasing
    assert reference[np.arange(140)!=77].max()<reference[77]/2  # control: nothing else stands out

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
    p = image_relations(learn, 11, learn.dls.valid)
    for who,temp in (('teacher',0.04), ('student',0.1)):
        expected = reference_relation(learn.model, x, 11, temp, who=='teacher')
        torch.testing.assert_close(p[who].double(), expected.double(), atol=1e-5, rtol=1e-3)
        assert p[who][11]==0
        for wrong in (reference_relation(learn.model, x, 11, 0.14-temp, who=='teacher'), reference_relation(learn.model, x, 11, temp, who!='teacher')):
            assert (p[who]-wrong).abs().max()>1e-4  # controls: temperatures swapped, networks swapped

def test_relations_of_a_saved_model(learn):
    now,then = image_relations(learn, 3, learn.dls.valid),image_relations(learn, 3, learn.dls.valid, before='start')
    start = make(predictor_layers=2)
    expected = image_relations(start, 3, start.dls.valid)
    for who in now:
        torch.testing.assert_close(then[who], expected[who])
        assert (then[who]-now[who]).abs().max()>1e-4
    learn.show_relations(3, k=4, dl=learn.dls.valid, before='start')
    titles = [ax.get_title() for ax in plt.gcf().axes]
    assert titles[::5]==['teacher then', 'student then', 'teacher now', 'student now']
    assert titles[11:15]==[f'{o:.3f}' for o in now['teacher'].topk(4).values]

# what to label

def reference_typiclust(x, n, labelled, k, seed):
    "Cluster by cluster, as the paper describes it"
    x = x/np.linalg.norm(x, axis=1, keepdims=True)
    cluster = KMeans(len(labelled)+n, random_state=seed, n_init=1).fit_predict(x)
    free = {c: (sum(cluster[i]==c for i in labelled), -np.sum(cluster==c)) for c in set(cluster) if np.sum(cluster==c)>5}
    picked = []
    for c in free:
        members = np.where(cluster==c)[0]
        dist = NearestNeighbors(n_neighbors=min(k, len(members)//2)).fit(x[members]).kneighbors()[0].mean(1)
        picked.append((*free[c], next(int(i) for i in members[np.argsort(dist)] if i not in labelled)))
    return [i for _,_,i in sorted(picked)[:n]]

@pytest.mark.parametrize('labelled', [[], [0, 5, 100, 333]])
def test_typiclust_is_the_papers(labelled):
    x = np.random.default_rng(1).normal(size=(500,6)).astype(np.float32)
    df = typiclust(torch.tensor(x), 12, labelled, seed=3)
    expected = reference_typiclust(x, 12, labelled, 20, 3)
    assert list(df['index'])==expected
    assert expected!=reference_typiclust(x, 12, labelled, 2, 3)  # control: other neighbours, other choice

def test_one_image_of_each_blob_where_chance_misses_some():
    for seed in range(5):
        x,y = blobs(seed=seed)
        df = typiclust(torch.tensor(x), 10, seed=seed)
        assert len(set(y[df['index']]))==10
        assert df.equals(typiclust(torch.tensor(x), 10, seed=seed))
        assert len(set(y[np.random.default_rng(seed).choice(len(y), 10, replace=False)]))<10

def test_the_next_round_goes_where_no_label_is():
    x,y = blobs()
    labelled = [np.where(y==c)[0][0] for c in range(4)]
    df = typiclust(torch.tensor(x), 6, labelled)
    assert set(y[df['index']])==set(range(4,10))
    assert set(y[typiclust(torch.tensor(x), 6)['index']]) & set(range(4))  # control: without knowing of the labels

def test_small_clusters_come_last_and_many_labels_go_round():
    x,y = blobs(4)
    far = torch.tensor(-x[y==0][:3])*50+torch.randn(3, 16)*100
    df = typiclust(torch.cat([torch.tensor(x), far.double()]), 6)
    assert not set(df['index'][:4]) & {240,241,242}
    df = typiclust(torch.tensor(x), 100, list(range(50)), max_clusters=7)
    assert len(set(df['index']))==100 and not set(df['index']) & set(range(50)) and df['cluster'].nunique()>4
    assert len(typiclust(torch.tensor(x), 240))==240

def test_suggestions_by_position_or_path(tmp_path):
    files = folder(tmp_path)
    learn = make(ImageDataLoaders.from_path_func(tmp_path, files, lambda f: int(f.stem)%2, valid_pct=0.2, seed=0, bs=8, num_workers=0), 3)
    first = suggest_labels(learn, 4)
    assert list(first.path)==[learn.dls.train_ds.items[i] for i in first['index']]
    assert all(suggest_labels(learn, 4, labelled=o).equals(suggest_labels(learn, 4, labelled=first['index'])) for o in (first.path, map(str, first.path)))
    assert not set(suggest_labels(learn, 28, labelled=first.path).path) & set(first.path)
    with pytest.raises(ValueError, match='no.png'): suggest_labels(learn, 2, labelled=['no.png'])
    with pytest.raises(ValueError, match='labelled must be one or more positions between 0 and 31, got 32'): suggest_labels(learn, 2, labelled=[32])
    with pytest.raises(ValueError, match='n must be at least 1 and at most the 28'): suggest_labels(learn, 29, labelled=first.path)
    # the file a person fills in is one that fastai reads
    first.assign(label=['a','b','a','b']).to_csv(tmp_path/'labels.csv', index=False)
    df = pd.read_csv(tmp_path/'labels.csv')
    dls = ImageDataLoaders.from_lists(tmp_path, df.path, df.label, valid_pct=0.5, bs=2, num_workers=0)
    assert dls.train.n+dls.valid.n==4 and dls.one_batch()[0].shape==(2,3,20,20)

# any data, nothing changed

def folder(path, n=40):
    rng = np.random.default_rng(0)
    for i in range(n): PILImage.create(rng.integers(0, 255, (20,20,3), dtype=np.uint8)).save(path/f'{i:02}.png')
    return get_image_files(path).sorted()

def use_all(learn, **kwargs):
    dl = kwargs.get('dl', learn.dls.train)
    show_neighbors(learn, 2, k=3, **kwargs)
    show_items(dl, [0, dl.n-1], ['a','b'], ['r',None])
    learn.show_relations(1, k=3, dl=dl)
    plot_embeddings(learn, 'pca', thumbnails=4, **kwargs)
    plot_embeddings(learn, 'tsne', n=20, **kwargs)
    return find_duplicates(learn, 0.9999, **kwargs),find_outliers(learn, k=3, **kwargs),suggest_labels(learn, 3, **kwargs)

def everything(learn):
    "What must stay: weights, modes, gradients wanted, random states, transforms, what fastai keeps"
    rng = torch.get_rng_state().tolist(),np.random.get_state()[1].tolist(),random.getstate(),learn.dls.train.rng.getstate()
    return ({k:v.clone() for k,v in learn.model.state_dict().items()},[m.training for m in learn.model.modules()],[p.requires_grad for p in learn.model.parameters()],
            rng,[list(dl.after_batch.fs) for dl in learn.dls],list(map(str, learn.cbs)),learn.loss_func,learn.path,learn.opt is None)

def same(a, b): return all(torch.equal(a[0][k], b[0][k]) for k in a[0]) and a[1:]==b[1:]

@pytest.mark.parametrize('training', [True,False])
def test_nothing_is_changed(learn, training):
    learn.model.train(training)
    before = everything(learn)
    use_all(learn, dl=learn.dls.valid)
    learn.show_relations(0, before='start')
    assert same(before, everything(learn))
    learn.model.train(not training)
    assert not same(before, everything(learn))  # control
    learn.model.train(training); torch.rand(1)
    assert not same(before, everything(learn))

def _data(path, kind):
    files = folder(path)
    df = pd.DataFrame(dict(name=[f.name for f in files], tags=['a b' if i%3 else 'b' for i in range(40)], size=[i/40 for i in range(40)]))
    x,split,kw = ImageBlock,RandomSplitter(0.3, seed=0),dict(bs=8, num_workers=0)
    def block(blocks, **kwargs): return DataBlock(blocks, splitter=split, **kwargs)
    if kind=='unlabelled, sizes': return block(x, get_items=get_image_files, item_tfms=Resize(16)).dataloaders(path, **kw)
    if kind=='data frame': return block((x,CategoryBlock), get_x=ColReader('name', pref=path), get_y=ColReader('tags')).dataloaders(df, **kw)
    if kind=='many labels': return block((x,MultiCategoryBlock), get_x=ColReader('name', pref=path), get_y=ColReader('tags', label_delim=' ')).dataloaders(df, **kw)
    return block((x,RegressionBlock), get_x=ColReader('name', pref=path), get_y=ColReader('size')).dataloaders(df, **kw)

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
    a,b = (find_outliers(learn, dl=learn.dls.valid, teacher=t).score for t in (False,True))
    assert not np.allclose(a, b)
    assert find_outliers(learn, dl=learn.dls.valid, features=embed(learn, learn.dls.valid, teacher=True)).score.equals(b)
    with pytest.raises(ValueError, match="dl's 140 images, got 60"): find_outliers(learn, features=embed(learn))

def test_frames_are_green_for_the_same_class(learn):
    x,y = embed(learn, learn.dls.valid)
    show_neighbors(learn, [5], k=8, dl=learn.dls.valid)
    drawn = [ax.patches[0].get_edgecolor() for ax in plt.gcf().axes if ax.patches]
    near = NearestNeighbors(n_neighbors=9, metric='cosine').fit(x).kneighbors()[1][5][:8]
    expected = [matplotlib.colors.to_rgba('tab:green' if y[i]==y[5] else 'tab:red') for i in near]
    assert drawn==expected and len(set(expected))==2

def test_pictures_are_those_of_the_positions(learn):
    show_items(learn.dls.train, [7, 139, 7])
    shown = [ax.images[0].get_array() for ax in plt.gcf().axes]
    for im,i in zip(shown, (7,139,7)): assert np.allclose(im, np.asarray(learn.dls.train_ds[i][0])/255, atol=1e-6)

def test_umap_is_used_if_there_and_asked_for_if_not(learn, monkeypatch):
    monkeypatch.setitem(sys.modules, 'umap', None)
    with pytest.raises(ImportError, match='pip install umap-learn'): plot_embeddings(learn, 'umap', dl=learn.dls.valid)
    class UMAP:
        def __init__(self, random_state): assert random_state==4
        def fit_transform(self, x): return x[:,:2]
    monkeypatch.setitem(sys.modules, 'umap', types.SimpleNamespace(UMAP=UMAP))
    ax = plot_embeddings(learn, 'umap', seed=4, dl=learn.dls.valid)
    assert sum(len(o.get_offsets()) for o in ax.collections)==60 and len(ax.get_legend().get_texts())==10

def test_what_cannot_work_is_refused(learn):
    for f,name in ((lambda: find_duplicates(learn, 1.5), 'threshold'), (lambda: find_outliers(learn, k=0), 'k must'), (lambda: plot_embeddings(learn, 'lda'), 'method'),
                   (lambda: show_neighbors(learn, [-1]), 'idxs'), (lambda: show_neighbors(learn, []), 'idxs'), (lambda: show_items(learn.dls.train, [140]), 'idxs'),
                   (lambda: image_relations(learn, -1), 'idx'), (lambda: suggest_labels(learn, 0), 'n must')):
        with pytest.raises(ValueError, match=name): f()
    plain = Learner(learn.dls, NoBN(), loss_func=noop)
    with pytest.raises(ValueError, match='encoder'): find_outliers(plain)
    with pytest.raises(ValueError, match='ReSSL callback'): plain.show_relations()
    with pytest.raises(FileNotFoundError, match='before'): learn.show_relations(before='never')
