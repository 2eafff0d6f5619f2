"""Pictures as viewers show them, wherever the package opens one; the file in every error; the data that was given,
all of it and no other."""

import subprocess, sys
from functools import partial

import numpy as np, pandas as pd, pytest, torch
from fastai.callback.data import partial_dataloaders, weighted_dataloaders  # noqa: puts them on Datasets
from fastai.vision.all import (CategoryBlock, CrossEntropyLossFlat, DataBlock, ImageBlock, ImageDataLoaders,
                               IndexSplitter, IntToFloatTensor, Learner, MaskBlock, PILImage, PILImageBW, Resize,
                               TensorImage, TfmdDL, TfmdLists, ToTensor, TransformBlock, accuracy, get_image_files,
                               parent_label)
from helpers import fit, layout
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from ressl_fastai.data import cached_dls, find_images, folder_dls, image_suffixes, tensor_dls
from ressl_fastai.evaluate import embed, knn_accuracy
from ressl_fastai.images import ImageError, PILImage12, PILImage16, open_image, set_opener
import ressl_fastai.curate
from ressl_fastai.learner import ressl_learner
from ressl_fastai.loaders import clean_dl, first_images
from ressl_fastai.models import small_resnet

rng = np.random.default_rng(0)
photos = load_sample_images().images
net,small = partial(small_resnet, widen=0.125),dict(queue_size=8, n_hidden=16, dim=8)

def piece(h=40, w=60, i=0):
    t, l = rng.integers(0, 300, 2)
    return Image.fromarray(photos[i % 2][t : t + h, l : l + w])


def dls_of(files, bs=4, cls=PILImage, labels=False, valid=(0,1), workers=0, **kw):
    blocks = (ImageBlock(cls),CategoryBlock) if labels else ImageBlock(cls)
    return DataBlock(
        blocks, get_y=parent_label if labels else None, splitter=IndexSplitter(list(valid)), item_tfms=Resize(16), **kw
    ).dataloaders(files, bs=bs, num_workers=workers)


def pixels(dl): return torch.cat([b[0] for b in clean_dl(dl, normalize=False)]).as_subclass(torch.Tensor)
def learner(dls, **kw): return ressl_learner(dls, net, **{**small, 'metrics':[], 'guard':False, **kw})

# as viewers show them

@pytest.mark.parametrize('suffix', ['jpg','png','tif','webp'])
def test_every_orientation_is_that_of_pil(tmp_path, suffix):
    im,n_turned = piece(16, 32),0
    for o in range(1, 10):  # 9 is no orientation
        exif = Image.Exif()
        exif[0x112] = o
        im.save(tmp_path/f'a.{suffix}', exif=exif, **({'quality':100} if suffix!='png' else {}))
        with Image.open(tmp_path/f'a.{suffix}') as f: want = np.asarray(ImageOps.exif_transpose(f))
        assert np.array_equal(open_image(tmp_path/f'a.{suffix}'), want), o
        n_turned += not np.array_equal(PILImage.create(tmp_path/f'a.{suffix}'), want)
    assert n_turned==(0 if suffix=='tif' else 7)  # control: what fastai shows (PIL turns TIFFs itself)

def test_a_turned_picture_is_not_turned_again(tmp_path):
    exif = Image.Exif(); exif[0x112] = 6
    piece(16, 32).save(tmp_path/'a.jpg', exif=exif)
    once = open_image(tmp_path/'a.jpg')
    assert once.size==(16,32) and np.array_equal(open_image(once), once)
    assert np.array_equal(open_image((tmp_path / 'a.jpg').read_bytes()), once) and np.array_equal(
        open_image(Image.open(tmp_path / 'a.jpg')), once
    )


def test_damaged_exif_does_not_damage_the_picture(tmp_path):
    piece().save(tmp_path/'a.jpg', exif=b'Exif\0\0'+bytes(range(40)))
    assert open_image(tmp_path/'a.jpg').size==(60,40)

