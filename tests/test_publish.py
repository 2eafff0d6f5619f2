"""The encoder in other hands: the lines that are printed and stand in the card are run as they are, and what they give
is compared with the encoder."""

import json, random, re, sys
from functools import partial
from inspect import signature
from pathlib import Path

import numpy as np, pytest, torch, torchvision
from fastai.learner import Learner
from sklearn.datasets import load_digits
from torch import nn

import ressl_fastai.publish
from ressl_fastai.data import digits_dls, tensor_dls
from ressl_fastai.evaluate import embedding_loss
from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import ReSSLModel, create_encoder, small_resnet
from ressl_fastai.loaders import add_normalize

timm = pytest.importorskip('timm')
root = Path(__file__).resolve().parent.parent


def make(arch, path, size=64, n_in=3, stem='auto', view_size=None):
    "A learner whose encoder has batch statistics of its own, as a trained one"
    ims = np.random.default_rng(0).integers(0, 256, (8, size, size, n_in), dtype=np.uint8)
    dls = tensor_dls(ims if n_in==3 else ims[...,0], bs=2, seed=0)
    add_normalize(dls, ([0.4]*n_in, [0.3]*n_in))
    enc = create_encoder(arch, n_in, stem=stem, size=view_size or size)
    for m in enc.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(std=0.1)
            m.running_var.uniform_(0.5, 1.5)
    model = ReSSLModel(enc, queue_size=4, n_hidden=8, dim=4)
    if view_size: model.view_size = view_size,view_size
    return Learner(dls, model, loss_func=embedding_loss, path=path, model_dir='.')

def codes(printed):
    "Library to its lines"
    parts = re.split(r'^# loads into (\w+)\n', printed, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2]))

def run(code, x, folder, monkeypatch, **given):
    "What the lines call features, run in the folder of the file"
    monkeypatch.chdir(folder)
    space = dict(x=x, **given)
    with torch.no_grad(): exec(code, space)
    return space['features']

@torch.no_grad()
def features(learn, x, teacher=False):
    return (learn.model.teacher[0] if teacher else learn.model.encoder).eval()(x)

def close(a, b): return a.shape==b.shape and bool((a-b).abs().max()<=1e-4*b.abs().max())

others = {
    'vgg11_bn': torchvision.models.vgg11_bn, 'densenet121': torchvision.models.densenet121,
    'convnext_tiny': torchvision.models.convnext_tiny, 'mobilenet_v3_small': torchvision.models.mobilenet_v3_small}
cases = {
    'resnet18, small': (torchvision.models.resnet18, dict(size=32, n_in=1), {'torchvision', 'timm'}),
    'resnet18, small_pad2': (torchvision.models.resnet18, dict(size=32, stem='small_pad2'), {'torchvision', 'timm'}),
    'resnet50, standard': (torchvision.models.resnet50, dict(size=96), {'torchvision', 'timm'}),
    "timm's resnet18": ('resnet18', dict(size=64), {'torchvision', 'timm'}),
    "timm's convnext_atto": ('convnext_atto', {}, {'timm'}),
    "timm's efficientnet_b0": ('efficientnet_b0', {}, {'timm'}),
    "timm's vit": ('vit_tiny_patch16_224', dict(size=224), {'timm'}),
    **{nm:(arch, {}, {'torchvision'}) for nm,arch in others.items()}}

@pytest.mark.parametrize('nm', cases)
def test_the_printed_lines_load_strictly_and_give_the_encoders_features(nm, tmp_path, capsys, monkeypatch):
    arch,kw,libraries = cases[nm]
    learn = make(arch, tmp_path, **kw)
    file = learn.save_weights('weights.pth')
    printed = codes(capsys.readouterr().out)
    assert set(printed)==libraries
    shape = learn.dls.one_batch()[0].shape[1:]
    x = torch.randn(3, *shape)
    for code in printed.values():
        assert 'strict=' not in code
        assert close(run(code, x, tmp_path, monkeypatch), features(learn, x))
    tensors = torch.load(file, weights_only=True)
    assert all(v.is_contiguous() and v.device.type=='cpu' for v in tensors.values())

