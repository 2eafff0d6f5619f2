"""`tensor_dls` and `cached_dls` against fastai's own pipeline: the same batches, the same training, and everything
that fastai does with `DataLoaders`."""

import os, random, shutil
from functools import partial
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import (Categorize, CategoryBlock, Datasets, DataBlock, ImageBlock, ImageDataLoaders,
                               IndexSplitter, L, Normalize, PILImage, PILImageBW, RandomResizedCrop, RegressionBlock,
                               Resize, TensorCategory, TensorImage, TensorImageBW, TfmdLists, Transform,
                               aug_transforms, imagenet_stats, load_learner, parent_label, vision_learner)
from PIL import Image
from torch import Tensor, nn

from ressl_fastai import data
from ressl_fastai.data import TensorDL, cached_dls, digits_dls, encoded_targets, find_images, free_memory, tensor_dls
from ressl_fastai.evaluate import KNNAccuracy, embed
from ressl_fastai.learner import ressl_learner
from ressl_fastai.loaders import clean_dl, first_images

rng = np.random.default_rng(0)
pictures = rng.integers(0, 256, (50,12,9,3), dtype=np.uint8)
names = np.array(['c','a','b'])[rng.integers(0, 3, 50)]
valid = list(range(3, 50, 5))

def seed(s=0):
    random.seed(s)
    np.random.seed(s)
    torch.manual_seed(s)


def plain(o): return o.as_subclass(Tensor)
def normalize(): return Normalize.from_stats(*imagenet_stats, cuda=False)

def fastais(x=pictures, y=names, block=None, batch_tfms=None, **kwargs):
    "The same images through fastai's pipeline, one after another"
    block = block or ImageBlock(PILImage if x.ndim==4 else PILImageBW)
    return DataBlock(
        (block, CategoryBlock),
        get_x=x.__getitem__,
        get_y=y.__getitem__,
        splitter=IndexSplitter(valid),
        batch_tfms=batch_tfms,
    ).dataloaders(range(len(x)), num_workers=0, **{'bs': 8, **kwargs})

def ours(x=pictures, y=names, **kwargs): return tensor_dls(x, y, **{'valid_idx':valid, 'bs':8, **kwargs})

def batches(dls, s=0, epochs=2):
    seed(s)
    return [b for _ in range(epochs) for dl in dls for b in dl]

def same(a, b):
    "Whether batches have the same types and values"
    return len(a) == len(b) and all(
        len(p) == len(q) and all(type(o) is type(r) and o.dtype == r.dtype and torch.equal(o, r) for o, r in zip(p, q))
        for p, q in zip(a, b)
    )


class Tiny(nn.Sequential):
    def __init__(self, c=3):
        super().__init__(nn.Conv2d(c, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3))


