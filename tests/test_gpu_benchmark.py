"`benchmarks/gpu.py` runs: on a machine with a GPU there is little time to find out."
import importlib.util, json
from pathlib import Path

import pytest, torch

@pytest.fixture(scope='module')
def gpu():
    spec = importlib.util.spec_from_file_location('gpu_benchmark', Path(__file__).parent.parent/'benchmarks'/'gpu.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

@pytest.mark.parametrize('name', ['env','syncs','step','loss','views','knn','equal'])
def test_a_section_finds_what_it_looks_for(gpu, name, tmp_path):
    gpu.section(name, tmp_path, tiny=True)
    lines = [json.loads(l) for l in (tmp_path/'gpu.jsonl').read_text().splitlines()]
    assert lines and all(
        l['section'] == name and l['device'] == 'cpu' and l['versions']['torch'] == torch.__version__ for l in lines
    )
    assert [l for l in lines if 'error' in l and l.get('what')!='kornia']==[]  # which is compared with where it is
    if name=='equal': assert max(l.get('most', l.get('off')) for l in lines)==0

def test_what_fails_is_said(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, 'run_env', lambda say: 1/0)
    gpu.section('env', tmp_path, tiny=True)
    assert 'ZeroDivisionError' in json.loads((tmp_path/'gpu.jsonl').read_text())['error']

def test_every_section_has_a_limit(gpu):
    assert (
        gpu.limits.keys() == {nm[4:] for nm in vars(gpu) if nm.startswith('run_')}
        and set(gpu.alone) <= gpu.limits.keys()
    )
