"""What an NVIDIA GPU shows, in under six minutes: whether what it computes is what a CPU computes, whether a step
waits, and how long it takes beside its floor.

    python benchmarks/gpu.py --out FOLDER            # all; one JSON line per result in FOLDER/gpu.jsonl, as they come
    python benchmarks/gpu.py step loss               # some
    python benchmarks/gpu.py --tiny                  # on a CPU, with tiny sizes: does the script itself run?

Each section is a process of its own with a limit, most important first; those that take times run alone, the others
side by side. What a section had found when it was
stopped counts. The floor of a step is what shared/design/GPU.md calls so: student forward and backward, teacher
forward, foreach Adam, on ready tensors. Beside PyTorch, torchvision,
scikit-learn, matplotlib, timm, pytest and hypothesis a bare machine needs fastai and what it needs, in the versions
that pip chooses (with plum-dispatch 2.10, which fasttransform excludes, fastai exports no learner); kornia and lightly
are compared with where they are."""

import argparse, collections, contextlib, gc, io, itertools, json, os, platform, statistics, subprocess, sys, tempfile
import time, traceback, warnings
from copy import deepcopy
from functools import partial
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root/'benchmarks'), str(root/'tests')]
limits = dict(
    env=40,
    syncs=60,
    step=115,
    host=40,
    equal=90,
    tests=90,
    resume=90,
    trouble=90,
    tour=90,
    cli=90,
    loss=45,
    knn=25,
    views=40,
    peer=45,
)
alone = ('env','syncs','step','host','loss','views','knn','peer')
total = 345  # seconds for all, with what starting takes