def test_timms_own_line_reads_both_kinds_of_file(tmp_path, capsys):
    pytest.importorskip('safetensors')
    learn = make(torchvision.models.resnet18, tmp_path, size=96)
    learn.model.to(memory_format=torch.channels_last)  # which safetensors does not take
    x = torch.randn(2, 3, 96, 96)
    for nm in ('encoder.pth', 'encoder.safetensors'):
        file = learn.save_weights(nm)
        net = timm.create_model('resnet18', num_classes=0, checkpoint_path=str(file)).eval()
        with torch.no_grad(): assert close(net(x), features(learn, x))
    assert 'load_file' in capsys.readouterr().out

class Own(nn.Module):
    "Somebody's network"
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3))
    def forward(self, x): return self.net(x)

narrow = partial(small_resnet, widen=0.25)

archs = dict(small=(small_resnet,False), narrow=(narrow,True), own=(Own(),True))

@pytest.mark.parametrize('arch,asked', archs.values(), ids=archs)
def test_what_no_library_has_loads_into_create_encoder(arch, asked, tmp_path, capsys, monkeypatch):
    learn = make(arch, tmp_path, size=32)
    learn.save_weights('weights.pth')
    printed = codes(capsys.readouterr().out)
    assert set(printed)=={'ressl_fastai'} and ('arch = ...' in printed['ressl_fastai'])==asked
    code = re.sub(r'^arch = \.\.\..*\n', '', printed['ressl_fastai'], flags=re.M)
    x = torch.randn(2, 3, 32, 32)
    fresh = Own() if isinstance(arch, Own) else arch
    assert close(run(code, x, tmp_path, monkeypatch, arch=fresh), features(learn, x))

def test_same_tensors_in_another_network_are_not_called_the_librarys(tmp_path, capsys):
    "Control: what compares features must see a difference that names and shapes do not show"
    learn = make(torchvision.models.resnet18, tmp_path, size=96)
    learn.model.encoder[0][2] = nn.LeakyReLU(0.3)
    learn.save_weights('weights.pth')
    assert set(codes(capsys.readouterr().out))=={'ressl_fastai'}

def test_the_teachers(tmp_path, capsys, monkeypatch):
    learn = make(torchvision.models.resnet18, tmp_path, size=32)
    with torch.no_grad(): learn.model.teacher[0][0][0].weight.mul_(-1)
    x = torch.randn(2, 3, 32, 32)
    for teacher in (False, True):
        learn.save_weights('weights.pth', teacher=teacher)
        got = run(codes(capsys.readouterr().out)['timm'], x, tmp_path, monkeypatch)
        assert close(got, features(learn, x, teacher)) and not close(got, features(learn, x, not teacher))

def test_refused(tmp_path, monkeypatch, capsys):
    learn = make(small_resnet, tmp_path, size=16)
    with pytest.raises(ValueError, match="must end in '.pth' or '.safetensors'"): learn.save_weights('weights.onnx')
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    with pytest.raises(ImportError, match='pip install safetensors, or save weights.pth'):
        learn.save_weights('weights.safetensors')
    with torch.no_grad(): learn.model.encoder[0][0][0].weight[0] = torch.nan
    with pytest.raises(ValueError, match='0.0.weight holds values that are not finite'):
        learn.save_weights('weights.pth')
    assert not list(tmp_path.iterdir())

def test_without_timm(tmp_path, monkeypatch, capsys):
    learn = make(torchvision.models.resnet18, tmp_path, size=32)
    monkeypatch.setitem(sys.modules, 'timm', None)
    learn.save_weights('weights.pth')
    assert set(codes(capsys.readouterr().out))=={'torchvision'}

# the card

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    learn = ressl_learner(digits_dls(8), torchvision.models.resnet18, n_hidden=16, dim=8, queue_size=64,
                          path=tmp_path_factory.mktemp('secret-folder'), model_dir='.')
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    return learn

