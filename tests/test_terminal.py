"The commands in a terminal: what is said at once, while one waits, before a long training, and after Ctrl-C."
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fastai.callback.core import Callback
from fastcore.script import CliError
from PIL import Image
from helpers import make, write_digits

from ressl_fastai import report, runs
from ressl_fastai.cli import ressl_pretrain
from ressl_fastai.data import digits_dls
from ressl_fastai.learner import TimeLeft, duration
from ressl_fastai.models import small_resnet

pty = pytest.importorskip('pty')  # Windows has none


def terminal(*args, cwd, until=None):
    "All that the installed command prints in a terminal, and its exit status; Ctrl-C once the text `until` is there"
    program = Path(sys.executable).with_name(args[0])
    pid,fd = pty.fork()
    if pid==0:
        os.chdir(cwd)
        os.environ.update(OMP_NUM_THREADS='1', XDG_CACHE_HOME=str(cwd/'cache'))
        os.environ.pop('PYTHONWARNINGS', None)
        os.execv(program, [str(program), *map(str, args[1:])])
    text,start = b'',time.time()
    while time.time()-start<240:
        if not select.select([fd], [], [], 1)[0]: continue
        try: part = os.read(fd, 2**16)
        except OSError: break  # Linux: the other side has closed it
        if not part: break
        text += part
        if until and until.encode() in text:
            os.write(fd, b'\x03')
            until = None
    return text.decode('utf-8', 'replace'),os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def seen(text):
    "The lines that stay on the screen: what follows the last carriage return overwrites what was there"
    lines = []
    for line in text.replace('\r\n', '\n').split('\n'):
        shown = ''
        for part in line.split('\r'): shown = part+shown[len(part):]
        lines.append(shown.rstrip())
    return lines

small = '--arch=small_resnet', '--size=8', '--bs=16', '--gray'

@pytest.fixture
def folder(tmp_path):
    write_digits(tmp_path/'ims', 60)
    Image.new('RGBA', (9,9), (10,200,3,40)).save(tmp_path/'ims'/'0'/'see-through.png')
    return tmp_path


def test_a_run_from_its_first_word_to_its_last(folder):
    text,status = terminal('ressl_pretrain', 'ims', *small, '--epochs=2', '--no-report', cwd=folder)
    assert status==0, text
    assert text.startswith('loading PyTorch and fastai ...\r')         # before anything else
    lines = [o for o in seen(text) if o]
    assert lines[0]=='looking for images in ims'                        # where 'loading' stood
    wanted = ['looking for images in ims', 'of 61 images looked at, 1 have transparency',
              'decoding 61 images to 8 x 8 pixels', '55 images for training, 6 held out',
              'effective_rank: ', 'kNN accuracy of raw pixels:',
              'epoch ', '0 ', '1 ', 'pictures:', 'encoder:', 'repeat:', 'embedding 61 images with the random encoder',
              'kNN accuracy on the 6', '  raw pixels', '  random encoder', '  pretrained encoder']
    said = iter(lines)
    for o in wanted: assert any(l.startswith(o) for l in said), (o, lines)   # in this order
    assert 'Warning' not in text and 'Traceback' not in text
    assert '% [' in text                                                # bars were there,
    assert not any('% [' in l for l in lines)                           # and went


def test_ctrl_c_says_what_is_kept(folder):
    text,status = terminal('ressl_pretrain', 'ims', *small, '--epochs=500', '--no-report', cwd=folder, until='Epoch 3/')
    kept = 'all whole epochs are kept in ressl-ims/checkpoint, and the same command goes on from there'
    assert status==130 and seen(text)[-2]==f'ressl_pretrain: interrupted; {kept}' and 'Traceback' not in text


def test_nothing_but_results_where_nobody_watches(folder, monkeypatch, capsys):
    """No bar of the report, which begins after two seconds, either"""
    monkeypatch.chdir(folder)
    (nm,section),*_ = report.report_sections
    def slow(*args):
        time.sleep(1.1)
        return section(*args)
    monkeypatch.setattr(report, 'report_sections', 3*[(nm,slow)])
    ressl_pretrain('ims', arch='small_resnet', size=8, bs=16, gray=True, epochs=1, num_workers=0)
    out = capsys.readouterr().out
    assert '\r' not in out and not re.search('looking for|decoding|embedding|% \\[', out)
    assert out.index('raw pixels') < out.index('train_loss')


# before a long training

@pytest.fixture
def seconds(monkeypatch):
    "Set what a step takes for each image, by the arch and the size"
    cost = {}
    def image_seconds(model, n_in, size, bs, dtype=None): return cost[model.encoder.arch,size]
    monkeypatch.setattr(runs, '_image_seconds', image_seconds)
    return cost

def learner(size):
    arch = 'resnet18' if size>32 else small_resnet
    return make(digits_dls(size=size, bs=32), arch, queue_size=32, metrics=[])

