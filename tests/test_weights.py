"""Checkpoints of others: files in their layouts, made from networks built here by hand, against what is loaded from
them.
What compares is shown to flag a wrong encoder before it is trusted."""

import os
from copy import deepcopy
from functools import cache, partial
from pathlib import Path

import numpy as np, pytest, torch, torchvision.models as tv
from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, IndexSplitter, PILImage, Learner, vision_learner
from fastai.vision.models import xresnet
from helpers import close, same
from torch import nn

from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import ReSSLModel, body_stem, create_encoder, set_stem, small_resnet, stems
from ressl_fastai.weights import load_ressl_weights, read_ressl_weights

@torch.no_grad()
def out(m, x): return m.eval()(x)

# the layouts

@cache
def resnet(arch, seed):
    "A network with tensors that are all its own, those of batch norm too"
    torch.manual_seed(seed)
    net = arch()
    net.fc = nn.Identity()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight, m.running_var): t.data.uniform_(0.5, 1.5)
            for t in (m.bias, m.running_mean): t.data.normal_()
            m.num_batches_tracked.fill_(seed+7)
    return net.eval()

def source(arch=tv.resnet18, n_in=3, kernel=7, pad=3, pool=True, seed=0):
    "The same with the first layers of another code"
    net = deepcopy(resnet(arch, seed))
    net.conv1 = nn.Conv2d(n_in, 64, kernel, stride=2 if kernel==7 else 1, padding=pad, bias=False)
    if not pool: net.maxpool = nn.Identity()
    return net

def named(prefix, m): return {f'{prefix}.{k}'.lstrip('.'):v for k,v in m.state_dict().items()}
def mlp(): return nn.ModuleDict(dict(linear1=nn.Linear(8, 4), linear2=nn.Linear(4, 2)))
def numbered(net):
    return nn.Sequential(
        *[m for nm, m in net.named_children() if nm != 'fc' and not isinstance(m, nn.Identity)], nn.Flatten()
    )


def queue(prefix=''):
    return {f'{prefix}queue': torch.randn(2, 8), f'{prefix}queue_ptr': torch.zeros(1, dtype=torch.long)}


def official(q, k):
    q,k = (nn.ModuleDict(dict(net=o, head=mlp())) for o in (q,k))
    tensors = {**named('module.encoder_q', q), **named('module.encoder_k', k), **queue('module.')}
    return dict(model=tensors, optimizer=torch.optim.SGD(mlp().parameters(), 0.1).state_dict(), epoch=200)

def archive(q, k):
    nets = {**named('net.net', numbered(q)), **named('encoder_k.net', numbered(k))}
    return dict(model={**nets, **named('head_q', mlp()), **named('head_k', mlp()), **queue()}, optimizer={}, epoch=800)

def solo_learn(q, k):
    nets = {**named('backbone', q), **named('momentum_backbone', k), **named('classifier', nn.Linear(8, 2))}
    heads = {
        **named('projector', mlp()),
        **named('momentum_projector', mlp()),
        **named('momentum_classifier', nn.Linear(8, 2)),
    }
    return dict(state_dict={**nets, **heads, **queue()}, epoch=400, loops={}, callbacks={})

def solo_learn_old(q, k):
    "As solo-learn 1.0.2 writes it, which calls a backbone an encoder"
    res = solo_learn(q, k)
    return dict(res, state_dict={o.replace('backbone.', 'encoder.'):v for o,v in res['state_dict'].items()})

def lightly_example(q, k):
    "As in lightly's examples/pytorch_lightning/byol.py: `nn.Sequential(*list(resnet.children())[:-1])`"
    nets = {**named('backbone', numbered(q)), **named('backbone_momentum', numbered(k))}
    heads = {nm: mlp() for nm in ('projection_head', 'projection_head_momentum', 'prediction_head')}
    return dict(state_dict={**nets, **named('', nn.ModuleDict(heads))}, epoch=9, hyper_parameters={})

def lightly_benchmark(q, k):
    "As in lightly's benchmarks/imagenet/resnet50/byol.py"
    nets = {**named('backbone', q), **named('teacher_backbone', k), **named('online_classifier', nn.Linear(8, 2))}
    heads = {nm: mlp() for nm in ('projection_head', 'teacher_projection_head', 'prediction_head')}
    return dict(state_dict={**nets, **named('', nn.ModuleDict(heads))}, epoch=99)

