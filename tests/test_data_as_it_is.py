"""Data as users have it: without labels or with any, last batches of one, few images, broken files, every mode and
depth, pixels that are no numbers."""

from functools import partial

import numpy as np, pytest, torch
from fastai.vision.all import (BBoxBlock, BBoxLblBlock, CategoryBlock, CutMix, DataBlock, ImageBlock, IndexSplitter,
                               MaskBlock, MixUp, MultiCategoryBlock, PILImageBW, PointBlock, RegressionBlock, Resize,
                               TensorImage, TransformBlock, get_image_files)
from PIL import Image
from helpers import NoBN, fit, make, same, state

from ressl_fastai.data import TensorDL, tensor_dls
from ressl_fastai.images import PILImage16, readable_images
from ressl_fastai.loaders import first_images, image_stats
from ressl_fastai.models import small_resnet

n,side = 20,12
rng = np.random.default_rng(0)
ims = rng.integers(0, 256, (n,side,side,3), dtype=np.uint8)
resnet = partial(small_resnet, widen=0.125)

def box(i): return [[1,1,5,6],[2,2,4,4]][:1+i%2]
labels = dict(
    none=((), []),
    category=((CategoryBlock,), [lambda i: i % 3]),
    multi_category=((MultiCategoryBlock,), [lambda i: ['a', 'b', 'c'][: i % 4]]),
    regression=((RegressionBlock(n_out=2),), [lambda i: [i / 2, 1.0]]),
    mask=((MaskBlock(['off', 'on']),), [lambda i: np.uint8(ims[i, :, :, 0] > 99)]),
    points=((PointBlock,), [lambda i: [[1.0, 2.0], [3.0, 4.0]]]),
    boxes=((BBoxBlock, BBoxLblBlock), [box, lambda i: ['x', 'y'][: 1 + i % 2]]),
    two=((CategoryBlock, RegressionBlock), [lambda i: i % 2, lambda i: float(i)]),
)

def block(nm='none', x=ims.__getitem__):
    blocks,get_y = labels[nm]
    return DataBlock((ImageBlock,*blocks), n_inp=1, getters=[x,*get_y], splitter=IndexSplitter(range(n-4, n)))

def dls_of(nm='none', bs=8, x=ims.__getitem__, **kwargs):
    return block(nm, x).dataloaders(range(n), bs=bs, num_workers=0, **kwargs)


def small(dls, arch=None, **kwargs):
    return make(dls, arch or (NoBN() if first_images(dls)[0].shape[1] == 1 else resnet), **{'queue_size': 8, **kwargs})


@pytest.mark.parametrize('nm', labels)
def test_d33_labels_of_any_kind_or_none(nm):
    learn = small(dls_of(nm))
    fit(learn)
    with learn.no_bar():
        assert (
            np.isfinite(learn.validate()[0])
            and learn.get_preds()[0].shape == (4, 8)
            and learn.predict(learn.dls.valid_ds[0][0])[0].shape == (8,)
        )
    other = small(dls_of('none'))
    assert same(state(learn), state(fit(other)))  # whatever they are, they take no part

def test_d32_a_last_batch_of_one_image():
    "17 training images: with batch norm one image alone cannot be trained on, so it waits for the next epoch"

    def dls(drop):
        return DataBlock(ImageBlock, get_x=ims.__getitem__, splitter=IndexSplitter(range(17, 20))).dataloaders(
            range(20), bs=8, num_workers=0, drop_last=drop
        )

    with pytest.raises(ValueError, match='more than 1 value'):
        small(dls(False)).model.train()(torch.rand(1, 3, side, side))  # control
    learn = fit(small(dls(False)), 2)
    assert np.isfinite(learn.recorder.values).all() and int(learn.model.queue.ptr)==(16+2*16)%8
    with learn.no_bar(): assert learn.get_preds(0)[0].shape==(17,8)  # all are embedded

def test_fewer_images_than_a_batch():
    with pytest.raises(ValueError, match='bs=64 is larger than the training set of 16 images'): small(dls_of(bs=64))
    assert np.isfinite(fit(small(dls_of(bs=64, drop_last=False))).recorder.values).all()

@pytest.fixture
def folder(tmp_path):
    for i in range(12): Image.fromarray(ims[i]).save(tmp_path/f'{i:02}.png')
    return tmp_path

def from_files(files, bs=4, cls=None, **kwargs):
    return DataBlock(ImageBlock(cls) if cls else ImageBlock, splitter=IndexSplitter([0, 1]), **kwargs).dataloaders(
        files, bs=bs, num_workers=0
    )


@pytest.mark.parametrize('kind', ['cut','text','empty'])
def test_a_broken_file_is_named(folder, kind, recwarn):
    bad = folder/'07.png'
    bad.write_bytes(dict(cut=bad.read_bytes()[:200], text=b'no picture', empty=b'')[kind])
    files = get_image_files(folder).sorted()
    with pytest.raises(ValueError, match='07.png cannot be read'): fit(small(from_files(files)))
    with pytest.raises(ValueError, match='1 of 12 images cannot be read: .*07.png'): readable_images(files)
    with pytest.warns(UserWarning, match='07.png; they are left out') as said:
        good = readable_images(files, skip_bad=True)
    assert len([o for o in said if 'left out' in str(o.message)])==1 and list(good)==[f for f in files if f!=bad]
    assert np.isfinite(fit(small(from_files(good))).recorder.values).all()

