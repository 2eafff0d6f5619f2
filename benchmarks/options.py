"""What else could make a step faster: each option against the defaults, steps of both in turns in one process, one
JSON line per option in results/options.jsonl.

    .venv/bin/python benchmarks/options.py            # all, about 8 minutes on 2 cores
    .venv/bin/python benchmarks/options.py compile    # one

compile: student and teacher through torch.compile, which needs a C++ compiler; the seconds that compiling takes are
counted apart. inference_mode: the teacher's
forward in torch.inference_mode instead of no_grad. fused: torch's fused AdamW in the place of fastai's Adam.
allocator: glibc keeps the memory it was given
(MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_), in processes of its own that take turns with those of the
defaults."""

import argparse, json, os, statistics, subprocess, sys, time
from functools import partial
from unittest.mock import patch

import torch
from fastai.optimizer import OptimWrapper

from common import ratio, receipt
from ressl_fastai import callback
from step import configs, make, steps

keep = dict(MALLOC_TRIM_THRESHOLD_=str(2**34), MALLOC_MMAP_THRESHOLD_=str(2**30))

def compiled(learn):
    "Seconds that the first two steps take beyond the later ones"
    learn.model.encoder.compile()
    learn.model.teacher[0].compile()
    start = time.perf_counter()
    seconds = steps(learn, 3)
    return time.perf_counter()-start-4*statistics.median(seconds)

def fused(learn): learn.opt_func = partial(OptimWrapper, opt=torch.optim.AdamW, fused=True)

def in_inference_mode(n):
    teach = callback.ReSSL._teach
    def _teach(self, x):
        with torch.inference_mode(): z = teach(self, x)
        return z.clone()  # an ordinary tensor, which autograd may keep
    def run(learn):
        with patch.object(callback.ReSSL, '_teach', _teach): return steps(learn, n)
    return run

def run(name, option, rounds):
    config,extra = configs[name],{}
    n = config['steps']
    plain,other = (make(name, 'auto', **config) for _ in range(2))
    take = in_inference_mode(n) if option=='inference_mode' else partial(steps, n=n)
    if option=='fused': fused(other)
    if option=='compile': extra['seconds_to_compile'] = round(compiled(other), 1)
    t = {'default':[], option:[]}
    for i in range(rounds+1):
        a,b = statistics.mean(steps(plain, n)),statistics.mean(take(other))
        if i:
            t['default'].append(a)
            t[option].append(b)
    write(name, option, t, precision=repr(plain.precision), **extra)

def write(name, option, t, **kwargs):
    receipt(
        'options',
        0,
        config=name,
        option=option,
        ms={k: round(1e3 * statistics.median(v), 1) for k, v in t.items()},
        times_faster=ratio(t['default'], t[option]),
        rounds=[round(a / b, 3) for a, b in zip(t['default'], t[option])],
        **kwargs,
    )

def allocator(name, rounds):
    def once(env):
        cmd = [sys.executable, __file__, '--once', name]
        return json.loads(
            subprocess.run(
                cmd, env={**os.environ, **env}, capture_output=True, text=True, check=True
            ).stdout.splitlines()[-1]
        )

    t = {'default':[], 'allocator':[]}
    for _ in range(rounds):
        t['default'].append(once({}))
        t['allocator'].append(once(keep))
    write(name, 'allocator', t, environment=keep)

options = ('compile','inference_mode','fused','allocator')

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('options', nargs='*', default=options, help=', '.join(options))
    p.add_argument('--configs', nargs='+', default=['resnet18_64','resnet18_32_standard'], help=', '.join(configs))
    p.add_argument('--rounds', type=int, default=4)
    p.add_argument('--once', help="print the seconds of a step (used by the script itself)")
    args = p.parse_args()
    if args.once:
        learn = make(args.once, 'auto', **configs[args.once])
        steps(learn, 1)
        print(statistics.median(steps(learn, 8)))
    else:
        for name in args.configs:
            for option in args.options:
                allocator(name, args.rounds) if option == 'allocator' else run(name, option, args.rounds)