def alphas(tmp_path, hidden):
    """One picture, a disc on nothing, in every mode that has transparency; `hidden` are the colours below what is
    transparent"""
    yy,xx = np.mgrid[:24,:24]
    disc = (yy-12)**2+(xx-12)**2<80
    rgb = np.where(disc[...,None], [200,30,30], hidden).astype(np.uint8)
    a = (disc*255).astype(np.uint8)
    Image.fromarray(np.dstack([rgb,a])).save(tmp_path/'rgba.png')
    Image.fromarray(np.dstack([rgb,a])).save(tmp_path/'rgba.tif')
    Image.fromarray(np.dstack([rgb,a])).save(tmp_path/'rgba.webp', lossless=True, exact=True)
    key = np.where(disc[...,None], [200,30,30], [1,2,3]).astype(np.uint8)
    Image.fromarray(key).save(tmp_path/'key.png', transparency=(1,2,3))
    p = Image.fromarray(np.where(disc, 1, 2).astype(np.uint8), mode='P')
    p.putpalette([0,0,0, 200,30,30, *np.ravel(hidden)[:3]])
    p.save(tmp_path/'palette.png', transparency=2)
    p.save(tmp_path/'bytes.png', transparency=b'\xff\xff\x00')
    p.save(tmp_path/'palette.gif', transparency=2)
    return np.where(disc[...,None], [200,30,30], 255).astype(np.uint8)

@pytest.mark.filterwarnings('ignore:.*mode.*:DeprecationWarning')
def test_what_looks_alike_is_alike(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'b').mkdir()
    want = alphas(tmp_path / 'a', rng.integers(0, 255, (24, 24, 3)))
    alphas(tmp_path / 'b', np.full((24, 24, 3), 90))
    files = get_image_files(tmp_path).sorted()
    assert len(files)==14
    for f in files:
        assert np.array_equal(open_image(f), want), f
        assert np.array_equal(open_image(f, 'L'), Image.fromarray(want).convert('L')), f
    assert sum(not np.array_equal(PILImage.create(f), want) for f in files)>=12  # control
    with pytest.warns(UserWarning, match='of 14 images looked at, 14 have transparency and are shown on white'):
        learn = learner(dls_of(files))
    x = embed(learn, learn.dls.test_dl(files))[0]
    assert torch.allclose(x, x[:1].expand_as(x), atol=1e-5)

def test_grey_with_transparency_half_transparent_and_other_backgrounds(tmp_path):
    la = np.dstack([np.full((4,4), 100), np.full((4,4), 51)]).astype(np.uint8)
    Image.fromarray(la, mode='LA').save(tmp_path/'la.png')
    assert np.asarray(open_image(tmp_path/'la.png', 'L')).max()==round(100*.2+255*.8)
    assert np.asarray(open_image(tmp_path/'la.png', 'L', 'black')).max()==round(100*.2)
    assert open_image(tmp_path/'la.png', 'RGBA').getpixel((0,0))==(100,100,100,51)  # four channels keep it
    dls = dls_of([tmp_path/'la.png']*8, cls=OnBlack)
    set_opener(dls)
    assert dls.train_ds[0][0].getpixel((0,0))==(20,20,20)

class OnBlack(PILImage): background = 'black'

def test_modes(tmp_path):
    im = piece()
    for mode in ('1','L','P','CMYK','YCbCr'):
        im.convert(mode).save(f := tmp_path/f'{mode}.tif')
        assert np.array_equal(open_image(f), Image.open(f).convert('RGB')) and open_image(f, 'L').mode=='L', mode
    for mode in ('CMYK','YCbCr'): assert np.abs(np.int16(open_image(tmp_path/f'{mode}.tif'))-np.asarray(im)).max()<=6

# depth

def deep(path, values, **kw):
    Image.fromarray(values).save(path, **kw)
    return path


@pytest.mark.parametrize(
    'x,remedy',
    [
        (np.uint16([[300, 60000]] * 4), 'has 16 bits per pixel, with values from 300 to 60000.*ImageBlock.PILImage16'),
        (np.uint16([[3, 4095]] * 4), 'ImageBlock.PILImage12'),
        (np.int32([[0, 60000]] * 4), 'has 32 bits per pixel.*ImageBlock.PILImage16'),
        (np.int32([[-1, 70000]] * 4), 'scale its values.*tensor_dls'),
        (np.float32([[0, 1]] * 4), 'has floats as pixels.*ImageBlock.PILImage16'),
        (np.float32([[0, 300]] * 4), 'scale its values'),
        (np.float32([[np.nan, 1]] * 4), 'scale its values'),
    ],
)
def test_deep_pixels_are_refused_with_a_remedy_that_works(tmp_path, x, remedy):
    f = deep(tmp_path/'x.tif', x)
    for mode in ('RGB','L'):
        with pytest.raises(ImageError, match=f'x.tif {remedy}' if remedy.startswith('has') else f'x.tif .*{remedy}'):
            open_image(f, mode)
    for cls in (PILImage16,PILImage12):
        if cls.__name__ in remedy:
            got = np.asarray(cls.create(f))
            assert got.min()<3 and got.max()>=234, (got.min(), got.max())
    assert open_image(f, None).mode[0] in 'IF'  # asked for