def stable_pretraining(q, k):
    "As in stable-pretraining's benchmarks/cifar10/byol-resnet18.py: `TeacherStudentWrapper`s"
    wrapped = nn.ModuleDict(dict(backbone=nn.ModuleDict(dict(student=q, teacher=k)),
                                 projector=nn.ModuleDict(dict(student=mlp(), teacher=mlp())), predictor=mlp(),
                                 callbacks_modules=nn.ModuleDict(dict(linear_probe=nn.Linear(8, 2)))))
    for nm in ('base_ema_coefficient', 'final_ema_coefficient', 'ema_coefficient'):
        wrapped['backbone'].register_buffer(nm, torch.tensor(0.996))
    return dict(state_dict=wrapped.state_dict(), epoch=999)

small = dict(kernel=3, pad=1)
files = {  # layout, the sources' first layers, what the caller says, the stem
    'official': (official, {}, 'auto', 'standard'),
    'official_small': (official, dict(small, pool=False, n_in=1), 'small', 'small'),
    'official_small_pool': (official, small, 'small_pool', 'small_pool'),
    'archive': (archive, dict(small, pool=False), 'auto', 'small'),
    'archive_pool': (archive, dict(small, n_in=4), 'auto', 'small_pool'),
    'solo': (solo_learn, {}, 'auto', 'standard'),
    'solo_cifar': (solo_learn, dict(kernel=3, pad=2, pool=False), 'auto', 'small_pad2'),
    'solo_old': (solo_learn_old, {}, 'auto', 'standard'),
    'solo_old_cifar': (solo_learn_old, dict(kernel=3, pad=2, pool=False), 'auto', 'small_pad2'),
    'lightly': (lightly_example, {}, 'auto', 'standard'),
    'lightly_small': (lightly_example, dict(small, pool=False), 'auto', 'small'),
    'lightly_benchmark': (lightly_benchmark, {}, 'auto', 'standard'),
    'lightly_benchmark_small': (lightly_benchmark, dict(small, pool=False), 'small', 'small'),
    'stable': (stable_pretraining, {}, 'auto', 'standard'),
    'stable_cifar': (stable_pretraining, dict(small, pool=False), 'auto', 'small')}

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Files and the student and teacher in them"
    folder,res = tmp_path_factory.mktemp('weights'),{}
    for nm,(layout,kwargs,*_) in files.items():
        nets = [source(**kwargs, seed=i) for i in range(2)]
        torch.save(layout(*nets), folder/nm)
        res[nm] = folder/nm,nets
    yield res
    for file,_ in res.values(): file.unlink()  # 90 MB each

def test_layouts_are_told_apart(made):
    names = {nm:read_ressl_weights(file)[1]['layout'] for nm,(file,_) in made.items()}
    assert names=={'official':'official', 'official_small':'official', 'official_small_pool':'official',
        'archive':'official, small images', 'archive_pool':'official, small images', 'solo':'solo-learn',
        'solo_cifar':'solo-learn', 'solo_old':'solo-learn 1.0.2', 'solo_old_cifar':'solo-learn 1.0.2',
        'lightly':'lightly, examples', 'lightly_small':'lightly, examples',
        'lightly_benchmark':'lightly, benchmarks', 'lightly_benchmark_small':'lightly, benchmarks',
        'stable':'stable-pretraining', 'stable_cifar':'stable-pretraining'}

@pytest.mark.parametrize('arch', ['resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152'])
def test_all_resnets_are_recognised(arch, tmp_path):
    with torch.device('meta'): net = tv.get_model(arch)
    torch.save(dict(model={f'module.encoder_q.net.{k}':v for k,v in empty(net).items()}), tmp_path/arch)
    assert read_ressl_weights(tmp_path/arch)[1]['arch']==arch

# the right ones

@pytest.mark.parametrize('nm', files)
def test_features_are_the_sources(nm, made):
    (file,nets),(_,_,stem,want) = made[nm],files[nm]
    x = torch.randn(3, nets[0].conv1.in_channels, 48, 40)
    feats = [out(net, x) for net in nets]
    assert not close(*feats)  # control: student and teacher differ
    for is_teacher,arch in ((False,tv.resnet18), (True,'resnet18')):
        enc = load_ressl_weights(file, arch, teacher=is_teacher, stem=stem)
        assert all(m.training for m in enc.modules()) and all(
            p.requires_grad for p in enc.parameters()
        )  # as `create_encoder` gives it
        assert close(out(enc, x), feats[is_teacher]) and (enc.stem, enc.n_in, enc.nf, enc.arch) == (
            want,
            x.shape[1],
            512,
            'resnet18',
        )
        got,wanted = (list(m.state_dict().values()) for m in (enc[0], nets[is_teacher]))
        assert len(got)==len(wanted) and all(map(torch.equal, got, wanted))

