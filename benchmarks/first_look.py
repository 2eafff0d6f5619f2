"""How long do the report and `ressl_evaluate` take for 5,000 images? Seconds of the processor, and by the clock.

One JSON line for each network in results/first_look.jsonl, about three minutes each.

    apt-get install the packages that hand_over.py names for tiles
    .venv/bin/python -W ignore benchmarks/first_look.py                # on all cores, while nothing else runs
    .venv/bin/python -W ignore benchmarks/first_look.py --threads 1    # for seconds of the processor

The images are squares of 37 photographs, in a class folder for each photograph, as JPEG files of 64 x 64 pixels. The
network is trained for three steps only: what is measured does not depend on how good it is. `sections` are seconds by
the clock, as the page has them. Loading PyTorch and fastai, some five seconds of a command, is not in these figures.
"""
import io, os, re, tempfile, time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback, CancelFitException
from fastcore.script import call_parse
from PIL import Image

import hand_over
from common import receipt
from ressl_fastai.cli import ressl_evaluate
from ressl_fastai.data import cached_dls, folder_dls
from ressl_fastai.files import write_text
from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import get_arch
import ressl_fastai.report
from ressl_fastai.runs import keep_memory


class ThreeSteps(Callback):
    def after_batch(self):
        if self.training and self.iter==2: raise CancelFitException

def write_tiles(folder, n, side=64):
    "`n` files in class folders; the photographs of `hand_over`, in larger squares"
    hand_over.size = side
    xs,ys = hand_over.tiles(cols=16, rows=10)
    for i,(x,y) in enumerate(zip(xs[:n], ys)):
        file = folder/f'{y:02}'/f'{i:05}.jpg'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).save(file, quality=90)

def seconds(): return np.array([sum(os.times()[:4]), time.perf_counter()])

@call_parse
def main(
    n:int=5000, # Images
    archs:str='small_resnet,resnet18', # Networks
    size:int=64, # Side of the images in pixels
    threads:int=None, # Of PyTorch; all cores if not given
    page:str=None # Where the report is kept, nowhere if not given
):
    if threads: torch.set_num_threads(threads)
    keep_memory()  # as the commands do
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        write_tiles(tmp/'images', n, 64)
        for arch in archs.split(','):
            dls = cached_dls(folder_dls(tmp/'images', size, num_workers=0), num_workers=0)
            learn = ressl_learner(dls, get_arch(arch), path=tmp, model_dir='.')
            with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=ThreeSteps())
            learn.save_encoder('encoder')
            write_text(tmp/'config.json', f'{{"size": {size}}}')
            start = seconds()
            with learn.no_bar(): text = learn.report().read_text()
            sections = {re.search('<h2>(.*?)</h2>', o)[1]:re.search(r'>([\d.]+) seconds</p>', o)
                        for o in text.split('<section')[1:]}
            report,start = seconds()-start,seconds()
            if page: write_text(page, text)
            with redirect_stdout(io.StringIO()) as said: ressl_evaluate(str(tmp), str(tmp/'images'), num_workers=0)
            print(said.getvalue())
            (report_cpu,report_s),(evaluate_cpu,evaluate_s) = report.round(1),(seconds()-start).round(1)
            receipt('first_look', None, n=n, arch=arch, size=size, keep_memory=True, report_cpu_s=report_cpu,
                    report_s=report_s, evaluate_cpu_s=evaluate_cpu, evaluate_s=evaluate_s,
                    sections={k:float(o[1]) for k,o in sections.items() if o})