def with_head(pretrained=False): return nn.Sequential(Tiny(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def pretrained(dls, s=0):
    seed(s)
    learn = ressl_learner(dls, Tiny(), n_hidden=16, dim=8, queue_size=16)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    return learn

# a batch in one look-up

@pytest.mark.parametrize('kwargs', [{}, dict(shuffle=False), dict(bs=7, drop_last=False), dict(val_bs=3)], ids=str)
@pytest.mark.parametrize('gray', [False, True])
def test_batches_are_those_of_fastais_pipeline(gray, kwargs):
    x = pictures[...,0] if gray else pictures
    norm = [] if gray else [normalize()]
    pair = []
    for make in (fastais, ours):
        seed()
        pair.append(make(x, batch_tfms=norm, **kwargs))
    want,got = pair
    assert same(batches(got), batches(want)) and type(got.one_batch()[0]) is (TensorImageBW if gray else TensorImage)
    wrong = batches(got)
    wrong[1] = (wrong[1][0], wrong[0][1])
    assert not same(wrong, batches(want))  # control: labels of another batch
    assert (
        [len(o) for o in got] == [len(o) for o in want]
        and got.vocab == want.vocab
        and got.valid_ds.items == want.valid_ds.items
    )


def test_pretraining_is_that_on_fastais_pipeline():
    states = [
        [plain(o) for o in pretrained(dls, s).model.state_dict().values()]
        for dls, s in ((fastais(), 0), (ours(), 0), (ours(), 1))
    ]
    assert all(map(torch.equal, states[0], states[1]))
    assert not all(map(torch.equal, states[1], states[2]))                  # control: another seed

def test_no_item_is_touched_while_batches_are_made(monkeypatch):
    dls,touched = ours(batch_tfms=[normalize()]),[]
    clean_dl(dls.train)                                                     # fastai looks at one item, once
    get = TfmdLists.__getitem__
    def spy(self, i):
        if not isinstance(i, str): touched.append(i)                        # fastai asks it for attributes, too
        return get(self, i)
    monkeypatch.setattr(TfmdLists, '__getitem__', spy)
    batches(dls)
    list(clean_dl(dls.train, normalize=False, shuffle=True, drop_last=True))
    assert not touched
    list(fastais().valid)
    assert len(touched)>=10                                                         # control

@pytest.mark.parametrize(
    'as_given',
    [
        lambda x: x,
        lambda x: x.transpose(0, 3, 1, 2),
        torch.from_numpy,
        lambda x: torch.from_numpy(x).permute(0, 3, 1, 2),
        lambda x: x / np.float32(255),
    ],
)
def test_layouts(as_given):
    x = as_given(pictures)
    got,want = (next(iter(ours(o).valid))[0] for o in (x, pictures))
    torch.testing.assert_close(plain(got), plain(want), rtol=0, atol=1e-7)
    assert got.shape==(8,3,12,9) and got.dtype==torch.float32

def test_many_channels_and_memory_maps(tmp_path):
    x = rng.integers(0, 256, (50,13,20,16), dtype=np.uint8)
    np.save(tmp_path/'x.npy', x)
    for o in (x, np.load(tmp_path/'x.npy', mmap_mode='c')):
        dls = ours(o)
        torch.testing.assert_close(plain(next(iter(dls.valid))[0]), torch.from_numpy(x[valid[:8]])/255)
        assert dls.train.images.data_ptr()==torch.from_numpy(o).data_ptr()  # no copy
        assert dls.train_ds[0][0].shape==(13,20,16)

def test_what_cannot_be_served_raises():
    for wrong, y, match in (
        (pictures[0, 0], None, 'x must hold images'),
        (np.zeros((9, 8, 8, 8), np.uint8), None, 'channels of x'),
        (pictures.astype(int), None, 'x must be uint8'),
        (pictures / 100, None, 'x must be uint8'),
        (pictures[:0], None, 'x must hold images'),
        (pictures, names[:-1], 'y must have one label'),
    ):
        with pytest.raises(ValueError, match=match): tensor_dls(wrong, y)

def test_splits():
    a,b,c = (tensor_dls(pictures, seed=s, valid_pct=p).valid_ds.items for s,p in ((0,0.2), (0,0.2), (1,0.2)))
    assert a==b!=c and len(a)==10
    assert len(tensor_dls(pictures, valid_pct=0).train_ds)==50

# what fastai does with DataLoaders

def test_labels_or_none():
    assert [type(o) for o in ours().one_batch()] == [TensorImage, TensorCategory] and len(
        tensor_dls(pictures, bs=8).one_batch()
    ) == 1
    y = rng.normal(size=50).astype(np.float32)
    dls = ours(y=y, y_block=RegressionBlock)
    torch.testing.assert_close(plain(torch.cat([b[1] for b in dls.valid])), torch.from_numpy(y[valid]))
    assert isinstance(dls.train_ds.loss_func.func, nn.MSELoss)
    for o in (list(names), pd.Series(names), L(list(names))): assert same(list(ours(y=o).valid), list(ours().valid))

def test_pretraining_evaluation_and_hand_over(tmp_path):
    dls = ours(path=tmp_path)
    learn = pretrained(dls)
    assert isinstance(learn.metrics[0], KNNAccuracy) or learn.metrics[0].name=='knn_accuracy'
    assert 0<=learn.recorder.values[-1][-1]<=1
    x,_ = embed(learn, dls.train)
    assert len(x)==40
    images,labels = first_images(dls, 4)
    items = [dls.train_ds.items[i*40//4] for i in range(4)]
    assert torch.equal(plain(images), torch.from_numpy(pictures[items]).permute(0, 3, 1, 2) / 255) and [
        dls.vocab[i] for i in labels
    ] == list(names[items])
    dls.show_batch(max_n=4)
    learn.show_views(n=2)


def test_vision_learner_predicts_and_is_exported_without_the_images(tmp_path):
    dls = ours(path=tmp_path)
    learn = vision_learner(dls, with_head, n_out=3, normalize=False, pretrained=False)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        preds,y = learn.get_preds()
        assert [dls.vocab[i] for i in y]==list(names[valid])
        single = [learn.predict(pictures[i])[2] for i in valid[:3]]
        torch.testing.assert_close(torch.stack(single), preds[:3].as_subclass(Tensor), rtol=0, atol=1e-5)
        test = learn.get_preds(dl=dls.test_dl([PILImage.create(pictures[i]) for i in valid]))[0]
        torch.testing.assert_close(test, preds, rtol=0, atol=1e-5)
    secret = pictures[7].tobytes()
    learn.export('x.pkl')
    assert secret not in (tmp_path/'x.pkl').read_bytes() and (tmp_path/'x.pkl').stat().st_size<200_000
    assert dls.train.images is not None and load_learner(tmp_path/'x.pkl').dls.vocab==dls.vocab

def test_another_dataset_takes_the_ordinary_way():
    dls = ours()
    assert clean_dl(dls.train).images is not None and dls.train.new().images is not None
    other = dls.train.new(dls.valid_ds)
    assert other.images is None and same(list(other.new(shuffle=False, drop_last=False)), list(dls.valid))
    assert dls.new_empty().train.images is None

def test_digits_are_as_before():
    "What single items give, in the fixed split"
    dls = digits_dls(8, bs=64)
    by_item = torch.stack([torch.from_numpy(np.asarray(o[0]).copy()) for o in dls.valid_ds])
    assert torch.equal(plain(torch.cat([b[0] for b in dls.valid])), by_item[:,None]/255)
    assert [int(o[1]) for o in dls.valid_ds]==torch.cat([b[1] for b in dls.valid]).tolist()
    assert all(isinstance(dl, TensorDL) and dl.images is not None for dl in dls.loaders)

# folders

@pytest.fixture
def folder(tmp_path):
    for i in range(24):
        f = tmp_path/'images'/names[i]/f'{i:02}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20+i,30,3), dtype=np.uint8)).save(f)
    return tmp_path

def from_folder(folder, **kwargs):
    return ImageDataLoaders.from_folder(
        folder / 'images',
        valid_pct=0.25,
        seed=0,
        num_workers=0,
        **{'item_tfms': Resize(16), 'bs': 4, 'batch_tfms': [normalize()], **kwargs},
    )


@pytest.mark.parametrize('kept', [False, True])
def test_cached_batches_are_those_of_fastais_pipeline(folder, kept, monkeypatch):
    seed()
    want = from_folder(folder)
    got = cached_dls(want, folder/'cache' if kept else None)
    assert [type(o) for o in want.loaders]!=[TensorDL,TensorDL]==[type(o) for o in got.loaders]  # what was given stays
    expected = [list(want.valid), list(clean_dl(want.train, normalize=False))]
    if kept: got = cached_dls(want, folder/'cache')                        # from the file
    monkeypatch.setattr(PILImage, 'create', None)                          # nothing is opened any more
    assert same(list(got.valid), expected[0]) and same(list(clean_dl(got.train, normalize=False)), expected[1])
    assert got.vocab==want.vocab and got.train_ds.items==want.train_ds.items
    assert [b[1].tolist() for b in got.train]!=[b[1].tolist() for b in got.train]  # shuffled

def test_pretraining_from_a_cache_is_that_on_fastais_pipeline(folder):
    def run(cached):
        seed()
        dls = from_folder(folder, item_tfms=RandomResizedCrop(16), batch_tfms=aug_transforms())
        return pretrained(cached_dls(dls, folder/'cache') if cached else dls)
    a,b = (dict(run(o).model.state_dict()) for o in (False,True))
    assert all(torch.equal(plain(a[k]), plain(b[k])) for k in a)

def test_a_cache_is_used_until_something_changes(folder, monkeypatch):
    decoded = []
    decode = data._decode
    monkeypatch.setattr(data, '_decode', lambda *args: decoded.append(1) or decode(*args))
    def made(**kwargs):
        before = len(decoded)
        dls = from_folder(folder, **kwargs)
        got = cached_dls(dls, folder/'cache')
        assert same(list(got.valid), list(dls.valid))                      # right in any case
        return len(decoded)>before
    files = sorted((folder/'images').rglob('*.png'))
    assert made() and not made() and not made(bs=8) and not made(batch_tfms=None)
    os.utime(files[0])
    assert made() and not made()
    Image.fromarray(rng.integers(0, 256, (25, 25, 3), dtype=np.uint8)).save(files[1])
    assert made() and not made()
    files[2].unlink()
    assert made() and not made()
    files[3].rename(files[3].with_name('zz.png'))
    assert made() and not made()
    assert made(item_tfms=Resize(12)) and made(item_tfms=Resize(12, method='squish')) and made() and not made()
    (folder / 'cache' / 'manifest.json').unlink()
    assert made()


def test_another_process_would_use_the_cache(folder):
    "Nothing of this process is in the manifest"
    one,two = (data._manifest(from_folder(folder)) for _ in range(2))
    assert one==two and ' at 0x' not in str(one)

def test_an_interrupted_cache_is_no_cache(folder, monkeypatch):
    dls = from_folder(folder)
    cached_dls(dls, folder/'cache')
    os.utime(dls.train_ds.items[0])
    with monkeypatch.context() as m:
        m.setattr(Path, 'replace', lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): cached_dls(dls, folder/'cache')
    assert not list((folder/'cache').glob('*.part'))
    assert same(list(cached_dls(dls, folder/'cache').valid), list(dls.valid))

def test_tables_of_files_and_what_cannot_be_cached(folder):
    files = sorted((folder/'images').rglob('*.png'))
    df = pd.DataFrame(dict(name=[str(o.relative_to(folder)) for o in files], y=range(len(files))))
    dls = ImageDataLoaders.from_df(
        df, folder, y_block=RegressionBlock, valid_pct=0.2, seed=0, bs=4, item_tfms=Resize(16), num_workers=0
    )
    got = cached_dls(dls, folder/'cache')
    assert same(list(got.valid), list(dls.valid)) and clean_dl(got.train).images is not None
    cached_dls(fastais())  # arrays: in memory
    with pytest.raises(ValueError, match='folder needs images that come from files'):
        cached_dls(fastais(), folder / 'cache2')


# start-up: what was found out once

@pytest.fixture
def many(tmp_path, monkeypatch):
    "1,000 images in two folders, an empty cache folder, and a list of the files that are opened"
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    for i in range(1000):
        f = tmp_path/'images'/'ab'[i%2]/f'{i:04}.bmp'
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4,4), i%256, np.uint8)).save(f)
    opened = []
    readable = data.readable_images
    def spy(files, skip_bad, unread=None, progress=False):
        opened.append(sorted(files if unread is None else unread))
        return readable(files, skip_bad, unread, progress)
    monkeypatch.setattr(data, 'readable_images', spy)
    return tmp_path,opened

def test_files_are_read_once_and_those_that_changed_again(many):
    tmp,opened = many
    files = list(find_images(tmp/'images'))
    assert len(files)==1000 and opened.pop()==sorted(files)
    assert list(find_images(tmp/'images'))==files and opened.pop()==[]
    new = tmp/'images'/'a'/'new.bmp'
    Image.new('L', (5,5)).save(new)
    os.utime(files[7], ns=(1,1))                                       # the time, the size, the name
    Image.new('L', (6,6)).save(files[8])
    moved = files[9].rename(files[9].with_name('zz.bmp'))
    assert len(find_images(tmp/'images'))==1001
    assert opened.pop()==sorted([new, files[7], files[8], moved])
    assert len(find_images(tmp/'images'))==1001 and opened.pop()==[]
    cut = moved.read_bytes()[:70]
    moved.write_bytes(cut)                                             # a file that was good
    with pytest.raises(ValueError, match='1 of 1001 images cannot be read: .*zz.bmp'): find_images(tmp/'images')
    assert opened.pop()==[moved]
    for _ in range(2):                                                 # a bad one is named each time
        assert len(find_images(tmp/'images', skip_bad=True))==1000 and opened.pop()==[moved]

def test_another_folder_has_a_list_of_its_own(many, monkeypatch):
    tmp,opened = many
    find_images(tmp/'images')
    shutil.copytree(tmp/'images', tmp/'copy')                          # sizes and times are the same
    find_images(tmp/'copy')
    assert len(opened.pop())==1000 and len(list((tmp/'cache'/'ressl_fastai').iterdir()))==2
    monkeypatch.chdir(tmp/'images')                                    # the same folder by another name
    assert len(find_images(Path('.')))==1000 and opened.pop()==[]

@pytest.mark.parametrize('damage', ['cut','text','other type','empty','folder','bits'])
def test_a_damaged_list_is_ignored(many, damage):
    tmp,opened = many
    files = list(find_images(tmp/'images'))
    kept, = (tmp/'cache'/'ressl_fastai').iterdir()
    whole = kept.read_bytes()
    if damage=='folder':
        kept.unlink()
        kept.mkdir()
    elif damage=='other type': np.save(kept, np.ones(1000))
    else: kept.write_bytes(dict(cut=whole[:500], text=b'no list', empty=b'', bits=whole[:-16]+bytes(16))[damage])
    opened.clear()
    assert list(find_images(tmp/'images'))==files
    assert len(opened.pop())==(2 if damage=='bits' else 1000)

def test_a_cache_folder_that_cannot_be_written_is_no_error(many, monkeypatch):
    tmp,opened = many
    (tmp/'file').write_text('x')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp/'file'))
    for _ in range(2): assert len(find_images(tmp/'images'))==1000 and len(opened.pop())==1000