def test_what_compares_features_flags_a_wrong_encoder(made):
    file,(net,_) = made['solo_cifar']
    x = torch.randn(3, 3, 48, 40)
    def reset(m):
        for o in m.modules():
            if isinstance(o, nn.BatchNorm2d): o.reset_running_stats()
    def swap(m):
        a,b = m[0][5][1].conv1.weight,m[0][5][1].conv2.weight
        a.data,b.data = b.data,a.data
    def padding(m): m[0][0].padding = (1,1)
    def pool(m): m[0][3] = nn.MaxPool2d(3, 2, 1)
    def bias(m): m[0][1].bias.data[0] += 0.1
    def nothing(m): pass
    loaded,passed = load_ressl_weights(file, tv.resnet18),[]
    for change in (reset, swap, padding, pool, bias, nothing):
        change(enc := deepcopy(loaded))
        if close(out(enc, x), out(net, x)): passed.append(change.__name__)
    assert passed==['nothing']

def test_bottlenecks(tmp_path):
    net,x = source(tv.resnet50),torch.randn(2, 3, 64, 64)
    torch.save(solo_learn(net, source()), tmp_path/'r50')
    for arch in (partial(tv.resnet50, num_classes=3), 'resnet50'):
        enc = load_ressl_weights(tmp_path/'r50', arch)
        assert close(out(enc, x), out(net, x)) and enc.nf==2048
    assert [read_ressl_weights(tmp_path/'r50', teacher=o)[1]['arch'] for o in (False,True)]==['resnet50','resnet18']
    with pytest.raises(ValueError, match='computes other features'):
        load_ressl_weights(tmp_path/'r50', partial(tv.resnet50, replace_stride_with_dilation=[False,False,True]))
    (tmp_path/'r50').unlink()

@pytest.mark.parametrize('nm', files)
def test_every_tensor_is_accounted_for(nm, made):
    (file,nets),held = made[nm],torch.load(made[nm][0])
    tensors = held.get('model') or held['state_dict']
    for teacher in (False,True):
        state,info = read_ressl_weights(file, teacher)
        assert same(state, nets[teacher].state_dict()) and info['n_in']==nets[0].conv1.in_channels
        counts = {o:sum(k==o or o.endswith('.') and k.startswith(o) for k in tensors) for o in info['ignored']}
        assert counts==info['ignored'] and sum(counts.values())+len(state)==len(tensors)

def test_half_precision_and_a_head_on_the_network(tmp_path):
    net = source()
    tensors = {k:v.half() if v.is_floating_point() else v for k,v in named('backbone', net).items()}
    torch.save(dict(state_dict={**tensors, **named('backbone.fc', nn.Linear(512, 10))}), tmp_path/'half')
    enc,x = load_ressl_weights(tmp_path/'half', tv.resnet18),torch.randn(2, 3, 64, 64)
    assert {p.dtype for p in enc.parameters()} == {torch.float32} and read_ressl_weights(tmp_path / 'half')[1][
        'ignored'
    ] == {'backbone.fc.': 2}
    assert (out(enc, x)-out(net, x)).norm()<0.01*out(net, x).norm()

# going on

def image_dls():
    ims = np.random.RandomState(0).randint(0, 256, (16,24,24,3), dtype=np.uint8)
    blocks,split = (ImageBlock(PILImage), CategoryBlock),IndexSplitter(range(12, 16))
    block = DataBlock(blocks, get_x=ims.__getitem__, get_y=lambda i: i%2, splitter=split)
    return block.dataloaders(range(16), bs=4, num_workers=0)

needs_stem = pytest.mark.skipif('small_pad2' not in stems, reason="set_stem does not make solo-learn's stem for CIFAR")

@pytest.mark.parametrize('nm', ['official', 'archive', pytest.param('solo_cifar', marks=needs_stem)])
def test_goes_on_in_learners(nm, made, tmp_path):
    file,(net,_) = made[nm]
    enc,x = load_ressl_weights(file, tv.resnet18),torch.randn(2, 3, 24, 24)
    learn = ressl_learner(image_dls(), enc[0], queue_size=8, n_hidden=16, dim=8, metrics=[], path=tmp_path)
    assert learn.model.encoder.stem == enc.stem and all(
        close(out(o, x), out(net, x)) for o in (learn.model.encoder, learn.model.teacher[0])
    )
    learn.save_encoder('enc')
    clf = vision_learner(image_dls(), tv.resnet18, pretrained=False, path=tmp_path).load_encoder('enc')
    assert close(out(clf.model[0], x).mean((2,3)), out(net, x))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.1)
    assert not close(out(learn.model.encoder, x), out(net, x))  # control: it trains

