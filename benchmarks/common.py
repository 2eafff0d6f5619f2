"""What the benchmarks share: receipts, and real images that a package manager serves.

A receipt is one JSON line in results/NAME.jsonl: command, seed, commit, versions, device, then what was measured."""
import gzip, json, os, platform, statistics, subprocess, sys, time
from datetime import date
from pathlib import Path

import fastai, numpy as np, torch, torchvision
from PIL import Image
from sklearn.datasets import load_sample_images

import ressl_fastai

root = Path(__file__).resolve().parent.parent

def _git(*args): return subprocess.run(['git', *args], cwd=root, capture_output=True, text=True).stdout.strip()

def cpu():
    "Name of the processor and what of it speeds up half precision (Linux)"
    try: info = Path('/proc/cpuinfo').read_text()
    except OSError: return platform.processor() or platform.machine()
    name = next((l.split(':')[1].strip() for l in info.splitlines() if l.startswith('model name')), platform.machine())
    return ' '.join([name] + [f for f in ('avx512_bf16', 'amx_bf16') if f in info])

def receipt(benchmark, seed=None, **measured):
    "Append a line to results/`benchmark`.jsonl, print it, and return it"
    line = dict(
        benchmark=benchmark,
        date=str(date.today()),
        command=' '.join([f'benchmarks/{Path(sys.argv[0]).name}', *sys.argv[1:]]),
        seed=seed,
        commit=_git('rev-parse', '--short', 'HEAD'),
        changed=bool(_git('diff', '--name-only', 'HEAD', '--', 'ressl_fastai', ':!ressl_fastai/_modidx.py')),
        versions=dict(
            ressl_fastai=ressl_fastai.__version__,
            fastai=fastai.__version__,
            torch=torch.__version__,
            torchvision=torchvision.__version__,
            python=platform.python_version(),
        ),
        device='cpu',
        cpu=cpu(),
        cpus=os.cpu_count(),
        threads=torch.get_num_threads(),
        **measured,
    )
    with (root/'benchmarks'/'results'/f'{benchmark}.jsonl').open('a') as f: f.write(json.dumps(line)+'\n')
    print(json.dumps(line), flush=True)
    return line

def fashion_mnist(n_train=10_000, n_valid=10_000, size=28, folder=Path('/usr/share/datasets/fashion-mnist')):
    """The first images of Fashion-MNIST's training and test sets, (n, size, size) uint8, and their labels; Debian's
    dataset-fashion-mnist"""
    if not folder.exists(): raise FileNotFoundError(f"{folder} is missing: apt-get install dataset-fashion-mnist")
    def read(nm, offset): return np.frombuffer(gzip.open(folder/nm).read(), np.uint8, offset=offset)

    def ims(part, n):
        return np.stack([resized(o, size) for o in read(f'{part}-images-idx3-ubyte.gz', 16).reshape(-1, 28, 28)[:n]])

    def ys(part, n): return read(f'{part}-labels-idx1-ubyte.gz', 8)[:n].astype(np.int64)
    return ims('train', n_train),ys('train', n_train),ims('t10k', n_valid),ys('t10k', n_valid)

def resized(im, size):
    return im if im.shape[:2] == (size, size) else np.asarray(Image.fromarray(im).resize((size, size), Image.BILINEAR))


def emoji(vendor, size=32, folder=Path(os.environ.get('EMOJI', '/tmp/emoji'))):
    """The pictures of one vendor (twitter, google, apple or facebook) on white, (n, size, size, 3) uint8, their
    categories and names; npm's emoji-datasource-VENDOR:

    npm install --prefix /tmp/emoji emoji-datasource-twitter emoji-datasource-google"""
    pkg = folder/'node_modules'/f'emoji-datasource-{vendor}'
    if not pkg.exists():
        raise FileNotFoundError(f"{pkg} is missing: npm install --prefix {folder} emoji-datasource-{vendor}")
    variants = (
        (v, o['category'])
        for o in json.loads((pkg / 'emoji.json').read_text())
        for v in (o, *o.get('skin_variations', {}).values())
    )
    found = [
        (pkg / 'img' / vendor / '64' / v['image'], category, v['unified'])
        for v, category in variants
        if v.get(f'has_img_{vendor}')
    ]

    def picture(f):
        im = Image.open(f).convert('RGBA')
        return np.asarray(
            Image.alpha_composite(Image.new('RGBA', im.size, 'white'), im)
            .convert('RGB')
            .resize((size, size), Image.BILINEAR)
        )

    return np.stack([picture(f) for f,_,_ in found]),np.array([c for _,c,_ in found]),np.array([u for _,_,u in found])

def in_turns(cases, n, warm=1, least=0.):
    """Seconds per call of each of `cases` (name: function), taken in turns so that what disturbs the machine
    disturbs all; the first `warm` rounds do not count.
    In its turn a case is called again until `least` seconds have passed, so that short ones are not measured with
    the caches that long ones left"""
    res = {k:[] for k in cases}
    for i in range(n+warm):
        for k,f in cases.items():
            start,seconds,calls = time.perf_counter(),0.,0
            while not calls or seconds < least:
                f()
                calls += 1
                seconds = time.perf_counter() - start
            if i>=warm: res[k].append(seconds/calls)
    return res

def ratio(a, b):
    "Median of what `a` took in each round over what `b` took"
    return round(statistics.median(x/y for x,y in zip(a, b)), 3)

def spread(seconds, digits=2):
    "Milliseconds: median, smallest and largest"
    return dict(
        median=round(1e3 * statistics.median(seconds), digits),
        min=round(1e3 * min(seconds), digits),
        max=round(1e3 * max(seconds), digits),
    )


def _memory(field):
    return (
        next(int(l.split()[1]) for l in Path('/proc/self/status').read_text().splitlines() if l.startswith(field))
        / 1024
    )


def peak(run):
    "Megabytes by which `run` raises the memory of this process, at most (Linux)"
    Path('/proc/self/clear_refs').write_text('5')  # the peak so far is forgotten
    before = _memory('VmRSS')
    run()
    return _memory('VmHWM')-before

def peaks(cases, *args):
    "Megabytes of each of `cases`, in a process of its own in which the script calls `answer_peak`"

    def of(case):
        return float(
            subprocess.run(
                [sys.executable, sys.argv[0], '--peak', case, *map(str, args)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.splitlines()[-1]
        )

    return {k:round(of(k), 1) for k in cases}

def answer_peak(measure):
    "If this process is one that `peaks` has started, print what `measure` says of its case and arguments, and end"
    if '--peak' not in sys.argv[1:2]: return
    print(measure(*sys.argv[2:]))
    sys.exit()

def photographs(n, size):
    "(n, 3, size, size) uint8: parts of scikit-learn's two photographs, of random place and size, resized"
    rng,photos = np.random.RandomState(0),[Image.fromarray(o) for o in load_sample_images().images]
    def part(i):
        side = rng.randint(min(size, 300), 427)
        left,top = rng.randint(0, 641-side),rng.randint(0, 428-side)
        return np.asarray(photos[i%2].resize((size,size), Image.BILINEAR, box=(left,top,left+side,top+side)))
    return torch.from_numpy(np.stack([part(i) for i in range(n)])).permute(0,3,1,2).contiguous()
