"`relation` and `ressl_loss` against sums written out element by element in float64, value and gradient."
import math

import pytest, torch
import torch.nn.functional as F

from ressl_fastai.losses import relation, ressl_loss

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
    assert not torch.isclose(-((zt@queue.T/0.04).softmax(1)*(zs@queue.T/0.1).log_softmax(1)).sum(1).mean().float(), got, **tol)

def test_gradcheck():
    zs,zt,queue = (o.double() for o in embeddings(3, 5, 4))
    assert torch.autograd.gradcheck(lambda z: ressl_loss(z, zt, queue), zs.requires_grad_())

def test_collapse_is_ln_k():
    z = F.normalize(torch.ones(16, 8), dim=1)
    torch.testing.assert_close(ressl_loss(z, z, z), torch.tensor(math.log(16)), **tol)