def test_solo_learns_stem_is_never_taken_for_another(made):
    file,(net,_) = made['solo_cifar']
    enc,x = load_ressl_weights(file, tv.resnet18),torch.randn(2, 3, 24, 24)
    other = create_encoder(tv.resnet18, stem='small')
    other[0].load_state_dict(enc[0].state_dict())
    assert not close(out(other, x), out(net, x))  # control: its tensors fit
    for make in (lambda: set_stem(tv.resnet18(), enc.stem), lambda: set_stem(other[0], enc.stem)):
        try: body = make()
        except ValueError as e: assert 'stem' in str(e)
        else: assert body_stem(body)==enc.stem and next(body.children()).padding==(2,2)

# what is refused

with torch.device('meta'): shapes,no_pool = tv.resnet18(),tv.resnet18()
no_pool.maxpool = nn.Identity()

def empty(net):
    return {
        k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in net.state_dict().items() if k[:2] != 'fc'
    }  # a small file


def tensors(layout='module.encoder_q.net.', **changes):
    res = {layout+k:v for k,v in [*empty(shapes).items(), *((k.replace('__', '.'), v) for k,v in changes.items())]}
    return {k:v for k,v in res.items() if v is not None}

class Code:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir,(str(self.path),)

bad = {  # what the file holds, a part of the error, arguments
    'list': ([1], 'none of the layouts', {}),
    'dict': (dict(model=1), 'none of the layouts', {}),
    'numbers': (dict(model={1: torch.ones(2)}), 'none of the layouts', {}),
    'bare': (empty(shapes), 'none of the layouts', {}),
    'other_key': (dict(state_dict=tensors()), 'none of the layouts', {}),
    'objects': (dict(model={**tensors(), 'module.note': 'best'}), 'none of the layouts', {}),
    'ours': (dict(format='ressl_fastai encoder', body={}), 'use load_encoder', {}),
    'path': (dict(model=tensors(), args=Path('a')), 'holds pathlib', {}),
    'unknown': (
        dict(model={**tensors(), 'module.predictor.weight': torch.ones(2)}),
        'no known part: module.predictor.weight',
        {},
    ),
    'like_known': (
        dict(model={**tensors(), 'module.queue_other': torch.ones(2)}),
        'no known part: module.queue_other',
        {},
    ),
    'unwrapped': (
        dict(model={**tensors('encoder_q.net.'), **tensors('encoder_k.net.')}),
        'no known part: encoder_q.net',
        {},
    ),
    'no_teacher': (dict(model=tensors()), 'holds no teacher', dict(teacher=True)),
    'no_student': (dict(model=tensors('module.encoder_k.net.')), 'holds no student', {}),
    'too_few': (
        dict(model=tensors(layer4__1__bn2__running_var=None)),
        'resnet18 is nearest: .* Missing .*layer4.1.bn2.running_var',
        {},
    ),
    'too_many': (
        dict(model=tensors(layer4__2__bn2__running_var=torch.ones(512))),
        'resnet18 is nearest: .* Unexpected .*layer4.2.bn2.running_var',
        {},
    ),
    'shape': (dict(model=tensors(bn1__bias=torch.ones(32))), 'size mismatch for bn1.bias', {}),
    'no_conv': (dict(model=tensors(conv1__weight=None)), 'conv1.weight is missing', {}),
    'conv_5': (dict(model=tensors(conv1__weight=torch.ones(64, 3, 5, 5))), 'convolution of 7x7 or 3x3', {}),
    'conv_out': (dict(model=tensors(conv1__weight=torch.ones(32, 3, 7, 7))), 'size mismatch for conv1.weight', {}),
    'archive_7': (
        dict(model={f'net.net.{k}': v for k, v in empty(numbered(no_pool)).items()}),
        'convolution of 3x3',
        {},
    ),
    'lightly_momentum': (
        dict(state_dict={**tensors('backbone.'), **tensors('query_backbone.')}),
        'no known part: query_backbone.bn1.bias',
        {},
    ),
    'stable_unwrapped': (
        dict(state_dict={**tensors('backbone.'), 'callbacks_modules.probe.weight': torch.ones(2)}),
        'no known part: callbacks_modules.probe.weight',
        {},
    ),
    'nan': (
        dict(model=tensors(layer1__0__bn1__bias=torch.full((64,), torch.nan))),
        'not finite, in layer1.0.bn1.bias',
        {},
    ),
    'untold': (
        dict(model=tensors(conv1__weight=torch.ones(64, 3, 3, 3))),
        "must be 'small' .without. or 'small_pool', got 'auto'",
        {},
    ),
    'untold_wrong': (
        dict(model=tensors(conv1__weight=torch.ones(64, 3, 3, 3))),
        "got 'standard'",
        dict(stem='standard'),
    ),
    'told': (dict(model=tensors()), "stem is 'standard'", dict(stem='small')),
    'told_solo': (
        dict(state_dict=tensors('backbone.', conv1__weight=torch.ones(64, 3, 3, 3))),
        "stem is 'small_pad2'",
        dict(stem='small'),
    ),
    'no_stem': (dict(model=tensors()), "stem='tiny' does not fit", dict(stem='tiny')),
    'resnet34': (dict(model=tensors()), 'holds a resnet18, which does not fit resnet34', dict(arch=tv.resnet34)),
    'resnet50': (dict(model=tensors()), 'holds a resnet18, which does not fit resnet50', dict(arch=tv.resnet50)),
    'xresnet': (dict(model=tensors()), "xresnets among them", dict(arch=xresnet.xresnet18)),
    'timm': (dict(model=tensors()), 'does not fit resnet18d', dict(arch='resnet18d')),
    'mobilenet': (dict(model=tensors()), 'does not fit mobilenet_v2', dict(arch=tv.mobilenet_v2)),
    'module': (dict(model=tensors()), 'got a module', dict(arch=nn.Identity())),
}


