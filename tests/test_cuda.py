"What only a CUDA device can show. Skipped where there is none; run alone, since the other tests hide it: `pytest tests/test_cuda.py`."
import pytest, torch

pytestmark = pytest.mark.cuda

def test_there_is_one(): assert torch.zeros(1, device='cuda').is_cuda