def section(name, out, tiny):
    "Run one section in this process"
    global CUDA, DEV, TINY, torch, np, F, tvm
    warnings.filterwarnings('ignore')
    import numpy as np, torch, torch.nn.functional as F, torchvision, torchvision.models as tvm, fastai
    torch.set_num_threads(max(1, (os.cpu_count() or 2)//4))
    CUDA,TINY = torch.cuda.is_available() and not tiny,tiny
    DEV = torch.device('cuda', 0) if CUDA else torch.device('cpu')
    if not CUDA:
        from fastai.torch_core import default_device
        default_device(use=False)
    def git(*args):
        try: return subprocess.run(['git', *args], cwd=root, capture_output=True, text=True, timeout=20).stdout.strip()
        except OSError: return ''

    common = dict(
        benchmark='gpu',
        date=time.strftime('%F'),
        commit=os.environ.get('COMMIT') or git('rev-parse', '--short', 'HEAD'),
        versions=dict(
            torch=torch.__version__,
            cuda=torch.version.cuda,
            torchvision=torchvision.__version__,
            fastai=fastai.__version__,
            python=platform.python_version(),
        ),
        device=torch.cuda.get_device_name() if CUDA else 'cpu',
        cpus=os.cpu_count(),
        tiny=tiny,
    )
    def say(**measured):
        line = json.dumps(dict(common, section=name, **measured), default=str)
        with (out/'gpu.jsonl').open('a') as f: f.write(line+'\n')
        print(json.dumps(dict(section=name, **measured), default=str), flush=True)
    try: globals()[f'run_{name}'](say)
    except BaseException as e: say(error=repr(e)[:500], trace=traceback.format_exc()[-1500:])

# tools

def sync():
    if CUDA: torch.cuda.synchronize()

def bench(f, n=20, warm=3):
    "Milliseconds of a call, the median"
    for _ in range(1 if TINY else warm): f()
    sync()
    ts = []
    for _ in range(2 if TINY else n):
        t = time.perf_counter()
        f()
        sync()
        ts.append(time.perf_counter()-t)
    return round(1e3*statistics.median(ts), 3)

def photos(n, size):
    "(n, 3, size, size) uint8: parts of scikit-learn's two photographs, 128 different ones"
    from common import photographs
    x = photographs(min(n, 16 if TINY else 128), size)
    return x[torch.randint(0, len(x), (n,), generator=torch.Generator().manual_seed(0))]

def attempt(say, f, **case):
    "Say what `f` finds, or how it failed"
    t = time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()): res = f()
        sync()
        res = res if isinstance(res, dict) else dict(got=str(res)[:200])
        say(**case, ok=True, seconds=round(time.perf_counter()-t, 2), **res)
    except BaseException as e:
        say(
            **case,
            ok=False,
            seconds=round(time.perf_counter() - t, 2),
            error=repr(e)[:500],
            trace=traceback.format_exc()[-1500:],
        )


def steps_of(learn, n, skip=6, on=None):
    """Seconds per step over `n` steps of a training, the first `skip` not counted; `on` is told when counting
    begins and ends"""
    from fastai.callback.core import Callback, CancelFitException
    class Cap(Callback):
        order = 1000
        def before_fit(self): self.i = 0
        def after_batch(self):
            self.i += 1
            if self.i == skip:
                sync()
                on and on(True)
                self.start = time.perf_counter()
            if self.i == skip + n:
                sync()
                self.seconds = time.perf_counter() - self.start
                on and on(False)
                raise CancelFitException

    cap = Cap()
    n_epoch = -(-(skip+n)//len(learn.dls.train))
    with learn.no_bar(), learn.no_logging(): learn.fit(n_epoch, 1e-3, cbs=cap)
    return cap.seconds/n

def make(arch, size, bs, n, **kwargs):
    "A learner with images for `n` steps"
    from ressl_fastai.data import tensor_dls
    from ressl_fastai.learner import ressl_learner
    torch.manual_seed(0); np.random.seed(0)
    return ressl_learner(tensor_dls(photos(n*bs, size), valid_pct=0, bs=bs, device=DEV), arch, metrics=[], **kwargs)

def archs():
    from ressl_fastai.models import small_resnet
    return dict(small=partial(small_resnet, widen=0.125) if TINY else small_resnet, r18=tvm.resnet18, r50=tvm.resnet50)

# sections

def run_env(say):
    import torchvision
    free = torch.cuda.mem_get_info() if CUDA else None
    say(memory=free, cudnn=torch.backends.cudnn.version())
    if not CUDA: return
    a = torch.randn(8192, 8192, device=DEV, dtype=torch.bfloat16)
    say(bfloat16_tflops=round(2*8192**3/bench(lambda: a@a)/1e9, 1))
    x = torch.empty(2**30, dtype=torch.uint8, device=DEV)
    y = torch.empty_like(x)
    say(copy_tb_s=round(2*2**30/bench(lambda: y.copy_(x))/1e9, 2))

def where_it_waits(learn, n):
    "Lines of fastai and ours that wait, with how often per step"
    found = collections.Counter()
    def note(message, category, filename, lineno, file=None, line=None):
        if 'synchroniz' not in str(message): return
        at = [f'{Path(f.filename).name}:{f.lineno}' for f in traceback.extract_stack() if 'fastai' in f.filename][-4:]
        found[' < '.join(reversed(at)) or f'{Path(filename).name}:{lineno}'] += 1
    old = warnings.showwarning
    def on(start):
        warnings.showwarning = note if start else old
        warnings.simplefilter('always' if start else 'ignore')
        torch.cuda.set_sync_debug_mode('warn' if start else 'default')
    steps_of(learn, n, skip=6 if TINY else 12, on=on)
    return {k:v/n for k,v in found.most_common(20)}

def ten_steps(learn, bar=False):
    "Ten steps in which waiting is an error"
    def on(start): CUDA and torch.cuda.set_sync_debug_mode('error' if start else 'default')
    # `Guard` looks at steps 10, 20, 40 and 50, and waits for what it sees
    try: steps_of(learn, 2 if TINY else 10, skip=2 if TINY else 22, on=on)
    finally: on(False)
    return dict(waits=0)

def counted(learn, n):
    "Launches, copies and waits of a step, and what the device itself takes"
    from torch.profiler import ProfilerActivity, profile
    p = profile(activities=[ProfilerActivity.CPU]+[ProfilerActivity.CUDA]*CUDA)
    ms = 1e3*steps_of(learn, n, skip=2 if TINY else 12, on=lambda start: p.start() if start else p.stop())
    events = p.key_averages()
    def device(e): return getattr(e, 'self_device_time_total', 0)

    return dict(
        profiled_ms=round(ms, 2),
        device_ms=round(sum(map(device, events)) / n / 1e3, 2),
        aten=sum(e.count for e in events if e.key.startswith('aten::')) / n,
        to_copy=sum(e.count for e in events if e.key == 'aten::_to_copy') / n,
        runtime={e.key: e.count / n for e in events if e.key.startswith('cuda') and e.count >= n},
        copies={e.key: [e.count / n, round(device(e) / n / 1e3, 3)] for e in events if 'Memcpy' in e.key},
        longest=[
            [e.key[:80], e.count / n, round(device(e) / n / 1e3, 3)]
            for e in sorted(events, key=device, reverse=True)[:20]
            if device(e)
        ],
        host=[
            [e.key[:60], e.count / n, round(e.self_cpu_time_total / n / 1e3, 3)]
            for e in sorted(events, key=lambda e: -e.self_cpu_time_total)[:20]
        ],
    )

def run_syncs(say):
    from ressl_fastai import data
    for case,size,bs in (('r18',32,256), ('r50',224,128)) if not TINY else (('small',8,8),):
        n = 5 if not TINY else 2
        learn = make(archs()[case], size, bs, 34 if not TINY else 18)
        say(case=case, size=size, bs=bs, dl=repr(learn.dls.train), learner=repr(learn))
        attempt(say, partial(ten_steps, learn), case=case, size=size, what='ten steps')
        if CUDA: attempt(say, lambda: dict(where=where_it_waits(learn, n)), case=case, size=size, what='waits per step')
        attempt(say, lambda: counted(learn, n), case=case, size=size, what='counts')
    free,data.free_memory = data.free_memory,lambda device: 0
    try:
        attempt(
            say,
            lambda: ten_steps(make(archs()['small'], 8 if TINY else 32, 8 if TINY else 64, 34)),
            case='small',
            what='ten steps, images on the host',
        )
    finally: data.free_memory = free

def run_host(say):
    "Where Python spends a step: milliseconds by function, its own and with what it calls"
    import cProfile, pstats
    for case,size,bs,n in (('small',32,64,40), ('r18',32,256,30)) if not TINY else (('small',8,8,3),):
        learn,p = make(archs()[case], size, bs, n+20),cProfile.Profile()
        steps_of(learn, 3, skip=4)
        ms = 1e3*steps_of(learn, n, skip=10, on=lambda start: p.enable() if start else p.disable())
        stats = pstats.Stats(p).stats
        def top(i, k): return [
            [f'{Path(f).name}:{line}:{nm}', round(v[0]/n, 1), round(1e3*v[i]/n, 3)]
            for (f,line,nm),v in sorted(stats.items(), key=lambda o: -o[1][i])[:k]]
        say(case=case, size=size, bs=bs, profiled_ms=round(ms, 2), own=top(2, 40), with_calls=top(3, 70))

class Floor:
    "Networks and a plain optimizer on ready tensors"
    def __init__(self, learn, dtype):
        self.model = deepcopy(learn.model).to(DEV)
        fmt = torch.channels_last if learn.precision.channels_last else torch.contiguous_format
        self.model.to(memory_format=fmt).train()
        self.x = torch.randn(learn.dls.train.bs, 3, *learn.dls.train.images.shape[2:], device=DEV).to(memory_format=fmt)
        self.opt, self.dtype = (
            torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], lr=1e-4, foreach=True),
            dtype,
        )

    def __call__(self):
        with torch.autocast(DEV.type, self.dtype) if self.dtype else contextlib.nullcontext():
            z = self.model(self.x)
            with torch.no_grad(): self.model.teacher(self.x)
        (z.float()*self.x.mean()).sum().backward()
        self.opt.step()
        self.opt.zero_grad()

    def seconds(self, n):
        for _ in range(5): self()
        sync()
        t = time.perf_counter()
        for _ in range(n): self()
        sync()
        return (time.perf_counter()-t)/n