def test_deep_files_big_endian_and_from_pgm(tmp_path):
    x = np.uint16([[256,60000]]*4)
    Image.fromarray(x.astype('>u2')).save(tmp_path/'b.tif')
    (tmp_path/'p.pgm').write_bytes(b'P5\n2 4\n65535\n'+x.astype('>u2').tobytes())
    for f in ('b.tif','p.pgm'):
        with pytest.raises(ImageError, match=f'{f} has .* bits per pixel'): open_image(tmp_path/f)
        assert np.array_equal(PILImage16.create(tmp_path/f), x>>8)
    with pytest.raises(ImageError, match='p.pgm .*12 bits.*PILImage16'): PILImage12.create(tmp_path/'p.pgm')

def test_a_deep_file_anywhere_is_refused_by_name(tmp_path):
    for i in range(12): piece(20, 20, i).save(tmp_path/f'{i:02}.png')
    deep(tmp_path/'09.png', rng.integers(0, 65536, (20,20), dtype=np.uint16))
    files = get_image_files(tmp_path).sorted()
    table = pd.DataFrame(dict(name=[f.name for f in files], label=['a','b']*6))

    def block(get_x, items, **kw):
        return DataBlock(ImageBlock, get_x=get_x, splitter=IndexSplitter([0, 1]), item_tfms=Resize(16)).dataloaders(
            items, bs=4, num_workers=0
        )

    ways = dict(
        paths=lambda: dls_of(files),
        strings=lambda: dls_of(files.map(str)),
        dicts=lambda: block(lambda o: o['file'], [dict(file=f) for f in files]),
        ids=lambda: block(dict(enumerate(files)).get, range(12)),
        table=lambda: ImageDataLoaders.from_df(table, tmp_path, seed=0, item_tfms=Resize(16), bs=4, num_workers=0),
        validation=lambda: dls_of(files, valid=[9]),
        one_list=lambda: lists(files),
        raw_bytes=lambda: block(lambda f: f.read_bytes(), files),
    )
    for nm,make in ways.items():
        with pytest.raises(ImageError, match='16 bits per pixel.*PILImage16') as e: fit(learner(make()), 2)
        assert '09.png' in str(e.value) or nm=='raw_bytes', nm
    learn = fit(learner(dls_of(files, cls=PILImage16)))  # the remedy
    assert np.isfinite(learn.recorder.values).all()

def lists(files):
    tls = TfmdLists(files, [PILImage.create, Resize(16), ToTensor()], splits=[range(2,12), range(2)])
    return tls.dataloaders(bs=4, num_workers=0, after_batch=[IntToFloatTensor()])

def test_twelve_bits_in_sixteen_are_found_before_training(tmp_path):
    for i in range(10): deep(tmp_path/f'{i}.png', rng.integers(0, 4096, (20,20), dtype=np.uint16))
    files = get_image_files(tmp_path).sorted()
    with pytest.raises(ImageError, match='no more than 12 of its 16 bits.*PILImage12'):
        learner(dls_of(files, cls=PILImage16))
    fit(learner(dls_of(files, cls=PILImage12)))
    x = np.concatenate([np.asarray(Image.open(f)) for f in files])
    assert np.array_equal(np.asarray(PILImage12.create(files[0])), x[:20]>>4)
    deep(
        tmp_path / '0.png', rng.integers(0, 65536, (20, 20), dtype=np.uint16)
    )  # one bright image among dark ones: all 16 are used
    learner(dls_of(files, cls=PILImage16))

