"`FeatureQueue` against `collections.deque(maxlen=size)`."
import random
from collections import deque

import pytest, torch

from ressl_fastai.feature_queue import FeatureQueue

size = 16


class Truncating(FeatureQueue):
    "D2: drops what does not fit before the end and starts again at the front"
    def enqueue(self, z):
        ptr,n = int(self.ptr),min(len(z), self.size-int(self.ptr))
        self.feats[ptr:ptr+n] = z[:n]
        self.ptr.fill_((ptr + n) % self.size)
        self.count.fill_(min(self.size, int(self.count) + n))


class FirstRows(FeatureQueue):
    "Keeps the first instead of the last rows of a batch larger than the queue"
    def enqueue(self, z): super().enqueue(z[:self.size])

def follows_deque(queue, batches):
    "Whether `queue` holds what a deque holds after every batch"
    want,n = deque(maxlen=queue.size),0
    for bs in batches:
        rows = torch.arange(n, n+bs).float()[:,None].expand(-1, 2)
        n += bs
        queue.enqueue(rows)
        want.extend(rows[:, 0].tolist())
        if queue.in_order[:,0].tolist()!=list(want) or int(queue.count)!=len(want): return False
        if sorted(queue.filled[:,0].tolist())!=sorted(want): return False
    return True

@pytest.mark.parametrize('bs', [1, 3, size-1, size, size+1, 3*size])
def test_is_first_in_first_out(bs): assert follows_deque(FeatureQueue(size, 2), [bs]*40)

def test_any_sequence_of_batches():
    rng = random.Random(0)
    for _ in range(200):
        assert follows_deque(FeatureQueue(rng.randint(1, 20), 2), [rng.randint(0, 50) for _ in range(20)])

def test_wrong_queues_are_caught():
    assert not follows_deque(Truncating(size, 2), [3]*40)
    assert follows_deque(Truncating(size, 2), [4]*40)   # which is why D1 asserts that the batch divides the size
    assert not follows_deque(FirstRows(size, 2), [size+1]*3)

def test_d3_state_survives_saving():
    a,b = FeatureQueue(size, 2),FeatureQueue(size, 2)
    a.enqueue(torch.randn(11, 2))
    b.load_state_dict(a.state_dict())
    z = torch.randn(9, 2)
    for q in (a,b): q.enqueue(z)
    assert torch.equal(a.in_order, b.in_order) and a.count==b.count

def test_rows_are_copied_without_gradient():
    queue,z = FeatureQueue(4, 2),torch.randn(2, 2, requires_grad=True)
    queue.enqueue(z)
    with torch.no_grad(): z.zero_()
    assert not queue.feats.requires_grad and queue.filled.abs().sum()>0
