"""`relation`, `ressl_loss` and `info_nce_loss` against sums written out element by element, value and gradient, and
what they keep in memory."""

import math
from contextlib import nullcontext

import pytest, torch
import torch.nn.functional as F

from torch.utils._python_dispatch import TorchDispatchMode

from ressl_fastai import losses
from ressl_fastai.feature_queue import FeatureQueue
from ressl_fastai.losses import info_nce_loss, mixed_loss, relation, ressl_loss

# float32 logits up to 25 carry an error of about 25 * 2**-24 = 1.5e-6, which exp and log pass on as a relative error
tol = dict(rtol=1e-5, atol=1e-5)


def softmax(z, queue, temp):
    logits = [sum(a*b for a,b in zip(z, q))/temp for q in queue]
    exps = [math.exp(l-max(logits)) for l in logits]
    return [e/sum(exps) for e in exps]

def loss_and_grad(zs, zt, queue, student_temp=0.1, teacher_temp=0.04):
    "The published formula, and its gradient (sum_j (p_s - p_t)_j queue_j) / student_temp / bs"
    loss,grad = 0.,[]
    for s,t in zip(zs, zt):
        ps,pt = softmax(s, queue, student_temp),softmax(t, queue, teacher_temp)
        loss -= sum(b*math.log(a) for a,b in zip(ps, pt))/len(zs)
        grad.append([sum((a-b)*q[d] for a,b,q in zip(ps, pt, queue))/student_temp/len(zs) for d in range(len(s))])
    return torch.tensor(loss),torch.tensor(grad)

def embeddings(bs, size, dim):
    return [F.normalize(torch.randn(n, dim), dim=1) for n in (bs, bs, size)]

@pytest.mark.parametrize('bs,size,dim', [(1,1,2), (1,7,3), (5,3,4), (4,64,16)])
def test_value_and_gradient(bs, size, dim):
    zs,zt,queue = embeddings(bs, size, dim)
    want,grad = loss_and_grad(*(o.tolist() for o in (zs,zt,queue)))
    zs.requires_grad_()
    got = ressl_loss(zs, zt, queue)
    got.backward()
    torch.testing.assert_close(got.detach(), want, **tol)
    torch.testing.assert_close(zs.grad, grad, rtol=1e-4, atol=1e-5)
    for row,z in zip(relation(zt, queue, 0.04), zt.tolist()):
        torch.testing.assert_close(row, torch.tensor(softmax(z, queue.tolist(), 0.04)), **tol)

@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('weight', [0., 0.3, 1.])
def test_both_in_one_pass_are_both(weight, reduction):
    "Value and gradient in float64, of two crops of each image; controls: the weights swapped, the crops mispaired"
    zt,queue = (F.normalize(torch.randn(n, 8).double(), dim=1) for n in (5,40))
    zs = F.normalize(torch.randn(10, 8).double(), dim=1).requires_grad_()
    temps = 0.2,0.05

    def parts(weight, zt=zt):
        relational,info_nce = ressl_loss(zs, zt, queue, *temps, reduction), info_nce_loss(zs, zt, queue, 0.2, reduction)
        return (1-weight)*relational + weight*info_nce

    def value_and_grad(loss): return loss.detach(),torch.autograd.grad(loss.sum(), zs)[0]

    got = value_and_grad(mixed_loss(zs, zt, queue, weight, *temps, reduction))
    for a,b in zip(got, value_and_grad(parts(weight))): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for wrong in (parts(1-weight), parts(weight, zt.roll(1, 0))):
        assert not torch.allclose(got[1], value_and_grad(wrong)[1], rtol=1e-3)

def wrong_losses(zs, zt, queue):
    "Implementations that a falling loss would not give away"
    log_ps,pt = (zs@queue.T/0.1).log_softmax(1),(zt@queue.T/0.04).softmax(1)
    yield 'temperatures swapped', ressl_loss(zs, zt, queue, student_temp=0.04, teacher_temp=0.1)
    yield 'one temperature for both', ressl_loss(zs, zt, queue, teacher_temp=0.1)
    yield 'uniform target', -log_ps.mean(1).mean()
    yield 'pairs mismatched', -(pt.roll(1, 0)*log_ps).sum(1).mean()
    yield 'teacher fits student', -((zs@queue.T/0.1).softmax(1)*(zt@queue.T/0.04).log_softmax(1)).sum(1).mean()
    yield 'mean over the queue', -(pt*log_ps).mean()
    yield 'divergence instead of cross entropy', F.kl_div(log_ps, pt, reduction='batchmean')