def test_pages_of_a_tiff(tmp_path):
    ims = [piece(16, 16, i) for i in range(3)]
    ims[0].save(tmp_path/'stack.tif', save_all=True, append_images=ims[1:])
    with pytest.raises(ImageError, match='stack.tif has 3 pages, of which only the first'):
        open_image(tmp_path / 'stack.tif')
    from PIL.TiffImagePlugin import AppendingTiffWriter, ImageFileDirectory_v2

    small = ImageFileDirectory_v2()
    small[254] = 1
    with AppendingTiffWriter(tmp_path/'thumb.tif', True) as f:
        ims[0].save(f, format='TIFF')
        f.newFrame()
        ims[0].resize((8, 8)).save(f, format='TIFF', tiffinfo=small)
        f.newFrame()
    assert Image.open(tmp_path/'thumb.tif').n_frames==2 and np.array_equal(open_image(tmp_path/'thumb.tif'), ims[0])
    ims[0].save(tmp_path/'film.webp', save_all=True, append_images=ims[1:], lossless=True)
    assert np.array_equal(open_image(tmp_path/'film.webp'), ims[0])

# everywhere

def test_one_picture_in_training_validation_embed_cache_hand_over_and_exports(tmp_path):
    "Phone pictures give everywhere what the same pictures give that were saved upright"
    exif = Image.Exif(); exif[0x112] = 6
    for k in ('phone','upright'): [(tmp_path/k/c).mkdir(parents=True) for c in 'ab']
    for i in range(16):
        im,nm = piece(i=i),f'{"ab"[i%2]}/{i:02}.png'
        im.save(tmp_path / 'upright' / nm)
        im.transpose(Image.ROTATE_90).save(tmp_path / 'phone' / nm, exif=exif)
    phone,upright = (get_image_files(tmp_path/k).sorted() for k in ('phone','upright'))
    with pytest.warns(UserWarning, match='16 are turned upright, as EXIF says'):
        learn = learner(dls_of(phone, labels=True), path=tmp_path)
    right = learner(dls_of(upright, labels=True))
    for dl, ref in (
        (learn.dls.train, right.dls.train),
        (learn.dls.valid, right.dls.valid),
        (cached_dls(dls_of(phone)).train, right.dls.train),
    ):
        assert torch.equal(pixels(dl), pixels(ref))
    assert torch.equal(
        learn.dls.valid.one_batch()[0], right.dls.valid.one_batch()[0]
    )  # what fastai's own validation takes
    turned = dls_of(phone).valid.one_batch()[0]
    assert not torch.equal(turned, dls_of(upright).valid.one_batch()[0])                  # control: fastai alone
    x = embed(learn, learn.dls.test_dl(phone))[0]
    torch.testing.assert_close(
        embed(
            learn,
            dls_of(upright, bs=16, valid=[]).train.new(
                shuffle=False, drop_last=False, after_batch=learn.dls.valid.after_batch
            ),
        )[0],
        x,
    )
    clf = learn.to_vision_learner(dls_of(phone, labels=True), metrics=accuracy)
    assert torch.equal(clf.dls.valid.one_batch()[0], learn.dls.valid.one_batch()[0])
    with clf.no_bar(): a = clf.get_preds(dl=clf.dls.test_dl(phone))[0],clf.get_preds(dl=clf.dls.test_dl(upright))[0]
    torch.testing.assert_close(*a)
    clf.export(tmp_path / 'clf.pkl')
    learn.export(tmp_path / 'enc.pkl')
    code = f"""
import warnings; warnings.filterwarnings('ignore')
from fastai.vision.all import *
for f in ('clf.pkl','enc.pkl'):
    learn = load_learner(r'{tmp_path}/'+f)
    with learn.no_bar(): a,b = (learn.predict(Path(p))[2] for p in ({str(phone[3])!r}, {str(upright[3])!r}))
    print(torch.allclose(a, b, atol=1e-5), end=' ')
"""
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert res.stdout.split()==['True','True'], res.stderr

