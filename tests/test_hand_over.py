"""An encoder in a classifier or a U-Net: its tensors, normalisation, groups and frozen state, against fastai's own
learners."""

from copy import deepcopy
from functools import partial

import numpy as np, pytest, torch, torchvision.models as tv
from fastai.vision.all import (CategoryBlock, DataBlock, IndexSplitter, MaskBlock, Normalize, TensorImage,
                               TransformBlock, trainable_params, unet_learner, vision_learner)
from fastai.vision.learner import model_meta
from fastai.vision.models.xresnet import xresnet18
from helpers import Own, close, same, state
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ressl_fastai.evaluate import embed
from ressl_fastai.learner import ressl_learner
from ressl_fastai.transfer import load_encoder
from ressl_fastai.models import body_stem, small_resnet
from ressl_fastai.precision import DevicePrecision

def tiny_densenet(pretrained=False):
    return tv.DenseNet(growth_rate=4, block_config=(1, 1), num_init_features=8, num_classes=2)


tiny_resnet, dense = (
    partial(small_resnet, widen=0.125),
    partial(tv.DenseNet, growth_rate=4, block_config=(1, 1), num_init_features=8),
)


def make_dls(n_in=3, size=32, norm=None, masks=False, n=12):
    "Noise that is not centred; two categories, or masks of two codes; `norm` is (mean, std) of every channel"
    ims = np.random.RandomState(0).rand(n, n_in, size, size).astype(np.float32)**2
    block = DataBlock(
        (TransformBlock, MaskBlock(['paper', 'ink']) if masks else CategoryBlock),
        get_x=lambda i: TensorImage(torch.tensor(ims[i])),
        get_y=(lambda i: np.uint8(ims[i, 0] > 0.5)) if masks else lambda i: i % 2,
        splitter=IndexSplitter(range(n - 4, n)),
        batch_tfms=norm and Normalize.from_stats([norm[0]] * n_in, [norm[1]] * n_in, cuda=False),
    )
    return block.dataloaders(range(n), bs=4, num_workers=0)

def quiet_fit(learn, n=1, fine_tune=False):
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(n) if fine_tune else learn.fit(n, 1e-2)
    return learn

def make(arch=tiny_resnet, n_in=3, size=32, norm=(0.3,0.4), train=True, **kwargs):
    "A learner whose student and teacher differ: trained, or made so"
    torch.manual_seed(0)
    kw = dict(queue_size=8, n_hidden=16, dim=8, metrics=[], guard=False, teacher_momentum=0.9)
    learn = ressl_learner(make_dls(n_in, size, norm), arch() if arch is Own else arch, **{**kw, **kwargs})
    if train: return quiet_fit(learn)
    for p in learn.model.teacher.parameters(): p.data.mul_(1.1)
    return learn

def norms(dls):
    return [
        [(f.mean.flatten().tolist(), f.std.flatten().tolist()) for f in dl.after_batch.fs if isinstance(f, Normalize)]
        for dl in dls
    ]


def changed(before, m): return {k for k,v in m.state_dict().items() if not torch.equal(before[k], v)}
def in_batch_norm(m):
    return {f'{nm}.{k}' for nm, o in m.named_modules() if isinstance(o, _BatchNorm) for k in o.state_dict()}


def groups(learn):
    "Names of the parameters in each group of the splitter"
    names = {id(p):k for k,p in learn.model.named_parameters()}
    return [[names[id(p)] for p in g] for g in learn.splitter(learn.model)]
def pooled(learn):
    "What the body makes of the validation images, as the learner's own `dls` gives them"
    body = learn.model[0].eval()
    with torch.no_grad():
        return torch.cat(
            [o.mean((2, 3)) if o.ndim == 4 else o for o in (body(b[0].as_subclass(Tensor)) for b in learn.dls.valid)]
        )


# to_vision_learner: the encoder

