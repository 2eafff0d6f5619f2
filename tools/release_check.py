"""Install the one wheel of a folder into an empty environment, as a user would, and run what the README shows.

    python tools/release_check.py dist
"""
import re, subprocess, sys, tempfile, venv
from pathlib import Path

root = Path(__file__).resolve().parent.parent

def readme_lines(text):
    "The Python of the README, block by block, with 2 epochs where it trains for 100: whether lines run needs no more"
    blocks = re.findall(r'```python\n(.*?)```', text, flags=re.S)
    return [o.replace('fit_one_cycle(100', 'fit_one_cycle(2') for o in blocks]

# what the reader of the README has: a folder of pictures, and `DataLoaders` of it, with labels and without
before = """
import matplotlib
matplotlib.use('agg')
from ressl_fastai.all import *
import numpy as np
rng = np.random.default_rng(0)
for i in range(80):
    file = Path('images')/'labelled'/f'class{i%2}'/f'{i}.png'
    file.parent.mkdir(parents=True, exist_ok=True)
    PILImage.create(rng.integers(0, 256, (20,20,3), dtype=np.uint8)).save(file)
def loaders():
    kw = dict(valid_pct=0.3, seed=0, item_tfms=Resize(16), bs=8, num_workers=0)
    return ImageDataLoaders.from_folder('images/labelled', **kw)
dls,labelled_dls = loaders(),loaders()
"""


def main(dist):
    wheel, = Path(dist).resolve().glob('*.whl')
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder)/'bin'/'python'
        def run(*args): subprocess.run([python, *args], cwd=folder, check=True)
        run('-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', wheel)
        run('-c', 'import ressl_fastai; assert ressl_fastai.__file__.startswith(r"%s")' % folder)
        run('-c', 'import importlib.resources as r; assert (r.files("ressl_fastai")/"py.typed").is_file()')
        command = [Path(folder)/'bin'/'ressl_pretrain', 'digits', '--out', 'run', '--epochs', '1', '--no-report']
        subprocess.run(command, cwd=folder, check=True)
        script = Path(folder)/'readme.py'
        script.write_text('\n'.join([before, *readme_lines((root/'README.md').read_text(encoding='utf-8'))]))
        run('-W', 'ignore', script)

if __name__=='__main__': main(sys.argv[1])