def test_few_images_leave_nothing_in_the_cache_folder(folder, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(folder/'cache'))
    assert len(find_images(folder/'images'))==24 and not (folder/'cache').exists()

def test_images_that_do_not_fit_into_memory_are_refused_before_they_are_decoded(folder, monkeypatch):
    dls = from_folder(folder)
    need = 24*16*16*3
    monkeypatch.setattr(data, 'free_memory', lambda: need)
    cached_dls(dls)
    monkeypatch.setattr(data, 'free_memory', lambda: need-1)
    opened = []
    monkeypatch.setattr(
        data, '_batches', lambda *args, batches=data._batches: (opened.append(1) or o for o in batches(*args))
    )
    with pytest.raises(ValueError, match='24 images of 16 x 16 pixels take 0.0 GB of memory, .* name a folder'):
        cached_dls(dls)
    assert len(opened)==1                                              # one batch tells the size
    assert len(cached_dls(dls, folder/'cache').train.images)==24       # on the disk they may be
    monkeypatch.setattr(data, 'free_memory', lambda: None)             # the system does not say
    cached_dls(dls)

def test_free_memory_is_what_the_system_says():
    free = free_memory()
    if free is None: return pytest.skip('no /proc/meminfo here')
    assert 2**20<free<=os.sysconf('SC_PAGE_SIZE')*os.sysconf('SC_PHYS_PAGES')