def step_row(case, size, bs, n, precision, rounds=2, **kwargs):
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    learn = make(archs()[case], size, bs, n+10, precision=precision, **kwargs)
    seconds = [steps_of(learn, n) for _ in range(rounds)]
    res = dict(
        ms=round(1e3 * min(seconds), 2),
        images_s=round(bs / min(seconds)),
        mb=round(torch.cuda.max_memory_allocated() / 2**20) if CUDA else 0,
        chosen=repr(learn.precision),
        rounds=[round(1e3 * o, 2) for o in seconds],
    )
    floor = Floor(learn, learn.precision.dtype)
    bare = [floor.seconds(n) for _ in range(rounds)]
    return dict(res, floor_ms=round(1e3*min(bare), 2), ratio=round(min(seconds)/min(bare), 3))

def run_step(say):
    cases = (
        (
            ('r18', 32, 256, 40),
            ('r50', 224, 128, 14),
            ('small', 32, 64, 60),
            ('r18', 64, 256, 30),
            ('r18', 32, 1024, 20),
            ('r50', 224, 256, 8),
        )
        if not TINY
        else (('small', 8, 8, 2),)
    )
    for case,size,bs,n in cases:
        for precision in ('bfloat16','float32'):
            attempt(
                say, partial(step_row, case, size, bs, n, precision), case=case, size=size, bs=bs, precision=precision
            )
            gc.collect()
    attempt(
        say, partial(compiled_row, *cases[0]), case=cases[0][0], size=cases[0][1], bs=cases[0][2], what='torch.compile'
    )


def compiled_row(case, size, bs, n):
    if TINY: return 'left out'
    learn = make(archs()[case], size, bs, n+30)
    t = time.perf_counter()
    learn.model.encoder.compile()
    learn.model.teacher[0].compile()
    return dict(ms=round(1e3*steps_of(learn, n, skip=20), 2), seconds_in_all=round(time.perf_counter()-t, 1))

