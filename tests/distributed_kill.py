"""Train for `test_distributed.py`; of several processes one is killed in the first attempt:

torchrun --nproc-per-node 2 --max-restarts 1 distributed_kill.py FOLDER"""

import os, signal, sys
from functools import partial
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import fit_one_cycle
from fastai.torch_core import default_device, rank_distrib, set_seed
from torch.distributed.distributed_c10d import _get_default_store

from ressl_fastai.checkpoint import Checkpoint
from ressl_fastai.data import digits_dls
from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import small_resnet

class Kill(Callback):
    "The power cut of one machine"
    order = 100
    def after_step(self):
        if self.train_iter==5 and rank_distrib()==1 and os.environ.get('TORCHELASTIC_RESTART_COUNT')=='0':
            os.kill(os.getpid(), signal.SIGKILL)

def train(folder):
    "Two epochs with a checkpoint every second step; process 0 writes the weights"
    default_device(use=False)
    torch.set_num_threads(1)
    set_seed(0)
    dls = digits_dls(8, bs=128)
    small = dict(queue_size=512, n_hidden=16, dim=8, metrics=[], precision='float32', channels_last=False)
    learn = ressl_learner(dls, partial(small_resnet, widen=0.125), path=folder, **small)
    with learn.no_bar(), learn.distrib_ctx():
        # a store with the addresses of an earlier attempt would have counted its processes, too
        assert _get_default_store().add('processes of this attempt', 1)<=2
        learn.fit_one_cycle(2, 1e-3, cbs=[Checkpoint('run', every=2), Kill()])
    if rank_distrib()==0: torch.save(learn.model.state_dict(), folder/'weights.pth')

if __name__=='__main__': train(Path(sys.argv[1]))