def test_a_short_training_is_begun_without_a_word(seconds):
    seconds.update({('resnet18',64):900/(1408*10), ('small_resnet',64):1e-4})  # 44 steps of 32 images
    assert runs._before_long(learner(64), 64, 10, 32) is None
    assert runs._before_long(learner(64), 64, 11, 32) is not None       # control

def test_what_fits_fifteen_minutes(seconds):
    seconds.update({('resnet18',64):0.02, ('small_resnet',64):0.005, ('small_resnet',32):0.002})
    learn = learner(64)
    def said(epochs): return runs._before_long(learn, 64, epochs, 32)
    assert said(100)==('100 epochs will take about 47 minutes on this machine without a GPU; 15 minutes are enough for '
                       '--epochs=31')
    seconds['resnet18',64] = 0.2
    assert said(100)==('100 epochs will take about 8 hours on this machine without a GPU; 15 minutes are enough for '
                       '--epochs=3 or --arch=small_resnet --epochs=100')
    seconds.update({('resnet18',64):2., ('small_resnet',64):0.2})
    assert said(400)==('400 epochs will take about 13 days on this machine without a GPU; 15 minutes are enough for '
                       '--arch=small_resnet --epochs=3 or --arch=small_resnet --size=32 --epochs=319')
    seconds.update({('resnet18',64):0.1, ('small_resnet',64):0.11})          # a set-up that is no cheaper is not named
    assert said(400).endswith('enough for --epochs=6 or --arch=small_resnet --size=32 --epochs=319')
    seconds['resnet18',64] = 2.
    seconds.update({('small_resnet',64):2., ('small_resnet',32):2.})
    assert said(100).endswith('; 15 minutes are not enough for one epoch of 1408 images')

def test_the_time_of_a_step_is_measured_and_leaves_no_trace():
    learn = learner(16)
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    small_one,large = (runs._image_seconds(learn.model, 1, size, 32) for size in (8,64))
    assert 0<small_one<large
    assert all(v.equal(before[k]) for k,v in learn.model.state_dict().items())
    assert all(p.grad is None for p in learn.model.parameters())

durations = {5:'5 seconds', 89:'89 seconds', 90:'2 minutes', 3600:'60 minutes', 7200:'2 hours', 86400*3:'3 days'}

@pytest.mark.parametrize('seconds', durations)
def test_durations(seconds): assert duration(seconds)==durations[seconds]


class Slow(Callback):
    "Each step takes as long as it says, by a clock of its own"
    order = TimeLeft.order-1
    def __init__(self, monkeypatch, each):
        self.now,self.each = 0.,each
        monkeypatch.setattr('ressl_fastai.learner.perf_counter', lambda: self.now)
    def after_batch(self):
        if self.training: self.now += self.each

@pytest.mark.parametrize('each,said', [(2.,'about 2 minutes to go, 2 seconds a step\n'), (0.2,'')])
def test_after_a_few_steps_the_time_that_is_left_is_said_once(each, said, monkeypatch, capsys):
    learn = make(digits_dls(size=8, bs=359), small_resnet, queue_size=32, metrics=[])  # 4 steps an epoch
    learn.logger = lambda row: None
    with learn.no_bar(): learn.fit(17, cbs=Slow(monkeypatch, each))
    assert capsys.readouterr().out==said
    with learn.no_bar(), learn.no_logging(): learn.fit(17, cbs=Slow(monkeypatch, each))
    assert capsys.readouterr().out==''                                  # who wants no table wants no words


def test_help_and_version_do_not_wait_for_pytorch(tmp_path):
    code = "import sys, ressl_fastai.cli; print(sorted({'torch','fastai','pandas','matplotlib'} & set(sys.modules)))"
    def loaded(more=''): return subprocess.run([sys.executable, '-c', more+code], capture_output=True, text=True).stdout
    assert loaded()=='[]\n' and 'torch' in loaded('import ressl_fastai.runs; ')   # control
    for flag in ('--version','--help'):
        text,status = terminal('ressl_pretrain', flag, cwd=tmp_path)
        assert status==0 and 'loading' not in text


@pytest.mark.skipif(sys.platform!='linux', reason='of glibc')
def test_memory_is_kept(tmp_path):
    "Pages that the system has to give a process again at each step"
    code = """
import resource, torch
def pages(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def used():
    before = pages()
    for _ in range(20): torch.empty(2**24).zero_()
    return pages()-before
from ressl_fastai.runs import keep_memory
plain = used()
keep_memory()
used()
print(plain>20*used())
"""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    if 'glibc' not in ' '.join(os.confstr(o) or '' for o in ('CS_GNU_LIBC_VERSION',)): pytest.skip('no glibc')
    assert done.stdout=='True\n', done.stderr

def test_a_broken_file_is_said_in_words_of_the_shell(folder):
    (folder/'ims'/'0'/'broken.png').write_bytes(b'')
    with pytest.raises(CliError, match=r'broken.png \(remove them, or leave them out with --skip-bad\)'):
        ressl_pretrain(str(folder/'ims'), **dict(arch='small_resnet', size=8, bs=16, num_workers=0))