def run_loss(say):
    from ressl_fastai import losses
    from ressl_fastai.losses import ressl_loss

    for bs, K, dim in (
        ((256, 4096, 128), (256, 65536, 128), (256, 131072, 512), (1024, 131072, 512), (4096, 65536, 128))
        if not TINY
        else ((8, 64, 16),)
    ):
        unit = lambda n: F.normalize(torch.randn(n, dim, device=DEV), dim=1)
        zs, zt, queue = unit(bs).requires_grad_(), unit(bs), unit(K)

        def formula(zs=zs, zt=zt, queue=queue):
            with torch.no_grad():
                p = (zt @ queue.T / 0.04).softmax(1)
            return -(p * (zs @ queue.T / 0.1).log_softmax(1)).sum(1).mean()

        def half():
            return formula(zs.bfloat16(), zt.bfloat16(), queue.bfloat16())

        def measure(f, grad=None):
            def run():
                zs.grad = None
                f().backward()

            if CUDA:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            res = dict(ms=bench(run), mb=round((torch.cuda.max_memory_allocated() - before) / 2**20, 1) if CUDA else 0)
            return res if grad is None else dict(res, gradient_off=((zs.grad - grad).norm() / grad.norm()).item())

        exact = exact_gradient(zs, zt, queue)
        case = dict(bs=bs, K=K, dim=dim)
        attempt(say, lambda: measure(lambda: ressl_loss(zs, zt, queue), exact), **case, what='ours')
        attempt(say, lambda: measure(formula, exact), **case, what='formula')
        attempt(say, lambda: measure(half, exact), **case, what='formula, bfloat16 logits')
        n = losses._n_logits
        for k in (20, 22, 26):
            losses._n_logits = lambda device: 2**k
            attempt(
                say, lambda: measure(lambda: ressl_loss(zs, zt, queue), exact), **case, what=f'ours, pieces of 2^{k}'
            )
        losses._n_logits = n
        for dtype in (torch.float32, torch.bfloat16):
            attempt(
                say,
                lambda: measure(partial(attention_loss, zs, zt, queue, dtype), exact),
                **case,
                what=f'attention kernel, {dtype}',
            )


def exact_gradient(zs, zt, queue):
    "In float64, in pieces"
    with torch.no_grad():
        q = queue.double()
        parts = [
            (a.double() @ q.T / 0.1).softmax(1) @ q - (b.double() @ q.T / 0.04).softmax(1) @ q
            for a, b in zip(zs.split(128), zt.split(128))
        ]
        return (torch.cat(parts)/0.1/len(zs)).float()

def attention_loss(zs, zt, queue, dtype):
    "The loss from PyTorch's attention kernels, which give log-sum-exp and mean"
    class Read(torch.autograd.Function):
        @staticmethod
        def forward(ctx, zs, z, queue):
            q,k = (o.to(dtype)[None,None] for o in (z, queue))
            if CUDA: out,lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, k, None, True, scale=1.)[:2]
            else: out,lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, scale=1.)[:2]
            out,lse,n = out[0,0].float(),lse.flatten()[:len(z)].float(),len(zs)
            ctx.save_for_backward(out[:n]-out[n:])
            return lse[:n]-(z[:n]*out[n:]).sum(1)
        @staticmethod
        def backward(ctx, grad): return grad[:,None]*ctx.saved_tensors[0]/0.1,None,None
    return Read.apply(zs, torch.cat([zs.detach()/0.1, zt/0.04]), queue).mean()

def run_views(say):
    from ressl_fastai.views import strong_tfms, weak_tfms

    for src, size, bs in (
        ((32, 32, 256), (64, 64, 256), (224, 224, 128), (256, 224, 128), (500, 224, 64)) if not TINY else ((12, 8, 8),)
    ):
        x = photos(bs, src).to(DEV)
        weak, strong = weak_tfms(size), strong_tfms(size)

        def both():
            weak(x)
            strong(x)

        attempt(say, lambda: dict(ms=bench(both)), src=src, size=size, bs=bs, what='ours')

        def host():
            t = time.perf_counter()
            for _ in range(2 if TINY else 20):
                both()
            took = time.perf_counter() - t
            sync()
            return dict(ms=round(1e3 * took / (2 if TINY else 20), 3))

        attempt(say, host, src=src, size=size, bs=bs, what='the host until it can go on')
        attempt(say, partial(kornia_ms, x, size), src=src, size=size, bs=bs, what='kornia')

