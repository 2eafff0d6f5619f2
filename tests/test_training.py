"What happens around the steps: data as it comes, labels, accumulation, skipped steps, errors, `lr_find`, saving."
import math
from functools import partial

import numpy as np, pytest, torch
import torch.nn.functional as F
from fastai.vision.all import (Callback, CancelFitException, DataBlock, GradientAccumulation, ImageBlock,
                               ImageDataLoaders, MixedPrecision, Normalize, PILImage, RandomResizedCrop, SchedLin,
                               RandomSplitter, Resize, SaveModelCallback, SGD, TensorImage, Transform, aug_transforms,
                               get_image_files, imagenet_stats)
from helpers import Skip, fit, make, same, state
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ressl_fastai.batch_norm import SplitBatchNorm
from ressl_fastai.callback import InfoNCEWarmup, ReSSL
from ressl_fastai.loaders import get_normalize
from ressl_fastai.data import digits_dls
from ressl_fastai.evaluate import KNNAccuracy
from ressl_fastai.losses import ressl_loss
from ressl_fastai.models import small_resnet
from ressl_fastai.views import multi_crop_tfms, strong_tfms, weak_tfms

def identity(x): return x
def darker(x): return x*0.5

class See(Callback):
    "Keeps what student and teacher are given"
    order = ReSSL.order+0.5
    def before_fit(self): self.strong,self.weak = [],[]
    def before_batch(self):
        if self.training:
            self.crops = self.xb
            self.strong.append(self.xb[0].clone())
            self.weak.append(self.ressl.x_teacher.clone())


class Boom(Callback):
    order = ReSSL.order+0.5
    def __init__(self, event): setattr(self, event, self.boom)
    def boom(self): raise KeyboardInterrupt

# data as it comes

def test_d33_unlabelled_data_trains_and_labels_take_no_part():
    a,b = (fit(make(digits_dls(8, labels=l, shuffle=False))) for l in (True,False))
    assert same(state(a), state(b))
    assert not same(state(a), state(make()))  # it did train

def test_labels_are_left_alone():
    learn = make()
    before = [learn.dls.valid_ds[i][1] for i in range(20)]
    fit(learn)
    assert before==[learn.dls.valid_ds[i][1] for i in range(20)]
    assert learn.validate()[0]>0 and learn.get_preds()[1][:20].tolist()==[int(o) for o in before]

@pytest.mark.parametrize(
    'batch_tfms',
    [
        None,
        Normalize.from_stats([0.2], [0.4], cuda=False),
        [
            *aug_transforms(p_affine=1.0, p_lighting=1.0, max_rotate=90.0),
            Normalize.from_stats([0.2], [0.4], cuda=False),
        ],
    ],
    ids=['none', 'normalize', 'aug'],
)
def test_d28_normalised_once_and_augmented_by_the_views_alone(batch_tfms):
    learn,see = make(digits_dls(8, batch_tfms=batch_tfms, shuffle=False), weak_tfms=identity, strong_tfms=darker),See()
    clean = torch.cat([b[0] for b in digits_dls(8).train.new(shuffle=False, drop_last=False)]).as_subclass(Tensor)
    norm = get_normalize(learn.dls)
    def normalise(x): return (x-norm.mean)/norm.std
    fs = list(learn.dls.train.after_batch.fs)
    fit(learn, cbs=see)
    torch.testing.assert_close(torch.cat(see.weak), normalise(clean))
    torch.testing.assert_close(torch.cat(see.strong), normalise(clean*0.5))
    assert not torch.allclose(torch.cat(see.weak), normalise(normalise(clean)), atol=0.1)  # control: twice
    assert list(learn.dls.train.after_batch.fs)==fs                                          # dls keeps its transforms
    x,_ = next(iter(learn.dls.valid))
    torch.testing.assert_close(x.as_subclass(Tensor), normalise(next(iter(digits_dls(8).valid))[0]).as_subclass(Tensor))

class Doubled(Normalize):
    "A user's own: its `encodes` is not (x-mean)/std"
    def encodes(self, x:TensorImage): return 2*(x-self.mean)/self.std

def test_a_normalize_of_ones_own_is_what_views_get():
    "Control: Normalize of the same numbers gives half of it"
    views = []
    for cls in (Doubled,Normalize):
        learn = make(digits_dls(8, batch_tfms=cls.from_stats([0.2], [0.4], cuda=False)), weak_tfms=lambda x: x)
        learn.ressl.normalize = get_normalize(learn.dls)
        views.append(learn.ressl._view(torch.full((1,1,8,8), 0.6), lambda x: x))
    torch.testing.assert_close(views[0], torch.full((1, 1, 8, 8), 2.0))
    torch.testing.assert_close(views[1], torch.full((1, 1, 8, 8), 1.0))
    assert type(views[0]) is Tensor and type(views[1]) is Tensor

