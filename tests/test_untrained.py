"""An untrained encoder as a baseline has the batch statistics of the images: those it begins with, mean 0 and variance
1, make it a worse one than it could be, and a training of a few steps looks better than it is."""

from copy import deepcopy

import pytest, torch, torch.nn.functional as F
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastcore.basics import noop
from torch import nn
from torch.optim.swa_utils import update_bn

from ressl_fastai.batch_norm import batch_norm_kinds
from ressl_fastai.data import digits_dls, tensor_dls
from ressl_fastai.evaluate import measure_batch_norms
from ressl_fastai.learner import ressl_learner
from ressl_fastai.loaders import clean_dl
from ressl_fastai.models import small_resnet
from ressl_fastai.transfer import encoder_learner

def make(dls=None, **kwargs):
    set_seed(0)
    return ressl_learner(dls or digits_dls(size=16, bs=64), small_resnet, metrics=[], queue_size=64, n_hidden=16, dim=8,
                         **kwargs)

def statistics(net): return [v for k,v in net.named_buffers() if 'running' in k]
def same(a, b): return all(torch.allclose(x, y, rtol=1e-4, atol=1e-6) for x,y in zip(a, b, strict=True))
def images(learn): return torch.cat([x for x,*_ in clean_dl(learn.dls.train)])

def fresh_statistics(net):
    "Of all pictures, by PyTorch's own function"
    return [torch.zeros_like(o) if i%2==0 else torch.ones_like(o) for i,o in enumerate(statistics(net))]

def test_statistics_are_those_of_update_bn():
    "Catches: running averages that keep a part of where they began, images with augmentation, another momentum"
    learn = make()
    reference = deepcopy(learn.model.encoder)
    assert same(statistics(reference), fresh_statistics(reference))
    choice = torch.randperm(learn.dls.train.n, generator=torch.Generator().manual_seed(0))[:1024]
    update_bn(images(learn)[choice].split(64), reference)
    before,state = [p.clone() for p in learn.model.encoder.parameters()],torch.get_rng_state()
    assert measure_batch_norms(learn) is learn
    assert same(statistics(learn.model.encoder), statistics(reference))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, before, learn.model.encoder.parameters()))
    assert {m.momentum for m in learn.model.encoder.modules() if isinstance(m, nn.BatchNorm2d)}=={0.1}

def test_images_are_brought_to_the_size_of_views():
    "As embeddings see them; in training the encoder would take them as they come, and have other statistics"
    learn = make(size=8)
    assert learn.model.encoder.view_size==(8,8)
    x = images(learn)
    choice = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:1024]
    small,as_is = (deepcopy(learn.model.encoder) for _ in range(2))
    update_bn(F.interpolate(x, (8,8), mode='bilinear', antialias=True)[choice].split(64), small)
    update_bn(x[choice].split(64), as_is)
    measure_batch_norms(learn)
    assert same(statistics(learn.model.encoder), statistics(small))
    assert not same(statistics(learn.model.encoder), statistics(as_is))

def test_modes_and_kinds_stay():
    "Batch norms in parts, and batches that are no multiple of the parts"
    dls = tensor_dls(torch.randint(0, 255, (150,3,16,16), dtype=torch.uint8), valid_pct=0, bs=32)
    learn = make(dls, batch_norm='split', n_splits=4)
    learn.model.train()
    learn.model.encoder[0][0].eval()
    modes = [m.training for m in learn.model.modules()]
    measure_batch_norms(learn)
    assert batch_norm_kinds(learn.model.encoder)=={'split'}
    assert [m.training for m in learn.model.modules()]==modes

@pytest.mark.parametrize('n', [1, 2, 65])
def test_any_number_of_images(n):
    "One image has no variance where maps have one place; with 65 the last batch is one image"
    dls = tensor_dls(torch.randint(0, 255, (max(n, 2),3,16,16), dtype=torch.uint8), valid_pct=0, bs=2 if n<3 else 64)
    learn = make(tensor_dls(torch.randint(0, 255, (64,3,16,16), dtype=torch.uint8), valid_pct=0, bs=64))
    probe = Learner(dls, learn.model, loss_func=noop)
    measure_batch_norms(probe, n=n)
    assert all(o.isfinite().all() for o in statistics(probe.model.encoder))

def test_networks_without_batch_norm_stay():
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU())
    learn = ressl_learner(digits_dls(size=16, bs=64), net, metrics=[], queue_size=64)
    before = deepcopy(learn.model.encoder.state_dict())
    measure_batch_norms(learn)
    assert all(torch.equal(before[k], v) for k,v in learn.model.encoder.state_dict().items())

def test_the_untrained_encoder_of_a_file_has_them(tmp_path):
    learn = make(path=tmp_path)
    file = learn.save_encoder('encoder')
    found = encoder_learner(file, digits_dls(size=16, bs=64), trained=False).model.encoder
    assert not same(statistics(found), fresh_statistics(found))
    kept = encoder_learner(file, digits_dls(size=16, bs=64)).model.encoder
    assert same(statistics(kept), statistics(learn.model.encoder))