def kornia_ms(x, size):
    import kornia.augmentation as K
    k = max(3, size//10|1)
    def first(): return [K.RandomResizedCrop((size,size), scale=(0.2,1.)), K.RandomHorizontalFlip()]
    weak = torch.nn.Sequential(*first())
    strong = torch.nn.Sequential(
        *first(),
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((k, k), (0.1, 2.0), p=0.5),
    )
    x = x.float()/255
    return dict(ms=bench(lambda: (weak(x), strong(x)), 8))

def run_knn(say):
    from ressl_fastai.evaluate import knn_accuracy
    for n,m,d in ((50_000,10_000,512), (200_000,10_000,512)) if not TINY else ((200,50,16),):
        y,w = torch.randint(0, 100, (n,)),torch.randint(0, 100, (m,))
        centres = torch.randn(100, d)
        x,v = centres[y]+4*torch.randn(n, d),centres[w]+4*torch.randn(m, d)
        there = [o.to(DEV) for o in (x, y, v, w)]
        attempt(
            say,
            lambda: dict(ms=bench(lambda: knn_accuracy(*there), 3, 1), accuracy=knn_accuracy(*there)),
            n=n,
            m=m,
            what='device',
        )
        if n<=50_000: attempt(say, lambda: dict(accuracy=knn_accuracy(x, y, v, w)), n=n, m=m, what='cpu')

def run_peer(say):
    "lightly's documented MoCo loop with all cores as workers and bfloat16, against ours"
    from PIL import Image
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms import MoCoV2Transform
    from ressl_fastai.models import create_encoder
    size,bs,workers = (32,256,os.cpu_count()) if not TINY else (16,8,0)
    ims, tfm = (
        [Image.fromarray(o) for o in photos(128, size).permute(0, 2, 3, 1).numpy()],
        MoCoV2Transform(input_size=size, gaussian_blur=0.5),
    )

    class Images(torch.utils.data.Dataset):
        def __len__(self): return 10**6
        def __getitem__(self, i): return tfm(ims[i%len(ims)])[:2]

    dl = torch.utils.data.DataLoader(
        Images(),
        bs,
        drop_last=True,
        num_workers=workers,
        pin_memory=CUDA,
        **(dict(prefetch_factor=4) if workers else {}),
    )
    encoder, head = (
        create_encoder(tvm.resnet18, 3, False, 'auto', (size, size)).to(DEV).to(memory_format=torch.channels_last),
        MoCoProjectionHead(512, 512, 128).to(DEV),
    )
    encoder_m,head_m = deepcopy(encoder),deepcopy(head)
    deactivate_requires_grad(encoder_m)
    deactivate_requires_grad(head_m)
    crit, opt = (
        NTXentLoss(memory_bank_size=(4096, 128)).to(DEV),
        torch.optim.SGD([*encoder.parameters(), *head.parameters()], lr=0.06, momentum=0.9),
    )
    n = start = 0
    for i,batch in enumerate(dl):
        a,b = (o.to(DEV, non_blocking=True).to(memory_format=torch.channels_last) for o in batch[:2])
        with torch.autocast(DEV.type, torch.bfloat16):
            update_momentum(encoder, encoder_m, 0.99)
            update_momentum(head, head_m, 0.99)
            q = head(encoder(a)).float()
            with torch.no_grad(): k = head_m(encoder_m(b)).float()
            loss = crit(q, k)
        opt.zero_grad()
        loss.backward()
        opt.step()
        if i == workers + 3:
            sync()
            start = time.perf_counter()
        elif start:
            n += len(a)
            if time.perf_counter()-start>(8 if not TINY else 0.5): break
    sync()
    theirs = n/(time.perf_counter()-start)
    ours = step_row('r18' if not TINY else 'small', size, bs, 40 if not TINY else 2, 'auto')['images_s']
    say(
        size=size,
        bs=bs,
        workers=workers,
        lightly_images_s=round(theirs),
        ours_images_s=ours,
        ratio=round(ours / theirs, 2),
    )


# side by side: no times

def exactly():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True

def run_equal(say):
    "The CPU and the device: views for a seed, and a training"
    from ressl_fastai.views import strong_tfms, weak_tfms
    exactly()
    for src, size in (
        ((32, 32), (64, 64), (224, 224), (256, 224), (500, 224), (700, 224), (40, 64))
        if not TINY
        else ((12, 8), (8, 12))
    ):
        x = photos(16, src)
        for nm, tfm in (('weak', weak_tfms(size)), ('strong', strong_tfms(size))):

            def views(x):
                torch.manual_seed(3)
                return tfm(x)

            attempt(
                say,
                lambda: dict(most=(views(x) - views(x.to(DEV)).cpu()).abs().max().item()),
                what=f'{nm} views',
                src=src,
                size=size,
            )
    here,there = torch.device('cpu'),DEV
    for steps,dtype in ((1,'float32'), (6,'float64')):
        for kw in ({}, dict(predictor_layers=2)):
            def differ():
                a,b = (trained(device, steps, getattr(torch, dtype), **kw) for device in (here, there))
                return dict(off=((a[0]-b[0]).norm()/a[0].norm()).item(), losses=[a[1], b[1]])
            attempt(say, differ, what=f'{steps} steps', dtype=dtype, kw=kw)

def trained(device, steps, dtype, **kwargs):
    "Weights and queue after a few steps on `device`, and the losses"
    from fastai.callback.core import Callback
    from fastai.torch_core import default_device, defaults
    from ressl_fastai.callback import ReSSL
    from ressl_fastai.data import tensor_dls
    from ressl_fastai.learner import ressl_learner
    from ressl_fastai.models import small_resnet
    class Cast(Callback):
        order = ReSSL.order+0.1

        def before_batch(self):
            self.learn.xb, self.ressl.x_teacher = tuple(o.to(dtype) for o in self.xb), self.ressl.x_teacher.to(dtype)

    class CastLoss(Callback):
        order = ReSSL.order-0.1  # before the loss is on its way to the recorder
        def after_loss(self): self.learn.loss = self.learn.loss.float()

    torch.manual_seed(0)
    np.random.seed(0)
    bs = 64 if not TINY else 8
    dls = tensor_dls(photos(bs*steps, 32 if not TINY else 8), valid_pct=0, bs=bs, device=device, shuffle=False)
    cbs = [Cast(),CastLoss()]
    learn = ressl_learner(
        dls,
        partial(small_resnet, widen=0.25),
        metrics=[],
        precision='float32',
        channels_last=False,
        queue_size=bs,
        cbs=cbs,
        **kwargs,
    )
    learn.model.queue.enqueue(F.normalize(torch.randn(bs, 128), dim=1))
    learn.model.to(dtype)
    was = defaults.use_cuda
    defaults.use_cuda = False if device.type=='cpu' else was
    torch.manual_seed(1)
    try:
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    finally: defaults.use_cuda = was
    net = learn.model
    return torch.cat(
        [
            p.detach().double().cpu().flatten()
            for p in (*net.student.parameters(), *net.teacher.parameters(), net.queue.feats)
        ]
    ), [float(o) for o in learn.recorder.losses]


def run_resume(say):
    "Stopped in the middle and gone on: the same bits"
    from fastai.callback.core import Callback
    from fastai.torch_core import set_seed
    from ressl_fastai.checkpoint import Checkpoint
    class Stop(Callback):
        order = 900
        def __init__(self, n): self.n = n
        def after_batch(self):
            if self.training and self.train_iter==self.n: raise KeyboardInterrupt
    def whole(folder, precision, stop=0):
        def new():
            set_seed(0, reproducible=True)
            return make(
                archs()['small'], 32 if not TINY else 8, 64 if not TINY else 8, 6, precision=precision, path=folder
            )

        learn = new()
        with learn.no_bar(), learn.no_logging():
            if stop:
                with contextlib.suppress(KeyboardInterrupt):
                    learn.fit_one_cycle(3, 1e-3, cbs=[Checkpoint('run', every=2), Stop(stop)])
                learn = new()
                torch.rand(7)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-3, cbs=Checkpoint('run', every=2))
        return torch.cat([o.detach().float().cpu().flatten() for o in learn.model.state_dict().values()])
    for precision in ('bfloat16','float32'):
        def same():
            with (
                tempfile.TemporaryDirectory() as a,
                tempfile.TemporaryDirectory() as b,
                tempfile.TemporaryDirectory() as c,
            ):
                first, again, resumed = (
                    whole(Path(a), precision),
                    whole(Path(b), precision),
                    whole(Path(c), precision, stop=9),
                )
            return dict(
                two_runs_equal=torch.equal(first, again),
                resumed_equal=torch.equal(first, resumed),
                most=(first - resumed).abs().max().item(),
            )

        attempt(say, same, precision=precision)

