import pytest, torch, warnings


@pytest.fixture(autouse=True)
def steady():
    "One thread and a fixed seed: sums are added in one order"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings('ignore', message='.*torch.jit.*|.*get_autocast_gpu_dtype.*')
