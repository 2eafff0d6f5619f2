"""What was finished is there, whatever the disk, another process or the system does: files are written and read in
one way."""

import errno, fcntl, os, pickle, random, signal, stat, subprocess, sys, warnings
from functools import partial
from multiprocessing import context
from pathlib import Path

import numpy as np, pytest, torch
from fastai.data import load
from fastai.vision.all import Callback, CSVLogger, ImageDataLoaders, PILImage, Resize, SaveModelCallback, Transform
from fastcore.script import CliError
from PIL import Image
from crashes import differences, everything, fit, make
from helpers import Crash

from ressl_fastai import cli, data
from ressl_fastai.checkpoint import Checkpoint
from ressl_fastai.checkpoint_file import checkpoints, last_checkpoint, read_checkpoint, write_checkpoint
from ressl_fastai.cli import ressl_pretrain
from ressl_fastai.data import cached_dls, find_images, tensor_dls
from ressl_fastai.files import check_writable, read_torch, replacing, write_text, write_torch, writing
from ressl_fastai.transfer import load_encoder
from ressl_fastai.models import create_encoder, small_resnet

def raising(e):
    "A system call that fails, or Ctrl-C in it"
    def f(*args, **kwargs): raise OSError(e, os.strerror(e)) if isinstance(e, int) else e()
    return f

def flipped(b, i, bit):
    b = bytearray(b)
    b[i] ^= 1<<bit
    return bytes(b)

# write

@pytest.mark.parametrize('error', [errno.ENOSPC, errno.EIO, KeyboardInterrupt])
@pytest.mark.parametrize('step', ['write', 'fsync', 'replace'])
def test_a_failed_write_changes_nothing(tmp_path, monkeypatch, step, error):
    file = write_text(tmp_path/'f.txt', 'old')
    if step=='fsync': monkeypatch.setattr(os, 'fsync', raising(error))
    if step=='replace': monkeypatch.setattr(Path, 'replace', raising(error))
    with pytest.raises(OSError if isinstance(error, int) else error) as e:
        with writing(file) as f:
            f.write(b'new')
            if step=='write': raising(error)()
    if isinstance(error, int):
        assert str(file) in str(e.value) and os.strerror(error) in str(e.value) and 'as it was' in str(e.value)
    assert file.read_text()=='old' and os.listdir(tmp_path)==['f.txt']

@pytest.mark.parametrize('nth', [1, 2, 5, 9])
def test_ctrl_c_in_the_middle_of_a_save_is_ctrl_c(tmp_path, monkeypatch, nth):
    "PyTorch's writer makes a RuntimeError of it"
    file,calls = write_torch(tmp_path/'f.pth', {'a':torch.zeros(9)}),iter(range(nth-1))
    class Interrupted:
        def __init__(self, f): self.f = f
        def __getattr__(self, nm): return getattr(self.f, nm)
        def write(self, b):
            if next(calls, None) is None: raise KeyboardInterrupt
            return self.f.write(b)
    save = torch.save
    monkeypatch.setattr(torch, 'save', lambda o, f: save(o, Interrupted(f)))
    with pytest.raises(KeyboardInterrupt): write_torch(file, {'a':torch.ones(99), 'b':torch.ones(99)})
    assert read_torch(file)['a'].sum()==0 and os.listdir(tmp_path)==['f.pth']

def test_an_error_that_is_not_of_the_disk_stays_what_it_is(tmp_path):
    "Such as that of an image that is decoded while the file is written"
    with pytest.raises(OSError, match='^image file is truncated$'):
        with replacing(tmp_path/'f'): raise OSError('image file is truncated')
    with pytest.raises(RuntimeError, match='^shapes differ$'):
        with writing(tmp_path/'f'): raise RuntimeError('shapes differ')
    assert os.listdir(tmp_path)==[]

