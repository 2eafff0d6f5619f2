"""A fit goes on as users run it: bar, loggers, monitors, random splits; and what is not the same data is refused by
name."""

import collections, datetime, enum, os, random, shutil, subprocess, sys
from functools import partial
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import (Callback, CategoryBlock, CSVLogger, DataBlock, ImageBlock, ImageDataLoaders,
                               IndexSplitter, L, PILImageBW, RandomSplitter, RandomResizedCrop, Resize, Transform,
                               aug_transforms, get_image_files, parent_label, PILImage)
from PIL import Image
from crashes import differences, digits, everything, fit, from_folder, of_colour, small_dls, train
from crashes import make as make_learner
from helpers import Crash, write_digits

from ressl_fastai.callback import InfoNCEWarmup
from ressl_fastai.checkpoint import Checkpoint
from ressl_fastai.checkpoint_file import decode, encode
from ressl_fastai.files import hold
from ressl_fastai.data import cached_dls, tensor_dls
from ressl_fastai.fingerprint import data_fingerprint, digest, item_fingerprints
from ressl_fastai.models import small_resnet

def make(seed=0, dls=None, **kwargs):
    return make_learner(seed, dls, **{**(of_colour if dls else {}), **kwargs})

@pytest.fixture(scope='session')
def images(tmp_path_factory):
    torch.set_num_threads(1)
    return write_digits(tmp_path_factory.mktemp('images'))

# the split

def from_block(path, seed):
    return DataBlock(
        ImageBlock(PILImageBW), get_items=get_image_files, splitter=RandomSplitter(0.2, seed), item_tfms=Resize(8)
    ).dataloaders(path, bs=16, num_workers=0)


def from_array(path, seed):
    return tensor_dls((digits.images[:80] * 15).astype(np.uint8), digits.target[:80], seed=seed, bs=16)


def from_cache(path, seed): return cached_dls(from_folder(path, seed))

def from_table(path, seed):
    files = get_image_files(path).sorted()
    table = pd.DataFrame({'name':[str(o.relative_to(path)) for o in files], 'label':[o.parent.name for o in files]})
    return ImageDataLoaders.from_df(
        table, path=path, valid_pct=0.2, seed=seed, item_tfms=Resize(8), bs=16, num_workers=0
    )


def crash(learn, folder, n=7, every=None, n_epoch=3, cbs=()):
    with pytest.raises(KeyboardInterrupt): fit(learn, n=n_epoch, cbs=[*cbs, Checkpoint(folder, every), Crash(n)])

@pytest.mark.parametrize('new', [from_folder, from_block, from_array, from_cache, from_table], ids=lambda f: f.__name__)
def test_a_split_that_is_drawn_anew_is_continued_as_it_was(images, tmp_path, new, capsys):
    """A line without a seed (here: another one) divides the images anew; grey ones are normalised by what was
    measured on them"""
    whole = everything(fit(make(dls=new(images, 1), metrics=None), n=3))
    crash(make(dls=new(images, 1), metrics=None), tmp_path/'run', every=1)
    learn = make(1, new(images, 2), metrics=None)
    assert set(map(str, learn.dls.valid_ds.items)) != set(map(str, new(images, 1).valid_ds.items)) or new is from_table
    assert differences(whole, everything(fit(learn, n=3, cbs=Checkpoint(tmp_path/'run', 1))))==[]
    assert 'training and validation images as in the checkpoint' in capsys.readouterr().out
    items = [dl.dataset.items for dl in new(images, 1).loaders]
    for dl, want in zip(learn.dls.loaders, items):
        assert list(map(str, list(dl.dataset.items) if new is not from_table else dl.dataset.items.name)) == list(
            map(str, want if new is not from_table else want.name)
        )
    assert torch.isfinite(learn.validate()[0]+torch.zeros(()))

def test_loaders_that_weigh_images_are_refused_with_another_split(images, tmp_path):
    def new(seed):
        block = DataBlock(
            ImageBlock, get_items=get_image_files, splitter=RandomSplitter(0.2, seed), item_tfms=Resize(8)
        )
        return block.weighted_dataloaders(images, wgts=np.ones(80), bs=16, num_workers=0)
    crash(make(dls=new(1)), tmp_path/'run', 2)
    with pytest.raises(ValueError, match='use a splitter with a seed'):
        fit(make(dls=new(2)), n=3, cbs=Checkpoint(tmp_path / 'run'))


