"Tests run on the CPU whatever else a machine has, and nothing forks once CUDA has started."
import subprocess, sys
import os, pytest, torch
from concurrent.futures import process
from pathlib import Path

from fastai.torch_core import default_device, defaults
from PIL import Image
from helpers import fit, make

from conftest import only_cuda
from ressl_fastai.data import digits_dls
from ressl_fastai.images import readable_images
from ressl_fastai.models import small_resnet

here = Path(__file__).parent

@pytest.fixture
def pretended(monkeypatch):
    "A CUDA device, as far as fastai asks for one"
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)

def test_the_cpu_is_the_default_beside_a_gpu(pretended, monkeypatch):
    assert default_device()==torch.device('cpu')==digits_dls(8).device
    learn = fit(make(digits_dls(8, bs=512), small_resnet))
    assert {p.device.type for p in learn.model.parameters()}=={'cpu'}
    monkeypatch.setattr(defaults, 'use_cuda', None)
    assert default_device()==torch.device('cuda', 0)                     # control: fastai's own choice

@pytest.mark.parametrize(
    'args,seen',
    [
        (['tests'], False),
        (['-n', 'auto', '--ignore', 'test_cuda.py', '.'], False),
        (['test_cuda.py', 'test_devices.py'], False),
        ([], False),
        (['test_cuda.py'], True),
        (['-q', 'test_cuda.py::test_views', '-k', 'seed'], True),
    ],
)
def test_gpus_are_hidden_from_all_tests_but_test_cuda_alone(args, seen, monkeypatch):
    monkeypatch.chdir(here)
    assert only_cuda(args)==seen
    assert os.environ['CUDA_VISIBLE_DEVICES']==''                        # in this process, and in those that it starts

def test_files_are_opened_without_a_fork_once_cuda_has_started(tmp_path, monkeypatch):
    for i in range(3): Image.new('RGB', (4,4)).save(tmp_path/f'{i}.png')
    (tmp_path/'bad.png').write_text('no picture')
    files = sorted(tmp_path.glob('*.png'))
    started = []
    submit = process.ProcessPoolExecutor.submit
    monkeypatch.setattr(
        process.ProcessPoolExecutor,
        'submit',
        lambda self, *args, **kwargs: (started.append(1), submit(self, *args, **kwargs))[1],
    )
    with pytest.warns(UserWarning, match='1 of 4 images cannot be read'):
        assert readable_images(files, skip_bad=True) == files[:3]
    assert started  # processes, which open files faster than threads
    started.clear()
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    with pytest.warns(UserWarning, match='bad.png'): assert readable_images(files, skip_bad=True)==files[:3]
    assert not started

def test_forked_workers_collect_nothing_that_was_there_before():
    """Pinned memory that an interrupted fit has left must not be freed by a worker: on a GPU that ends the worker
    (seen on an H100)"""
    code = """
import gc, os
from ressl_fastai.callback import _let_workers_collect_nothing
def in_a_worker():
    read,write = os.pipe()
    if os.fork()==0: os.write(write, b'%d' % gc.get_freeze_count()); os._exit(0)
    return int(os.read(read, 20))
before = in_a_worker()
_let_workers_collect_nothing()
print(before==0, in_a_worker()>10_000)"""
    out = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True
    ).stdout
    assert out.split()==['True','True']