@pytest.mark.parametrize(
    'arch,n_in,stem',
    [
        (tiny_resnet, 1, 'auto'),
        (tiny_resnet, 3, 'small_pool'),
        (tiny_resnet, 4, 'standard'),
        (dense, 3, 'auto'),
        ('mobilenetv3_small_050', 3, 'auto'),
        (Own, 3, 'auto'),
    ],
    ids=['grey', 'small_pool', 'four', 'dense', 'timm_cnn', 'own'],
)
@pytest.mark.filterwarnings('ignore:images have')
def test_body_is_the_encoder(arch, n_in, stem):
    learn = make(arch, n_in, stem=stem)
    encoders = learn.model.encoder,learn.model.teacher[0]
    for teacher in (False,True):
        clf = learn.to_vision_learner(make_dls(n_in), teacher=teacher)
        assert same(state(clf.model[0]), state(encoders[teacher][0])) and not same(
            state(clf.model[0]), state(encoders[not teacher][0])
        )  # and a control
        assert body_stem(clf.model[0])==learn.model.encoder.stem!='auto'
        want,other = (embed(learn, learn.dls.valid, teacher=o)[0] for o in (teacher, not teacher))
        assert close(pooled(clf), want) and not close(pooled(clf), other)
        assert clf.get_preds()[0].shape==(4,2)
    quiet_fit(clf)

def test_a_timm_transformer_is_handed_over():
    learn = make('test_vit', size=160)
    clf = learn.to_vision_learner(make_dls(size=160))
    assert same(state(clf.model[0]), state(learn.model.encoder[0]))
    assert close(pooled(clf), embed(learn, learn.dls.valid)[0])
    before = state(clf.model)
    moved = changed(before, quiet_fit(clf).model)
    assert moved=={k for k in before if k.startswith('1.') or '.norm' in k}  # fastai goes on with layer norms too

@pytest.mark.parametrize('teacher', [False, True])
def test_body_is_a_copy(teacher):
    learn = make()
    clf = learn.to_vision_learner(make_dls(), teacher=teacher)
    before = (
        state(learn.model),
        learn.opt.state_dict(),
        [p.requires_grad for p in learn.model.parameters()],
        [m.training for m in learn.model.modules()],
    )
    body = state(clf.model[0])
    quiet_fit(clf, fine_tune=True)
    assert same(before[0], state(learn.model)) and not same(body, state(clf.model[0]))
    assert before[2:]==([p.requires_grad for p in learn.model.parameters()],[m.training for m in learn.model.modules()])
    body = state(clf.model)
    quiet_fit(learn)
    assert same(body, state(clf.model)) and not same(before[0], state(learn.model))

def test_frozen_pretraining_is_handed_over_whole():
    learn = make()
    learn.freeze()
    for teacher in (False,True):
        clf = learn.to_vision_learner(
            make_dls(), teacher=teacher, splitter=trainable_params
        )  # leaves out what is frozen
        assert {id(p) for p in clf.opt.param_lists.concat()}=={id(p) for p in clf.model.parameters()}
    assert not all(p.requires_grad for p in learn.model.student.parameters())  # control

@pytest.mark.parametrize('kind', ['split', 'sync'])
@pytest.mark.parametrize('unet', [False, True])
def test_batch_norms_are_plain_again(kind, unet):
    learn = (
        make(batch_norm=kind, n_splits=2)
        if kind == 'split'
        else ressl_learner(make_dls(norm=(0.3, 0.4)), tiny_resnet, batch_norm=kind, queue_size=8)
    )
    new = learn.to_unet_learner(make_dls(masks=True)) if unet else learn.to_vision_learner(make_dls())
    body = new.model.layers[0] if unet else new.model[0]
    assert same(state(body), state(learn.model.encoder[0]))
    def kinds(m): return {type(o) for o in m.modules() if isinstance(o, _BatchNorm)}
    assert kinds(body)=={nn.BatchNorm2d}!=kinds(learn.model.encoder)
    quiet_fit(new)  # on the CPU, where SyncBatchNorm cannot train

def test_after_bfloat16_training_all_is_float32():
    learn = make(precision='bfloat16', channels_last=True)
    assert learn.precision.dtype==torch.bfloat16
    clf = learn.to_vision_learner(make_dls())
    assert same(state(clf.model[0]), state(learn.model.encoder[0]))
    assert close(pooled(clf), embed(learn, learn.dls.valid)[0])
    assert {p.dtype for p in clf.model.parameters()} == {torch.float32} and not any(
        isinstance(o, DevicePrecision) for o in clf.cbs
    )
    assert clf.get_preds()[0].dtype==torch.float32
    dtypes = set()
    clf.model[0].register_forward_hook(lambda m, i, o: dtypes.add(o.dtype))
    quiet_fit(clf)
    assert dtypes=={torch.float32}  # no autocast is left in training

# normalisation

def handing_over(kind):
    "A learner, its method, and what makes data for it"
    learn = make()
    return learn,getattr(learn, f'to_{kind}_learner'),partial(make_dls, masks=kind=='unet')

