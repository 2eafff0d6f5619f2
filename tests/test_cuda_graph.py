"`CUDAGraph` changes nothing but the time: the logic around the recordings, with calls in their place."
import pytest, torch
from fastai.optimizer import Adam
from fastai.vision.all import GradientAccumulation, SchedCos

from ressl_fastai.callback import InfoNCEWarmup
from ressl_fastai.cuda_graph import CUDAGraph
from ressl_fastai.evaluate import embed
from ressl_fastai.views import multi_crop_tfms
from replaced import PlayedBack
from test_checkpoint import check, differences, everything, fit, make, small_dls

@pytest.mark.parametrize('kw', [{}, dict(opt_func=Adam), dict(predictor_layers=2, warmup=InfoNCEWarmup(1, ramp=2), teacher_momentum=SchedCos(0.9, 1.), teacher_temp=SchedCos(0.06, 0.03)),
    dict(strong_tfms=multi_crop_tfms(8, (1, 1, 7/8), (0.2,)*3, (1.,)*3)), dict(precision='bfloat16', channels_last=True), dict(batch_norm='split', n_splits=4)],
    ids=['defaults',"fastai's Adam",'schedules','crops','bfloat16','split'])
def test_a_recorded_training_is_the_training(kw):
    "Same bits, with a last short batch and changing learning rate, momentum and temperatures"
    drop = 'batch_norm' in kw
    def run(*cbs): return everything(fit(make(dls=small_dls(n=120, drop_last=drop), **kw), n=3, cbs=list(cbs)))
    graph = PlayedBack()
    got = run(graph)
    assert graph.records==1 and graph.graphed is None and len(got['losses'])==(9 if drop else 12)
    assert differences(run(), got)==[]

def test_gradients_that_are_not_let_go_would_be_added_twice(monkeypatch):
    "Control: with fastai's zeros in the memory that the recording writes to"
    whole = everything(fit(make(opt_func=Adam), n=2))
    class Kept(PlayedBack):
        def before_batch(self):
            grads = [(p, p.grad) for p in self.model.parameters()]
            super().before_batch()
            for p,g in grads: p.grad = g
    assert differences(whole, everything(fit(make(opt_func=Adam), n=2, cbs=Kept())))!=[]

def test_nothing_stays_swapped():
    learn = fit(make(), n=1, cbs=PlayedBack())
    assert 'forward' not in vars(learn.model) and 'forward' not in vars(learn.model.teacher)
    class Interrupt(PlayedBack):
        def after_loss(self): raise KeyboardInterrupt
    learn = make()
    with pytest.raises(KeyboardInterrupt): fit(learn, n=1, cbs=Interrupt())
    z = embed(learn)[0]
    fit(learn, n=1)
    assert 'forward' not in vars(learn.model) and len(z)==32

def test_it_goes_on_after_a_crash(tmp_path): check(tmp_path, 24, cbs=lambda: [PlayedBack()], every=3)

def test_where_it_cannot_be_it_says_so():
    with pytest.raises(ValueError, match='leave it or GradientAccumulation out'): fit(make(), cbs=[PlayedBack(), GradientAccumulation(64)])
    with pytest.raises(ValueError, match='needs a CUDA device, dls are on cpu'): fit(make(), cbs=CUDAGraph())
    make(cbs=CUDAGraph()).validate()                           # nothing to record
