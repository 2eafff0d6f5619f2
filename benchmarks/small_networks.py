"""Small networks at equal minutes: is one that is made for phones the better choice where training is short?

Asked: 2203.08717 speaks of ReSSL for EfficientNet and MobileNet; which network gives the best encoder after so many
minutes of a processor? n: the sets and seeds that the receipts hold. Machine: that of each receipt.

    cd benchmarks; python -W ignore levers.py --prepare /tmp/levers                # pictures, once; see there
    cd benchmarks; python -W ignore small_networks.py --seeds 0,1,2                # nine minutes a set and seed
    cd benchmarks; python -W ignore small_networks.py --sets tiles --seeds 0 --minutes 0.1    # tries it

One JSON line per set, network and seed in results/small_networks.jsonl. Minutes are of processor time of one thread;
measures are those of minutes.py. Everything is the default of `ressl_learner`, precision, layout and stem too: at 32
pixels all networks keep their resolution for longer ('small')."""

import time
from pathlib import Path

import torch
from fastai.torch_core import set_seed
from fastcore.script import call_parse
from torchvision.models import efficientnet_b0, mobilenet_v3_small, resnet18

from common import receipt
from hand_over import train
from levers import imagenet, load, quality
from ressl_fastai.data import tensor_dls
from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import small_resnet

archs = dict(resnet18=resnet18, mobilenet_v3_small=mobilenet_v3_small, efficientnet_b0=efficientnet_b0,
             small_resnet=small_resnet)

@call_parse
def main(
    sets:str='tiles,emoji',
    seeds:str='0,1,2',
    minutes:float=3., # Of processor time
    only:str='', # Networks, all without it; separated by ;
    data:str='/tmp/levers', # What `levers.py --prepare` made
):
    torch.set_num_threads(1)
    for seed in map(int, seeds.split(',')):
        for name in sets.split(','):
            arrays = load(Path(data), name)
            for arch in only.split(';') if only else archs:
                set_seed(seed, reproducible=True)
                start = time.process_time()
                learn = ressl_learner(tensor_dls(arrays['x'].contiguous(), valid_pct=0), archs[arch], metrics=[])
                steps = train(learn, 60*minutes-(time.process_time()-start), learn.lr)
                net = learn.model.encoder
                receipt('small_networks', seed, data=name, arch=arch, minutes=minutes, steps=steps, stem=net.stem,
                        precision=str(learn.precision.dtype), parameters=sum(o.numel() for o in net.parameters()),
                        features=net.nf, pictures=steps*learn.dls.train.bs,
                        **quality(net.eval(), arrays, imagenet, torch.device('cpu')))