@pytest.mark.parametrize('kind', ['vision', 'unet'])
def test_d28_normalised_once_as_in_pretraining(kind):
    learn,hand_over,data = handing_over(kind)
    want,raw = [[([0.3]*3,[0.4]*3)]]*2,data().valid.one_batch()[0]
    ready = data()
    hand_over(ready)
    for dls in (data(), data(norm=(0.3,0.4)), ready):
        assert hand_over(dls).dls is dls and [[tuple(map(pytest.approx, o)) for o in n] for n in norms(dls)]==want
        torch.testing.assert_close(Tensor(dls.valid.one_batch()[0]), (Tensor(raw)-0.3)/0.4)
    if kind=='vision': assert norms(hand_over(learn.dls).dls)==norms(dls)

@pytest.mark.parametrize('kind', ['vision', 'unet'])
def test_d28_another_normalize_is_refused(kind):
    _,hand_over,data = handing_over(kind)
    for norm in ((0.3,0.5), (0.5,0.4)):
        dls = data(norm=norm)
        before = norms(dls)
        with pytest.raises(ValueError, match='was pretrained with Normalize.*0.3.*0.4.*dls normalises with.*0.[45]'):
            hand_over(dls)
        assert norms(dls)==before
    dls = data(n_in=1)
    with pytest.raises(ValueError, match='pretrained on images with 3 channels, those of dls have 1'): hand_over(dls)
    assert norms(dls)==[[],[]]

def test_d28_control_vision_learner_neither_normalises_nor_freezes():
    clf = vision_learner(make_dls(), tv.resnet18, pretrained=False)
    assert norms(clf.dls)==[[],[]] and clf.opt is None
    before = state(clf.model)
    assert changed(before, quiet_fit(clf).model)==set(before)

# frozen state and groups

def test_frozen_up_to_the_head_then_fine_tuned():
    clf = make().to_vision_learner(make_dls())
    before,bn = state(clf.model),in_batch_norm(clf.model)
    moved = changed(before, quiet_fit(clf).model)
    assert moved==bn|{k for k in before if k.startswith('1.')} and clf.opt.frozen_idx==len(clf.opt.param_lists)-1
    assert {k for k in before if k.startswith('0.')}-bn  # control: there is something to freeze
    clf = make().to_vision_learner(make_dls())
    moved = changed(before, quiet_fit(clf, fine_tune=True).model)
    assert moved==set(before) and clf.opt.frozen_idx==0
    assert clf.opt.hypers[0]['lr']<clf.opt.hypers[-1]['lr']

def test_unet_is_frozen_up_to_the_decoder_then_fine_tuned():
    unet = make().to_unet_learner(make_dls(masks=True))
    before,bn = state(unet.model),in_batch_norm(unet.model)
    def body(ks): return {k for k in ks if k.startswith('layers.0.')}-bn
    moved = changed(before, quiet_fit(unet).model)
    assert (
        not body(moved)
        and body(before)
        and unet.opt.frozen_idx == len(unet.opt.param_lists) - 1
        and {k for k in before if k.startswith('layers.4.')} <= moved | bn
    )
    assert body(changed(before, quiet_fit(unet, fine_tune=True).model))==body(before)

def test_groups_are_fastais(monkeypatch):
    monkeypatch.setitem(model_meta[tv.resnet18], 'weights', None)  # no download
    ref, clf = (
        vision_learner(make_dls(), tv.resnet18, pretrained=True),
        make(tv.resnet18, train=False).to_vision_learner(make_dls()),
    )
    assert groups(clf)==groups(ref) and len(groups(clf))==3 and clf.opt.frozen_idx==ref.opt.frozen_idx==2
    assert [p.requires_grad for p in clf.model.parameters()]==[p.requires_grad for p in ref.model.parameters()]
    ref = unet_learner(make_dls(masks=True), tv.resnet18, pretrained=True)
    unet = make(tv.resnet18, stem='standard', train=False).to_unet_learner(make_dls(masks=True))
    assert groups(unet)==groups(ref) and len(groups(unet))==3 and unet.opt.frozen_idx==ref.opt.frozen_idx==2
    assert [p.requires_grad for p in unet.model.parameters()]==[p.requires_grad for p in ref.model.parameters()]

