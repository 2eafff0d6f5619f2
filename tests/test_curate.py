"What is found and suggested, against scikit-learn and the paper: duplicates, outliers, clusters, first labels."
import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import (DataBlock, ImageBlock, ImageDataLoaders, IndexSplitter, PILImage, RandomResizedCrop,
                               get_image_files)
from matplotlib import pyplot as plt
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score
from sklearn.neighbors import NearestNeighbors

from looks import blobs, folder, make, trained
import ressl_fastai.transfer
from ressl_fastai.curate import typiclust

@pytest.fixture(scope='module')
def learn(tmp_path_factory): return trained(tmp_path_factory.mktemp('learn'))

def test_planted_duplicates_are_found_and_nothing_else(learn):
    x = torch.randn(140, 16)
    x[90] = x[3]*2 + 0.001*torch.randn(16)
    x[101] = x[5]
    pairs = learn.find_duplicates(0.999, pairs=True, features=(x,None), chunk=140*50)
    assert list(zip(pairs['index'], pairs.other_index))==[(5,101), (3,90)]
    unit = x/x.norm(dim=1, keepdim=True)
    sims = (unit@unit.T).numpy()
    many = learn.find_duplicates(0.5, pairs=True, features=(x,None), chunk=140*50)
    assert set(zip(many['index'], many.other_index))==set(zip(*np.where(np.triu(sims>=0.5, 1)))) and len(many)>10
    assert many.similarity.is_monotonic_decreasing
    assert list(many.path)==[learn.dls.train_ds.items[i] for i in many['index']]
    with pytest.raises(ValueError, match='raise the threshold'):
        learn.find_duplicates(0.01, features=(x,None), max_pairs=100)

def test_a_copied_file_is_found(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40): PILImage.create(rng.integers(0, 255, (20,20,3), dtype=np.uint8)).save(tmp_path/f'{i:02}.png')
    (tmp_path/'copy.png').write_bytes((tmp_path/'07.png').read_bytes())
    dls = DataBlock(ImageBlock, get_items=get_image_files, splitter=IndexSplitter([]),
                    item_tfms=RandomResizedCrop(16, min_scale=0.2)).dataloaders(tmp_path, bs=8, num_workers=0)
    pairs = make(dls, 3).find_duplicates(0.99999, pairs=True)
    assert [{o.path.name,o.other_path.name} for o in pairs.itertuples()]==[{'07.png','copy.png'}]

def test_planted_outlier_ranks_first(learn):
    x = torch.randn(16)+torch.randn(140, 16)*0.1
    x[77] = -x[77]
    odd = learn.find_outliers(k=6, features=(x,None))
    assert odd['index'][0]==77 and odd.path[0]==learn.dls.train_ds.items[77] and len(odd)==140
    reference = NearestNeighbors(n_neighbors=6, metric='cosine').fit(x).kneighbors()[0].mean(1)
    assert np.allclose(odd.sort_values('index').score, reference, atol=1e-5) and odd.score.is_monotonic_decreasing
    assert reference[np.arange(140)!=77].max()<reference[77]/2  # control: nothing else stands out

def test_many_images_are_compared_with_some_and_it_is_said(learn, monkeypatch, capsys):
    x = torch.randn(140, 16)
    want = learn.find_outliers(k=6, features=(x,None), bank=50)
    assert capsys.readouterr().out==''
    monkeypatch.setattr('ressl_fastai.curate.many', 50)
    monkeypatch.setitem(type(learn).find_outliers.__globals__, 'many', 50)
    assert learn.find_outliers(k=6, features=(x,None), bank=50).equals(want)
    assert capsys.readouterr().out=='each of the 140 images is compared with 50, always the same: bank=None takes all\n'
    everything = learn.find_outliers(k=6, features=(x,None), bank=None)
    assert not everything.equals(want)  # control
    pairs = learn.find_duplicates(0.5, pairs=True, features=(x,None))
    assert 'comparing 140 images with each other: 9,730 pairs on cpu' in capsys.readouterr().out
    monkeypatch.undo()
    assert learn.find_duplicates(0.5, pairs=True, features=(x,None)).equals(pairs) and len(pairs)>10

def reference_typiclust(x, n, labelled, k, seed):
    "Cluster by cluster, as the paper describes it"
    x = x/np.linalg.norm(x, axis=1, keepdims=True)
    cluster = KMeans(len(labelled)+n, random_state=seed, n_init=1).fit_predict(x)
    free = {c: (sum(cluster[i]==c for i in labelled), -np.sum(cluster==c)) for c in set(cluster)
            if np.sum(cluster==c)>5}
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
    learn = make(ImageDataLoaders.from_path_func(tmp_path, files, lambda f: int(f.stem)%2, valid_pct=0.2, seed=0, bs=8,
                                                 num_workers=0), 3)
    first = learn.suggest_labels(4)
    assert list(first.path)==[learn.dls.train_ds.items[i] for i in first['index']]
    assert all(learn.suggest_labels(4, labelled=o).equals(learn.suggest_labels(4, labelled=first['index']))
               for o in (first.path, map(str, first.path)))
    assert not set(learn.suggest_labels(28, labelled=first.path).path) & set(first.path)
    with pytest.raises(ValueError, match='no.png'): learn.suggest_labels(2, labelled=['no.png'])
    with pytest.raises(ValueError, match='labelled must be one or more positions between 0 and 31, got 32'):
        learn.suggest_labels(2, labelled=[32])
    with pytest.raises(ValueError, match='n must be at least 1 and at most the 28'):
        learn.suggest_labels(29, labelled=first.path)
    # the file a person fills in is one that fastai reads
    first.assign(label=['a','b','a','b']).to_csv(tmp_path/'labels.csv', index=False)
    df = pd.read_csv(tmp_path/'labels.csv')
    dls = ImageDataLoaders.from_lists(tmp_path, df.path, df.label, valid_pct=0.5, bs=2, num_workers=0)
    assert dls.train.n+dls.valid.n==4 and dls.one_batch()[0].shape==(2,3,20,20)

