"`update_teacher` against torch's own `AveragedModel`, parameters and buffers."
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from ressl_fastai.models import Encoder, ReSSLModel
from ressl_fastai.teacher import make_teacher, update_teacher


def net(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))

def follow(update, momentum=0.9, steps=20):
    "Parameters of a teacher that `update` moved, and of torch's average, after `steps` random changes of the student"
    student = net()
    teacher,averaged = make_teacher(student),AveragedModel(student, avg_fn=get_ema_avg_fn(momentum))
    averaged.update_parameters(student)  # its first call only copies
    for _ in range(steps):
        with torch.no_grad(): [p.add_(0.1*torch.randn_like(p)) for p in student.parameters()]
        update(teacher, student, momentum)
        averaged.update_parameters(student)
    return [torch.cat([p.flatten() for p in m.parameters()]) for m in (teacher, averaged)]

# each of 20 steps rounds to 2**-24 of values of about 1
tol = dict(rtol=1e-5, atol=20*2**-24)

def test_is_the_moving_average(): torch.testing.assert_close(*follow(update_teacher), **tol)

def test_wrong_averages_are_caught():
    for wrong in (
        lambda t, s, m: update_teacher(t, s, 1 - m),
        lambda t, s, m: None,
        lambda t, s, m: update_teacher(t, s, 0.99),
    ):
        got, want = follow(wrong)
        assert not torch.allclose(got, want, **tol)

def test_happens_in_place():
    student = net()
    teacher = make_teacher(student)
    ptrs = [p.data_ptr() for p in teacher.parameters()]
    update_teacher(teacher, student, 0.5)
    assert ptrs==[p.data_ptr() for p in teacher.parameters()]

def test_d15_buffers_come_from_the_teachers_own_passes():
    "In training mode the teacher uses the batch's statistics and collects its own; nothing is copied or averaged"
    model = ReSSLModel(Encoder(net(), 'net', size=8), queue_size=4, n_hidden=8, dim=4).train()
    bn,x = model.teacher[0][0][1],torch.randn(16, 3, 8, 8)
    alone = nn.BatchNorm2d(8)
    h = model.teacher[0][0][0](x)
    model.teacher(x)
    want = alone(h)
    torch.testing.assert_close(bn.running_mean, alone.running_mean)
    torch.testing.assert_close(bn.running_var, alone.running_var)
    model.encoder(5+x)                                       # the student's statistics go elsewhere
    update_teacher(model.teacher, model.student, 0.5)
    torch.testing.assert_close(bn.running_mean, alone.running_mean)
    assert not torch.allclose(model.encoder[0][1].running_mean, alone.running_mean)
    # in evaluation mode the running statistics count
    model.eval()
    torch.testing.assert_close(bn(h), alone.eval()(h))
    assert not torch.allclose(bn(h), want)

def test_d16_teacher_is_the_student_at_step_0():
    model = ReSSLModel(Encoder(net(), 'net', size=8), queue_size=4, n_hidden=8, dim=4).eval()
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(model.teacher(x), model(x))

def test_d13_dropout_is_off_in_the_teacher_after_train():
    class Noisy(nn.Sequential):
        def __init__(self): super().__init__(*net(), nn.Dropout(0.5))
    model = ReSSLModel(Encoder(Noisy(), 'noisy', size=8), queue_size=4, n_hidden=8, dim=4).train()
    assert {type(m) for m in model.teacher.modules() if m.training}=={nn.BatchNorm2d}
    assert all(m.training for m in model.encoder.modules())