def labelled(n, size, bs):
    from ressl_fastai.data import tensor_dls
    return tensor_dls(photos(n, size), np.arange(n)%4, valid_pct=0.2, seed=0, bs=bs, device=DEV)

def run_trouble(say):
    "What goes wrong must be said, what is unusual must run"
    from fastai.callback.core import Callback
    from fastai.callback.fp16 import MixedPrecision
    from fastai.callback.training import GradientAccumulation, GradientClip
    from fastai.optimizer import OptimWrapper, SGD
    from ressl_fastai.callback import InfoNCEWarmup
    from ressl_fastai.health import HealthMonitor
    from ressl_fastai.learner import ressl_learner
    from ressl_fastai.views import multi_crop_tfms
    size,n,bs = (32,640,64) if not TINY else (8,64,8)
    dls = labelled(n, size, bs)
    def new(arch=None, **kwargs): return ressl_learner(dls, arch or archs()['small'], **kwargs)
    def fit(learn, epochs=1, lr=1e-3, **kwargs):
        with learn.no_bar(): learn.fit_one_cycle(epochs, lr, **kwargs)
        return dict(
            row=str(list(learn.recorder.values[-1])) if learn.recorder.values else None,
            alarms=learn.guard.alarms if hasattr(learn, 'guard') else None,
            precision=repr(learn.precision),
        )

    def state(learn): return {k:v.clone() for k,v in learn.model.state_dict().items()}
    class Poison(Callback):
        "A loss that is not a number, at one step"
        order = -5
        def __init__(self, what): self.what = what
        def after_loss(self):
            if self.training and self.train_iter == 4:
                self.learn.loss_grad, self.learn.loss = self.learn.loss_grad * self.what, self.learn.loss * self.what

    def poisoned(what):
        learn = new()
        res = fit(learn, 2, cbs=Poison(what))
        return dict(
            res,
            finite=all(bool(v.isfinite().all()) for v in learn.model.state_dict().values()),
            stopped=bool(learn.guard.alarms),
        )

    def overflow():
        learn,seen = new(cbs=MixedPrecision('fp16', init_scale=2.**40, backoff_factor=2.**-6)),[]
        class Watch(Callback):
            order = MixedPrecision.order+20
            def before_batch(self): self.before = state(self.learn)
            def after_batch(self):
                if not self.training: return
                moved = [
                    k
                    for k, v in state(self.learn).items()
                    if not torch.equal(v, self.before[k]) and not ('running' in k or 'batches' in k)
                ]
                seen.append((bool(self.mixed_precision.skipped), bool(moved)))
        res = fit(learn, cbs=Watch())
        return dict(
            res,
            skipped=sum(s for s, _ in seen),
            moved_when_skipped=sum(s and m for s, m in seen),
            stood_still=sum(not s and not m for s, m in seen),
        )

    def accumulated():
        learn = new()
        pointers = []
        class Note(Callback):
            order = 100
            def after_batch(self): self.training and pointers.append(self.learn.opt.param_lists[0][0].grad is None)
        return dict(fit(learn, cbs=[GradientAccumulation(2*bs), Note()]), stepped=pointers[:8])
    if CUDA or not TINY: attempt(say, overflow, what='fp16 overflow')
    for what in (float('nan'),float('inf')): attempt(say, partial(poisoned, what), what=f'loss of {what}')
    attempt(say, accumulated, what='accumulation')
    cases = {
        'split batch norm': lambda: fit(new(batch_norm='split', n_splits=4)) if dls.train.drop_last else None,
        'sync batch norm': lambda: fit(new(batch_norm='sync')),
        'predictor, warm-up, crops': lambda: fit(
            new(
                predictor_layers=2,
                warmup=InfoNCEWarmup(0.2, ramp=0.3, fraction=True),
                strong_tfms=multi_crop_tfms(size),
            )
        ),
        'queue of bfloat16': lambda: fit(new(queue_dtype=torch.bfloat16)),
        'clip': lambda: fit(new(cbs=GradientClip(1.0))),
        'SGD': lambda: fit(new(opt_func=partial(SGD, mom=0.9))),
        'health': lambda: fit(new(), 2, cbs=HealthMonitor()),
        "torch's AdamW": lambda: fit(new(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))),
        'fp16': lambda: fit(new().to_fp16()),
        'bf16': lambda: fit(new().to_bf16()),
        'fp32': lambda: fit(new().to_fp32()),
        'collapse': lambda: fit(new(), 3, 10.0),
    }
    if not TINY:
        cases |= {
            nm: partial(lambda arch: fit(new(arch)), arch)
            for nm, arch in (
                ('efficientnet', 'efficientnet_b0'),
                ('mobilenet', tvm.mobilenet_v3_small),
                ('vit', 'vit_tiny_patch16_224'),
            )
            if nm != 'vit'
        }
    for what,f in cases.items(): attempt(say, f, what=what)