@pytest.mark.parametrize('nm', bad)
def test_refused(nm, tmp_path):
    held,msg,kwargs = bad[nm]
    torch.save(held, tmp_path/nm)
    with pytest.raises(ValueError, match=msg) as e: load_ressl_weights(tmp_path/nm, **{'arch':tv.resnet18, **kwargs})
    assert str(tmp_path/nm) in str(e.value) or nm=='module'

def test_the_file_that_refusals_start_from_is_good(tmp_path):
    torch.save(dict(model=tensors()), tmp_path/'good')
    assert load_ressl_weights(tmp_path/'good', tv.resnet18).stem=='standard'

def test_same_tensors_other_network(made):
    "timm's resnetblur18 has resnet18's names and shapes, all of them"
    file,(net,_) = made['official']
    enc,x = create_encoder('resnetblur18', stem='standard'),torch.randn(2, 3, 64, 64)
    enc[0].model.load_state_dict(net.state_dict())  # fits
    assert not close(out(enc, x), out(net, x))
    with pytest.raises(ValueError, match='computes other features'): load_ressl_weights(file, 'resnetblur18')

def test_files_of_another_kind(tmp_path):
    model = ReSSLModel(create_encoder(partial(small_resnet, widen=0.125), size=24), 8, n_hidden=16, dim=8)
    learn = Learner(image_dls(), model, loss_func=nn.MSELoss(), path=tmp_path)
    learn.create_opt()
    learn.save('learner')
    learn.save('alone', with_opt=False)
    learn.save_encoder('encoder')
    torch.save(dict(model=tensors()), tmp_path/'good')
    good = (tmp_path/'good').read_bytes()
    for nm, b in dict(empty=b'', words=b'words', cut=good[:-200], half=good[: len(good) // 2]).items():
        (tmp_path / 'models' / nm).write_bytes(b)
    torch.save(model, tmp_path/'models'/'model')
    torch.save(dict(model=Code(tmp_path/'it_ran')), tmp_path/'models'/'code')
    msgs = dict(learner='use learn.load', alone='none of the layouts', encoder='use load_encoder',
                model='objects beside tensors', code='objects beside tensors')
    for file in [*(tmp_path/'models').iterdir(), tmp_path]:
        with pytest.raises(ValueError, match=msgs.get(file.stem, 'cannot be read')) as e:
            load_ressl_weights(file, tv.resnet18)
        assert str(file) in str(e.value)
    assert not (tmp_path/'it_ran').exists()
    torch.load(tmp_path / 'models' / 'code', weights_only=False)
    assert (tmp_path / 'it_ran').exists()  # control: it would
    with pytest.raises(FileNotFoundError, match='no checkpoint'): load_ressl_weights(tmp_path/'none', tv.resnet18)
