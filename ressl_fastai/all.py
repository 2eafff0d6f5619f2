"Everything for `from ressl_fastai.all import *`: fastai's vision API and ours"
from fastai.vision.all import *

from ressl_fastai.batch_norm import *
from ressl_fastai.callback import *
from ressl_fastai.checkpoint import *
from ressl_fastai.curate import *
from ressl_fastai.data import *
from ressl_fastai.evaluate import *
from ressl_fastai.feature_queue import *
from ressl_fastai.fingerprint import *
from ressl_fastai.health import *
from ressl_fastai.images import *
from ressl_fastai.interpret import *
from ressl_fastai.label_efficiency import *
from ressl_fastai.learner import *
from ressl_fastai.losses import *
from ressl_fastai.models import *
from ressl_fastai.optimizer import *
from ressl_fastai.precision import *
from ressl_fastai.recipes import *
from ressl_fastai.report import *
from ressl_fastai.signs import *
from ressl_fastai.teacher import *
from ressl_fastai.transfer import *
from ressl_fastai.views import *
from ressl_fastai.weights import *