class Upper(Transform):
    def encodes(self, o:str): return o.upper()

def by_type(o:Path): return o.parent.name

labellings = dict(
    plain=[parent_label],
    typed=[by_type],
    two=[parent_label, str.upper],
    with_class=[parent_label, Upper()],
    partial=[partial(parent_label)],
    numbers=[parent_label, ord],
)

@pytest.mark.parametrize('nm', labellings)
def test_targets_are_those_of_fastais_transforms(folder, nm):
    files = sorted((folder/'images').rglob('*.png'))
    ds = Datasets(files, [[PILImage.create], [*labellings[nm], Categorize()]])
    got, = encoded_targets(ds)
    assert torch.equal(got, torch.stack([ds[i][1] for i in range(len(ds))])) and type(got)==type(ds[0][1])
    assert len(got.unique())>1                                         # control

def test_each_class_is_encoded_once(folder, monkeypatch):
    "What makes it quick: fastai's transforms take long to choose a function by types"
    calls,files = [],sorted((folder/'images').rglob('*.png'))
    monkeypatch.setattr(
        Categorize, '__call__', lambda self, o, **kwargs: calls.append(o) or self._call('encodes', o, **kwargs)
    )
    ds = Datasets(files, [[PILImage.create], [parent_label, Categorize(vocab=['a','b','c'])]])
    calls.clear()
    encoded_targets(ds)
    assert len(calls)<=3+1                                             # the first is looked at

def test_missing_labels_in_lists_are_those_of_tables():
    "A number that is missing among words is no class 'nan'"
    x,words = np.zeros((12,8,8), np.uint8),['a','b',np.nan]*4
    as_list,as_table = (tensor_dls(x, o, valid_pct=0.25, seed=0, bs=4) for o in (words, pd.Series(words)))
    assert list(as_list.vocab)==list(as_table.vocab)==['a','b']
    assert all(torch.equal(a, b) for dl,other in zip(as_list.loaders, as_table.loaders)
               for a,b in zip(dl.targets, other.targets))
    assert (as_list.train.targets[0]==-1).any()

def test_arrays_of_16_bits_are_refused_in_words():
    with pytest.raises(ValueError, match=r'x must be uint8 or floats in \[0, 1\], got torch.uint16 from 0 to 6e\+04'):
        tensor_dls(np.array([[[0,60000]]*2]*4, dtype=np.uint16))