def folder_of(n, size, at):
    "`n` pictures in two folders"
    from PIL import Image
    for i,im in enumerate(photos(n, size).permute(0,2,3,1).numpy()):
        f = at/'ab'[i%2]/f'{i}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(im).save(f)
    return at

def run_tour(say):
    "What a user does, one after another, with workers and defaults"
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    from fastai.vision.all import ImageDataLoaders, Resize, accuracy, load_learner, vision_learner
    from ressl_fastai.all import cached_dls
    from ressl_fastai.transfer import load_encoder
    from ressl_fastai.learner import ressl_learner
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        n,size,workers = (600,64,4) if not TINY else (40,16,0)
        dls = ImageDataLoaders.from_folder(
            folder_of(n, size, tmp / 'pics'),
            valid_pct=0.2,
            seed=0,
            item_tfms=Resize(size),
            bs=64 if not TINY else 8,
            num_workers=workers,
        )
        arch = tvm.resnet18 if not TINY else archs()['small']
        learn = ressl_learner(dls, arch, path=tmp)

        def do(what, f):
            attempt(say, f, what=what)
            plt.close('all')

        def fine_tuned(c):
            c.fine_tune(1)
            return c.validate()

        do('lr_find', lambda: learn.lr_find(show_plot=False))
        do('two epochs', lambda: (learn.fit_one_cycle(2, 1e-3), list(learn.recorder.values[-1]))[1])
        do('ten steps of a folder', lambda: where_it_waits(learn, 3) if CUDA else None)
        do(
            'cached',
            lambda: (
                fast := cached_dls(dls),
                ressl_learner(fast, arch, path=tmp).fit_one_cycle(1, 1e-3),
                repr(fast.train),
            )[2],
        )
        do('validate', learn.validate)
        do('embed', lambda: learn.embed(learn.dls.valid)[0].shape)
        do('linear_probe', lambda: learn.linear_probe())
        do('show_neighbors', lambda: learn.show_neighbors())
        do('find_duplicates', lambda: len(learn.find_duplicates()))
        do('find_outliers', lambda: len(learn.find_outliers()))
        do('suggest_labels', lambda: learn.suggest_labels(6))
        do('plot_embeddings', lambda: learn.plot_embeddings())
        do('save, load', lambda: (learn.save('m'), learn.load('m'))[0])
        do('save_encoder', lambda: learn.save_encoder('enc'))
        do('to_vision_learner', lambda: fine_tuned(learn.to_vision_learner(dls, metrics=accuracy)))
        do('predict', lambda: learn.predict(dls.valid_ds.items[0])[0].shape)
        do(
            'export, load on the CPU',
            lambda: (
                learn.export('e.pkl'),
                load_learner(tmp / 'e.pkl', cpu=True).predict(dls.valid_ds.items[0])[0].shape,
            )[1],
        )
        do('report', lambda: learn.report(tmp/'report.html'))