# other data

class Crop(Transform):
    order = 0
    def __init__(self, n): self.m = 8-n
    def encodes(self, x:PILImage): return x.crop((0,0,8-self.m,8-self.m))

def fixed(
    path,
    get_y=parent_label,
    item_tfms=(),
    splitter=IndexSplitter(range(0, 80, 5)),
    order=lambda files: files.sorted(),
    kind=PILImage,
    size=8,
    **kwargs,
):
    return DataBlock(
        (ImageBlock(kind), CategoryBlock),
        get_items=lambda o: order(get_image_files(o)),
        get_y=get_y,
        splitter=splitter,
        item_tfms=[*item_tfms, Resize(size)],
        **kwargs,
    ).dataloaders(path, bs=16, num_workers=0)

def replace_one(path): shutil.copy(path/'1'/'011.png', path/'0'/'010.png')
def add_one(path): shutil.copy(path/'1'/'011.png', path/'0'/'new.png')
def rename_one(path): (path/'0'/'010.png').rename(path/'0'/'renamed.png')
def same_size(path):
    "Other bytes, and as many"
    data = bytearray((path/'0'/'010.png').read_bytes())
    data[-1] ^= 1  # of the end's checksum, which PIL does not look at
    (path/'0'/'010.png').write_bytes(data)

def upper(o): return parent_label(o).upper()+'x'

changes = {
    'images: 1 of 80 are not what they were .*010.png': dict(on_disk=replace_one),
    'images: 1 of 80 are not .*010': dict(on_disk=same_size),
    'images: 80 in the checkpoint, now 81 .*new.png': dict(on_disk=add_one),
    'images: 80 in the checkpoint, now 80 .1 are new.*renamed.png, 1 are gone': dict(on_disk=rename_one),
    'labels: .* are not what they were': dict(get_y=lambda o: str(int(o.parent.name) % 3)),
    'label transforms: .*upper': dict(get_y=upper),
    'item transforms: .*Crop.m=2.* now .*Crop.m=3': dict(item_tfms=[Crop(5)]),
    'item transforms: .*Resize.size=.8': dict(size=12),
    'batch transforms: in the checkpoint .*Flip.* now .*Flip': dict(
        batch_tfms=aug_transforms(max_warp=0.0, p_affine=1.0)
    ),
    'kind: in the checkpoint PILImage, now PILImageBW': dict(kind=PILImageBW),
}

@pytest.mark.parametrize('said', changes)
def test_other_data_are_refused_by_name_before_anything_is_trained(images, tmp_path, said, monkeypatch):
    path,change = shutil.copytree(images, tmp_path/'images'),dict(changes[said])
    on_disk, before = (
        change.pop('on_disk', lambda o: None),
        dict(item_tfms=[Crop(6)], batch_tfms=aug_transforms(max_warp=0.0)),
    )
    crash(make(dls=fixed(path, **before)), tmp_path/'run', 2)
    on_disk(path)
    n = []
    class Count(Callback):
        def after_step(self): n.append(1)

    with pytest.raises(ValueError, match=said):
        fit(make(1, fixed(path, **{**before, **change})), n=3, cbs=[Count(), Checkpoint(tmp_path / 'run')])
    assert n==[]

def test_other_arrays_under_the_same_numbers_are_refused(tmp_path):
    x,y = (digits.images[:80]*15).astype(np.uint8),digits.target[:80]
    def new(x, y): return make(dls=tensor_dls(x, y, valid_idx=range(16), bs=16))
    crash(new(x, y), tmp_path/'run', 2)
    for x2, y2, said in (
        (x[::-1].copy(), y, 'type transforms'),
        (x, y[::-1].copy(), 'label transforms.*labels: 66 of 80'),
        (np.r_[x[:79], x[:1]], y, 'type transforms'),
    ):
        with pytest.raises(ValueError, match=said): fit(new(x2, y2), n=3, cbs=Checkpoint(tmp_path/'run'))

