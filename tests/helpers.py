"""What tests share: small networks and learners, quiet fits, comparisons, digits as files, a lock that another process
holds. No test module imports another; beside this one, crashes.py is for fits that go on, looks.py for looks."""

import math, random, subprocess, sys
from contextlib import contextmanager

import numpy as np, torch, torchvision.models as tv
from fastai.vision.all import Callback, CancelStepException, Learner, MixedPrecision, xresnet18
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from ressl_fastai import transfer  # learn.save_encoder
from ressl_fastai.data import digits_dls, folder_dls
from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import small_resnet
from ressl_fastai.views import strong_tfms, weak_tfms

# networks and learners

class NoBN(nn.Sequential):
    "A fast network in which images of a batch do not meet"
    def __init__(self, n_in=1): super().__init__(nn.Conv2d(n_in, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3))

class Net(nn.Sequential):
    "Two convolutions with batch norm"
    def __init__(self, n_in=1):
        first = nn.Conv2d(n_in, 8, 3, stride=2),nn.BatchNorm2d(8),nn.ReLU()
        super().__init__(*first, nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16))

class Own(nn.Module):
    "A user's module: 32 features, not maps"
    def __init__(self, n_in=3):
        super().__init__()
        layers = nn.Conv2d(n_in, 8, 3, stride=2),nn.BatchNorm2d(8),nn.ReLU()
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
    def forward(self, x): return self.net(x)

families = dict(  # by name: torchvision's, fastai's, ours, timm's
    resnet18=tv.resnet18, resnet50=tv.resnet50, efficientnet_b0=tv.efficientnet_b0, mobilenet_v2=tv.mobilenet_v2,
    convnext_tiny=tv.convnext_tiny, xresnet18=xresnet18, small_resnet=small_resnet, timm_vit='test_vit')

def seed_all(seed=0):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)

def make(dls=None, arch=None, seed=0, **kwargs):
    "A learner that trains in a moment, of scikit-learn's digits unless `dls` are given"
    seed_all(seed)
    kw = dict(queue_size=200, n_hidden=16, dim=8, metrics=[])
    return ressl_learner(dls or digits_dls(8, bs=64), arch or NoBN(), **{**kw, **kwargs})

def quiet(learn, f, *args, **kwargs):
    "`f(*args, **kwargs)` without a bar and without lines of losses"
    with learn.no_bar(), learn.no_logging(): return f(*args, **kwargs)

def fit(learn, n=1, lr=1e-2, **kwargs):
    quiet(learn, learn.fit, n, lr, **kwargs)
    return learn

# comparisons

def state(o):
    "A copy of the tensors of a learner's model, or of a module"
    m = o.model if isinstance(o, Learner) else o
    return {k:v.clone() for k,v in m.state_dict().items()}

def same(a, b):
    "Whether two states have the same names, types and bits"
    return list(a)==list(b) and all(a[k].dtype==b[k].dtype and torch.equal(a[k], b[k]) for k in a)

def close(a, b, tol=1e-5):
    "Relative to the largest, since features of untrained networks can be tiny"
    return a.shape==b.shape and bool((a-b).abs().max()<=tol*b.abs().max())

# callbacks

class Crash(Callback):
    "Ends a fit like Ctrl-C after `n` steps"
    order = 1
    def __init__(self, n): self.n = n
    def before_batch(self):
        if self.training and self.train_iter==self.n: raise KeyboardInterrupt

class Skip(Callback):
    "Skips every step, as `MixedPrecision` does after an overflow"
    order = MixedPrecision.order
    def before_step(self): raise CancelStepException

# views

def mild_views():
    "Arguments of `ressl_learner`: views of 8 pixels that hardly differ"
    kw = dict(scale=(0.7,1.), flip_p=0.)
    return dict(weak_tfms=weak_tfms(8, **kw), strong_tfms=strong_tfms(8, **kw))

class Spoil:
    "Views of which the `nth` batch is not finite"
    def __init__(self, tfms, nth, value=math.nan): self.tfms,self.nth,self.value,self.n = tfms,nth,value,0
    def __call__(self, x):
        self.n += 1
        x = self.tfms(x)
        return x if self.n!=self.nth else x.clone().index_fill_(0, torch.tensor(0), self.value)

# files

def write_digits(path, n=80, flat=False):
    "`n` of scikit-learn's digits as PNG files, in a folder for each class unless `flat`"
    digits = load_digits()
    for i in range(n):
        folder = path if flat else path/str(digits.target[i])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[i]*15).astype(np.uint8)).save(folder/f'{i:03}.png')
    return path

def layout(path, *names):
    "Grey images with these names, each another grey"
    for i,nm in enumerate(names):
        (path/nm).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8,8), i, np.uint8)).save(path/nm)
    return path

def trained_on(images):
    "A learner of the grey images in a folder, trained for an epoch"
    return fit(make(folder_dls(images, 8, 16, gray=True, num_workers=0), small_resnet, queue_size=32))

def write_run(learn, path):
    "The folder that `ressl_pretrain` leaves, as far as the other commands read it"
    path.mkdir()
    learn.save_encoder(path/'encoder.pth')
    (path/'config.json').write_text('{"size": 8}')

@contextmanager
def held(folder):
    "Another process is at the checkpoints in `folder`, to which it holds the lock"
    code = (f"from fcntl import *; f = open('{folder}/lock', 'w'); lockf(f, LOCK_EX|LOCK_NB); "
            "print('held', flush=True); input()")
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, '-c', code], text=True, **pipes) as other:
        assert other.stdout.readline()=='held\n'
        try: yield
        finally: other.kill()
