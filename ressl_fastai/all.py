"Everything that users call, for `from ressl_fastai.all import *`: fastai's vision API and ours"
from fastai.vision.all import *

from ressl_fastai.batch_norm import FrozenBatchNorm, batch_norms, set_batch_norm, split_batch_norm
from ressl_fastai.callback import InfoNCEWarmup, ReSSL
from ressl_fastai.checkpoint import Checkpoint
from ressl_fastai.curate import typiclust
from ressl_fastai.data import cached_dls, digits_dls, find_images, folder_dls, tensor_dls
from ressl_fastai.distributed import join_processes, memory_plan
from ressl_fastai.evaluate import (KNNAccuracy, LinearProbe, embed, fit_logistic, knn_accuracy, linear_accuracy,
                                   measure_batch_norms, pixel_features)
from ressl_fastai.feature_queue import FeatureQueue, default_queue_size
from ressl_fastai.fingerprint import data_fingerprint
from ressl_fastai.health import Guard, HealthMonitor
from ressl_fastai.images import ImageError, OpenImage, PILImage12, PILImage16, open_image, readable_images
from ressl_fastai.interpret import show_items
from ressl_fastai.label_efficiency import draw_labels, label_rows, labelled_part, plot_labels, summarize_labels
from ressl_fastai.learner import ReSSLLearner, TimeLeft, ressl_learner
from ressl_fastai.loaders import ResizeBatch, clean_dl, first_images, image_stats
from ressl_fastai.losses import info_nce_loss, relation, ressl_loss
from ressl_fastai.models import (Embedder, Encoder, ReSSLModel, create_encoder, create_mlp, get_arch, ressl_splitter,
                                 set_stem, small_resnet, stems)
from ressl_fastai.optimizer import FusedAdam
from ressl_fastai.precision import DevicePrecision, choose_precision, has_bfloat16, precisions
from ressl_fastai.prepare import prepare_images
from ressl_fastai.recipes import Recipe, recipe, recipes
import ressl_fastai.detection  # learn.to_fpn_backbone()
import ressl_fastai.publish  # learn.save_weights(), learn.model_card()
import ressl_fastai.replay  # learn.replay()
import ressl_fastai.report  # learn.report()
from ressl_fastai.runs import keep_memory
from ressl_fastai.signs import draw_signs, sign_kinds, write_signs
from ressl_fastai.teacher import make_teacher, update_teacher
from ressl_fastai.transfer import encoder_learner, load_encoder
from ressl_fastai.views import RandomView, full_size, multi_crop_tfms, show_views, strong_tfms, weak_tfms
from ressl_fastai.weights import load_ressl_weights, read_ressl_weights