class Disk:
    """What would be there after a power cut: the content that a file had when it was last brought to the disk,
    under a name that is on the disk too"""

    def __init__(self, monkeypatch):
        self.files,self.folders = {},{}
        fsync = os.fsync
        def record(fd):
            fsync(fd)
            o = os.fstat(fd)
            if stat.S_ISDIR(o.st_mode):
                self.folders[o.st_ino] = {nm: os.stat(nm, dir_fd=fd).st_ino for nm in os.listdir(fd)}
            else:
                assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY  # Windows would refuse
                self.files[o.st_ino] = Path(f'/proc/self/fd/{fd}').read_bytes()
        monkeypatch.setattr(os, 'fsync', record)

    def has(self, file):
        "Whether all of `file` is safe, and its name and those of its folders up to an old one"
        file = file.resolve()
        o,parents = file.stat(),[]
        for p in (file, *file.parents):
            if p.name=='old': break
            parents.append(self.folders.get(p.parent.stat().st_ino, {}).get(p.name)==p.stat().st_ino)
        return self.files.get(o.st_ino)==file.read_bytes() and all(parents)

needs_proc = pytest.mark.skipif(not Path('/proc/self/fd').exists(), reason='Linux alone tells what a descriptor holds')

@needs_proc
def test_what_was_written_outlives_a_power_cut(tmp_path, monkeypatch):
    (tmp_path/'old').mkdir()
    new = tmp_path/'old'/'new'/'folder'
    disk = Disk(monkeypatch)
    for f in (write_text(new/'a.txt', 'text'), write_torch(new/'b.pth', {'a':torch.ones(9)}), new/'c.pth'):
        if f.name=='c.pth': write_checkpoint(f, {'epoch':1})
        assert disk.has(f)
    (new/'d.txt').write_text('text')                            # control
    assert not disk.has(new/'d.txt')
    (new/'a.txt').write_text('another')
    assert not disk.has(new/'a.txt')

@needs_proc
def test_results_are_on_the_disk_before_the_checkpoint_goes(tmp_path, monkeypatch, capsys):
    old = tmp_path/'old'
    pictures(old/'data', 40)
    monkeypatch.chdir(old)
    disk,delete,seen = Disk(monkeypatch),cli._delete_checkpoint,{}
    def look(kept):
        seen.update({p.name:disk.has(p) for p in kept.parent.iterdir() if p.is_file()}, checkpoint=kept.is_dir())
        delete(kept)
    monkeypatch.setattr(cli, '_delete_checkpoint', look)
    ressl_pretrain('data', **small)
    names = ['checkpoint','config.json','curves.png','encoder.pth','history.csv','report.html','views.png']
    assert sorted(seen)==names and all(seen.values()), seen
    assert sorted(os.listdir('ressl-data'))==names[1:]

def test_a_checkpoint_that_cannot_be_deleted_is_not_an_error(tmp_path, monkeypatch):
    (tmp_path/'checkpoint').mkdir()
    monkeypatch.setattr(Path, 'rename', raising(errno.EBUSY))
    cli._delete_checkpoint(tmp_path/'checkpoint')

