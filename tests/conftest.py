import pytest, torch, warnings


@pytest.fixture(autouse=True, scope='session')
def float32_on_every_cpu():
    "float32 unless a test asks for less: the same on every CPU; for fixtures of any scope"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.cpu, 'get_capabilities', dict, raising=False)
        yield

@pytest.fixture(autouse=True)
def steady():
    "One thread and a fixed seed"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings('ignore', message='.*torch.jit.*|.*get_autocast_gpu_dtype.*')