def test_what_is_the_same_is_not_refused(images, tmp_path, capsys):
    "A folder that moved and was touched, another order of its files, processes that load, augmentations that were used"
    path = shutil.copytree(images, tmp_path/'images')

    def new(path, **kwargs):
        return fixed(path, item_tfms=[RandomResizedCrop(12)], batch_tfms=aug_transforms(), **kwargs)

    whole = everything(fit(make(dls=new(path)), n=3))
    dls = new(path)
    for _ in range(3): dls.one_batch()
    crash(make(dls=new(path)), tmp_path/'run', 7)
    moved = path.rename(tmp_path/'elsewhere')
    for f in get_image_files(moved): os.utime(f)
    dls = new(moved, order=lambda files: files.sorted(reverse=True), splitter=IndexSplitter(range(4, 80, 5)))
    for _ in range(3): dls.one_batch()
    assert differences(whole, everything(fit(make(1, dls), n=3, cbs=Checkpoint(tmp_path/'run'))))==[]
    assert 'in the order of the checkpoint' in capsys.readouterr().out

def test_a_table_goes_on_when_its_folder_has_moved(images, tmp_path):
    path = shutil.copytree(images, tmp_path/'images')
    crash(make(dls=from_table(path, 1)), tmp_path/'run', 2)
    fit(make(1, from_table(path.rename(tmp_path/'elsewhere'), 1)), n=3, cbs=Checkpoint(tmp_path/'run'))

# fingerprints

class Mode(enum.Enum): A = 1
Point = collections.namedtuple('Point', 'x y')

def values():
    "Of every kind, made anew at each call"
    class Inner:
        def __init__(self): self.a,self.b = {3,1,'x'},{'k':np.arange(3.)}

    return dict(
        set={'b', 'a', 3},
        dict={'a': 1, Path('b'): [1, 2]},
        array=np.arange(6).reshape(2, 3),
        table=pd.DataFrame({'a': ['x', 'y'], 'b': [1.0, 2.0]}),
        lists=pd.Series([[1], [2]]),
        function=lambda x, y=3: [o + 1 for o in x],
        partial=partial(sorted, key=len),
        bound='ab'.join,
        object=Inner(),
        tensor=torch.arange(3.0),
        half=torch.ones(2, dtype=torch.bfloat16),
        mode=Mode.A,
        cls=Inner,
        method=parent_label,
        tfm=Crop(3),
        crop=RandomResizedCrop(8),
        image=PILImage.create(np.zeros((3, 3, 3), np.uint8)),
        opener=PILImage.create,
    )

def test_in_a_notebook_the_same_line_goes_on_and_digests_are_the_same(tmp_path, monkeypatch):
    "In a kernel with bars of its own, and another hash seed"
    import nbformat
    from nbclient import NotebookClient
    for k,v in dict(PYTHONHASHSEED='1', PYTHONWARNINGS='ignore').items(): monkeypatch.setenv(k, v)
    cells = [
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_resume import *\n"
        "whole = make()\nwhole.fit_one_cycle(3, 1e-2)\nwhole = everything(whole)",
        f"try: make().fit_one_cycle(3, 1e-2, cbs=[Checkpoint({str(tmp_path / 'run')!r}, 1), Crash(6)])\n"
        "except KeyboardInterrupt: print('crashed')",
        f"learn = make(1)\nlearn.fit_one_cycle(3, 1e-2, cbs=Checkpoint({str(tmp_path / 'run')!r}, 1))",
        "print(differences(whole, everything(learn)))",
        "print({k:digest(v) for k,v in values().items()})",
    ]
    nb = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
    NotebookClient(nb, timeout=300, kernel_name='python3').execute()

    def shown(i, kind):
        return ''.join(
            o.get('text') or o.data.get('text/html', '') for o in nb.cells[i].outputs if o.output_type == kind
        )

    assert (
        'crashed' in shown(1, 'stream')
        and 'continuing from' in shown(2, 'stream')
        and 'valid_loss' in shown(2, 'display_data')
        and shown(3, 'stream') == '[]\n'
    )
    want = {k:digest(v) for k,v in values().items()}
    assert eval(shown(4, 'stream'))==want and len(set(want.values()))==len(want)