def test_wrong_losses_are_caught():
    zs,zt,queue = embeddings(8, 32, 8)
    want,_ = loss_and_grad(*(o.tolist() for o in (zs,zt,queue)))
    torch.testing.assert_close(ressl_loss(zs, zt, queue), want, **tol)
    for name,wrong in wrong_losses(zs, zt, queue): assert not torch.isclose(wrong, want, rtol=1e-3), name

def test_teacher_and_queue_get_no_gradient():
    zs,zt,queue = (o.requires_grad_() for o in embeddings(4, 8, 3))
    ressl_loss(zs, zt, queue.detach()).backward()
    assert zt.grad is None and zs.grad.abs().sum()>0

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    zs,zt,queue = (o.to(dtype) for o in embeddings(4, 64, 16))
    got = ressl_loss(zs, zt, queue)
    assert got.dtype==torch.float32
    torch.testing.assert_close(got, ressl_loss(zs.float(), zt.float(), queue.float()), **tol)
    with torch.autocast('cpu', dtype=torch.bfloat16): torch.testing.assert_close(ressl_loss(zs, zt, queue), got, **tol)
    # control: what half-precision logits would give
    assert not torch.isclose(
        -((zt @ queue.T / 0.04).softmax(1) * (zs @ queue.T / 0.1).log_softmax(1)).sum(1).mean().float(), got, **tol
    )


def nce_and_grad(zs, zt, queue, temp=0.1):
    "-log softmax of the positive among the positive and the queue, and its gradient"
    loss,grad = 0.,[]
    for s,t in zip(zs, zt):
        keys = [t, *queue]
        p = softmax(s, keys, temp)
        loss -= math.log(p[0])/len(zs)
        grad.append([(sum(a*k[d] for a,k in zip(p, keys)) - t[d])/temp/len(zs) for d in range(len(s))])
    return torch.tensor(loss),torch.tensor(grad)

@pytest.mark.parametrize('bs,size,dim', [(1,1,2), (1,7,3), (5,3,4), (4,64,16)])
def test_info_nce_value_and_gradient(bs, size, dim):
    zs,zt,queue = embeddings(bs, size, dim)
    zt = F.normalize(zs+0.2*zt, dim=1)  # two views of one image
    want,grad = nce_and_grad(*(o.tolist() for o in (zs,zt,queue)))
    got = info_nce_loss(zs.requires_grad_(), zt, queue)
    got.backward()
    torch.testing.assert_close(got.detach(), want, **tol)
    torch.testing.assert_close(zs.grad, grad, rtol=1e-4, atol=1e-5)
    pos,neg = (zs*zt).sum(1, keepdim=True)/0.1,zs@queue.T/0.1
    for name, wrong in (
        ('positive not among the candidates', (neg.logsumexp(1) - pos[:, 0]).mean()),
        ('pairs mismatched', info_nce_loss(zs, zt.roll(1, 0), queue)),
        ('another temperature', info_nce_loss(zs, zt, queue, temp=0.2)),
    ):
        if bs>1 or name!='pairs mismatched': assert not torch.isclose(wrong, want, rtol=1e-3), name

@pytest.fixture(params=[2**20, 40, 1], ids=['one piece','pieces','rows'])
def piece(request, monkeypatch): monkeypatch.setattr(losses, '_n_logits', lambda device: request.param)