def reference_groups(n, pairs):
    "Merge until nothing changes"
    group = list(range(n))
    for _ in range(n):
        for a,b in pairs: group[a] = group[b] = min(group[a], group[b])
    return {frozenset(i for i in range(n) if group[i]==g) for g in group if group.count(g)>1}

def test_groups_are_what_pairs_connect(learn):
    x = torch.randn(140, 16)
    x[10:15] = x[9]+0.02*torch.randn(5, 16)  # six of a kind
    x[90],x[101] = x[3]*2,x[5]
    for threshold in (0.5,0.99):
        pairs = learn.find_duplicates(threshold, pairs=True, features=(x,None), chunk=140*50)
        df = learn.find_duplicates(threshold, features=(x,None), chunk=140*50)
        groups = {frozenset(o['index']) for _,o in df.groupby('group')}
        assert groups==reference_groups(140, list(zip(pairs['index'], pairs.other_index)))
        assert (df.groupby('group')['index'].transform('size')==df['size']).all() and df['size'].is_monotonic_decreasing
        for i,sim in zip(df['index'], df.similarity):
            mine = pairs[(pairs['index']==i)|(pairs.other_index==i)]
            assert sim==pytest.approx(mine.similarity.max())
    assert df['index'].tolist()[:6]==[9,10,11,12,13,14] and df.group.nunique()==3
    assert sorted(df[~df.duplicated('group')]['index'])==[3,5,9]  # one of each is kept
    empty = learn.find_duplicates(0.999999, features=(torch.randn(140, 16),None))
    assert len(empty)==0 and list(empty)==['index','path','group','size','similarity']

def test_clusters_are_the_planted_ones(learn):
    x,y = blobs(4)
    x,y = x[:140],y[:140]
    df = learn.find_clusters(4, features=(torch.tensor(x).float(),torch.tensor(y)))
    assert df.attrs['agreement']==pytest.approx(1) and sorted(df['index'])==list(range(140))
    assert df.groupby('cluster')['index'].apply(lambda o: len(set(y[o]))).eq(1).all()
    assert df['size'].is_monotonic_decreasing and list(df.path)==[learn.dls.train_ds.items[i] for i in df['index']]
    unit = x/np.linalg.norm(x, axis=1, keepdims=True)
    for c,o in df.groupby('cluster'):
        assert o.typicality.is_monotonic_decreasing
        centre = unit[o['index']].mean(0)
        assert np.allclose(o.typicality, unit[o['index']]@centre/np.linalg.norm(centre), atol=1e-5)
    half = torch.tensor(np.where(np.arange(140)%2, y, -1))  # some have no label
    assert learn.find_clusters(4, features=(torch.tensor(x).float(),half)).attrs['agreement']==pytest.approx(1)
    noise = learn.find_clusters(4, features=(torch.randn(140, 16),torch.tensor(y)))
    want = adjusted_mutual_info_score(y[noise['index']], noise.cluster)
    assert noise.attrs['agreement']==pytest.approx(want) and want<0.2  # control
    assert 'agreement' not in learn.find_clusters(4, features=(torch.tensor(x).float(),None)).attrs
    for n in (1, 141):
        with pytest.raises(ValueError, match='n must be at least 2'): learn.find_clusters(n)

def test_names_of_clusters_are_labels_for_a_first_fine_tune(tmp_path):
    files = folder(tmp_path)
    learn = make(ImageDataLoaders.from_path_func(tmp_path, files, lambda f: int(f.stem)%2, valid_pct=0.2, seed=0, bs=8,
                                                 num_workers=0), 3)
    clusters = learn.find_clusters(4)
    names = {0:'cat', 1:'dog', 2:'cat'}
    learn.show_clusters(clusters, names, k=5)
    rows = [ax.get_ylabel() for ax in plt.gcf().axes if ax.get_ylabel()]
    assert [o.split('\n')[0] for o in rows]==['cat','dog','cat','cluster 3']
    assert [int(o.split('\n')[1].split()[0]) for o in rows]==clusters.groupby('cluster').size().tolist()
    drawn = [bool(ax.images) for ax in plt.gcf().axes]
    assert [sum(drawn[i*5:i*5+5]) for i in range(4)]==clusters.groupby('cluster').size().clip(upper=5).tolist()
    labels = clusters.assign(label=clusters.cluster.map(names)).dropna(subset='label')
    assert set(labels.label)=={'cat','dog'} and len(labels)==(clusters.cluster<3).sum()
    dls = ImageDataLoaders.from_lists(tmp_path, labels.path, labels.label, valid_pct=0.2, bs=4, num_workers=0)
    clf = learn.to_vision_learner(dls)
    with clf.no_bar(), clf.no_logging(): clf.fine_tune(1)
    assert clf.dls.vocab==['cat','dog']
