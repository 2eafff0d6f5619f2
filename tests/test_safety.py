"Everything fastai users do is safe, in any order: before, between and after `fit`."
import random, zipfile
from functools import partial

import numpy as np, pytest, torch
from fastai.vision.all import (Callback, CSVLogger, EarlyStoppingCallback, GradientAccumulation, GradientClip, L,
                               Learner, Normalize, ReduceLROnPlateau, SaveModelCallback, ShortEpochCallback,
                               TerminateOnNaNCallback, load_learner)
from torch import Tensor
from helpers import fit, make, same, state

from ressl_fastai import recipes  # learn.fit_warmup_cos
from ressl_fastai.callback import ReSSL
from ressl_fastai.loaders import get_normalize
from ressl_fastai.data import digits_dls
from ressl_fastai.evaluate import embed
from ressl_fastai.learner import ReSSLLearner
from ressl_fastai.models import small_resnet

def randoms():
    "All random states, as bytes"
    return repr(random.getstate()),repr(np.random.get_state()),torch.get_rng_state().numpy().tobytes()

def opt_state(learn):
    def flat(o):
        if isinstance(o, Tensor): return o.tolist()
        if isinstance(o, dict): return {k:flat(v) for k,v in o.items()}
        return [flat(v) for v in o] if isinstance(o, (list,tuple,L)) else o
    return learn.opt and flat(learn.opt.state_dict())

def everything(learn): return repr((opt_state(learn), randoms())),state(learn)
def unchanged(a, b): return a[0]==b[0] and same(a[1], b[1])

def tidy(learn): return learn.loss_func,sorted(map(str, learn.cbs)),[type(f) for f in learn.dls.train.after_batch.fs]

resnet = partial(small_resnet, widen=0.125)
def few(**kwargs): return make(digits_dls(8, bs=256), resnet, **kwargs)

# lr_find

@pytest.mark.parametrize('trained', [False, True])
def test_d11_lr_find_leaves_no_trace_not_even_in_the_random_state(trained):
    learn = few()
    if trained: fit(learn)
    before = everything(learn)
    with learn.no_bar(): assert learn.lr_find(num_it=6, show_plot=False).valley>0
    assert unchanged(before, everything(learn))
    with learn.no_bar():
        Learner.lr_find(learn, num_it=6, show_plot=False)  # control: fastai's own changes what comes after
    assert not unchanged(before, everything(learn)) and same(before[1], state(learn))

def test_training_after_lr_find_is_the_training_without():
    def run(find):
        learn = few()
        if find:
            with learn.no_bar(): learn.lr_find(num_it=6, show_plot=False)
        return state(fit(learn))
    assert same(run(False), run(True))

class CtrlC(Callback):
    "Ctrl-C in the middle of an epoch"
    order = ReSSL.order+2

    def __init__(self, event, n=3):
        self.n = n
        setattr(self, event, self.press)

    def press(self):
        if self.training and self.train_iter>=self.n: raise KeyboardInterrupt

def test_ctrl_c_in_lr_find_leaves_no_trace():
    learn = fit(few())
    before = everything(learn)
    learn.add_cb(CtrlC('after_step'))
    with learn.no_bar(), pytest.raises(KeyboardInterrupt): learn.lr_find(num_it=9, show_plot=False)
    learn.remove_cb(CtrlC)
    assert unchanged(before, everything(learn))

@pytest.mark.parametrize('event', ['after_pred', 'after_backward', 'after_step'])
def test_ctrl_c_in_mid_epoch(event):
    "The learner is as it was, and no gradient of the broken batch goes into the next fit"
    learn = few(precision='bfloat16')
    was = tidy(learn)
    with learn.no_bar(), pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=CtrlC(event))
    assert tidy(learn)==was and not torch.is_autocast_enabled('cpu')
    grads = []
    class First(Callback):
        def before_backward(self):
            grads.append(
                max((p.grad.abs().max().item() for p in self.model.parameters() if p.grad is not None), default=0.0)
            )

    fit(learn, cbs=First())
    assert grads[0]==0. and np.isfinite(learn.recorder.values[-1]).all()