def test_digests_see_small_differences():
    step = 2
    def f(x): return x+step
    a = digest(f)
    step = 3
    assert digest(f)!=a
    for x, y in (
        (1, True),
        (1, 1.0),
        ('1', 1),
        ([1], (1, 2)),
        ({1: 2}, {2: 1}),
        (np.zeros(2), np.zeros(2, np.float32)),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (lambda o: o[0], lambda o: o[1]),
        (partial(max, default=1), partial(max, default=2)),
        ('a'.join, 'b'.join),
        (Crop(3), Crop(4)),
        (RandomResizedCrop(8), RandomResizedCrop(8, min_scale=0.3)),
        (torch.zeros(2), torch.zeros(2).bfloat16()),
    ):
        assert digest(x)!=digest(y), (x, y)

def test_the_fingerprint_opens_few_files_and_leaves_random_states_alone(tmp_path, monkeypatch):
    "A thousand of 1,200 files are read in part, none is decoded but the first"
    for i in range(1200): (tmp_path/f'{i}.png').write_bytes(b'x'*i)
    for i in (0, 1): Image.new('RGB', (4,4)).save(tmp_path/f'{i}.png')
    dls = DataBlock(
        ImageBlock, get_items=lambda o: get_image_files(o).sorted(), splitter=IndexSplitter(range(1, 100))
    ).dataloaders(tmp_path, bs=4, num_workers=0)
    opened = []
    monkeypatch.setattr(Image, 'open', lambda f, *a, _open=Image.open, **k: (opened.append(f), _open(f, *a, **k))[1])
    states = random.getstate(),torch.get_rng_state(),np.random.get_state()[1].tolist()
    items = item_fingerprints(dls)
    data_fingerprint(dls, items)
    assert len(opened)<=3 and sum((df['bytes']!=0).sum() for df in items)==1000
    assert (
        random.getstate() == states[0]
        and torch.equal(torch.get_rng_state(), states[1])
        and np.random.get_state()[1].tolist() == states[2]
    )


# callbacks

@pytest.mark.parametrize('every,n_crash', [(1,10), (None,14)])
def test_common_callbacks_with_the_bar_on_go_on_as_if_nothing_had_been(images, tmp_path, every, n_crash, capsys):
    whole = train(tmp_path/'whole', 0, from_folder(images, 1, num_workers=1))
    assert len(whole['csv'])==5 and whole['history'][0].shape==(4,8) and len(whole['lrs'])==16
    with pytest.raises(KeyboardInterrupt):
        train(
            tmp_path / 'run',
            0,
            from_folder(images, 1, num_workers=1),
            Checkpoint(tmp_path / 'run' / 'state', every),
            Crash(n_crash),
        )
    got = train(tmp_path/'run', 1, from_folder(images, 2), Checkpoint(tmp_path/'run'/'state', every))
    assert 'continuing from' in capsys.readouterr().out and differences(whole, got)==[]

def test_a_csv_is_appended_to_once_and_left_alone_by_a_fit_that_is_refused(tmp_path):
    (tmp_path/'h.csv').write_text('an earlier run\n')

    def go(seed, n=4, cbs=(), append=True):
        fit(make(seed, path=tmp_path), n=n, cbs=[CSVLogger('h.csv', append=append), *cbs])

    with pytest.raises(KeyboardInterrupt): go(0, cbs=[Checkpoint('run', 1), Crash(6)])
    with pytest.raises(KeyboardInterrupt): go(1, cbs=[Checkpoint('run', 1), Crash(11)])
    before = (tmp_path/'h.csv').read_text()
    assert [l.split(',')[0] for l in before.splitlines()]==['an earlier run','epoch','0','1']
    with pytest.raises(ValueError, match='n_epoch'): go(1, n=5, cbs=[Checkpoint('run', 1)])
    assert (tmp_path/'h.csv').read_text()==before
    go(2, cbs=[Checkpoint('run', 1)])
    assert [l.split(',')[0] for l in (tmp_path / 'h.csv').read_text().splitlines()] == [
        'an earlier run',
        'epoch',
        '0',
        '1',
        '2',
        '3',
    ]
    shutil.rmtree(tmp_path/'models')
    go(0, append=False, cbs=[Checkpoint('run')])
    before = (tmp_path/'h.csv').read_text()
    with pytest.raises(ValueError, match='n_epoch'): go(1, n=5, append=False, cbs=[Checkpoint('run')])
    assert (tmp_path/'h.csv').read_text()==before and len(before.splitlines())==5

