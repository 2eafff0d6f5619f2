"""Odd command lines, Ctrl-C, the same command twice, odd names in the C locale: a sentence each, and nothing left
half done."""

import os, shlex, signal, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch
from fastcore.script import CliError, anno_parser
from PIL import Image
from sklearn.datasets import load_digits
from helpers import held, trained_on, write_digits

from ressl_fastai import cli
from ressl_fastai.cli import Interrupted, _claim, ressl_evaluate, ressl_pretrain
from ressl_fastai.checkpoint import Checkpoint

def arguments(func, line):
    return {
        k: v
        for k, v in vars(anno_parser(func.__wrapped__).parse_args(shlex.split(line))).items()
        if k not in ('pdb', 'xtra')
    }


def command(func, line):
    "As the console script calls `func`, in this process; exit status and message if it fails"
    try: return func(**arguments(func, line))
    except CliError as e: return 1,str(e)
    except SystemExit as e: return e.code,''

def everything(path): return sorted(str(p.relative_to(path)) for p in path.rglob('*'))

def is_refused(func, line, code, text):
    "In one sentence with `text`, and nothing is written; the sentence"
    before = everything(Path('.'))
    got,said = command(func, line+' --num-workers=0')
    assert (got,'\n' in said,everything(Path('.')))==(code,False,before) and text in said, said
    return said

@pytest.fixture(scope='module')
def there(tmp_path_factory):
    "Images with and without classes, folders without, encoder files that are none"
    tmp = tmp_path_factory.mktemp('odd')
    write_digits(tmp / 'ims', 60)
    write_digits(tmp / 'flat', 30, flat=True)
    (tmp / 'empty').mkdir()
    (tmp / 'file.txt').write_text('x')
    learn = trained_on(tmp/'ims')
    state = torch.load(learn.save_encoder(tmp/'good.pth'), weights_only=True)
    for i, text in enumerate(
        ('', '[]', '{}', '{"size":"8"}', '{"size":8.5}', '{"size":-1}', '{"size":null}', '{"size":NaN}')
    ):
        (tmp / f'run{i}').mkdir()
        (tmp / f'run{i}' / 'encoder.pth').write_bytes((tmp / 'good.pth').read_bytes())
        (tmp / f'run{i}' / 'config.json').write_text(text)
    (tmp/'run0'/'config.json').write_bytes(b'\xff\xfe')
    state.pop('sealed', None)
    for nm, o in dict(
        a_model=learn.model.state_dict(),
        a_tensor=torch.zeros(3),
        no_arch={k: v for k, v in state.items() if k != 'arch'},
        arch_none={**state, 'arch': None},
        no_body={k: v for k, v in state.items() if k != 'body'},
        other={**state, 'arch': 'resnet18'},
    ).items(): torch.save(o, tmp/f'{nm}.pth')
    (tmp / 'text.pth').write_text('hello')
    (tmp / 'image.pth').write_bytes(next((tmp / 'ims').rglob('*.png')).read_bytes())
    return tmp

numbers = {
    'size': '0 -1 x nan 1e3 99999999999999999999',
    'epochs': "0 -1 0.5 '' 99999999999",
    'bs': '0 1 -1 61 99999999999999999999',
    'lr': '0 -1 nan inf 1e9 x',
    'min_scale': '0 nan 2',
    'flip_p': '-1 2 nan',
    'teacher_momentum': 'nan 2',
    'queue_size': '0 -1 99999999999999999999',
    'student_temp': '0 nan inf 1e-300',
    'teacher_temp': '-1 inf',
    'predictor_layers': '-1 99999999999999999999',
    'infonce_epochs': '-1 nan inf',
    'valid_pct': '0 1 nan inf 1e-300 0.99',
    'num_workers': '-1 99999999999999999999',
    'seed': '-1 99999999999999999999',
    'arch': "'' resnet99 accuracy vit_b_16",
    'stem': "'' x",
    'recipe': "'' cifar11",
    'out': "'' file.txt/x /dev/full",
}
names = {'bs':'bs|valid', 'valid_pct':'valid_pct|valid-pct|bs', 'arch':'arch|vit_b_16'}

@pytest.mark.parametrize('nm', numbers)
def test_a_wrong_value_is_one_sentence_that_names_the_argument(there, nm, monkeypatch, capsys):
    monkeypatch.chdir(there)
    before = everything(there)
    for val in shlex.split(numbers[nm]):
        small = ' '.join(
            f'--{k}={v}'
            for k, v in dict(arch='small_resnet', size=8, epochs=1, bs=16).items()
            if k != nm and not (nm == 'recipe')
        )
        code, text = command(
            ressl_pretrain, f"ims {small} --gray --num-workers=0 --{nm.replace('_', '-')}={shlex.quote(val)}"
        )
        said = text or capsys.readouterr().err.strip().splitlines()[-1]
        assert (
            code == (1 if text else 2)
            and '\n' not in said
            and any(o in said for o in names.get(nm, f"{nm}|{nm.replace('_', '-')}").split('|'))
        ), (val, code, said)
        assert everything(there)==before, val
    capsys.readouterr()

