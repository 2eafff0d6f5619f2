"""The pyramid's backbone gives the encoder's maps; torchvision's detectors train with it."""

import numpy as np, pytest, torch, torchvision.models as tv
from fastai.learner import Learner
from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import ressl_fastai.detection
from ressl_fastai.data import tensor_dls
from ressl_fastai.evaluate import embedding_loss
from ressl_fastai.models import ReSSLModel, create_encoder, small_resnet

def make(arch=small_resnet, size=64, n_in=3):
    torch.manual_seed(0)
    dls = tensor_dls(np.zeros((8,size,size,n_in), np.uint8) if n_in==3 else np.zeros((8,size,size), np.uint8), bs=2)
    enc = create_encoder(arch, n_in, size=size)
    for m in enc.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(std=0.1)
            m.running_var.uniform_(0.5, 1.5)
    return Learner(dls, ReSSLModel(enc, queue_size=4, n_hidden=8, dim=4), loss_func=embedding_loss)

def close(a, b): return a.shape==b.shape and bool((a-b).abs().max()<=1e-4*b.abs().max())

@pytest.mark.parametrize('arch', [small_resnet, tv.resnet18, tv.densenet121], ids=['small', 'resnet', 'densenet'])
def test_every_level_is_the_encoders(arch):
    learn = make(arch)
    enc,backbone = learn.model.encoder.eval(),learn.to_fpn_backbone(3, 16).eval()
    x = torch.randn(2, 3, 64, 64)
    body = enc[0] if len(enc[0])>1 else enc[0][0]
    by_size,y = {},x
    with torch.no_grad():
        for layer in body:
            y = layer(y)
            by_size[y.shape[2:]] = y.clone()
        got,pyramid = backbone.body(x),backbone(x)
        for have,want in zip(got.values(), list(by_size.values())[-3:], strict=True): assert close(have, want)
        assert close(got['2'].mean((2,3)), enc(x))
    assert list(pyramid)==['0', '1', '2', 'pool'] and all(o.shape[1]==16 for o in pyramid.values())

def test_batch_norms_are_constants_unless_told_otherwise():
    learn,x = make(),torch.randn(4, 3, 64, 64)
    for freeze in (True, False):
        backbone = learn.to_fpn_backbone(2, 16, freeze_bn=freeze)
        with torch.no_grad(): a,b = backbone.eval().body(x)['1'],backbone.train().body(x)['1']
        assert close(a, b)==freeze
        assert any(isinstance(m, FrozenBatchNorm2d) for m in backbone.modules())==freeze
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in learn.model.modules())

def test_it_is_a_copy_and_the_teachers_if_asked():
    learn,x = make(),torch.randn(2, 3, 64, 64)
    with torch.no_grad(): learn.model.teacher[0][0][0][0].weight.mul_(-1)
    student,teacher = (learn.to_fpn_backbone(1, 16, teacher=o).eval() for o in (False, True))
    with torch.no_grad():
        for backbone,enc in ((student,learn.model.encoder), (teacher,learn.model.teacher[0])):
            assert close(backbone.body(x)['0'].mean((2,3)), enc.eval()(x))
        student.body.requires_grad_(False).get_submodule('0')[0].weight.zero_()
    assert learn.model.encoder[0][0][0].weight.any() and learn.model.encoder[0][0][0].weight.requires_grad

@pytest.mark.parametrize('kind', ['faster', 'retina'])
def test_torchvisions_detectors_train_and_detect(kind):
    learn = make(n_in=1)
    anchors = AnchorGenerator(((8,),(16,),(24,),(32,),(48,)), ((1.,),)*5)
    how = dict(num_classes=2, min_size=64, max_size=64, image_mean=[0.5], image_std=[0.5])
    if kind=='faster': detector = FasterRCNN(learn.to_fpn_backbone(4, 16), rpn_anchor_generator=anchors, **how,
                                             rpn_post_nms_top_n_train=50, box_batch_size_per_image=16)
    else: detector = RetinaNet(learn.to_fpn_backbone(3, 16, extra_blocks=LastLevelP6P7(16, 16)),
                               anchor_generator=anchors, **how)
    target = dict(boxes=torch.tensor([[8.,8.,30.,30.]]), labels=torch.tensor([1]))
    loss = sum(detector([torch.rand(1, 64, 64)]*2, [target]*2).values())
    loss.backward()
    first = next(p for nm,p in detector.backbone.body.named_parameters())
    assert loss.isfinite() and first.grad.abs().sum()>0
    with torch.no_grad(): assert set(detector.eval()([torch.rand(1, 64, 64)])[0])=={'boxes', 'labels', 'scores'}

def test_refused():
    learn = make()
    with pytest.raises(ValueError, match='n_levels must be between 1 and'): learn.to_fpn_backbone(9)
    flat = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match='a feature pyramid needs a body'): make(flat).to_fpn_backbone()