def is_held(folder):
    "Asked by another process, with nothing but the standard library"
    code = (
        f"import fcntl; f = open(r'{folder / 'lock'}', 'w')\n"
        "try: fcntl.lockf(f, fcntl.LOCK_EX|fcntl.LOCK_NB)\nexcept OSError: print('held')"
    )
    return subprocess.run([sys.executable, '-S', '-c', code], capture_output=True, text=True).stdout=='held\n'

class Interrupted(Checkpoint):
    "Ctrl-C while batches that are done are drawn again"
    def before_batch(self):
        if self.to_skip: raise KeyboardInterrupt
        super().before_batch()

@pytest.mark.parametrize('permanent', [False, True])
def test_ctrl_c_while_batches_are_passed_over_leaves_all_callbacks_on(tmp_path, permanent):
    whole = everything(fit(make(), n=3))
    crash(make(), tmp_path/'run', 7, every=1)
    learn,rows = make(1),[]
    learn.logger = rows.append
    cb = Interrupted(tmp_path/'run', 1)
    if permanent: learn.add_cb(cb)
    with learn.no_bar(), pytest.raises(KeyboardInterrupt):
        learn.fit_one_cycle(3, 1e-2, cbs=[CSVLogger(tmp_path / 'h.csv')] + ([] if permanent else [cb]))
    if permanent: learn.remove_cb(cb)
    assert [o for o in learn.cbs if not o.run]==[] and learn.logger==rows.append
    hold(tmp_path/'run').close()
    assert differences(whole, everything(fit(learn, n=3, cbs=Checkpoint(tmp_path/'run', 1))))==[]

def test_an_object_that_stays_on_a_learner_goes_on_after_ctrl_c(tmp_path):
    whole = everything(fit(make(), n=3))
    crash(make(), tmp_path/'run', 7, every=1)
    learn,cb,seen = make(1),Interrupted(tmp_path/'run', 1),[]
    learn.add_cb(cb)
    with pytest.raises(KeyboardInterrupt): fit(learn, n=3)
    cb.before_batch = partial(Checkpoint.before_batch, cb)
    class Ask(Callback):
        def after_train(self): seen.append(is_held(tmp_path/'run'))
    assert differences(whole, everything(fit(learn, n=3, cbs=Ask())))==[]
    assert all(seen[1:]) and not is_held(tmp_path/'run')

def test_a_second_fit_of_one_object_holds_the_folder_and_a_refused_one_frees_it(tmp_path):
    seen,learn,cb,run = [],make(),Checkpoint(tmp_path/'run', 1),tmp_path/'run'
    class Ask(Callback):
        order,run_valid = 50,False
        def after_batch(self):
            if self.train_iter in (2,5): seen.append(is_held(run))
    with pytest.raises(KeyboardInterrupt): fit(learn, n=3, cbs=[cb, Ask(), Crash(3)])
    assert not is_held(run)
    with pytest.raises(KeyboardInterrupt): fit(learn, n=3, cbs=[cb, Ask(), Crash(6)])
    assert seen==[True,True] and not is_held(run)
    other = Checkpoint(run, 1)
    with pytest.raises(ValueError, match='other settings'): fit(make(2, queue_size=60), n=3, cbs=other)
    assert not is_held(run)