@pytest.mark.parametrize(
    'arch,n',
    [(xresnet18, 3), ('mobilenetv3_small_050', 2), (tiny_resnet, 2)],
    ids=['xresnet18', 'timm_cnn', 'tiny_resnet'],
)
def test_groups_of_other_architectures_are_fastais(arch, n):
    ref,clf = vision_learner(make_dls(), arch, pretrained=False),make(arch, train=False).to_vision_learner(make_dls())
    assert groups(clf)==groups(ref) and len(groups(clf))==n and clf.opt.frozen_idx==n-1

# arguments

def test_head_and_learner_take_what_vision_learner_takes():
    learn = make()
    kw = dict(lin_ftrs=[16], ps=0.25, concat_pool=False, bn_final=True, first_bn=False, y_range=(0,1))
    ref, clf = (
        vision_learner(make_dls(), tiny_resnet, pretrained=False, **kw),
        learn.to_vision_learner(make_dls(), wd=0.3, moms=(0.9, 0.8, 0.9), **kw),
    )
    assert repr(clf.model[1])==repr(ref.model[1]) and clf.wd==0.3 and clf.moms==(0.9,0.8,0.9)
    assert learn.to_vision_learner(make_dls(), n_out=5).get_preds()[0].shape==(4,5)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(learn.model.encoder.nf, 2))
    assert learn.to_vision_learner(make_dls(), custom_head=head).model[1] is head

@pytest.mark.parametrize('kind', ['vision', 'unet'])
def test_what_pretraining_has_decided_is_refused_by_name(kind):
    _,hand_over,data = handing_over(kind)
    dls = data()
    for nm,v in dict(arch=tv.resnet18, pretrained=False, normalize=True, cut=-2, n_in=3, lin_ftr=[64]).items():
        with pytest.raises(TypeError, match=f"'{nm}'"): hand_over(dls, **{nm:v})
    assert norms(dls)==[[],[]]

def test_only_a_ressl_learner_hands_over():
    clf = make().to_vision_learner(make_dls())
    for hand_over in (clf.to_vision_learner, clf.to_unet_learner):
        with pytest.raises(ValueError, match='only a ressl_learner has an encoder to hand over.*Sequential'):
            hand_over(make_dls())


# to_unet_learner

@pytest.mark.parametrize('arch,teacher', [(tv.resnet18,False), (xresnet18,True)], ids=['resnet18','xresnet18'])
def test_unet_has_the_encoder(arch, teacher):
    learn,x = make(arch, train=False),torch.rand(2, 3, 32, 32)
    unet = learn.to_unet_learner(make_dls(masks=True), teacher=teacher)
    body,(enc,other) = unet.model.layers[0],(learn.model.encoder[0],learn.model.teacher[0][0])[::-1 if teacher else 1]
    assert same(state(body), state(enc)) and not same(state(body), state(other)) and body_stem(body)=='small'
    with torch.no_grad(): assert unet.model.eval()(x).shape==(2,2,32,32) and torch.equal(body(x), enc.eval()(x))

def test_unet_has_outputs_as_asked_for():
    learn,x = make(),torch.rand(2, 3, 32, 32)
    for n_out in (None,3):
        unet = learn.to_unet_learner(
            make_dls(masks=True), n_out=n_out, teacher=True, y_range=(0, 1), self_attention=True
        )
        with torch.no_grad(): y = unet.model.eval()(x)
        assert (
            y.shape == (2, n_out or 2, 32, 32)
            and 0 <= y.min() <= y.max() <= 1
            and same(state(unet.model.layers[0]), state(learn.model.teacher[0][0]))
        )


@pytest.mark.parametrize('arch', ['mobilenetv3_small_050', Own, dense], ids=['timm_cnn','own','dense'])
def test_unet_without_levels_is_refused(arch):
    learn,dls = make(arch),make_dls(masks=True)
    with pytest.raises(ValueError, match=f'a U-Net needs a body.*{learn.model.encoder.arch}'):
        learn.to_unet_learner(dls)
    assert norms(dls)==[[],[]]