lines = {
    "'' --gray": 'DATA must be',
    'nowhere': 'no such folder',
    'empty': 'no images',
    'file.txt': 'is a file',
    'digits --size=1': 'size must be between 2 and 512',
    'ims --recipe=cifar10 --gray --epochs=3 --bs=16': 'epochs must be more than 5',
    'ims --recipe=cifar10 --gray --epochs=6 --bs=16 --size=8': '--queue-size=',
    'ims --size=4000 --bs=50': 'one batch',
    'ims extra': '',
    'ims --no-gray': '',
    '': '',
}

@pytest.mark.parametrize('line', lines)
def test_an_odd_line_is_one_sentence(there, line, monkeypatch, capsys):
    monkeypatch.chdir(there)
    is_refused(ressl_pretrain, line, 1 if lines[line] else 2, lines[line])


def test_advice_of_a_recipe_can_be_followed_in_the_shell(there, monkeypatch, capsys):
    monkeypatch.chdir(there)
    line = ('ims --recipe=cifar10 --gray --epochs=6 --bs=16 --size=8 --arch=small_resnet --num-workers=0 '
            '--no-report --out=advised')
    text = command(ressl_pretrain, line)[1]
    assert command(ressl_pretrain, line+' '+text.split('They do with ')[1]) is None
    assert (there/'advised'/'encoder.pth').exists() and not (there/'advised'/'report.html').exists()

evaluate = {
    'nowhere ims': 'no encoder file',
    "'' ims": 'ENCODER must be',
    'text.pth ims --size=8': 'text.pth',
    'image.pth ims --size=8': 'image.pth',
    'a_model.pth ims --size=8': 'save_encoder',
    'a_tensor.pth ims --size=8': 'save_encoder',
    'no_arch.pth ims --size=8': 'no_arch.pth',
    'arch_none.pth ims --size=8': 'arch_none.pth',
    'no_body.pth ims --size=8': 'no_body.pth',
    'other.pth ims --size=8': 'other.pth',
    'good.pth ims': 'size must be given',
    'good.pth ims --size=0': 'size must be',
    'good.pth flat --size=8': 'must have labels',
    **{f'run{i} ims': 'size must be given' for i in range(8)},
    'good.pth ims --size=8 --k=0': 'k must be',
    'good.pth ims --size=8 --seeds=-1': 'seeds must be',
    'good.pth ims --size=8 --protocol=x': 'protocol must be',
    'good.pth ims --size=8 --seed=-1': 'seed must be',
    'good.pth ims --size=8 --valid-pct=1': 'valid_pct must be',
    **{
        f'good.pth ims --size=8 --labels-per-class={o}': 'labels_per_class must be'
        for o in ("''", 'x', '1,', '0', '1,-1', '1.5', '1,99', 'half', '1e9')
    },
    **{f'good.pth ims --size=8 --out={o}': 'out must be' for o in ("''", 'file.txt/x', '/dev/full')},
}

@pytest.mark.parametrize('line', evaluate)
def test_an_odd_line_of_evaluate_is_one_sentence(there, line, monkeypatch, capsys):
    monkeypatch.chdir(there)
    assert 'weights_only' not in is_refused(ressl_evaluate, line, 1, evaluate[line])
    assert capsys.readouterr().out==''                           # before anything was computed

def test_an_error_that_nobody_thought_of_is_a_sentence_too(there, monkeypatch, capsys):
    monkeypatch.chdir(there)
    before = everything(there)
    for e in (KeyError('x'), RuntimeError('two\nlines'), MemoryError(), AssertionError()):
        def fail(*args, **kwargs): raise e
        with monkeypatch.context() as m:
            m.setattr('ressl_fastai.learner.Learner.show_views', fail, raising=False)
            code, text = command(
                ressl_pretrain, 'ims --arch=small_resnet --size=8 --epochs=1 --bs=16 --gray --num-workers=0'
            )
        assert code==1 and '\n' not in text and (type(e).__name__ in text or 'out of memory' in text)
        assert everything(there)==before                          # what stood there before training is gone again