def test_fine_tune_is_two_fits_in_two_folders(tmp_path, capsys):
    def tune(seed, *cbs):
        learn = make(seed, small_dls(), path=tmp_path)
        with learn.no_bar(), learn.no_logging(): learn.fine_tune(2, freeze_epochs=2, cbs=cbs)
        return everything(learn)
    whole = tune(0)
    for n,m in ((5,None), (6,1)):  # in the first fit, and in the second
        class Cut(Crash):
            def before_fit(self): self.n = m if self.learn.opt.frozen_idx==0 else n

        with pytest.raises(KeyboardInterrupt):
            tune(0, Checkpoint(f'run{n}', 1), *([Crash(n)] if m is None else [Late(m)]))
        assert differences(whole, tune(1, Checkpoint(f'run{n}', 1)))==[]
    assert {'run5','run5-2','run6','run6-2'} <= {o.name for o in (tmp_path/'models').iterdir()}
    assert 'nothing to do' in capsys.readouterr().out

class Late(Callback):
    "Ends the second fit"
    order = 1
    def __init__(self, n): self.n,self.fits = n,0
    def before_fit(self): self.fits += 1
    def before_batch(self):
        if self.training and self.fits==2 and self.train_iter==self.n: raise KeyboardInterrupt

def test_a_later_fit_says_that_the_warmup_begins_again(tmp_path, capsys):
    learn = make(warmup=InfoNCEWarmup(1))
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=5, show_plot=False)
    fit(learn, n=2)
    learn.validate()
    assert 'begin' not in capsys.readouterr().out
    fit(learn, n=2)
    assert 'warmup begins again' in capsys.readouterr().out
    crash(make(warmup=InfoNCEWarmup(1)), tmp_path/'run', 3, every=1)
    fit(make(warmup=InfoNCEWarmup(1)), n=3, cbs=Checkpoint(tmp_path/'run', 1))
    assert 'again' not in capsys.readouterr().out.replace('To train again', '')  # the same fit
    fit(make(), n=1)
    assert 'again' not in capsys.readouterr().out

# memory of callbacks

class Color(enum.IntEnum): RED = 1
class Text(str, enum.Enum): A = 'a'

kinds = dict(
    a=1,
    b=2.5,
    c='x',
    d=None,
    e=True,
    big=2**200,
    bytes=b'abc',
    complex=1j,
    tuple=(1, (2,)),
    list=[1, 'x', None],
    set={1, 'a'},
    frozen=frozenset([1]),
    dict={'a': {'b': [1]}},
    int_key={3: 'x'},
    tuple_key={(1, 2): 3},
    numpy_key={np.int64(3): 0.5},
    class_key={torch.nn.Conv2d: 3},
    path_key={Path('a'): 1},
    enum_key={Color.RED: 1},
    counter=collections.Counter('aab'),
    default=collections.defaultdict(int, a=1),
    ordered=collections.OrderedDict(a=1),
    deque=collections.deque([1, 2], 3),
    L=L(1, 'a'),
    point=Point(1, 2),
    color=Color.RED,
    text=Text.A,
    np_str=np.str_('x'),
    np_bool=np.bool_(True),
    np_float=np.float32(1.5),
    np_complex=np.complex128(1j),
    np_date=np.datetime64('2020-01-01'),
    np_delta=np.timedelta64(1, 's'),
    array=np.arange(6.0).reshape(2, 3),
    objects=np.array([{}, None, 'a'], dtype=object),
    scalar=torch.tensor(1.0),
    scalars=[torch.tensor(1.0), torch.tensor(2.0)],
    mixed=[torch.tensor(1.0), 2],
    tensor=torch.arange(4).reshape(2, 2),
    numbers=[np.float64(0.1)] * 3,
    date=datetime.date(2020, 1, 2),
    time=datetime.datetime(2020, 1, 2, 3, 4),
    delta=datetime.timedelta(1, 2),
    path=Path('a') / 'b',
    range=range(3),
    slice=slice(1, None),
    dtype=torch.float16,
    cls=torch.nn.Conv2d,
    kind_key={'_kind': 'set'},
    nan_free=float('inf'),
)

def same(a, b):
    if type(a) is not type(b): return False
    if isinstance(a, (np.ndarray,torch.Tensor)): return a.dtype==b.dtype and a.shape==b.shape and bool((a==b).all())
    if isinstance(a, (list,tuple,L)): return len(a)==len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(map(type, a)) == list(map(type, b)) and same(list(a.values()), list(b.values())) and a == b
    return a==b