# anything, in any order

actions = dict(
    fit_one_cycle=lambda l: l.fit_one_cycle(1, 1e-3),
    fit_flat_cos=lambda l: l.fit_flat_cos(1, 1e-3),
    fine_tune=lambda l: l.fine_tune(1),
    lr_find=lambda l: l.lr_find(num_it=6, show_plot=False),
    fit_warmup_cos=lambda l: l.fit_warmup_cos(1, 1e-3, warmup_epochs=0.5),
    freeze=lambda l: l.freeze(),
    unfreeze=lambda l: l.unfreeze(),
    validate=lambda l: l.validate(),
    get_preds=lambda l: l.get_preds(),
    with_loss=lambda l: l.get_preds(with_loss=True),
    predict=lambda l: l.predict(l.dls.valid_ds[0][0]),
    summary=lambda l: l.summary(),
    show_batch=lambda l: l.dls.show_batch(max_n=1),
    show_views=lambda l: l.show_views(1),
    save_load=lambda l: (l.save('all'), l.load('all')),
    export=lambda l: l.export(),
    to_bf16=lambda l: l.to_bf16(),
    to_fp32=lambda l: l.to_fp32(),
    to_channelslast=lambda l: l.to_channelslast(amp_mode='bf16'),
    to_contiguous=lambda l: l.to_contiguous(),
    save_encoder=lambda l: l.save_encoder('enc'),
    embed=lambda l: embed(l, l.dls.valid),
    dls=lambda l: setattr(l, 'dls', digits_dls(8, bs=200)),
)
callbacks = dict(
    accumulation=lambda: GradientAccumulation(400),
    clip=lambda: GradientClip(0.1),
    save=lambda: SaveModelCallback(),
    early=lambda: EarlyStoppingCallback(),
    plateau=lambda: ReduceLROnPlateau(patience=0),
    csv=lambda: CSVLogger(),
    nan=lambda: TerminateOnNaNCallback(),
    short=lambda: ShortEpochCallback(pct=0.3),
)
steady = {
    'validate',
    'get_preds',
    'with_loss',
    'predict',
    'summary',
    'show_batch',
    'show_views',
    'export',
    'save_encoder',
    'embed',
    'lr_find',
}


@pytest.mark.parametrize('seed', range(3))
def test_d9_d10_d38_anything_in_any_order(seed, tmp_path):
    """All of it in a random order: what only looks changes no weight, teacher, queue or pointer; nothing leaves the
    learner's loss, callbacks or transforms other"""
    learn,rng = make(digits_dls(8, bs=200), path=tmp_path, projector_bn=seed%2==0),random.Random(seed)
    todo = list(actions)
    rng.shuffle(todo)
    for nm in todo:
        before,was = state(learn),tidy(learn)
        with learn.no_bar(), learn.no_logging(): actions[nm](learn)
        if nm in steady: assert same(before, state(learn)), f'{nm} changed the model, after {todo[:todo.index(nm)]}'
        if not nm.startswith('to_'): assert tidy(learn)==was, f'{nm} left something behind'
    before = state(learn)
    fit(learn)
    assert not same(before, state(learn))


@pytest.mark.parametrize('nm', callbacks)
def test_fastai_callbacks(nm, tmp_path):
    learn = make(digits_dls(8, bs=200), path=tmp_path)
    was,before = tidy(learn),state(learn)
    fit(learn, 2, cbs=callbacks[nm]())
    assert tidy(learn)==was and not same(before, state(learn)) and np.isfinite(learn.recorder.values).all()

