import pytest, torch, warnings


@pytest.fixture(autouse=True)
def steady(monkeypatch):
    "One thread, a fixed seed, and float32 unless a test asks for less: the same on every CPU"
    monkeypatch.setattr(torch.cpu, 'get_capabilities', dict, raising=False)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings('ignore', message='.*torch.jit.*|.*get_autocast_gpu_dtype.*')