@pytest.mark.parametrize('nm', kinds)
def test_ordinary_values_come_back_as_what_they_were(nm, tmp_path):
    torch.save(encode(kinds[nm]), tmp_path/'o.pth')
    assert same(decode(torch.load(tmp_path/'o.pth', weights_only=True)), kinds[nm])

def test_what_a_callback_has_of_the_model_at_hand_is_the_models_after_a_resume_too(tmp_path):
    """Teacher and student are averaged, and batch norms watched, by lists of the model's own tensors; were these kept
    as a memory, a fit that goes on would average and watch copies"""
    seen = []
    class Look(Callback):
        order,remembered = 1000,False
        def after_batch(self):
            if not self.training: return
            own = {id(o) for o in (*self.learn.model.parameters(), *self.learn.model.buffers())}
            lists = *self.learn.ressl.followed,self.learn.guard.statistics
            seen.append(all(len(o) and all(id(t) in own for t in o) for o in lists))
    crash(make(arch=partial(small_resnet, widen=0.125)), tmp_path/'run', every=1)
    fit(make(1, arch=partial(small_resnet, widen=0.125)), n=3, cbs=[Look(), Checkpoint(tmp_path/'run', 1)])
    assert len(seen)>=3 and all(seen)

def test_the_memory_of_a_callback_is_exact_and_what_cannot_be_kept_is_said(tmp_path, capsys):
    local,loop = collections.namedtuple('Local', 'x'),[]
    loop.append(loop)
    class Mine(Callback):
        run_valid = False
        def __init__(self, count=0, given='x'): self.count,self.given,self.rng = count,given,np.random.default_rng(3)

        def before_fit(self):
            self.all, self.loop, self.local, self.file, self.large, self.drawn = (
                {},
                loop,
                local(1),
                open(os.devnull),
                torch.zeros(2**23),
                [],
            )

        def after_batch(self):
            self.count += 1
            self.all.update({k:kinds[k] for k in list(kinds)[:4*self.count]})
            self.drawn.append(self.rng.random())
    whole = Mine()
    fit(make(), n=3, cbs=whole)
    crash(make(), tmp_path/'run', 7, every=1, cbs=[Mine()])
    said = [l for l in capsys.readouterr().out.splitlines() if 'does not keep' in l]
    assert len(said) == 1 and all(
        o in said[0]
        for o in ('Mine.loop (list)', 'Mine.local (Local)', 'Mine.file (TextIOWrapper)', 'Mine.large (large)')
    ), said
    got = Mine(given='y')
    fit(make(1), n=3, cbs=[got, Checkpoint(tmp_path/'run', 1)])
    assert (
        got.count == 12
        and got.given == 'y'
        and same(got.all, whole.all)
        and got.drawn == whole.drawn
        and len(got.all) == len([k for k in kinds][:48])
    )
    with pytest.raises(ValueError, match='no Enum'): decode({'_kind':'enum', 'v':('os','system','A')})
    with pytest.raises(ValueError, match='no tuple'): decode({'_kind':'fields', 'v':('os','system',(1,))})

def test_a_csv_has_one_header_after_a_kill_before_the_first_checkpoint(tmp_path):
    "The process is gone between the header and the first checkpoint; rows of an earlier fit, and its header, stay"
    class Killed(Callback):
        order = float('inf')
        def before_fit(self): raise SystemExit
    def rows(): return (tmp_path/'h.csv').read_text().splitlines()
    log = lambda: CSVLogger('h.csv', append=True)
    for n_before in (0,1):
        if n_before: fit(make(0, path=tmp_path), n=1, cbs=log())
        kept = rows() if n_before else []
        with pytest.raises(SystemExit):
            fit(make(0, path=tmp_path), n=2, cbs=[log(), Checkpoint(f'run{n_before}'), Killed()])
        shutil.rmtree(tmp_path/'models'/f'run{n_before}', ignore_errors=True)
        fit(make(0, path=tmp_path), n=2, cbs=[log(), Checkpoint(f'run{n_before}')])
        new = rows()[len(kept):]
        assert rows()[:len(kept)]==kept and [o.split(',')[0] for o in new]==['epoch','0','1']
