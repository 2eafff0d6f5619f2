"""An untrained encoder as a baseline has the batch statistics of the images: those it begins with, mean 0 and variance
1, make it a worse one than it could be, and a training of a few steps looks better than it is."""

import json
from copy import deepcopy

import pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastcore.basics import noop
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn
from torchvision.models import _api, resnet18
from helpers import write_digits

from ressl_fastai import cli, runs
from ressl_fastai.batch_norm import FrozenBatchNorm, batch_norm_kinds
from ressl_fastai.data import digits_dls, tensor_dls
from ressl_fastai.evaluate import knn_accuracy, measure_batch_norms
from ressl_fastai.learner import ressl_learner
from ressl_fastai.loaders import clean_dl
from ressl_fastai.models import create_encoder, small_resnet
from ressl_fastai.transfer import encoder_learner, load_encoder

def make(dls=None, **kwargs):
    set_seed(0)
    return ressl_learner(dls or digits_dls(size=16, bs=64), small_resnet, metrics=[], queue_size=64, n_hidden=16, dim=8,
                         **kwargs)

def statistics(net): return [v for k,v in net.named_buffers() if 'running' in k]
def same(a, b): return all(torch.allclose(x, y, rtol=1e-4, atol=1e-6) for x,y in zip(a, b, strict=True))
def images(learn): return torch.cat([x for x,*_ in clean_dl(learn.dls.train)])

def fresh_statistics(net):
    "Those that batch norms begin with: means 0 and variances 1, in turn"
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

@pytest.mark.parametrize('kwargs', [{}, dict(batch_norm='split', n_splits=4)])
def test_frozen_statistics_stay_in_student_and_teacher(kwargs):
    """Catches: fastai's training mode that comes after, a teacher that is forgotten, statistics that stay but are not
    used, a projector whose new batch norm is frozen, too"""
    learn = measure_batch_norms(make(projector_bn=True, **kwargs))
    learn.model.teacher[0].load_state_dict(learn.model.encoder.state_dict())
    encoders = learn.model.encoder,learn.model.teacher[0]
    before,weights = deepcopy([statistics(e) for e in encoders]),[o.clone() for o in encoders[0].parameters()]
    used,new = [],[]
    class Look(Callback):
        run_valid = False
        def after_pred(self):
            used.extend(m.training for e in encoders for m in e.modules() if isinstance(m, _BatchNorm))
            new.extend(m.training for m in self.model.projector.modules() if isinstance(m, _BatchNorm))
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3, cbs=[FrozenBatchNorm(), Look()])
    assert used and not any(used) and new and all(new)
    assert all(torch.equal(a, b) for e,was in zip(encoders, before) for a,b in zip(statistics(e), was, strict=True))
    assert not any(map(torch.equal, weights, encoders[0].parameters()))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)  # control: without it
    assert not same(statistics(encoders[0]), before[0])

def with_weights(monkeypatch):
    "Let torchvision's resnet18 come with weights whose batch norms have statistics; nothing is downloaded"
    weights = resnet18().state_dict()
    for k,v in weights.items():
        if 'running_mean' in k: v.normal_()
    monkeypatch.setattr(_api, 'load_state_dict_from_url', lambda *args, **kwargs: weights)
    return [v for k,v in weights.items() if 'running' in k]

@pytest.mark.parametrize('kwargs,frozen', [
    (dict(pretrained=True), True), (dict(pretrained=True, stem='standard'), True),
    (dict(pretrained=True, stem='small'), False),  # a new first convolution: its maps have other statistics
    (dict(pretrained=True, batch_norm='plain'), False), (dict(pretrained=True, batch_norm='split', n_splits=4), False),
    (dict(batch_norm='frozen'), True), ({}, False)])
def test_librarys_weights_keep_their_statistics(monkeypatch, kwargs, frozen):
    with_weights(monkeypatch)
    learn = ressl_learner(digits_dls(size=32, bs=64), resnet18, metrics=[], queue_size=64, n_hidden=16, dim=8, **kwargs)
    assert any(isinstance(o, FrozenBatchNorm) for o in learn.cbs)==frozen

def test_fresh_weights_have_no_statistics_to_keep():
    "Refused before anything is trained; those of a file are kept"
    learn = make(batch_norm='frozen')
    before = deepcopy(learn.model.state_dict())
    with pytest.raises(ValueError, match='load an encoder first'), learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert all(torch.equal(before[k], v) for k,v in learn.model.state_dict().items())
    measure_batch_norms(learn)
    kept = deepcopy(statistics(learn.model.encoder))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert all(map(torch.equal, statistics(learn.model.encoder), kept))

def test_the_random_encoder_of_a_run_has_the_statistics_of_the_images(tmp_path, monkeypatch):
    """Catches: those it begins with, those that training left, the trained encoder, the held-out images; batch norm in
    half precision moves single images of the 360 (see `_roughly_embedded`)"""
    first = []
    def spy(learn):
        first.append(deepcopy(learn.model.encoder))
        return measure_batch_norms(learn)
    monkeypatch.setattr(runs, 'measure_batch_norms', spy)
    out = tmp_path/'run'
    cli.ressl_pretrain('digits', out=str(out), epochs=1, size=8, num_workers=0, no_report=True)
    found = json.loads((out/'config.json').read_text())['knn_accuracy']
    dls = digits_dls(size=8, bs=64)
    x,y = (torch.cat(o) for o in zip(*clean_dl(dls.train)))
    valid_x,valid_y = (torch.cat(o) for o in zip(*clean_dl(dls.valid)))
    def knn(net):
        with torch.no_grad(): feats = [net.eval()(o) for o in (x, valid_x)]
        return knn_accuracy(feats[0], y, feats[1], valid_y)
    net, = first
    assert same(statistics(net), fresh_statistics(net))
    begun = knn(deepcopy(net))
    update_bn(x.split(64), net)
    assert knn(net)==pytest.approx(found['random encoder'], abs=4/360)
    assert abs(begun-found['random encoder'])>8/360
    assert abs(found['pretrained encoder']-found['random encoder'])>8/360

def test_a_run_that_begins_with_the_librarys_weights_is_compared_with_these(tmp_path, monkeypatch):
    "As they are; catches: weights of ImageNet that are called random, or get other statistics, then or in training"
    expected = with_weights(monkeypatch)
    compared = []
    real = runs._roughly_embedded
    def spy(learn, dl):
        compared.append(deepcopy(learn.model.encoder))
        return real(learn, dl)
    monkeypatch.setattr(runs, '_roughly_embedded', spy)
    write_digits(tmp_path/'ims', 60)
    out = tmp_path/'run'
    cli.ressl_pretrain(str(tmp_path/'ims'), out=str(out), size=16, epochs=1, bs=16, pretrained=True, num_workers=0,
                       no_report=True)
    assert list(json.loads((out/'config.json').read_text())['knn_accuracy'])==[
        'raw pixels','library weights','pretrained encoder']
    assert compared and all(torch.equal(a, b) for a,b in zip(statistics(compared[0]), expected, strict=True))
    trained = load_encoder(create_encoder(resnet18, size=16, stem='standard'), out/'encoder.pth')
    assert all(torch.equal(a, b) for a,b in zip(statistics(trained), expected, strict=True))
    assert not torch.equal(next(trained.parameters()), next(compared[0].parameters()))