def test_what_killed_processes_left_is_deleted_and_nothing_else(tmp_path):
    code = f"""
import os, sys
from ressl_fastai.files import replacing
with replacing('{tmp_path}/f.txt') as f:
    f.write(b'half'); f.flush()
    print('writing', flush=True); sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline()=='writing\n'
        (tmp_path/'film.mp4.part').touch()                      # of a browser
        write_text(tmp_path/'g.txt', 'g')
        assert len(list(tmp_path.glob('f.txt.*.part')))==1      # that process is at it
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        write_text(tmp_path/'g.txt', 'g')
        assert sorted(os.listdir(tmp_path))==['film.mp4.part','g.txt']
    finally:
        other.kill()
        other.wait()


def test_two_that_write_one_file_do_not_mix(tmp_path):
    with writing(tmp_path/'f') as a, writing(tmp_path/'f') as b:
        a.write(b'a'*9000)
        b.write(b'b'*10)
    assert (tmp_path/'f').read_bytes()==b'a'*9000 and os.listdir(tmp_path)==['f']

@pytest.mark.parametrize(
    'e,fails', [(errno.EINVAL, False), (errno.EOPNOTSUPP, False), (errno.EACCES, False), (errno.EIO, True)]
)
def test_a_folder_that_cannot_be_brought_to_the_disk(tmp_path, monkeypatch, e, fails):
    fsync = os.fsync
    monkeypatch.setattr(os, 'fsync', lambda fd: raising(e)() if stat.S_ISDIR(os.fstat(fd).st_mode) else fsync(fd))
    if fails:
        with pytest.raises(OSError, match='Input/output'): write_text(tmp_path/'f', 'text')
    else: write_text(tmp_path/'f', 'text')
    assert (tmp_path/'f').read_text()=='text'

# read

def test_any_wrong_bit_is_found(tmp_path):
    file = write_torch(tmp_path/'a.pth', dict(w=torch.arange(200.), b=[1,'x',None]))
    assert torch.load(file, weights_only=True)['b']==[1,'x',None]          # as others read it
    good,rng = file.read_bytes(),random.Random(0)
    places = [
        *range(0, len(good), 37),
        *range(len(good) - 120, len(good)),
    ]  # the last ones: tables of the zip file and the checksum
    for i in places:
        file.write_bytes(flipped(good, i, rng.randrange(8)))
        with pytest.raises(Exception): read_torch(file)
    for b in (
        b'',
        good[:-1],
        good[:-32],
        good[:-60],
        good[:500],
        good + b'x',
        good[:300] + good[301:],
        good.replace(b'SHA-256', b'sha-256'),
    ):
        file.write_bytes(b)
        with pytest.raises(Exception): read_torch(file)
    file.write_bytes(good)
    assert torch.equal(read_torch(file)['w'], torch.arange(200.))

def test_files_of_torch_save_are_read_and_their_parts_checked(tmp_path):
    w,file = torch.arange(200.),tmp_path/'a.pth'
    torch.save(dict(w=w), file)
    good = file.read_bytes()
    assert torch.equal(read_torch(file)['w'], w)
    for i in range(0, w.nbytes, 50):
        file.write_bytes(flipped(good, good.find(w.numpy().tobytes())+i, 3))
        with pytest.raises(Exception, match='Bad CRC-32'): read_torch(file)
        torch.load(file, weights_only=True)                                # control: PyTorch says nothing
    torch.save(dict(w=w), file, _use_new_zipfile_serialization=False)
    assert torch.equal(read_torch(file)['w'], w)
    torch.serialization.set_crc32_options(False)
    try: torch.save(dict(w=w), file)
    finally: torch.serialization.set_crc32_options(True)
    assert torch.equal(read_torch(file)['w'], w)

tiny = partial(small_resnet, widen=0.25)

@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
    torch.set_num_threads(1)
    return make(arch=tiny, path=tmp_path_factory.mktemp('encoder')).save_encoder('enc')

def test_damaged_encoder_files_are_not_loaded(encoder, tmp_path):
    enc = create_encoder(tiny, 1, size=8)
    before,good,rng,bad = [p.clone() for p in enc.parameters()],encoder.read_bytes(),random.Random(0),tmp_path/'bad.pth'
    damages = [flipped(good, rng.randrange(len(good)), rng.randrange(8)) for _ in range(60)]
    damages += [good[:i*512]+bytes(512)+good[i*512+512:] for i in rng.sample(range(len(good)//512), 20)]
    damages += [good[:rng.randrange(len(good))] for _ in range(20)]
    for b in damages:
        bad.write_bytes(b)
        with pytest.raises(ValueError, match='bad.pth'): load_encoder(enc, bad)
    assert all(torch.equal(a, b) for a,b in zip(before, enc.parameters()))
    load_encoder(enc, encoder)
    assert not all(torch.equal(a, b) for a,b in zip(before, enc.parameters()))

def changed(state, v): return {**state, 'body':{**state['body'], '0.0.weight':v(state['body']['0.0.weight'])}}

@pytest.mark.parametrize(
    'v,text',
    [
        (lambda w: w * float('nan'), 'not finite'),
        (lambda w: w.index_fill(0, torch.tensor([0]), float('inf')), 'not finite'),
        (lambda w: w.to(torch.int8), 'int8'),
        (lambda w: w.to(torch.complex64), 'complex64'),
        (lambda w: w.to_sparse(), 'sparse'),
        (lambda w: w.tolist(), 'tensors differ'),
        (lambda w: w.double(), None),
        (lambda w: w.half(), None),
        (lambda w: w, None),
    ],
    ids='nan inf int8 complex sparse list double half same'.split(),
)
def test_weights_of_another_kind_are_refused_by_name(encoder, tmp_path, v, text):
    state = torch.load(encoder, weights_only=True)
    torch.save(changed(state, v), tmp_path / 'a.pth')  # as by somebody else, and as earlier versions did
    enc = create_encoder(tiny, 1, size=8)
    if text:
        with pytest.raises(ValueError, match=rf'a.pth.*0.0.weight.*{text}|a.pth.*{text}.*0.0.weight'):
            load_encoder(enc, tmp_path / 'a.pth')
    else:
        load_encoder(enc, tmp_path/'a.pth')
        torch.testing.assert_close(enc[0].state_dict()['0.0.weight'], state['body']['0.0.weight'], atol=1e-3, rtol=1e-3)

@pytest.mark.parametrize('key', ['arch','n_in','stem','normalize','body'])
def test_encoder_files_that_are_not_whole_are_refused_by_name(encoder, tmp_path, key):
    state = torch.load(encoder, weights_only=True)
    for o in ({k:v for k,v in state.items() if k!=key}, {**state, key:[1]}, {**state, key:b'x'}):
        torch.save(o, tmp_path/'a.pth')
        with pytest.raises(ValueError, match=rf'a.pth.*{key} is '):
            load_encoder(create_encoder(tiny, 1, size=8), tmp_path / 'a.pth')


# checkpoints

def test_files_of_other_callbacks_in_the_folder_are_left_alone(tmp_path):
    "`SaveModelCallback(every_epoch=True, fname='run/epoch')` beside `Checkpoint('run')`, as users name it"
    def cbs(): return [Checkpoint('run'), SaveModelCallback(every_epoch=True, fname='run/epoch')]
    learn = make(path=tmp_path, model_dir='.')
    with pytest.raises(KeyboardInterrupt): fit(learn, n=4, cbs=[*cbs(), Crash(9)])
    again = fit(make(1, path=tmp_path, model_dir='.'), n=4, cbs=cbs())
    (tmp_path/'whole').mkdir()
    again = everything(again)  # now, since it draws random numbers
    assert differences(everything(fit(make(path=tmp_path/'whole'), n=4)), again)==[]
    names = sorted(os.listdir(tmp_path/'run'))
    assert [o for o in names if '_batch_' not in o]==['epoch_0.pth','epoch_1.pth','epoch_2.pth','epoch_3.pth','lock']
    assert [o for o in names if '_batch_' in o]==['epoch_0003_batch_000000.pth','epoch_0004_batch_000000.pth']

def test_after_epoch_9999_comes_10000(tmp_path):
    for i in (9999, 10000, 2): write_checkpoint(tmp_path/f'epoch_{i:04}_batch_000000.pth', dict(epoch=i))
    write_checkpoint(tmp_path/'epoch_9999_batch_1000000.pth', dict(epoch=9999.5))
    assert [read_checkpoint(o)['epoch'] for o in checkpoints(tmp_path)]==[10000, 9999.5, 9999, 2]
    assert last_checkpoint(tmp_path)[1]['epoch']==10000

def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_a_training(tmp_path, monkeypatch):
    whole = everything(fit(make(), n=2))
    with monkeypatch.context() as m:
        m.setattr(Path, 'unlink', raising(errno.EBUSY))
        assert differences(whole, everything(fit(make(), n=2, cbs=Checkpoint(tmp_path/'run'))))==[]
    assert len(checkpoints(tmp_path/'run'))==3

# folders

@pytest.mark.parametrize('e', [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks_is_trained_on_with_a_warning(tmp_path, monkeypatch, e):
    monkeypatch.setattr(fcntl, 'lockf', raising(e))
    with pytest.warns(UserWarning, match=rf'run cannot be reserved.*{os.strerror(e)}'):
        fit(make(), n=1, cbs=Checkpoint(tmp_path / 'run'))
    assert checkpoints(tmp_path/'run')

@pytest.mark.parametrize('e', [errno.EACCES, errno.EAGAIN])
def test_contention_alone_means_in_use(tmp_path, monkeypatch, e):
    monkeypatch.setattr(fcntl, 'lockf', raising(e))
    with pytest.raises(ValueError, match='run is in use'): fit(make(), n=1, cbs=Checkpoint(tmp_path/'run'))

@pytest.mark.skipif(not Path('/proc/self').exists(), reason='a folder that nobody can write into, root neither')
def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch):
    steps = []
    class Count(Callback):
        def before_batch(self): steps.append(1)

    for kw, cb in (
        (dict(path='/proc/ressl'), SaveModelCallback()),
        (dict(path=tmp_path), SaveModelCallback(fname='/proc/ressl/best')),
        (dict(path=tmp_path), Checkpoint('/proc/ressl/run')),
        (dict(path='/proc/ressl'), [Checkpoint(tmp_path / 'run'), CSVLogger()]),
    ):
        learn = make()
        learn.path = Path(kw['path'])
        with pytest.raises(OSError, match='/proc/ressl'):
            fit(learn, n=1, cbs=[*(cb if isinstance(cb, list) else [cb]), Count()])
    assert steps==[]
    fit(make(path=tmp_path), n=1, cbs=[SaveModelCallback(fname='new/best'), Count()])
    assert steps
    monkeypatch.setattr(cli, '_set_up', lambda *args, **kwargs: pytest.fail('images are looked at'))
    with pytest.raises(CliError, match='cannot write /proc/ressl'): ressl_pretrain('digits', out='/proc/ressl')
    check_writable(tmp_path/'a'/'b')
    assert not (tmp_path/'a').exists()

# results among the images

small = dict(arch='small_resnet', size=8, epochs=1, bs=16, gray=True, num_workers=0)

def pictures(path, n):
    rng = np.random.default_rng(0)
    path.mkdir(parents=True, exist_ok=True)
    for i in range(n): Image.fromarray(rng.integers(0, 256, (8,8), dtype=np.uint8)).save(path/f'{i:03}.png')
    return path

def test_results_among_the_images_are_no_images(tmp_path):
    pictures(tmp_path, 6)
    for nm, config in {
        'run': '{"command": "ressl_pretrain . --size=8"}',
        'a/b/old': '{"command": "ressl_evaluate run ."}',
    }.items():
        pictures(tmp_path / nm, 2)
        pictures(tmp_path / nm / 'inside', 1)
        (tmp_path/nm/'config.json').write_text(config)
    assert find_images(tmp_path).map(lambda o: o.parent)==[tmp_path]*6
    for i,config in enumerate(('{"name": "my data"}', 'half {', '[1]', '{"command": 3}')):  # of the user's data
        pictures(tmp_path/f'own{i}', 1)
        (tmp_path/f'own{i}'/'config.json').write_text(config)
    assert len(find_images(tmp_path))==10
    assert len(find_images(tmp_path/'run'))==2+1                                            # asked for by name

def test_a_run_among_the_images_is_continued(tmp_path, monkeypatch, capsys):
    pictures(tmp_path/'data', 40)
    monkeypatch.chdir(tmp_path/'data')
    class Kill(Checkpoint):
        def after_batch(self):
            if self.train_iter==2: raise KeyboardInterrupt
            super().after_batch()
    with monkeypatch.context() as m:
        m.setattr(cli, 'Checkpoint', Kill)
        with pytest.raises(KeyboardInterrupt): ressl_pretrain('.', out='results', **small)
    assert (tmp_path/'data'/'results'/'views.png').exists()
    capsys.readouterr()
    for out in ('results', 'results-2'):  # continued, then another run beside it
        ressl_pretrain('.', out='results', **small, no_report=True)
        text = capsys.readouterr().out
        assert '36 images for training, 4 held out' in text and ('continuing from' in text)==(out=='results')
        assert (tmp_path/'data'/out/'encoder.pth').exists()

# the cache

def folder_dls(path, **kwargs):
    return ImageDataLoaders.from_folder(
        path, valid_pct=0.25, seed=0, num_workers=0, **{'item_tfms': Resize(8), 'bs': 4, **kwargs}
    )


def images_of(dls): return torch.cat([o.images[o.rows] for o in dls]).as_subclass(torch.Tensor)

def decoded(dls): return images_of(cached_dls(dls))

@pytest.fixture
def wide(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(24):
        f = tmp_path/'images'/'ab'[i%2]/f'{i:02}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12,20,3), dtype=np.uint8)).save(f)
    return tmp_path

def test_a_damaged_cache_is_made_anew(wide):
    want,file = decoded(folder_dls(wide/'images')),wide/'cache'/'images.npy'
    def got(): return images_of(cached_dls(folder_dls(wide/'images'), wide/'cache'))
    got()
    good,rng = file.read_bytes(),random.Random(0)
    bits = [
        flipped(good, i, rng.randrange(8))
        for i in [*range(0, 64, 5), *(rng.randrange(128, len(good)) for _ in range(20))]
    ]
    for b in [b'', good[:100], good[:-9], b'PK\3\4'+good[4:], good[:512]+bytes(512)+good[1024:], *bits]:
        file.unlink()  # what is in use elsewhere is not written to
        file.write_bytes(b)
        with warnings.catch_warnings(record=True) as w:
            warnings.simplefilter('always')
            assert torch.equal(got(), want)
        assert (
            {'damaged' in str(o.message) for o in w} == {True} or file.read_bytes() != good and not w
        )  # a bit of the header that means nothing
    file.unlink()
    with pytest.warns(UserWarning, match='damaged'): assert torch.equal(got(), want)
    (wide/'cache'/'manifest.json').write_text('{"images": ')
    assert torch.equal(got(), want) and sorted(os.listdir(wide/'cache'))==['images.npy','manifest.json']

class Brighter(Transform):
    "A transform of a user, with a parameter"
    order = 0
    def __init__(self, by):
        super().__init__()
        self.by = by
    def encodes(self, im:PILImage): return im.point(lambda v: min(255, v+self.by))

def test_a_parameter_of_a_transform_of_ones_own_counts(wide):
    last = None
    for by in (0, 40, 40, 0):
        dls = partial(folder_dls, wide/'images', item_tfms=[Brighter(by), Resize(8)])
        before = (wide/'cache'/'images.npy').stat().st_mtime_ns if (wide/'cache').exists() else 0
        assert torch.equal(images_of(cached_dls(dls(), wide/'cache')), decoded(dls()))
        after = (wide/'cache'/'images.npy').stat().st_mtime_ns
        assert (before==after)==(before>0 and last==by)
        last = by

@pytest.mark.parametrize('at', [0, 1])
def test_two_processes_with_one_cache_folder_each_have_their_images(wide, monkeypatch, at):
    "The other one comes before the images of the first have their name, or between images and manifest"
    def one(how): return folder_dls(wide/'images', item_tfms=Resize(8, method=how))
    want = {how:decoded(one(how)) for how in ('crop','squish')}
    assert not torch.equal(*want.values())
    replace,calls,other = Path.replace,iter(range(at)),[]
    def interrupted(self, o):
        if next(calls, None) is None and not other:
            other.append(None)
            other[0] = images_of(cached_dls(one('squish'), wide/'cache'))
        return replace(self, o)
    with monkeypatch.context() as m:
        m.setattr(Path, 'replace', interrupted)
        first = images_of(cached_dls(one('crop'), wide/'cache'))
    assert torch.equal(first, want['crop']) and torch.equal(other[0], want['squish'])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for how in ('crop', 'squish', 'crop'):
            assert torch.equal(images_of(cached_dls(one(how), wide / 'cache')), want[how])


def test_a_full_disk_is_an_error_of_the_cache_and_leaves_the_old_one(wide):
    import resource
    cached_dls(folder_dls(wide/'images'), wide/'cache')
    before = {f.name:f.read_bytes() for f in (wide/'cache').iterdir()}
    soft,hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(OSError, match='cannot write .*images.npy: File too large'):
            cached_dls(folder_dls(wide / 'images', item_tfms=Resize(40)), wide / 'cache')
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {f.name:f.read_bytes() for f in (wide/'cache').iterdir()}==before

def test_a_cache_that_cannot_be_written_is_still_read(wide, monkeypatch):
    cached_dls(folder_dls(wide/'images'), wide/'cache')
    monkeypatch.setattr("builtins.open", _no_writing(open))
    monkeypatch.setattr(Path, "open", _no_writing(Path.open))
    assert torch.equal(
        images_of(cached_dls(folder_dls(wide / 'images'), wide / 'cache')), decoded(folder_dls(wide / 'images'))
    )


def _no_writing(f):
    def g(*args, **kwargs):
        mode = args[1] if len(args)>1 else kwargs.get('mode', 'r')
        if set(mode)&set('wax+'): raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return f(*args, **kwargs)
    return g

def test_images_of_two_sizes_are_refused_in_memory_and_in_a_folder(wide):
    Image.fromarray(np.zeros((9,9,3), np.uint8)).save(wide/'images'/'a'/'00.png')
    for where in (None, wide/'cache'):
        with pytest.raises(ValueError, match='one size'):
            cached_dls(folder_dls(wide / 'images', item_tfms=None, bs=1), where)
    assert not (wide/'cache'/'images.npy').exists()

# workers that are spawned

def test_images_in_memory_need_no_workers_where_processes_are_spawned(monkeypatch):
    x = np.random.default_rng(0).integers(0, 256, (40,8,8,3), dtype=np.uint8)
    dls = tensor_dls(x, np.arange(40)%2, bs=8, num_workers=2, seed=0)
    def batches():
        dls.train.rng = random.Random(0)
        return [b for dl in dls for b in dl]
    forked = batches()
    monkeypatch.setattr(load, "_loaders", (lambda *args: pytest.fail("a worker is started"), load._loaders[1]))
    monkeypatch.setattr(data, "_start_method", lambda: "spawn")
    spawned = batches()
    assert len(forked)==len(spawned)
    for a,b in zip(forked, spawned): assert all(torch.equal(p, q) for p,q in zip(a, b))
    assert dls.train.fake_l.num_workers==2

def test_rows_go_to_a_worker_and_not_into_a_file():
    x = np.random.default_rng(0).integers(0, 256, (400,8,8,3), dtype=np.uint8)
    ds = tensor_dls(x, np.arange(400)%2, seed=0).valid_ds
    assert len(pickle.dumps(ds))<10_000
    context.set_spawning_popen(object())
    try: there = pickle.loads(pickle.dumps(ds))
    finally: context.set_spawning_popen(None)
    assert np.array_equal(np.asarray(there[3][0]), np.asarray(ds[3][0])) and there[3][1]==ds[3][1]