def test_unet_of_layers_in_one_child(monkeypatch, tmp_path):
    "fastai's bodies of DenseNets have a single child"
    monkeypatch.setitem(model_meta, tiny_densenet, dict(cut=-1, split=model_meta[tv.densenet121]['split']))
    learn = make(tiny_densenet, path=tmp_path)
    assert len(learn.model.encoder[0])==1
    assert groups(learn.to_vision_learner(make_dls())) == groups(
        vision_learner(make_dls(), tiny_densenet, pretrained=False)
    )
    unet = learn.to_unet_learner(make_dls(masks=True), path=tmp_path)
    assert same(state(unet.model.layers[0]), state(learn.model.encoder[0][0]))
    with torch.no_grad(): assert unet.model.eval()(torch.rand(2, 3, 32, 32)).shape==(2,2,32,32)
    quiet_fit(learn).save_encoder('enc')
    copied,tensors = deepcopy(unet.model),list(unet.model.state_dict())
    assert not same(state(unet.model.layers[0]), state(learn.model.encoder[0][0]))
    unet.load_encoder('enc')
    for net in (unet.model, load_encoder(copied, tmp_path/'models'/'enc')):
        assert same(state(net.layers[0]), state(learn.model.encoder[0][0])) and list(net.state_dict())==tensors

# load_encoder into the user's learner

def test_encoder_file_fits_a_unet_of_its_stem(tmp_path):
    learn = make(path=tmp_path)
    learn.save_encoder('first')
    unet = learn.to_unet_learner(make_dls(masks=True), path=tmp_path)
    quiet_fit(learn).save_encoder('second')
    assert not same(state(unet.model.layers[0]), state(learn.model.encoder[0]))
    for nm in ('second','first'): unet.load_encoder(nm)
    assert not same(state(unet.model.layers[0]), state(learn.model.encoder[0]))  # control
    assert same(state(unet.load_encoder('second').model.layers[0]), state(learn.model.encoder[0]))
    quiet_fit(unet)

@pytest.mark.parametrize('kind', ['vision', 'unet'])
def test_load_encoder_takes_all_or_nothing(kind, tmp_path):
    users = dict(vision=vision_learner, unet=unet_learner)[kind]
    def user(arch=tiny_resnet, n_in=3, norm=None):
        return users(
            make_dls(n_in, norm=norm, masks=kind == 'unet'),
            arch,
            pretrained=False,
            n_in=n_in,
            path=tmp_path,
            normalize=False,
            n_out=2,
        )

    def body(learn): return learn.model.layers[0] if kind=='unet' else learn.model[0]
    pre = make(stem='standard', path=tmp_path)
    pre.save_encoder('enc')
    make(path=tmp_path).save_encoder('small')
    learn = user()
    learn.freeze()
    def frozen(): return learn.opt.frozen_idx,[p.requires_grad for p in learn.model.parameters()]
    before = frozen()
    learn.load_encoder('enc')
    assert (
        same(state(body(learn)), state(pre.model.encoder[0]))
        and norms(learn.dls) == norms(pre.dls)
        and frozen() == before
    )
    others = dict(
        arch=(user(tv.resnet18), 'small_resnet.*does not fit.*missing'),
        channels=(user(n_in=1), r'n_in=3.*\(\d+, 1, 3, 3\) in the model and \(\d+, 3, 3, 3\) in the file'),
        normalisation=(user(norm=(0.3, 0.5)), 'was pretrained with.*0.4.*normalises with.*0.5'),
        keys=(user(), 'does not fit.*extra'),
    )
    body(others['keys'][0]).register_buffer('extra', torch.ones(1))
    if kind=='unet': others['stem'] = user(),"stem='small'.*stem='standard'"
    for nm,(learn,words) in others.items():
        learn.freeze()
        before,norm,opt,buffers = state(learn.model),norms(learn.dls),deepcopy(learn.opt.state_dict()),frozen()
        with pytest.raises(ValueError, match=words): learn.load_encoder('small' if nm=='stem' else 'enc')
        assert (
            same(before, state(learn.model))
            and norms(learn.dls) == norm
            and str(learn.opt.state_dict()) == str(opt)
            and frozen() == buffers
        ), nm


def test_loaded_stem_is_what_the_optimizer_trains(tmp_path):
    "resnet18's 7x7 convolution becomes a new 3x3 one"
    pre = make(tv.resnet18, size=16, train=False, path=tmp_path)
    pre.save_encoder('enc', teacher=True)
    clf = vision_learner(make_dls(size=16), tv.resnet18, pretrained=False, path=tmp_path)
    clf.freeze()
    clf.load_encoder('enc')
    assert same(state(clf.model[0]), state(pre.model.teacher[0][0]))
    assert close(pooled(clf), embed(pre, pre.dls.valid, teacher=True)[0])
    first = clf.model[0][0].weight
    assert not first.requires_grad and clf.opt.frozen_idx==2 and any(first is p for p in clf.opt.param_lists[0])
    before = state(clf.model)
    assert changed(before, quiet_fit(clf, fine_tune=True).model)==set(before)