def run_cli(say):
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        n,size,arch,bs = (400,64,'resnet18',64) if not TINY else (40,16,'small_resnet',8)
        folder_of(n, size, tmp/'pics')
        def command(module, name, *args):
            script = tmp/f'{name}.py'
            script.write_text(f'from ressl_fastai.{module} import {name}\nif __name__=="__main__": {name}()\n')
            res = subprocess.run(
                [sys.executable, script, *map(str, args)],
                capture_output=True,
                text=True,
                timeout=120,
                env={**os.environ, 'PYTHONPATH': f"{root}:{os.environ.get('PYTHONPATH', '')}"},
            )
            if res.returncode: raise RuntimeError((res.stdout+res.stderr)[-800:])
            return (res.stdout+res.stderr)[-300:]

        attempt(
            say,
            lambda: command(
                'cli',
                'ressl_pretrain',
                tmp / 'pics',
                '--out',
                tmp / 'run',
                '--epochs',
                2,
                '--size',
                size,
                '--arch',
                arch,
                '--bs',
                bs,
            ),
            what='ressl_pretrain',
        )
        attempt(
            say,
            lambda: command(
                'cli', 'ressl_evaluate', tmp / 'run' / 'encoder.pth', tmp / 'pics', '--out', tmp / 'evaluated'
            ),
            what='ressl_evaluate',
        )


def run_tests(say):
    "tests/test_cuda.py, and on the CPU beside the GPU a part of the gate"
    def pytest(*args):
        res = subprocess.run(
            [sys.executable, '-m', 'pytest', '-q', '-rsf', '--disable-warnings', *args],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=90,
        )
        return dict(code=res.returncode, end=res.stdout[-6000:])
    attempt(say, lambda: pytest('tests/test_cuda.py'), what='test_cuda.py')
    if not TINY:
        attempt(
            say,
            lambda: pytest('tests/test_devices.py', 'tests/test_optimizer.py', 'tests/test_step_cost.py'),
            what='beside a GPU',
        )


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('sections', nargs='*', help=', '.join(limits))
    p.add_argument('--out', type=Path, default=root/'benchmarks'/'results')
    p.add_argument('--tiny', action='store_true', help="tiny sizes on the CPU")
    p.add_argument('--total', type=float, default=total, help="seconds for all")
    p.add_argument('--section', help=argparse.SUPPRESS)
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.section: return section(args.section, args.out, args.tiny)
    if wrong := set(args.sections) - limits.keys():
        p.error(f"no section {', '.join(sorted(wrong))}; there are {', '.join(limits)}")
    start,chosen = time.perf_counter(),args.sections or list(limits)
    def left(): return args.total-(time.perf_counter()-start)
    def begin(name):
        env = {
            **os.environ,
            'OMP_NUM_THREADS': '1' if args.tiny else os.environ.get('OMP_NUM_THREADS', '4'),
            'MPLBACKEND': 'agg',
        }
        return subprocess.Popen(
            [sys.executable, __file__, '--section', name, '--out', args.out] + ['--tiny'] * args.tiny,
            env=env,
            start_new_session=True,
        )

    def finish(name, process, limit):
        try: process.wait(max(1, min(limit, left())))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, 9)
            process.wait()
            print(json.dumps(dict(section=name, stopped_after=round(limit))), flush=True)
    for by_itself,names in itertools.groupby(sorted(chosen, key=list(limits).index), key=lambda o: o in alone):
        at_once = 1 if by_itself or (os.cpu_count() or 1)<8 else len(limits)
        names = list(names)
        for i in range(0, len(names), at_once):
            if left()<12: break
            began = time.perf_counter()
            for name, process in [(o, begin(o)) for o in names[i : i + at_once]]:
                finish(name, process, limits[name] - (time.perf_counter() - began))
    print(json.dumps(dict(seconds=round(time.perf_counter()-start, 1))), flush=True)

if __name__=='__main__': main()