@pytest.mark.parametrize('loss,oracle', [(ressl_loss,loss_and_grad), (info_nce_loss,nce_and_grad)])
@pytest.mark.parametrize('views', [1, 3])
def test_crops_and_pieces_of_the_queue(piece, loss, oracle, views):
    "Rows of z_student are crop-major: crop v of image i is row v*bs+i"
    zt,queue = embeddings(4, 23, 5)[1:]
    zs = F.normalize(torch.randn(views*4, 5), dim=1).requires_grad_()
    want,grad = oracle(zs.tolist(), [zt[i%4].tolist() for i in range(views*4)], queue.tolist())
    got = loss(zs, zt, queue)
    got.backward()
    torch.testing.assert_close(got.detach(), want, **tol)
    torch.testing.assert_close(zs.grad, grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss(zs, zt, queue, reduction='none').mean().detach(), want, **tol)
    if views>1:  # control: image-major rows
        wrong,_ = oracle(zs.tolist(), [zt[i//views].tolist() for i in range(views*4)], queue.tolist())
        assert not torch.isclose(wrong, want, rtol=1e-3)

def test_pieces_whose_largest_logits_grow_and_shrink(monkeypatch):
    "The running maximum: pieces in any order, long embeddings, exact where exp of a logit would overflow"
    monkeypatch.setattr(losses, '_n_logits', lambda device: 4)
    z,queue = torch.randn(2, 3).double()*30,torch.randn(9, 3).double()*30
    for q in (queue, queue.flip(0), queue[(z[0]@queue.T).argsort()]):
        want = -((z@q.T/0.04).softmax(1)*(z@q.T/0.1).log_softmax(1)).sum(1).mean()
        assert (z@q.T/0.04).exp().isinf().any()  # control: what a sum without the maximum would meet
        torch.testing.assert_close(ressl_loss(z, z, q), want, rtol=1e-10, atol=1e-10)

def test_gradcheck(piece):
    zs,zt,queue = (o.double() for o in embeddings(3, 5, 4))
    zs = torch.cat([zs, zs.flip(1)]).requires_grad_()
    for loss in (ressl_loss, info_nce_loss):
        assert torch.autograd.gradcheck(lambda z: loss(z, zt, queue), zs)
        assert torch.autograd.gradcheck(lambda z: loss(z, zt, queue, reduction='none'), zs)

def test_unfilled_slots_do_not_count():
    zs,zt,queue = embeddings(4, 6, 3)
    q = FeatureQueue(10, 3)
    q.enqueue(queue)
    torch.testing.assert_close(ressl_loss(zs, zt, q.filled), ressl_loss(zs, zt, queue), rtol=0, atol=0)
    assert not torch.isclose(
        ressl_loss(zs, zt, q.feats), ressl_loss(zs, zt, queue), rtol=1e-3
    )  # control: empty slots as embeddings of zeros


class Largest(TorchDispatchMode):
    "The largest tensor that an operation makes"

    def __enter__(self):
        self.numel = 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not any(
            out.untyped_storage()._cdata == o.untyped_storage()._cdata for o in args if isinstance(o, torch.Tensor)
        ):
            self.numel = max(self.numel, out.numel())
        return out

def memory(loss, bs=8, size=500, dim=4):
    "(elements kept for backward, largest tensor made)"
    zs,zt,queue = embeddings(bs, size, dim)
    zs.requires_grad_()
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t),
        Largest() as largest,
    ):
        loss(zs, zt, queue).backward()
    return max(kept),largest.numel

def test_nothing_of_the_queues_size_is_kept_or_made(monkeypatch):
    monkeypatch.setattr(losses, '_n_logits', lambda device: 8*50)
    def plain(zs, zt, queue): return -(relation(zt, queue, 0.04)*(zs@queue.T/0.1).log_softmax(1)).sum(1).mean()
    for loss in (ressl_loss, info_nce_loss):
        kept,made = memory(loss)
        assert kept<=2*8*4 and made<=8*50, (kept,made)  # as much as the embeddings of student and teacher
    kept,made = memory(plain)
    assert kept>=8*500 and made>=8*500  # control

@pytest.mark.parametrize('device,most', [('cpu', 2**20), ('meta', 2**24)])
def test_pieces_are_as_large_as_the_device_likes_them(device, most, monkeypatch):
    "A processor's cache, or what keeps another device busy; `meta` stands for the latter"
    monkeypatch.setattr(torch, 'autocast', lambda *args, **kwargs: nullcontext())  # which does not know `meta`
    zs,zt,queue = (torch.zeros(n, 8, device=device) for n in (64,64,2**19))
    with Largest() as largest: ressl_loss(zs, zt, queue)
    assert largest.numel==most

def test_collapse_is_ln_k():
    z = F.normalize(torch.ones(16, 8), dim=1)
    torch.testing.assert_close(ressl_loss(z, z, z), torch.tensor(math.log(16)), **tol)