def test_images_normalised_elsewhere_or_twice_are_refused():
    dls = digits_dls(8)
    for _ in range(2): dls.add_tfms([Normalize.from_stats([0.2], [0.4], cuda=False)], 'after_batch')
    with pytest.raises(ValueError, match='normalise once'): make(dls)
    shift = Transform(lambda x: x - 1 if isinstance(x, TensorImage) else x)
    shift.order = 11
    with pytest.raises(ValueError, match=r'must be in \[0, 1\]'): make(digits_dls(8, batch_tfms=shift))

def test_colour_folder_with_item_tfms(tmp_path):
    for i in range(24):
        (tmp_path/str(i%2)).mkdir(exist_ok=True)
        PILImage.create(np.random.randint(0, 255, (40,50,3), dtype=np.uint8)).save(tmp_path/str(i%2)/f'{i}.png')
    for dls in (
        ImageDataLoaders.from_folder(
            tmp_path,
            valid_pct=0.25,
            item_tfms=RandomResizedCrop(32),
            batch_tfms=aug_transforms(size=24),
            bs=4,
            num_workers=0,
        ),
        DataBlock(
            ImageBlock, get_items=get_image_files, splitter=RandomSplitter(0.25), item_tfms=Resize(24)
        ).dataloaders(tmp_path, bs=4, num_workers=0),
    ):
        learn = make(dls, partial(small_resnet, widen=0.25), queue_size=8)
        assert learn.model.encoder.n_in == 3 and learn.ressl.strong_tfms.size == (24, 24)
        assert (get_normalize(dls).mean.flatten().cpu() - torch.tensor(imagenet_stats[0])).abs().max() < 1e-6
        before = state(learn)
        fit(learn)
        assert not same(before, state(learn))


def test_d32_any_last_batch():
    learn = fit(
        make(digits_dls(8, bs=100, drop_last=False), queue_size=150)
    )  # the last batch has 37 images, which divide nothing
    assert int(learn.model.queue.ptr)==(200+1437)%150 and int(learn.model.queue.count)==150

def test_unknown_and_impossible_arguments_raise():
    for kw, name in (
        (dict(queu_size=4), 'queu_size'),
        (dict(teacher_momentum=2), 'teacher_momentum'),
        (dict(student_temp=0), 'student_temp'),
        (dict(queue_size=0), 'size'),
        (dict(stem='tiny'), 'stem'),
        (dict(weak_tfms=3), 'weak_tfms'),
    ):
        with pytest.raises((ValueError,TypeError), match=name): make(**kw)
    with pytest.raises(ValueError, match='fastai DataLoaders'): make(type('DL', (), {'train':[1]})())

# the loop

