"What passes from `ressl_pretrain FOLDER` to its first step: CPU seconds and memory, the first time and the second"
import json
import os
import subprocess
import sys
import tempfile
from io import BytesIO
from pathlib import Path

import numpy as np
from fastcore.script import call_parse
from PIL import Image
from sklearn.datasets import load_sample_images

from common import receipt, root

child = '''
import json, os, resource, sys
from fastai.callback.core import Callback
from ressl_fastai import cli, runs

class Stop(Callback):
    order = -100
    def after_batch(self):
        own,system,children,children_system,_ = os.times()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024
        workers = round(children+children_system, 1)
        print(json.dumps(dict(cpu_s=round(own+system, 1), workers_cpu_s=workers, peak_mb=peak)))
        sys.stdout.flush()
        os._exit(0)

checkpoint = runs.Checkpoint
runs.Checkpoint = lambda folder: [checkpoint(folder), Stop()]
how = dict(arch='small_resnet', size=int(sys.argv[3]), bs=64, epochs=1, num_workers=0, no_report=True)
cli.ressl_pretrain(sys.argv[1], out=sys.argv[2], **how)
'''


def make_files(folder, n, side=64, classes=20):
    "`n` JPEG files, pieces of scikit-learn's two photographs, in class folders"
    rng,pieces = np.random.default_rng(0),[]
    for im in load_sample_images().images:
        for _ in range(250):
            top,left = (rng.integers(0, s-side) for s in im.shape[:2])
            Image.fromarray(im[top:top+side, left:left+side]).save(b := BytesIO(), 'JPEG', quality=85)
            pieces.append(b.getvalue())
    for c in range(classes): (folder/f'{c:02}').mkdir(parents=True)
    for i in range(n): (folder/f'{i%classes:02}'/f'{i:07}.jpg').write_bytes(pieces[i%len(pieces)]+b'%d' % i)

@call_parse
def main(
    n:int=20_000, # Files
    size:int=64, # Side of the images in training
    times:int=2, # Starts, one after the other
    tree:str=None # Another checkout of this repository, to compare with
):
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        make_files(tmp/'images', n)
        env = {**os.environ, 'PYTHONPATH':str(tree or root), 'XDG_CACHE_HOME':str(tmp/'cache'), 'OMP_NUM_THREADS':'1'}
        for i in range(times):  # in another folder: Python looks for packages there first
            args = [sys.executable, '-W', 'ignore', '-c', child, tmp/'images', tmp/f'run{i}', str(size)]
            res = subprocess.run(args, cwd=tmp, env=env, stdout=subprocess.PIPE, text=True, check=True)
            code = subprocess.run(
                ['git', '-C', tree or root, 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True
            )
            receipt(
                'startup',
                n=n,
                size=size,
                start=i + 1,
                tree=code.stdout.strip(),
                **json.loads(res.stdout.splitlines()[-1]),
            )