def test_a_vision_learner_with_a_loaded_encoder_and_other_dls(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    for i in range(10): piece(i=i).save(tmp_path/f'{i}.jpg', exif=exif)
    files = get_image_files(tmp_path).sorted()
    learn = learner(dls_of(files), path=tmp_path)
    learn.save_encoder('enc')
    other = dls_of(files)
    clf = Learner(other, torch.nn.Sequential(learn.model.encoder[0]), loss_func=CrossEntropyLossFlat(), path=tmp_path)
    clf.load_encoder('enc')
    learn.dls = more = dls_of(files)
    for dls in (other,more): assert dls.valid_ds[0][0].size==(40,60) or dls.valid_ds[0].size==(40,60)

def test_masks_of_a_turned_picture(tmp_path):
    "A mask painted over the picture as it is shown fits; fastai keeps its loss for masks"
    exif = Image.Exif()
    exif[0x112] = 6
    for i in range(8): piece(16, 32).save(tmp_path/f'{i}.jpg', exif=exif)
    def mask(f): return np.uint8(np.asarray(ImageOps.exif_transpose(Image.open(f)).convert('L'))>99)

    dls = DataBlock((ImageBlock, MaskBlock([0, 1])), get_y=mask, splitter=IndexSplitter([0])).dataloaders(
        get_image_files(tmp_path), bs=2, num_workers=0
    )
    set_opener(dls)
    x,y = dls.valid.one_batch()
    assert x.shape[2:]==y.shape[1:]==(32,16) and dls.train_ds.loss_func is not None

# errors

bad_files = dict(
    cut=lambda b: b[: len(b) // 2],
    text=lambda b: b'no picture',
    empty=lambda b: b'',
    header=lambda b: b[:30],
    noise=lambda b: b[:8] + rng.integers(0, 255, 3000, dtype=np.uint8).tobytes(),
)


@pytest.mark.parametrize('kind,workers', [(k,0) for k in bad_files]+[('cut',2)])
def test_any_error_of_a_file_names_it(tmp_path, kind, workers):
    for i in range(10): piece(i=i).save(tmp_path/f'{i}.png')
    files = get_image_files(tmp_path).sorted()
    learn = learner(dls_of(files, workers=workers))
    (tmp_path/'7.png').write_bytes(bad_files[kind]((tmp_path/'7.png').read_bytes()))
    def said(f):
        with pytest.raises(ImageError) as e, learn.no_bar(): f()
        return str(e.value)
    for text in (said(lambda: learn.fit(3)), said(lambda: embed(learn, learn.dls.train))):
        assert f'{tmp_path}/7.png cannot be read' in text and 'skip_bad=True' in text and 'Traceback' not in text

def test_a_bomb_names_itself_and_pils_limit_stays(tmp_path, monkeypatch):
    piece(40, 60).save(tmp_path/'a.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    with pytest.raises(ImageError, match='a.png cannot be read .*exceeds limit.*make it smaller'):
        open_image(tmp_path / 'a.png')


def test_errors_of_a_users_own_opener_and_of_masks(tmp_path):
    piece().save(tmp_path/'a.png')
    for o in ('b','c','m'): (tmp_path/f'{o}.png').write_text('x')
    for files, get_y, nm in (
        ([tmp_path / 'a.png', tmp_path / 'b.png'], lambda f: np.zeros((40, 60), np.uint8), 'b.png'),
        ([tmp_path / 'a.png'], lambda f: tmp_path / 'm.png' if asked else tmp_path / 'a.png', 'm.png'),
    ):
        asked = []
        dls = DataBlock((ImageBlock(Own), MaskBlock), get_y=get_y, splitter=IndexSplitter([])).dataloaders(
            files, bs=len(files), num_workers=0, shuffle=False
        )
        set_opener(dls)
        asked.append(1)
        with pytest.raises(ImageError, match=f'{nm} cannot be read'): dls.train.one_batch()

class Own(PILImage):
    "As for a format that PIL does not know"
    @classmethod
    def create(cls, fn, **kwargs):
        if fn.name=='b.png': raise RuntimeError('not mine')
        return cls(Image.open(fn).convert('RGB').copy())

def test_arrays_keep_fastais_way_unless_their_bits_would_be_cut_off():
    def make(x):
        dls = DataBlock(ImageBlock(PILImageBW), get_x=x.__getitem__, splitter=IndexSplitter([0])).dataloaders(
            range(len(x)), bs=4, num_workers=0
        )
        set_opener(dls)
        return dls

    ims = rng.integers(0, 255, (8,12,12), dtype=np.uint8)
    assert np.array_equal(np.stack([np.asarray(o) for o, in make(ims).train_ds]), ims[1:])
    for x in (ims.astype(np.uint16)*257, ims.astype(np.float32)/255):
        with pytest.raises(ImageError, match='the ndarray given as an image has'): make(x).train.one_batch()

def test_pils_warnings_do_not_tear_the_bar(tmp_path):
    piece(40, 60).save(tmp_path/'a.png')
    code = f"""
import sys, ressl_fastai.images as r
from PIL import Image
Image.MAX_IMAGE_PIXELS = 2000
print('now', file=sys.stderr)
for _ in range(2): r.open_image(r'{tmp_path}/a.png')
import warnings; warnings.simplefilter('always'); r.open_image(r'{tmp_path}/a.png')   # who asks is told
"""
    err = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stderr.split('now\n')[1]
    assert err.count('DecompressionBombWarning')==1, err

# loaders as they were given

def folder(tmp_path, n=40):
    for i in range(n):
        (tmp_path / 'ab'[i % 2]).mkdir(exist_ok=True)
        piece(i=i).save(tmp_path / 'ab'[i % 2] / f'{i:02}.png')
    return DataBlock(
        (ImageBlock, CategoryBlock),
        get_items=lambda p: get_image_files(p).sorted(),
        get_y=parent_label,
        splitter=IndexSplitter(range(0, n, 5)),
    ).datasets(tmp_path)


tfms = dict(after_item=[Resize(16),ToTensor()], after_batch=[IntToFloatTensor()], num_workers=0)

def test_weights_and_parts_are_kept_in_training_and_not_in_evaluation(tmp_path):
    ds = folder(tmp_path)
    w = np.array([float(f.parent.name=='a') for f in ds.train.items])
    for dls, n, classes in (
        (ds.weighted_dataloaders(w, bs=8, **tfms), 32, {0}),
        (ds.partial_dataloaders(9, bs=4, drop_last=False, **tfms), 8, {0, 1}),
    ):
        learn, seen = learner(dls), []
        learn.add_cb(See(seen))
        fit(learn, 4)
        assert len(seen) == 4 * n and set(seen) == classes  # of 9 in fours the last one is alone, and waits
        x, y = embed(learn, dls.train)
        assert len(x) == 32 and y.tolist() == [ds.train[i][1] for i in range(32)]  # all, in order
        assert type(clean_dl(dls.train, sampled=True)) is type(dls.train)

from fastai.callback.core import Callback
class See(Callback):
    order = -20
    def __init__(self, seen): self.seen = seen
    def before_batch(self):
        if self.training: self.seen.extend(self.yb[0].tolist())

def test_settings_of_a_loader_survive(tmp_path):
    ds = folder(tmp_path)
    dls = ds.dataloaders(bs=4, n=12, **{**tfms, 'num_workers':1}, persistent_workers=True, pin_memory=False, timeout=60)
    dl = clean_dl(dls.train, sampled=True)
    assert (
        dl.fake_l.persistent_workers,
        dl.fake_l.num_workers,
        dl.fake_l.timeout,
        dl.n,
        dl.bs,
        dl.shuffle,
        dl.drop_last,
        len(dl),
    ) == (True, 1, 60, 12, 4, True, True, 3)
    assert clean_dl(dls.train).n==12 and len(list(clean_dl(dls.train, num_workers=0)))==3
    class Every(TfmdDL):
        "A sampler of a user's own, with an argument that `new` does not know"

        def __init__(self, *args, step, **kwargs):
            self.step = step
            super().__init__(*args, **kwargs)

        def get_idxs(self): return list(range(0, self.n, self.step))
    own = Every(ds.train, step=2, bs=4, **tfms)
    y = torch.cat([b[1] for b in clean_dl(own, sampled=True)])
    assert (
        y.tolist() == [int(ds.train[i][1]) for i in range(0, 32, 2)]
        and len(torch.cat([b[1] for b in clean_dl(own)])) == 32
    )


# labels: few, missing

def test_fewer_labels_than_a_batch_are_trained_on(tmp_path):
    learn = learner(folder(tmp_path).dataloaders(bs=8, **tfms))
    few = folder(tmp_path).dataloaders(bs=64, **tfms)
    with pytest.warns(UserWarning, match='bs=64 is larger than the training set of 32 images: dls.train now gives all'):
        clf = learn.to_vision_learner(few, metrics=accuracy)
    before = [o.clone() for o in clf.model.parameters()]
    with clf.no_bar(), clf.no_logging(): clf.fine_tune(1)
    assert len(few.train)==1 and all(not torch.equal(a, b) for a,b in zip(before, clf.model.parameters()))
    one = DataBlock(
        (ImageBlock, CategoryBlock(['a', 'b'])), get_y=parent_label, splitter=IndexSplitter([1]), item_tfms=Resize(16)
    ).dataloaders(get_image_files(tmp_path)[:2], num_workers=0)
    with pytest.raises(ValueError, match='at least 2 images, it has 1'): learn.to_vision_learner(one)

def test_a_table_with_some_labels(tmp_path):
    folder(tmp_path)
    files = get_image_files(tmp_path).sorted()
    table = pd.DataFrame(
        dict(
            name=[str(f.relative_to(tmp_path)) for f in files],
            label=[f.parent.name if i % 3 else np.nan for i, f in enumerate(files)],
        )
    )

    def dls(df): return ImageDataLoaders.from_df(df, tmp_path, seed=0, item_tfms=Resize(16), bs=8, num_workers=0)
    learn = fit(learner(dls(table), metrics=None))
    knn = learn.recorder.values[-1][2]
    (x,y),(vx,vy) = embed(learn, learn.dls.train),embed(learn, learn.dls.valid)
    assert len(x)==32 and 5<(y<0).sum()<20 and {*y.tolist()}=={-1,0,1}
    assert knn==pytest.approx(knn_accuracy(x[y>=0], y[y>=0], vx[vy>=0], vy[vy>=0])) and list(learn.dls.vocab)==['a','b']
    with pytest.raises(ValueError, match='images have no label: leave these rows of the table out'):
        learn.to_vision_learner(dls(table))
    learn.to_vision_learner(dls(table[table.label.notna()]))                   # what the advice gives
    i = dls(table).train.items.index
    rare = table.assign(label=pd.Series({i[0]:'a', i[1]:'b'}))
    assert np.isnan(
        fit(learner(dls(rare), metrics=None)).recorder.values[-1][2]
    )  # no label in validation: a NaN, no reason to stop

    few = learn.dls.train.items.iloc[[3,5]]
    want = learn.suggest_labels(4, labelled=[3,5])
    for labelled in (few, few.name.tolist(), few[['name']].reset_index(drop=True), want.assign(index=[3,5,3,5])):
        pd.testing.assert_frame_equal(learn.suggest_labels(4, labelled=labelled), want)
    with pytest.raises(ValueError, match="'nowhere.png' is not one"): learn.suggest_labels(4, labelled=['nowhere.png'])
    with pytest.raises(ValueError, match='column that tells'):
        learn.suggest_labels(4, labelled=pd.DataFrame(dict(other=[1])))


# folders

def taken(tmp_path):
    dls = folder_dls(tmp_path, 8, 1, valid_pct=0.5, num_workers=0)
    return [*map(lambda f: str(f.relative_to(tmp_path)), dls.train.items)], dls


@pytest.mark.parametrize(
    'a,b',
    [
        ('train', 'valid'),
        ('Train', 'Validation'),
        ('TRAIN', 'VAL'),
        ('Training', 'Test'),
        ('train_images', 'test_images'),
        ('train2017', 'val2017'),
        ('trainset', 'testset'),
        ('seg_train', 'seg_test'),
        ('trn', 'dev'),
        ('asl_alphabet_train', 'asl_alphabet_test'),
    ],
)
@pytest.mark.parametrize('inner', ['{s}/{c}', '{c}/{s}', 'data/{s}/{c}'])
def test_test_images_never_join_the_training(tmp_path, a, b, inner, capsys):
    names = [inner.format(s=s, c=c)+f'/{i}.png' for s in (a,b) for c in ('cat','dog') for i in range(2)]
    train,dls = taken(layout(tmp_path, *names))
    assert len(train)==dls.valid.n==4 and all(a in f for f in train) and list(dls.vocab)==['cat','dog']
    assert {dls.vocab[dls.valid_ds[i][1]] for i in range(4)}=={'cat','dog'}
    assert capsys.readouterr().err==f'training on {a}, held out: {b}\n'

def test_folders_that_are_no_split(tmp_path, capsys):
    train,dls = taken(layout(tmp_path, *(f'{c}/{i}.png' for c in ('train','bus','car') for i in range(4))))
    assert list(dls.vocab)==['bus','car','train'] and len(train)==6 and capsys.readouterr().err==''
    layout(tmp_path/'parts', *(f'{c}/{i}.png' for c in ('train','valid','test') for i in range(2)))
    assert folder_dls(tmp_path/'parts', 8, 1, num_workers=0).valid.n==2
    assert capsys.readouterr().err=='training on train, held out: valid; 2 images of test are left out\n'

def test_links_multiply_nothing(tmp_path):
    root = layout(tmp_path/'data', *(f'{c}/{i}.png' for c in 'ab' for i in range(3)))
    layout(tmp_path / 'beside', '0.png')
    layout(tmp_path / 'linked', 'x.png', 'deep/y.png')
    for link, to in (
        ('a/up', root),
        ('around', tmp_path),
        ('again', root / 'a'),
        ('0first', root / 'b'),
        ('c', tmp_path / 'linked'),
        ('d', tmp_path / 'linked'),
    ):
        (root / link).symlink_to(to, target_is_directory=True)
    files = [str(f.relative_to(root)) for f in find_images(root)]
    assert files==['a/0.png','a/1.png','a/2.png','b/0.png','b/1.png','b/2.png','c/deep/y.png','c/x.png']
    (tmp_path/'link').symlink_to(root, target_is_directory=True)
    (layout(tmp_path/'one', '0.png')/'up').symlink_to(tmp_path/'one', target_is_directory=True)
    assert len(get_image_files(tmp_path/'one'))>20 and len(find_images(tmp_path/'one'))==1  # control: what fastai finds
    assert len(find_images(tmp_path/'link'))==8

def test_suffixes_are_one_list_and_what_is_left_out_is_said(tmp_path, monkeypatch, capsys):
    for s in ('JPG','jpeg','png','webp','avif','tif','gif','bmp'): piece().save(tmp_path/f'a.{s}')
    for o in ('b.heic','c.heic','labels.csv','noise','.hidden.png'): (tmp_path/o).write_text('x')
    (tmp_path / '.cache').mkdir()
    piece().save(tmp_path / '.cache' / 'x.png')
    assert len(find_images(tmp_path))==8
    assert capsys.readouterr().err=='left out, no suffix of an image: 2 .heic, 1 .csv, 1 noise\n'
    Image.init()
    assert set(image_suffixes) <= set(Image.registered_extensions()), 'PIL opens them all'

def test_the_shell_reads_sixteen_bits_as_grey_and_says_so_otherwise(tmp_path):
    for i in range(10): deep(tmp_path/f'{i}.png', rng.integers(0, 65536, (20,20), dtype=np.uint16))
    assert folder_dls(tmp_path, 8, 2, gray=True, num_workers=0).one_batch()[0].std()>0.05
    with pytest.raises(ImageError, match='--gray in the shell'): folder_dls(tmp_path, 8, 2, num_workers=0)

# channels

def test_rows_are_not_taken_for_channels():
    def run(*shape):
        x = torch.rand(12, *shape)
        return first_images(
            DataBlock(TransformBlock, get_x=lambda i: TensorImage(x[i]), splitter=IndexSplitter([0])).dataloaders(
                range(12), bs=4, num_workers=0
            )
        )

    for shape in ((64,64,13), (64,64,3), (48,64,3), (32,32,200), (48,64,13)):
        with pytest.raises(ValueError, match='looks like rows.*permute'): run(*shape)
    for shape in ((13,64,64), (3,48,64), (200,32,32), (1,8,8), (4,16,24)): assert run(*shape)[0].shape[1]==shape[0]
    for shape,c in (((32,32,200),200), ((200,32,32),200), ((48,64,13),13), ((13,48,64),13), ((64,64,3),3)):
        x = np.random.rand(6, *shape).astype(np.float32)
        assert tensor_dls(x, bs=2).one_batch()[0].shape[1]==c, shape

def test_a_grey_encoder_of_16_bits_looks_at_whatever_a_picture_comes_in(tmp_path):
    "As `predict` and `test_dl` promise; an encoder of 8 bits does so by fastai's own `create`"
    x = rng.integers(0, 2**16, (12,16,16), dtype=np.uint16)
    files = [tmp_path/f'{i}.png' for i in range(len(x))]
    for f,o in zip(files, x): Image.fromarray(o).save(f)
    learn = fit(ressl_learner(dls_of(files, cls=PILImage16), net, **small, metrics=[]))
    file = files[3]
    with learn.no_bar():
        want = learn.predict(file)[0]
        for o in (str(file), file.read_bytes(), Image.open(file), x[3]):
            torch.testing.assert_close(learn.predict(o)[0], want, rtol=0, atol=1e-5)
        assert (learn.predict(files[4])[0]-want).abs().max()>1e-4  # control
        assert learn.get_preds(dl=learn.dls.test_dl([str(file)]))[0].shape==(1,8)