def test_remove_cb_is_safe_and_said():
    learn = fit(make())
    learn.remove_cb(ReSSL)
    with learn.no_bar():
        assert learn.get_preds()[0].shape==(360,8) and learn.validate()[0]==0
        with pytest.raises(RuntimeError, match='ReSSL callback was removed'): learn.fit(1)

def test_freeze_leaves_the_encoder_alone_and_fine_tune_trains_it_slowly():
    learn = few()
    learn.freeze()
    def weights(m): return {k:v.clone() for k,v in m.named_parameters() if v.ndim==4}

    enc, proj, teacher = (
        weights(learn.model.encoder),
        learn.model.projector[0].weight.clone(),
        learn.model.teacher[1][0].weight.clone(),
    )
    fit(learn)
    assert same(enc, weights(learn.model.encoder)) and not torch.equal(proj, learn.model.projector[0].weight)
    assert not torch.equal(teacher, learn.model.teacher[1][0].weight) and not any(
        p.requires_grad for p in learn.model.teacher.parameters()
    )
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1)
    assert not same(enc, weights(learn.model.encoder)) and not any(
        p.requires_grad for p in learn.model.teacher.parameters()
    )
    body,heads = (h['lr'] for h in learn.opt.hypers)
    assert body<heads/50

# what comes out

def test_d38_an_exported_learner_embeds_images_and_holds_no_more(tmp_path):
    learn = fit(few(path=tmp_path, queue_size=1000, dim=64))
    im = learn.dls.valid_ds[0][0]
    with learn.no_bar(): want = learn.get_preds()[0]
    learn.export('e.pkl')
    loaded = load_learner(tmp_path/'e.pkl')
    assert (
        isinstance(loaded, ReSSLLearner)
        and not hasattr(loaded.model, 'teacher')
        and not hasattr(loaded.model, 'queue')
        and loaded.opt is None
    )

    def size(*modules): return sum(o.numel()*o.element_size() for m in modules for o in m.state_dict().values())

    with zipfile.ZipFile(tmp_path / 'e.pkl') as z:
        tensors = sum(o.file_size for o in z.infolist() if '/data/' in o.filename)
    net = learn.model
    assert (
        0 <= tensors - size(net.encoder, net.projector, net.predictor) < 100 and size(net) > 2 * tensors
    )  # the normalisation's statistics are the rest
    with loaded.no_bar(), learn.no_bar():
        torch.testing.assert_close(loaded.get_preds(dl=learn.dls.valid)[0], want)
        torch.testing.assert_close(loaded.predict(im)[0], want[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(learn.predict(im)[0], want[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(learn.predict(np.asarray(im))[0], want[0], rtol=1e-4, atol=1e-5)
    clf = loaded.to_vision_learner(digits_dls(8))
    assert torch.equal(get_normalize(clf.dls).mean, get_normalize(learn.dls).mean)
    with pytest.raises(ValueError, match='only a ressl_learner has a teacher'):
        loaded.to_vision_learner(digits_dls(8), teacher=True)
    fit(learn)  # and the learner itself goes on

def test_show_results_is_refused_in_words():
    with pytest.raises(ValueError, match='embed'): make().show_results()

def test_repr_says_what_it_is():
    assert (
        repr(make(precision='bfloat16', channels_last=True))
        == "ReSSLLearner(NoBN for 1 channel, stem standard; 1437 images on cpu; bfloat16, channels last)"
    )
    assert repr(make(precision='float32', channels_last=False)).endswith('; float32)')

# dls replaced

def test_d28_replaced_dls_keep_the_normalisation():
    learn = fit(make())
    norm,new = get_normalize(learn.dls),digits_dls(8, bs=32, labels=False)
    learn.dls = new
    assert torch.equal(get_normalize(new).mean, norm.mean) and learn.dls is new
    fit(learn)
    with pytest.raises(ValueError, match='was pretrained with Normalize'):
        learn.dls = digits_dls(8, batch_tfms=Normalize.from_stats([0.9], [0.9], cuda=False))
    assert learn.dls is new
