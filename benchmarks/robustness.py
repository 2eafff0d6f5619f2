"""How much does it matter which learning rate, teacher momentum and temperature one takes?

Asked: 2203.08717 says that predictor and warm-up make the method robust to such settings; how many of 27 settings come
near the best, with and without them? n: the sets and seeds that the receipts hold. Machine: that of each receipt.

    cd benchmarks; python -W ignore levers.py --prepare /tmp/levers                # pictures, once; see there
    cd benchmarks; python -W ignore robustness.py --seeds 0                        # 50 minutes of one core a set
    cd benchmarks; python -W ignore robustness.py --sets tiles --seeds 0 --seconds 3    # tries it

One JSON line per set, variant and seed in results/robustness.jsonl, with all of the grid. Seconds are of processor
time of one thread, so that variants that do more per step see fewer pictures; encoder and measures are those of
minutes.py.

- `relations`: `warmup=None`, 2107.09282
- `predictor, first fifth`: a predictor of two layers, and InfoNCE in the first fifth of the time, 2203.08717
- `default`: InfoNCE ramped down over all of the time, as `ressl_learner` has it"""

from itertools import product
from pathlib import Path

import torch
from fastai.torch_core import set_seed
from fastcore.script import call_parse

from common import receipt
from continued import learner
from hand_over import train
from levers import imagenet, load, quality
from ressl_fastai.callback import InfoNCEWarmup

grid = dict(lr=(5e-4,2e-3,8e-3), teacher_momentum=(0.9,0.99,0.999), teacher_temp=(0.02,0.04,0.07))
variants = {
    'relations': lambda: dict(warmup=None),
    'predictor, first fifth': lambda: dict(predictor_layers=2, warmup=InfoNCEWarmup(0.2, 0., fraction=True)),
    'default': dict,
}

@call_parse
def main(
    sets:str='tiles,emoji',
    seeds:str='0',
    seconds:float=30., # Of processor time, each
    only:str='', # Variants, all without it; separated by ;
    data:str='/tmp/levers', # What `levers.py --prepare` made
):
    torch.set_num_threads(1)
    for seed,name in product(map(int, seeds.split(',')), sets.split(',')):
        arrays = load(Path(data), name)
        x = arrays['x'].contiguous()
        for variant in only.split(';') if only else variants:
            found = []
            for lr,*values in product(*grid.values()):
                rest = dict(zip(list(grid)[1:], values))
                set_seed(seed, reproducible=True)
                learn = learner(x, guard=False, **rest, **variants[variant]())
                steps = train(learn, seconds, lr)
                net = learn.model.encoder.eval()
                good = all(o.isfinite().all() for o in net.state_dict().values())
                found.append(dict(lr=lr, **rest, steps=steps,
                                  **(quality(net, arrays, imagenet, torch.device('cpu')) if good else {})))
            receipt('robustness', seed, data=name, variant=variant, seconds=seconds, size=32, arch='small_resnet',
                    n_pictures=len(x), found=found)