@pytest.mark.parametrize('warmup', [None, InfoNCEWarmup(0, end=0.5)])
def test_d18_accumulation_equals_one_large_batch(warmup):
    "1x128 and 4x32 without batch norm, weight of the InfoNCE loss constant: weights, teacher and queue to 1e-6"
    def run(bs, cbs):
        learn = make(
            digits_dls(8, bs=bs, shuffle=False),
            weak_tfms=identity,
            strong_tfms=darker,
            projector_bn=False,
            opt_func=partial(SGD, mom=0.0),
            wd=0.0,
            queue_size=256,
            warmup=warmup,
        )
        return state(fit(learn, lr=0.1, cbs=cbs+[Stop(512//bs)]))
    class Stop(Callback):
        def __init__(self, n): self.n = n
        def after_batch(self):
            if self.train_iter==self.n: raise CancelFitException
    large,small,wrong = run(128, []),run(32, [GradientAccumulation(128)]),run(32, [])
    assert max((large[k].double()-small[k]).abs().max() for k in large)<1e-6
    assert max((large[k].double()-wrong[k]).abs().max() for k in large)>1e-3  # control: a step for each small batch

def test_d19_a_skipped_step_changes_neither_teacher_nor_queue():
    learn = fit(make())
    before = state(learn)
    fit(learn, cbs=Skip())
    after = state(learn)
    for k in before:
        if not ('running' in k or 'batches' in k): assert torch.equal(before[k], after[k]), k
    fit(learn)
    assert int(learn.model.queue.ptr)==(int(before['queue.ptr'])+22*64)%200  # keys of skipped steps are gone for good

def test_d11_lr_find_changes_nothing():
    for learn in (make(), fit(make())):
        before = state(learn)
        with learn.no_bar(): learn.lr_find(num_it=4, show_plot=False)
        assert same(before, state(learn))

def test_d9_d10_saved_and_loaded_whole(tmp_path):
    learn = fit(make())
    learn.path = tmp_path
    before = state(learn)
    learn.save('all')
    fit(learn)
    assert not same(before, state(learn))
    learn.load('all')
    assert same(before, state(learn))
    with learn.no_bar():
        learn.validate()
        learn.get_preds()
        learn.get_preds(with_loss=True)
    assert same(before, state(learn))

@pytest.mark.parametrize(
    'event', ['before_batch', 'after_pred', 'after_loss', 'before_step', 'after_step', 'after_batch', 'before_validate']
)
def test_an_interrupt_leaves_the_learner_usable(event):
    learn = make()
    lf,cbs = learn.loss_func,sorted(map(str, learn.cbs))
    with learn.no_bar(), pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Boom(event))
    with learn.no_bar(): learn.get_preds()
    fit(learn)
    assert learn.loss_func is lf and sorted(map(str, learn.cbs))==cbs

def test_loss_is_back_whatever_happens():
    learn = make()
    lf = learn.loss_func
    for event in ('after_loss', 'after_step', 'after_batch', 'before_train'):
        with learn.no_bar(), pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Boom(event))
        assert learn.loss_func is lf, event
    class Cancel(Callback):
        def after_pred(self): raise CancelFitException

    fit(learn, cbs=Cancel())
    assert learn.loss_func is lf


def test_d12_teacher_runs_inside_autocast():
    "bfloat16 autocast of the model shows in the teacher's embeddings; the loss stays float32"
    class Auto(Callback):
        order = MixedPrecision.order

        def before_batch(self):
            self.ctx = torch.autocast('cpu', dtype=torch.bfloat16)
            self.ctx.__enter__()

        def after_loss(self): self.ctx.__exit__(None, None, None)
    class Watch(Callback):
        order = ReSSL.order+0.5
        def after_loss(self):
            net = self.model
            self.autocast = torch.is_autocast_enabled('cpu')
            with torch.autocast('cpu', enabled=False), torch.no_grad(): plain = net.teacher.eval()(self.ressl.x_teacher)
            self.gap,self.dtype = (plain-self.ressl.z_teacher).abs().max().item(),self.loss.dtype
    watch = Watch()
    fit(make(), cbs=[Auto(), watch])
    assert watch.dtype==torch.float32 and 1e-5<watch.gap<0.1

def test_d6_queue_is_filled_with_real_embeddings_before_the_first_step():
    class First(Callback):
        order = ReSSL.order+0.5
        def before_batch(self):
            if self.train_iter==0 and self.training: self.at_start = self.model.queue.filled.clone()
    first = First()
    fit(make(weak_tfms=identity), cbs=first)
    assert first.at_start.shape==(200,8)
    torch.testing.assert_close(first.at_start.norm(dim=1), torch.ones(200))
    assert F.cosine_similarity(first.at_start[:100], first.at_start[100:]).mean()>0.3  # random vectors would give 0

def test_validation_loss_is_repeatable_and_on_clean_images():
    learn = fit(make())
    with learn.no_bar(): a,b = learn.validate()[0],learn.validate()[0]
    assert a==b
    x = torch.cat([b[0] for b in learn.dls.valid]).as_subclass(Tensor)
    net = learn.model.eval()
    with torch.no_grad(): want = ressl_loss(net(x), net.teacher(x), net.queue.filled)
    assert abs(a-want.item())<1e-4

def test_knn_column_drives_save_model_callback(tmp_path):
    learn = make(metrics=KNNAccuracy(), path=tmp_path)
    fit(learn, 2, cbs=SaveModelCallback(monitor='knn_accuracy', fname='best'))
    assert (tmp_path/'models'/'best.pth').exists() and 0.1<learn.recorder.values[-1][2]<=1

def test_summary_and_show():
    learn = make()
    assert 'Conv2d' in str(learn.summary())
    learn.show_views(3)

@pytest.mark.parametrize('teacher', [False, True])
def test_encoder_file_round_trip(tmp_path, teacher):
    learn = make(arch=small_resnet, path=tmp_path)
    fit(learn)
    learn.save_encoder('enc', teacher=teacher)
    other = make(arch=small_resnet, path=tmp_path, seed=5).load_encoder('enc')
    x = torch.rand(3, 1, 8, 8)
    source = learn.model.eval().teacher[0] if teacher else learn.model.eval().encoder
    torch.testing.assert_close(other.model.eval().encode(x), source(x), rtol=0, atol=0)
    assert not torch.allclose(other.model.encode(x), (learn.model.encoder if teacher else learn.model.teacher[0])(x))
    assert torch.load(tmp_path/'models'/'enc.pth', weights_only=True)['arch']=='small_resnet'
    (tmp_path/'models'/'cut.pth').write_bytes((tmp_path/'models'/'enc.pth').read_bytes()[:1000])
    for bad in ('cut',):
        with pytest.raises(ValueError, match='cannot be read'): other.load_encoder(bad)

# variants

class Weights(Callback):
    "Weight of the InfoNCE loss at the first batch of each epoch"
    order = ReSSL.order+0.5
    def before_fit(self): self.seen = []
    def before_batch(self):
        if self.training and self.train_iter % 22 == 0:
            self.seen.append(self.ressl.warmup(self.ressl.progress, self.learn.n_epoch))


def test_a_run_that_is_continued_has_the_warmup_where_it_was():
    for kw,want in ((dict(), [1.,1.,0.5,0.]), (dict(start_epoch=2), [0.5,0.])):
        w = Weights()
        fit(make(warmup=InfoNCEWarmup(1.5, ramp=1)), 4, cbs=w, **kw)
        assert w.seen==pytest.approx(want)

def test_split_batch_norm_and_a_shuffled_teacher():
    learn = make(arch=partial(small_resnet, widen=0.125), batch_norm='split', n_splits=4)
    bns = [m for m in learn.model.modules() if isinstance(m, _BatchNorm)]
    assert bns and all(isinstance(m, SplitBatchNorm) and m.n_splits==4 for m in bns) and learn.ressl.shuffle
    before = state(learn)
    fit(learn)
    assert not same(before, state(learn))
    for bad in (dict(n_splits=7), dict(n_splits=64), dict(n_splits=0), dict(batch_norm='group')):
        with pytest.raises(ValueError, match='n_splits|batch_norm|kind'):
            make(arch=small_resnet, **{'batch_norm': 'split', **bad})
    # without batch norm a shuffled batch gives the same embeddings, in the images' order, from another order of images
    learn,orders = make(projector_bn=False, weak_tfms=identity),[]
    learn.ressl.shuffle = True
    class Watch(Callback):
        order = ReSSL.order+0.5
        def after_loss(self):
            if not self.training: return
            orders.append(torch.equal(seen[-1], self.ressl.x_teacher))
            torch.testing.assert_close(self.ressl.z_teacher, self.model.teacher(self.ressl.x_teacher))
    seen = []
    learn.model.teacher.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    fit(learn, cbs=Watch())
    assert len(orders)==22 and not any(orders)

def test_queue_in_bfloat16():
    learn = fit(make(queue_dtype=torch.bfloat16))
    feats = learn.model.queue.feats
    assert feats.dtype==torch.bfloat16 and feats.norm(dim=1).sub(1).abs().max()<2**-7
    z = F.normalize(feats[:50].float()+0.1*torch.randn(50, 8), dim=1)
    a,b = (ressl_loss(z[:25], z[25:], q) for q in (feats, feats.float()))
    assert a.dtype==torch.float32 and torch.equal(a, b)

def test_collapse_is_ln_k_and_a_healthy_run_stays_below():
    mild = dict(scale=(0.7,1.), flip_p=0.)
    learn = fit(
        make(
            arch=partial(small_resnet, widen=0.25),
            dim=32,
            n_hidden=64,
            weak_tfms=weak_tfms(8, **mild),
            strong_tfms=strong_tfms(8, **mild),
        ),
        3,
        3e-3,
    )
    assert learn.recorder.values[-1][0]<math.log(200)-0.1 and learn.recorder.values[-1][1]<math.log(200)-0.1
    with torch.no_grad():
        for net in (learn.model.projector, learn.model.teacher[1]):
            net[-1].weight.zero_()
            net[-1].bias.fill_(1.0)
        learn.model.queue.feats.copy_(F.normalize(torch.ones(200, 32), dim=1))
    with learn.no_bar(): assert abs(learn.validate()[0]-math.log(200))<1e-5

def test_several_crops_are_seen_by_the_student_alone():
    learn,see = make(arch=partial(small_resnet, widen=0.125), strong_tfms=multi_crop_tfms(8)[:3]),See()
    fit(learn, cbs=see)
    assert [tuple(x.shape[1:]) for x in see.crops] == [(1, 8, 8), (1, 7, 7), (1, 6, 6)] and all(
        x.shape == (64, 1, 8, 8) for x in see.weak
    )
    assert int(learn.model.queue.ptr)==(256+22*64)%200  # four batches fill the queue, then one key for each image
    learn.show_views(2)

def test_schedules_that_leave_their_range_are_refused():
    for kw, text in (
        (
            dict(teacher_momentum=SchedLin(0.9, 1.1)),
            'teacher_momentum must be between 0 and 1, got 1.1 at progress 1.0',
        ),
        (dict(teacher_temp=SchedLin(0.04, 0.0)), 'teacher_temp must be greater than 0'),
        (dict(warmup=5), 'warmup must be an InfoNCEWarmup'),
        (dict(strong_tfms=[]), 'strong_tfms must be'),
        (dict(predictor_layers=-1), 'n_layers must be'),
        (dict(projector_layers=0), 'n_layers=0'),
    ):
        with pytest.raises(ValueError, match=text): make(**kw)
