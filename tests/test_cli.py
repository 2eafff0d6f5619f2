"`ressl_pretrain` as a shell user meets it: one clear line for each mistake, whole results, runs that can be repeated."
import json, os, re, shlex, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch
from fastcore.script import CliError
from helpers import held, layout, write_digits
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.neighbors import KNeighborsClassifier

from ressl_fastai.checkpoint import Checkpoint
from ressl_fastai.cli import new_folder, ressl_pretrain
from ressl_fastai.data import find_data, folder_dls
from ressl_fastai.transfer import load_encoder
from ressl_fastai.models import create_encoder, small_resnet
from ressl_fastai.loaders import clean_dl

def shell(*args, cwd=None):
    "The installed command in its own process"
    return subprocess.run(
        [Path(sys.executable).with_name('ressl_pretrain'), *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )

def all_files(path): return {str(p.relative_to(path)):p.read_bytes() for p in path.rglob('*') if p.is_file()}

def photo_folder(path, n=60):
    "`n` pieces of scikit-learn's two photographs as JPEG files, in a folder for each photograph"
    rng = np.random.default_rng(0)
    for nm,im in zip(('china','flower'), load_sample_images().images):
        (path/nm).mkdir(parents=True)
        for i in range(n//2):
            size = rng.integers(40, 120, 2)
            top,left = (rng.integers(0, s-k) for s,k in zip(im.shape, size))
            Image.fromarray(im[top:top+size[0], left:left+size[1]]).save(path/nm/f'{i}.jpg')
    return path

small = ('--arch=small_resnet', '--size=16', '--epochs=2', '--bs=16', '--gray', '--num-workers=0')

# mistakes

@pytest.fixture(scope='module')
def bad(tmp_path_factory):
    "Folders that cannot be trained on"
    tmp = tmp_path_factory.mktemp('bad')
    (tmp / 'empty').mkdir()
    (tmp / 'file.txt').write_text('text')
    write_digits(tmp/'few', 5, flat=True)
    image = next(write_digits(tmp/'truncated', 30).rglob('*.png'))
    image.write_bytes(image.read_bytes()[:-30])
    return tmp

mistakes = {
    'missing': (dict(data='nowhere'), 'there is no such folder'),
    'file': (dict(data='file.txt'), 'file.txt is a file'),
    'no_images': (dict(data='empty'), 'no images in empty'),
    'truncated': (dict(data='truncated'), '1 of 30 images cannot be read: truncated/'),
    'none_held_out': (dict(data='few', bs=2), 'valid_pct=0.1 of 5 images'),
    'arch': (dict(arch='resnet81'), "'resnet81'; did you mean resnet18"),
    'size': (dict(size=0), 'size must be greater than 0, got 0'),
    'epochs': (dict(epochs=-1), 'epochs must be greater than 0, got -1'),
    'bs': (dict(bs=1438), 'bs=1438 is larger than the training set of 1437 images'),
    'queue': (dict(queue_size=2000), 'queue_size must be at most the number of training images, 1437, got 2000'),
    'scale': (dict(min_scale=0), 'scale must be'),
    'momentum': (dict(teacher_momentum=2), 'teacher_momentum must be between 0 and 1, got 2'),
    'pretrained': (dict(pretrained=True), 'small_resnet has no pretrained weights')}

@pytest.mark.parametrize('nm', mistakes)
def test_a_mistake_is_one_line_before_training_and_nothing_is_lost(bad, nm, monkeypatch, capsys):
    args,text = mistakes[nm]
    monkeypatch.chdir(bad)
    out = Path('out')/nm
    out.mkdir(parents=True)
    (out / 'encoder.pth').write_text('precious')
    with pytest.raises(CliError) as e: ressl_pretrain(**{'data':'digits', 'out':str(out), **args})
    assert text in str(e.value) and '\n' not in str(e.value)
    assert all_files(out)=={'encoder.pth': b'precious'} and list(Path('out').glob(f'{nm}-*'))==[]
    assert capsys.readouterr()==('','')

@pytest.mark.parametrize('nm', ['missing','truncated','size'])
def test_in_the_shell_a_mistake_is_that_line_and_an_exit_status(bad, nm):
    args,text = mistakes[nm]
    res = shell(args.get('data', 'digits'), *(f'--{k}={v}' for k,v in args.items() if k!='data'), cwd=bad)
    assert res.returncode==1 and res.stdout==''
    assert len(res.stderr.strip().splitlines())==1 and text in res.stderr, res.stderr

def test_an_unknown_option_is_refused():
    res = shell('digits', '--epoch-count=3')
    assert res.returncode==2 and '--epoch-count' in res.stderr and 'Traceback' not in res.stderr

# runs

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Class folders of digits, the same repeated from its config, flat digits, photographs with a bad file among them"
    tmp = tmp_path_factory.mktemp('runs')
    classes,flat,photos = write_digits(tmp/'classes'),write_digits(tmp/'flat', flat=True),photo_folder(tmp/'photos')
    (photos/'china'/'bad.jpg').write_bytes((photos/'china'/'0.jpg').read_bytes()[:200])
    out = tmp / 'out'
    out.mkdir()
    (out / 'notes.txt').write_text('mine')

    def go(args): return shell(*args, cwd=tmp)
    with ThreadPoolExecutor(2) as pool:
        a, b, c = pool.map(
            go,
            [
                (classes, '--out', out, *small),
                (flat, *small),
                (
                    photos,
                    '--arch=xresnet18',
                    '--size=32',
                    '--epochs=1',
                    '--bs=16',
                    '--skip-bad',
                    '--predictor-layers=2',
                    '--infonce-epochs=1',
                ),
            ],
        )
    again = go([*shlex.split(json.loads((tmp/'out-2'/'config.json').read_text())['command'])[1:], '--out', tmp/'again'])
    return SimpleNamespace(tmp=tmp, classes=a, flat=b, photos=c, again=again)

def test_class_folders_give_a_whole_result(runs):
    assert runs.classes.returncode==0, runs.classes.stderr
    assert all_files(runs.tmp/'out')=={'notes.txt': b'mine'}          # what was there is left alone,
    out = runs.tmp/'out-2'                                              # the results lie beside it
    assert sorted(all_files(out))==['config.json','curves.png','encoder.pth','history.csv','report.html','views.png']
    history = pd.read_csv(out/'history.csv')
    assert (
        list(history.columns[:4]) == ['epoch', 'train_loss', 'valid_loss', 'knn_accuracy']
        and len(history) == 2
        and history.notna().all(axis=None)
    )
    for nm in ('views','curves'):
        im = np.asarray(Image.open(out/f'{nm}.png').convert('L'))
        assert im.std()>10  # not an empty picture
    assert "72 images for training, 8 held out" in runs.classes.stdout

def test_printed_knn_accuracy_is_that_of_the_saved_encoder(runs):
    out = runs.tmp/'out-2'
    dls = folder_dls(runs.tmp/'classes', 16, 16, gray=True, num_workers=0)
    encoder = load_encoder(create_encoder(small_resnet, 1, size=16), out/'encoder.pth').eval()
    mean,std = (torch.tensor(o)[:,None,None] for o in torch.load(out/'encoder.pth')['normalize'])
    def features(dl):
        b = [(torch.as_tensor(x), y) for x,y in clean_dl(dl)]
        with torch.no_grad():
            return torch.cat([encoder((x.cpu() - mean) / std) for x, _ in b]).numpy(), torch.cat(
                [y.cpu() for _, y in b]
            ).numpy()

    def score(encode):
        return (
            KNeighborsClassifier(20, metric='cosine', weights=lambda d: np.exp(-d / 0.1))
            .fit(*encode(dls.train))
            .score(*encode(dls.valid))
        )

    theirs = json.loads((out/'config.json').read_text())['knn_accuracy']
    assert score(features)==pytest.approx(theirs['pretrained encoder'], abs=1e-6)
    for k,v in theirs.items(): assert re.search(fr'{k} +{v:.4f}', runs.classes.stdout)
    assert theirs.keys()=={'raw pixels','random encoder','pretrained encoder'}

def test_a_run_is_repeated_by_the_command_in_its_config(runs):
    assert runs.again.returncode==0, runs.again.stderr
    def losses(nm): return pd.read_csv(runs.tmp/nm/'history.csv').drop(columns='time')
    pd.testing.assert_frame_equal(losses('again'), losses('out-2'), check_exact=True)
    assert not losses('ressl-flat').train_loss.equals(losses('out-2').train_loss)  # control: another run differs

def test_an_interrupted_run_is_continued_by_the_same_command(tmp_path, monkeypatch, capsys):
    write_digits(tmp_path/'data', 60)
    monkeypatch.chdir(tmp_path)

    def go(out, epochs=3):
        ressl_pretrain('data', out=out, arch='small_resnet', size=8, epochs=epochs, bs=16, gray=True, num_workers=0)

    class Crash(Checkpoint):
        def after_batch(self):
            if self.train_iter==5: raise KeyboardInterrupt
    go('whole')
    table = [l.split()[:4] for l in capsys.readouterr().out.splitlines() if re.match(' +(epoch|[0-9])', l)]
    with monkeypatch.context() as m:
        m.setattr('ressl_fastai.cli.Checkpoint', Crash)
        with pytest.raises(KeyboardInterrupt): go('out')
    assert 'encoder.pth' not in all_files(Path('out')) and any('epoch_0001' in f for f in all_files(Path('out')))
    go('out', epochs=2)                                          # another command leaves it alone
    assert Path('out-2/encoder.pth').exists() and not Path('out/encoder.pth').exists()
    capsys.readouterr()
    go('out')
    again = [l.split()[:4] for l in capsys.readouterr().out.splitlines() if re.match(' +(epoch|[0-9])', l)]
    assert (
        again == table
        and len(table) == 4
        and sorted(all_files(Path('out'))) == sorted(all_files(Path('whole')))
        and not Path('out-3').exists()
    )
    a,b = (pd.read_csv(f'{nm}/history.csv').drop(columns='time') for nm in ('whole','out'))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    a,b = (torch.load(f'{nm}/encoder.pth', weights_only=True)['body'] for nm in ('whole','out'))
    assert all(torch.equal(a[k], b[k]) for k in a)
    def kept(nm): return {k:v for k,v in json.loads(Path(nm, 'config.json').read_text()).items() if k!='versions'}
    assert kept('whole')==kept('out')
    go('out')                                                    # and a finished run too
    assert Path('out-3/encoder.pth').exists()

def test_a_flat_folder_needs_no_labels(runs):
    assert runs.flat.returncode==0, runs.flat.stderr
    out = runs.tmp/'ressl-flat'   # the name it gets by itself
    assert list(pd.read_csv(out/'history.csv').columns[:3])==['epoch','train_loss','valid_loss']
    assert 'knn' not in runs.flat.stdout.lower() and (out/'encoder.pth').exists()

def test_photographs_of_mixed_sizes_and_a_bad_file(runs):
    assert runs.photos.returncode==0, runs.photos.stderr
    assert '1 of 61 images cannot be read' in runs.photos.stderr and 'bad.jpg; they are left out' in runs.photos.stderr
    state = torch.load(runs.tmp/'ressl-photos'/'encoder.pth')
    assert (state['arch'], state['n_in'], state['stem'])==('xresnet18', 3, 'small')

def test_help_describes_every_option():
    text = shell('--help').stdout
    options = re.findall(r'^  (--[\w-]+|data)', text, flags=re.M)
    assert len(options)>=20 and 'None' not in text
    for o in options: assert re.search(fr'{o}\b[^\n]*\s+\w', text)

# parts

@pytest.mark.parametrize('names,expected', [
    (['a/1.png','a/2.png','b/1.png','b/2.png'], (2, 2, ['a','b'])),
    (['train/a/1.png','train/b/1.png','valid/a/1.png','valid/b/2.png','valid/c/3.png'], (2, 3, ['a','b','c'])),
    (['training/a/1.png','training/b/1.png','testing/b/1.png'], (2, 1, ['a','b'])),
    (['train/1.png','train/2.png','val/1.png','other/1.png'], (2, 1, None)),
    (['1.png','2.png','3.png','a/4.png'], (2, 2, None)),
    (['a/1.png','a/2.png','a/3.png','a/4.png'], (2, 2, None))],
    ids=['classes','train-valid','training-testing','unlabelled-val','mixed','one-class'])
def test_folder_layouts(tmp_path, names, expected):
    dls = folder_dls(layout(tmp_path, *names), 8, 1, valid_pct=0.5, num_workers=0)
    assert (dls.train.n, dls.valid.n, list(dls.vocab) if len(dls.one_batch())==2 else None)==expected
    for x,*_ in dls.valid: assert x.shape==(1,3,8,8)   # every label is known, also one that only validation has

def test_a_urls_name_is_looked_up(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr('ressl_fastai.data.untar_data', lambda url: asked.append(url) or tmp_path)
    assert find_data('cifar')==tmp_path and asked[0].endswith('cifar10.tgz')
    for nm in ('path', 'S3', 'nowhere'):
        with pytest.raises(ValueError, match='no such folder'): find_data(nm)

def test_new_folder_never_reuses_one_that_holds_something(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'x').touch()
    (tmp_path / 'a-2').touch()
    (tmp_path / 'a-3').mkdir()
    assert [new_folder(tmp_path/nm).name for nm in ('a','b')]==['a-3','b']

def test_new_folder_is_that_of_an_interrupted_run_unless_another_process_is_at_it(tmp_path):
    (tmp_path/'a'/'checkpoint').mkdir(parents=True)
    for text,name in (('{"epochs":', 'a-2'), ('{"epochs":2}', 'a-2'), ('{"epochs":3,"versions":"older"}', 'a')):
        (tmp_path/'a'/'config.json').write_text(text)
        assert new_folder(tmp_path/'a', dict(epochs=3, versions='newer')).name==name
    assert new_folder(tmp_path/'a').name=='a-2'
    with held(tmp_path/'a'/'checkpoint'): assert new_folder(tmp_path/'a', dict(epochs=3)).name=='a-2'
    assert new_folder(tmp_path/'a', dict(epochs=3)).name=='a'
