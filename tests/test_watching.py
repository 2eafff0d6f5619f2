"""What is shown beside the loss: the online linear probe changes nothing, learns of training images alone, and reaches
trackers."""

from functools import partial

import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastcore.basics import camel2snake

import ressl_fastai.all  # all callbacks
from ressl_fastai.data import digits_dls
from ressl_fastai.evaluate import LinearProbe, embed
from ressl_fastai.health import HealthMonitor
from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import small_resnet

def train(tmp_path, cbs, n_epoch=2, wrong_labels=False):
    set_seed(0, reproducible=True)
    torch.set_num_threads(1)
    dls = digits_dls(8)
    if wrong_labels: dls.valid.targets = tuple(y.roll(1) for y in dls.valid.targets)
    learn = ressl_learner(dls, partial(small_resnet, widen=0.25), n_hidden=64, dim=32, queue_size=256, path=tmp_path,
                          precision='float32', metrics=[])
    with learn.no_bar(), learn.no_logging(): learn.fit(n_epoch, 3e-3, cbs=cbs)
    return learn

def column(learn, nm):
    return [row[learn.recorder.metric_names.index(nm)-1] for row in learn.recorder.values]

def weights(learn): return [p.detach().clone() for p in learn.model.state_dict().values()]

def test_probe_leaves_the_training_as_it_is(tmp_path):
    probe = LinearProbe()
    learn = train(tmp_path, [probe])
    plain = train(tmp_path, [])
    assert all(map(torch.equal, weights(learn), weights(plain)))
    assert len(learn.metrics)==0 and probe.metric is None
    other = train(tmp_path, [], n_epoch=1)  # control
    assert not all(map(torch.equal, weights(other), weights(plain)))

def test_column_is_what_the_classifier_gives_on_validation_images(tmp_path):
    probe = LinearProbe()
    learn = train(tmp_path, [probe])
    x,y = embed(learn, learn.dls.valid)
    with torch.no_grad(): right = (probe.head.eval()(x).argmax(1)==y).float().mean().item()
    assert column(learn, 'linear_accuracy')[-1]==pytest.approx(right, abs=1e-6)
    assert right>0.2  # a tenth is chance

def test_validation_labels_are_not_learnt(tmp_path):
    true,wrong = LinearProbe(),LinearProbe()
    train(tmp_path, [true])
    learn = train(tmp_path, [wrong], wrong_labels=True)
    assert all(map(torch.equal, true.head.parameters(), wrong.head.parameters()))
    assert column(learn, 'linear_accuracy')[-1]<0.2

def test_best_epoch_is_kept_by_it(tmp_path):
    learn = train(tmp_path, [LinearProbe(), SaveModelCallback(monitor='linear_accuracy', fname='best'),
                             HealthMonitor(['feature_std'])])
    assert (tmp_path/'models'/'best.pth').exists()
    assert learn.recorder.metric_names[-3:]==['linear_accuracy','feature_std','time']

def test_tensorboard_gets_every_column(tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    board = TensorBoardCallback(tmp_path/'runs', trace_model=False, log_preds=False)
    learn = train(tmp_path, [LinearProbe(), HealthMonitor(['feature_std']), board])
    written = EventAccumulator(str(tmp_path/'runs')).Reload()
    for nm in ('valid_loss','linear_accuracy','feature_std'):
        assert [o.value for o in written.Scalars(nm)]==pytest.approx(column(learn, nm), rel=1e-5)


class Interrupt(Callback):
    "Ctrl-C in the first batch of the second epoch"
    def before_batch(self):
        if self.epoch==1 and self.training: raise KeyboardInterrupt

@pytest.mark.parametrize('own', [False, True], ids=['of the fit', 'of the learner'])
def test_the_column_of_an_interrupted_fit_is_gone(tmp_path, own):
    "Fits after Ctrl-C show one column, a true one, or none"
    learn = train(tmp_path, [], n_epoch=1)
    if own: learn.add_cb(LinearProbe())
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.no_logging():
        learn.fit(2, 3e-3, cbs=[Interrupt()] if own else [LinearProbe(), Interrupt()])
    assert own or not learn.model.encoder._forward_hooks
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 3e-3)
    assert learn.recorder.metric_names.count('linear_accuracy')==own
    if own: return
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 3e-3, cbs=(probe := LinearProbe()))
    x,y = embed(learn, learn.dls.valid)
    with torch.no_grad(): right = (probe.head.eval()(x).argmax(1)==y).float().mean().item()
    assert learn.recorder.metric_names.count('linear_accuracy')==1
    assert column(learn, 'linear_accuracy')[-1]==pytest.approx(right, abs=1e-6)

def test_the_probe_beside_the_training_leaves_the_method_of_the_same_name(tmp_path):
    probe = LinearProbe()
    dls = digits_dls(8)
    learn = ressl_learner(dls, partial(small_resnet, widen=0.25), n_hidden=16, dim=8, queue_size=64, cbs=probe,
                          path=tmp_path)
    assert 0<=learn.linear_probe()['top1']<=1 and learn.online_probe is probe

def test_no_callback_has_the_name_of_a_method_of_learners():
    "fastai makes a callback an attribute of its learner, which would hide the method"
    ours = [o for o in Callback.__subclasses__() if o.__module__.startswith('ressl_fastai.')]
    assert LinearProbe in ours and HealthMonitor in ours
    names = [o.name if isinstance(o.name, str) else camel2snake(o.__name__) for o in ours]
    assert not [o for o in names if hasattr(Learner, o)]
