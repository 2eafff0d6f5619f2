"""Where tests run: on the CPU with every GPU hidden, whatever the machine has, since what they compare is
arithmetic. A GPU is left in sight for `pytest tests/test_cuda.py` alone."""

import os, pytest, sys, warnings
from pathlib import Path

os.environ['MPLBACKEND'] = 'agg'  # pictures are drawn and never shown

def only_cuda(args):
    "Whether the files among the arguments of pytest are test_cuda.py alone"
    asked = [Path(arg.split('::')[0]) for arg in args]
    return {o.name for o in asked if o.exists()}=={'test_cuda.py'}

if not only_cuda(sys.argv[1:]):
    os.environ['CUDA_VISIBLE_DEVICES'] = ''  # before CUDA starts; processes that tests start inherit it

import torch
from fastai.torch_core import default_device
from matplotlib import pyplot as plt

if os.environ.get('CUDA_VISIBLE_DEVICES') == '':
    default_device(use=False)  # fastai's own choice, also where PyTorch knows other accelerators


def pytest_configure(config): config.addinivalue_line('markers', 'cuda: needs a CUDA device')

def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker('cuda') and not torch.cuda.is_available():
            item.add_marker(
                pytest.mark.skip(
                    reason="no CUDA device in sight: `pytest tests/test_cuda.py`, alone, on a machine that has one"
                )
            )


@pytest.fixture(autouse=True, scope='session')
def float32_on_every_cpu():
    "float32 unless a test asks for less: the same on every CPU; for fixtures of any scope"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.cpu, 'get_capabilities', dict, raising=False)
        yield

@pytest.fixture(autouse=True)
def steady():
    "One thread and a fixed seed; figures are closed afterwards"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings('ignore', message='.*torch.jit.*|.*get_autocast_gpu_dtype.*')
    yield
    plt.close('all')