def test_paths_are_printed_before_the_report_begins(there, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(there)
    monkeypatch.setattr('ressl_fastai.learner.Learner.report', lambda self, **kwargs: print('begins'), raising=False)
    assert (
        command(
            ressl_pretrain,
            f'flat --arch=small_resnet --size=8 --epochs=1 --bs=16 --gray --num-workers=0 --out={tmp_path}/run',
        )
        is None
    )
    before,after = capsys.readouterr().out.split('begins')
    assert (
        all(f'{tmp_path}/run/{o}' in before for o in ('encoder.pth', 'report.html', 'views.png', 'curves.png'))
        and after.strip() == ''
    )


def test_the_version(capsys):
    for func in (ressl_pretrain, ressl_evaluate):
        assert command(func, '--version')[0] == 0 and capsys.readouterr().out.startswith('ressl_fastai ')


def test_the_same_command_twice_and_ctrl_c(there, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(there)
    line = ('ims --arch=small_resnet --size=8 --epochs=5000 --bs=16 --gray --num-workers=0 --no-report '
            f'--out={tmp_path}/run')
    with subprocess.Popen(
        [Path(sys.executable).with_name('ressl_pretrain'), *shlex.split(line)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, 'PYTHONWARNINGS': 'ignore'},
    ) as first:
        for row in first.stdout:
            if row.split()[:1] == ['2']:
                break
        code, text = command(ressl_pretrain, line)
        assert code == 1 and f'{tmp_path}/run is in use: the same command runs in another process' in text
        assert [p.name for p in tmp_path.iterdir()] == ['run'] and first.poll() is None
        os.killpg(first.pid, signal.SIGINT)
        err = first.communicate()[1].strip()
    kept = f'all whole epochs are kept in {tmp_path}/run/checkpoint, and the same command goes on from there'
    assert first.returncode==130 and len(err.splitlines())==1 and kept in err, err
    capsys.readouterr()

    class CtrlC(Checkpoint):
        def after_batch(self): raise KeyboardInterrupt
    monkeypatch.setattr(cli, 'Checkpoint', CtrlC)                # and in a notebook
    with pytest.raises(KeyboardInterrupt) as e: ressl_pretrain(**arguments(ressl_pretrain, line+'2'))
    assert e.value.code==130 and capsys.readouterr().err.strip().endswith(kept.replace('/run/', '/run2/'))

def test_ctrl_c_before_training_leaves_nothing(there, monkeypatch, capsys):
    monkeypatch.chdir(there)
    before = everything(there)
    def interrupt(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(cli, 'cached_dls', interrupt)
    with pytest.raises(Interrupted): ressl_pretrain('ims', arch='small_resnet', size=8, bs=16, num_workers=0)
    assert (
        capsys.readouterr().err.strip() == 'ressl_pretrain: interrupted; nothing was written'
        and everything(there) == before
    )


def test_a_run_has_its_folder_for_itself_before_and_after_training_too(tmp_path):
    config,kept = dict(epochs=3, versions='newer'),tmp_path/'a'/'checkpoint'/'command'
    kept.mkdir(parents=True)
    with held(kept):
        (tmp_path/'a'/'config.json').write_text('{"epochs":3, "versions":"older"}')
        with pytest.raises(ValueError, match='a is in use: the same command'): _claim(tmp_path/'a', config)
        assert _claim(tmp_path/'a', dict(epochs=4))[0].name=='a-2'  # another command goes beside it
    (tmp_path/'a'/'config.json').write_text('{"epochs":3}')
    assert _claim(tmp_path/'a', config)[0].name=='a'

odd = 'a_b', '_c', '$x_{', 'x$y$', '<b>&', '\U0001f431', os.fsdecode(b'\xff\xfe'), 'long'*40

def test_odd_names_in_the_c_locale(tmp_path):
    folder = tmp_path/os.fsdecode(b'$ims\xff')
    for i,im in enumerate(load_digits().images[:80]):
        (folder/odd[i%8]).mkdir(parents=True, exist_ok=True)
        Image.fromarray((im*15).astype(np.uint8)).save(folder/odd[i%8]/f'{i}.png')
    env = {**os.environ, 'LC_ALL':'C', 'PYTHONUTF8':'0', 'PYTHONCOERCECLOCALE':'0', 'OMP_NUM_THREADS':'1'}
    res = subprocess.run(
        [
            Path(sys.executable).with_name('ressl_pretrain'),
            folder,
            '--arch=small_resnet',
            '--size=8',
            '--epochs=1',
            '--bs=16',
            '--gray',
            '--num-workers=0',
        ],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    assert res.returncode == 0 and b'Traceback' not in res.stderr and b'Glyph' not in res.stderr, res.stderr.decode(
        'ascii', 'backslashreplace'
    )
    html = next(tmp_path.glob('ressl-*/report.html')).read_text(encoding='utf-8')
    assert 'This section failed' not in html and html.count('Left out: ')==1      # what to label first
    assert '$x_{' in html and '&lt;b&gt;&amp;' in html
    assert '\\udcff' in res.stdout.decode('ascii')                # a name that cannot be shown, by its code