def test_a_card_is_complete_and_its_lines_run(trained, monkeypatch, capsys):
    pytest.importorskip('safetensors')
    trained.save_weights('encoder.safetensors')
    card = trained.model_card(license='mit', data='Digits.', limits='Not tried on letters.').read_text()
    blocks = re.findall(r'```python\n(.*?)```', card, flags=re.S)
    x = torch.randn(2, 1, 8, 8)
    assert len(blocks)==2
    for code in blocks: assert close(run(code, x, trained.path, monkeypatch), features(trained, x))
    head = card.split('---')[1]
    assert 'license: mit' in head and 'library_name: torchvision' in head
    for text in ('Digits.', 'Not tried on letters.', '| batch size | 64 |', '| epochs | 1 |', 'teacher 0.04',
                 f'| knn_accuracy | {trained.recorder.values[-1][2]:.4g} |'):
        assert text in card
    assert 'secret-folder' not in card and 'Not said' not in card

def test_a_card_says_what_it_does_not_know(trained):
    card = trained.model_card('card.md').read_text()
    assert card.count('*Not said') == 2 and 'license:' not in card

def test_a_card_has_what_the_guard_said(trained):
    trained.guard.alarms.append('Warning in epoch 0: this | that')
    try: assert '- Warning in epoch 0' in trained.model_card('card.md').read_text()
    finally: trained.guard.alarms.clear()

def test_tables_keep_their_columns():
    row = ressl_fastai.publish._table(('a','b'), [('x|y', 1)]).splitlines()[-1]
    assert len(re.findall(r'(?<!\\)\|', row))==3

def test_a_card_needs_a_training(tmp_path):
    with pytest.raises(ValueError, match='model_card needs a ressl_learner'): make(small_resnet, tmp_path).model_card()

# recipes of the page

def cells(*ids):
    nb = json.loads((root/'nbs'/'36_publish.ipynb').read_text())
    return '\n'.join(''.join(c['source']) for i in ids for c in nb['cells'] if c['id']==i)

@pytest.fixture
def recipe(tmp_path):
    "What the recipe's cells have at hand, with an encoder that also brings images to a size"
    from copy import deepcopy
    learn = make(torchvision.models.resnet18, tmp_path, size=48, view_size=32)
    return dict(nn=nn, torch=torch, learn=learn, deepcopy=deepcopy, folder=tmp_path, x=torch.rand(5, 3, 48, 48))

def as_the_page(source): return source.replace('torch.rand(2, 1, 8, 8)', 'torch.rand(2, 3, 48, 48)')

def wanted(o):
    x = (o['x']-0.4)/0.3
    return features(o['learn'], x)

def test_torch_export_gives_the_same_features(recipe):
    recipe['test_close'] = lambda *args, **kwargs: None
    exec(as_the_page(cells('pb22', 'pb23')), recipe)
    with torch.no_grad(): assert close(recipe['again'](recipe['x']), wanted(recipe))

def test_onnx_gives_the_same_features(recipe):
    for nm in ('onnx', 'onnxscript', 'onnxruntime'): recipe[nm] = pytest.importorskip(nm)
    recipe['test_close'] = lambda *args, **kwargs: None
    exec(as_the_page(cells('pb22', 'pb23', 'pb25')), recipe)
    assert close(recipe['to_onnx'](recipe['folder']/'encoder.onnx'), wanted(recipe))

def test_the_hub_recipe_calls_what_there_is():
    hub = pytest.importorskip('huggingface_hub')
    text = cells('pb30')
    for nm in ('create_repo', 'upload_folder'):
        used = re.search(rf'api\.{nm}\((.*?)\)\n', text, flags=re.S)[1]
        assert set(re.findall(r'(\w+)=', used))<=set(signature(getattr(hub.HfApi, nm)).parameters)

@pytest.mark.parametrize('how', ['save_weights', 'model_card', 'report'])
def test_what_is_written_between_two_fits_leaves_the_random_state(tmp_path, how):
    "A training that goes on is the same with and without it"
    x,y = load_digits(return_X_y=True)
    dls = tensor_dls((x.reshape(-1, 8, 8)[:96]*15).astype(np.uint8), y[:96], bs=16)
    learn = ressl_learner(dls, partial(small_resnet, widen=0.125), queue_size=16, n_hidden=8, dim=4, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        state = random.getstate(),np.random.get_state()[1].copy(),torch.get_rng_state()
        getattr(learn, how)(**({'file':'a.pth'} if how=='save_weights' else {}))
    assert random.getstate()==state[0] and (np.random.get_state()[1]==state[1]).all()
    assert torch.equal(torch.get_rng_state(), state[2])