def test_other_errors_stay_what_they_are(folder):
    files = get_image_files(folder).sorted()
    learn = small(from_files(files))
    files[7].unlink()
    with learn.no_bar(), pytest.raises(FileNotFoundError, match='07.png'): learn.fit(1)

def test_mixed_modes_and_sizes(tmp_path):
    im = Image.fromarray(ims[0].repeat(3, 0).repeat(3, 1))
    for i, mode in enumerate(['RGB', 'L', 'P', 'RGBA', 'LA', 'CMYK', '1'] * 2):
        im.convert('RGB').convert(mode if mode != 'LA' else 'L').convert(mode).resize((30 + i, 40)).save(
            tmp_path / f'{i:02}.{"tif" if mode == "CMYK" else "png"}'
        )
    files = get_image_files(tmp_path).sorted()
    with pytest.raises(RuntimeError, match='same size'): fit(small(from_files(files)))  # fastai's own words
    for cls,c in ((None,3), (PILImageBW,1)):
        learn = small(from_files(files, cls=cls, item_tfms=Resize(side)))
        assert learn.model.encoder.n_in==c and np.isfinite(fit(learn).recorder.values).all()

def test_sixteen_bits_are_refused_or_kept(tmp_path):
    deep = rng.integers(0, 65536, (12,side,side), dtype=np.uint16)
    for i,o in enumerate(deep): Image.fromarray(o).save(tmp_path/f'{i:02}.png')
    files = get_image_files(tmp_path).sorted()
    for cls in (None,PILImageBW):
        with pytest.raises(ValueError, match='16 bits per pixel.*PILImage16'): small(from_files(files, cls=cls))
    learn = small(from_files(files, cls=PILImage16))
    x = torch.cat([b[0] for b in learn.dls.train.new(shuffle=False, drop_last=False, after_batch=[])]).squeeze(1)
    assert np.array_equal(np.uint8(x), deep[2:]//256)
    assert np.isfinite(fit(learn).recorder.values).all()

@pytest.mark.parametrize('value', [float('nan'), float('inf'), -0.5, 300.])
def test_pixels_that_are_no_numbers(value):
    "In a late batch, one pixel"
    def get_x(i):
        x = torch.tensor(ims[i], dtype=torch.float32).permute(2,0,1)/255
        if i==13: x[0,0,0] = value
        return TensorImage(x)

    dls = DataBlock(TransformBlock, get_x=get_x, splitter=IndexSplitter(range(16, 20))).dataloaders(
        range(20), bs=4, num_workers=0, shuffle=False
    )
    learn = small(dls, queue_size=4)
    with learn.no_bar(), pytest.raises(ValueError, match=r'must be in \[0, 1\].*got values from .*(nan|inf|-0.5|300)'):
        learn.fit(1)
    assert all(v.isfinite().all() for v in learn.model.state_dict().values())

def test_several_categories_train_with_the_metrics_of_the_default():
    "There is no accuracy of neighbours then; `TensorMultiCategory` is a `TensorCategory`, too"
    block = DataBlock((ImageBlock,MultiCategoryBlock), get_x=lambda i: ims[i], get_y=lambda i: ['a','b','c'][:i%4],
                      splitter=IndexSplitter(range(4)))
    learn = fit(make(block.dataloaders(range(n), bs=8, num_workers=0), NoBN(3), queue_size=8, metrics=None))
    assert learn.metrics==[] and np.isfinite(learn.recorder.values[-1]).all()
    block = DataBlock((ImageBlock,CategoryBlock), get_x=lambda i: ims[i], get_y=lambda i: i%3,
                      splitter=IndexSplitter(range(4)))
    one = make(block.dataloaders(range(n), bs=8, num_workers=0), NoBN(3), queue_size=8, metrics=None)
    assert [m.name for m in one.metrics]==['knn_accuracy']  # control

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixed_labels_are_refused_before_training(mix):
    learn = make(cbs=mix())
    before = state(learn)
    with pytest.raises(ValueError, match=f'{mix.__name__} mixes images and their labels'): fit(learn)
    assert same(state(learn), before)

def test_statistics_of_images_come_batch_by_batch(monkeypatch):
    "As of all at once, where batches are of other sizes and differ; large images would fill the memory"
    x = rng.integers(0, 256, (23,2,9,7)).astype(np.uint8)
    x[:8] //= 4
    dls = tensor_dls(x, valid_pct=0, bs=5)
    std,mean = torch.std_mean(torch.tensor(x).double()/255, (0,2,3))
    most = []
    get = TensorDL._batch
    def batch(self, rows, targets):
        most.append(len(rows))
        return get(self, rows, targets)
    monkeypatch.setattr(TensorDL, '_batch', batch)
    got = image_stats(dls)
    torch.testing.assert_close(torch.tensor(got), torch.stack([mean,std]).float(), rtol=1e-6, atol=0)
    assert sorted(most)==[3,5,5,5,5]
