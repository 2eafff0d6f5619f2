"""What each lever does to the encoder: short pretrainings side by side on one GPU, each judged on held-out pictures.

    cd benchmarks; python -W ignore levers.py --prepare /tmp/levers   # pictures, once; see hand_over.py for packages
    python -W ignore levers.py --data /tmp/levers --out FOLDER [--seconds 450] [--workers 10] [--images 64000]

One JSON line per training in FOLDER/levers.jsonl. Everything is as `ressl_learner(dls, small_resnet, warmup=None)` has
it at 32 pixels, with `stem='small_pool'`, but for the lever; all see as many images (64,000 take one core of a
processor with bfloat16 two to three minutes). First every lever is tried with one seed. Then the plain set-up and the
levers that paid, and those that the papers speak of, are run with two more seeds, and last combinations of what paid.

emoji: pretrained on the pictures of two vendors, without labels; kNN and logistic regression on ten labels per class
(mean of three draws) learn from Google's and are tested on Twitter's; `same` is how often the nearest of Google's
pictures shows the same thing. tiles: squares of 37 photographs, see hand_over.py; the class is the photograph.
fashion: 10,000 and 10,000 pictures of Fashion-MNIST; others: as emoji, with Apple's pictures in place of Google's and
Facebook's of Twitter's. Both are kept aside for what has won."""

import argparse, json, os, platform, sys, time, traceback
from functools import partial
from pathlib import Path

import numpy as np, torch
import torch.multiprocessing as mp
import torch.nn.functional as F

size,lr,n_images = 32,2e-3,64_000
imagenet = [torch.tensor(o)[:,None,None] for o in ((0.485,0.456,0.406), (0.229,0.224,0.225))]  # mean, deviation

def two_vendors(bank, test, size=size):
    "Pictures of both to pretrain on; bank, test, and which of them show the same thing"
    from common import emoji
    (gx,gy,gu),(tx,ty,tu) = emoji(bank, size),emoji(test, size)
    x,few = np.concatenate([gx,tx]),'Component'  # five pictures
    gx,gu,gy,tx,tu,ty = gx[gy!=few],gu[gy!=few],gy[gy!=few],tx[ty!=few],tu[ty!=few],ty[ty!=few]
    names = sorted(set(gy))
    where = {u:i for i,u in enumerate(gu)}
    pairs = np.array([(i, where[u]) for i,u in enumerate(tu) if u in where])
    def numbers(y): return np.array([names.index(o) for o in y])
    return dict(x=x, bx=gx, by=numbers(gy), tx=tx, ty=numbers(ty), pairs=pairs)

def prepare(folder):
    "Pictures and labels of each set: pretraining, bank and test"
    from common import fashion_mnist
    from hand_over import arrays
    folder.mkdir(parents=True, exist_ok=True)
    for name,vendors in (('emoji',('google','twitter')), ('others',('apple','facebook'))):
        np.savez_compressed(folder/f'{name}.npz', **two_vendors(*vendors))
    _,bx,by,tx,ty = arrays('tiles')
    np.savez_compressed(folder/'tiles.npz', bx=bx, by=by, tx=tx, ty=ty)
    bx,by,tx,ty = fashion_mnist(size=size)
    np.savez_compressed(folder/'fashion.npz', bx=bx, by=by, tx=tx, ty=ty)

def smaller_first(share=0.75, side=24):
    "Views of `side` pixels for the first `share` of the training"
    from fastai.callback.core import Callback
    from ressl_fastai.views import strong_tfms, weak_tfms
    class SmallerFirst(Callback):
        "Changes the views, not the model"
        order,run_valid = -50,False
        def before_batch(self):
            s = side if self.learn.pct_train<share else size
            if self.learn.ressl.weak_tfms.size[0]!=s:
                self.learn.ressl.weak_tfms,self.learn.ressl.strong_tfms = weak_tfms(s),strong_tfms(s)
    return SmallerFirst()

def levers():
    "Name: what `ressl_learner` and the fit are told"
    from fastai.callback.schedule import SchedCos
    from fastai.optimizer import SGD, Lamb, Larc, ranger
    from ressl_fastai.callback import InfoNCEWarmup
    from ressl_fastai.views import strong_tfms as strong, weak_tfms as weak
    def warmup(hold, ramp=0., end=0.): return InfoNCEWarmup(hold, ramp, fraction=True, end=end)
    return {
        'plain': {},
        'InfoNCE first fifth': dict(warmup=warmup(0.2)),
        'InfoNCE ramped down': dict(warmup=warmup(0, 1.)),
        'InfoNCE ramped down to half': dict(warmup=warmup(0, 1., 0.5)),
        'InfoNCE and relation, half each': dict(warmup=warmup(0, 0, 0.5)),
        'InfoNCE alone': dict(warmup=warmup(1)),
        'predictor': dict(predictor_layers=2),
        'predictor, InfoNCE first fifth': dict(predictor_layers=2, warmup=warmup(0.2)),
        'momentum 0.97': dict(teacher_momentum=0.97),
        'momentum 0.996': dict(teacher_momentum=0.996),
        'momentum 0.97 to 1': dict(teacher_momentum=SchedCos(0.97, 1.)),
        'teacher_temp 0.02': dict(teacher_temp=0.02),
        'teacher_temp 0.06': dict(teacher_temp=0.06),
        'teacher_temp 0.08': dict(teacher_temp=0.08),
        'student_temp 0.2': dict(student_temp=0.2),
        'lr 1e-3': dict(lr=1e-3),
        'lr 4e-3': dict(lr=4e-3),
        'lr 8e-3': dict(lr=8e-3),
        'pct_start 0.1': dict(pct_start=0.1),
        'wd 0.1': dict(wd=0.1),
        'SGD': dict(opt_func=partial(SGD, mom=0.9), lr=0.1, wd=5e-4),
        'ranger': dict(opt_func=ranger),
        **{f'LARS, lr {o:g}': dict(opt_func=partial(Larc, clip=False), lr=o) for o in (0.03,0.1,0.3)},
        **{f'LAMB, lr {o:g}': dict(opt_func=Lamb, lr=o) for o in (3e-3,1e-2,3e-2)},
        'bs 32': dict(bs=32),
        'bs 128': dict(bs=128, lr=3e-3),
        'queue 256': dict(queue_size=256),
        'queue 2048': dict(queue_size=2048),
        'dim 256': dict(dim=256),
        'n_hidden 512': dict(n_hidden=512),
        '3-layer projector': dict(projector_layers=3),
        'no batch norm in the projector': dict(projector_bn=False),
        'teacher sees strong views': dict(weak_tfms=strong(size)),
        'student sees weak views': dict(strong_tfms=weak(size)),
        'teacher crops from half': dict(weak_tfms=weak(size, scale=(0.5,1.))),
        'crops from 0.08': dict(weak_tfms=weak(size, scale=(0.08,1.)), strong_tfms=strong(size, scale=(0.08,1.))),
        'crops from 0.4': dict(weak_tfms=weak(size, scale=(0.4,1.)), strong_tfms=strong(size, scale=(0.4,1.))),
        'no blur': dict(strong_tfms=strong(size, blur_p=0.)),
        'colour twice': dict(strong_tfms=strong(size, jitter=(0.8,0.8,0.8,0.2))),
        'views of 24': dict(weak_tfms=weak(24), strong_tfms=strong(24)),
        '24, then 32': dict(weak_tfms=weak(24), strong_tfms=strong(24), cbs=smaller_first),
        'a second crop of 20': dict(strong_tfms=[strong(size), strong(20, (0.05,0.4))]),
    }

papers = ['InfoNCE first fifth','InfoNCE alone','predictor','predictor, InfoNCE first fifth',
          'teacher sees strong views']

# in a worker

def load(folder, name):
    z = np.load(folder/f'{name}.npz')
    data = {k:torch.from_numpy(z[k]) for k in z.files}
    data.setdefault('x', data['bx'])  # all of the bank, where nothing else is pretrained on
    return {k:o[...,None].expand(-1, -1, -1, 3) if k in ('x','bx','tx') and o.ndim==3 else o for k,o in data.items()}

@torch.no_grad()
def features(net, x, stats, device):
    mean,std = stats
    def normed(o): return (o.to(device).permute(0,3,1,2).float()/255-mean)/std
    return torch.cat([net(normed(o)).float() for o in x.split(1024)])

def quality(net, data, stats, device):
    from ressl_fastai.evaluate import fit_logistic, knn_accuracy
    from ressl_fastai.label_efficiency import draw_labels
    bx,tx = (features(net, data[k], stats, device) for k in ('bx','tx'))
    by,ty = data['by'],data['ty']
    knn = knn_accuracy(bx, by.to(device), tx, ty.to(device))
    bx,tx,found = bx.cpu(),tx.cpu(),[]
    for seed in range(3):
        i = draw_labels(by, 10, seed=seed)
        clf = fit_logistic(bx[i], by[i], Cs=(0.01,), scale_x=bx)
        found.append(float((clf.predict(tx.numpy())==ty.numpy()).mean()))
    res = dict(knn=round(knn, 4), ten_labels=round(float(np.mean(found)), 4))
    if 'pairs' in data:
        i,j = data['pairs'].T
        res['same'] = round(float(((F.normalize(tx)[i]@F.normalize(bx).T).argmax(1)==j).float().mean()), 4)
    return res

def run(data, seed, images, device, bs=64, lr=lr, wd=None, pct_start=0.25, cbs=None, **kwargs):
    from fastai.data.transforms import Normalize
    from fastai.torch_core import set_seed
    from ressl_fastai.data import tensor_dls
    from ressl_fastai.learner import ressl_learner
    from ressl_fastai.models import small_resnet
    set_seed(seed)
    x = data['x'].permute(0,3,1,2).contiguous()
    dls = tensor_dls(x, valid_pct=0, bs=bs, device=device)
    part = x[::4].float()/255
    mean,std = part.mean((0,2,3)),part.std((0,2,3))
    dls.add_tfms([Normalize.from_stats(mean.tolist(), std.tolist(), cuda=device.type=='cuda')], 'after_batch')
    kwargs = {'warmup':None, **kwargs}
    learn = ressl_learner(dls, small_resnet, stem='small_pool', metrics=[], cbs=cbs() if cbs else None, **kwargs)
    n_epoch = max(1, round(images/(len(dls.train)*bs)))
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n_epoch, lr, wd=wd, pct_start=pct_start)
    seconds = time.perf_counter()-start
    stats = [o[:,None,None].to(device) for o in (mean,std)]
    model = learn.model.eval()
    res = {k:quality(net, data, stats, device) for k,net in (('student',model.encoder), ('teacher',model.teacher[0]))}
    return dict(epochs=n_epoch, steps=n_epoch*len(dls.train), seconds=round(seconds, 1),
                alarms=learn.guard.alarms, **res)

def work(folder, jobs, results):
    os.environ['OMP_NUM_THREADS'] = '1'
    torch.set_num_threads(1)
    device = torch.device('cuda', 0) if torch.cuda.is_available() else torch.device('cpu')
    known,sets = levers(),{}
    for name,case,parts,seed,images in iter(jobs.get, None):
        if name not in sets: sets[name] = load(folder, name)
        kwargs = {}
        for o in parts: kwargs.update(known[o])
        try: res = run(sets[name], seed, images, device, **kwargs)
        except BaseException as e: res = dict(error=repr(e)[:300], trace=traceback.format_exc()[-800:])
        results.put(dict(data=name, case=case, parts=parts, seed=seed, images=images, **res))

# in the parent

def gain(found, case, sets, seeds):
    """Gain over the plain set-up with the same seeds in kNN and in ten labels together, the smallest of the sets and
    the mean; the better of student and teacher"""
    def score(case, s, seed):
        o = found.get((s, case, seed), {})
        if 'student' not in o: return np.nan
        return max(o[net]['knn']+o[net]['ten_labels'] for net in ('student','teacher'))
    gains = [np.nanmean([score(case, s, i)-score('plain', s, i) for i in seeds]) for s in sets]
    return min(gains),float(np.mean(gains))

class Pool:
    "Workers that train, until the time is up; what they find is written at once"
    def __init__(self, args):
        ctx = mp.get_context('spawn')
        self.jobs,self.results,self.args = ctx.Queue(),ctx.Queue(),args
        self.ps = [ctx.Process(target=work, args=(args.data, self.jobs, self.results), daemon=True)
                   for _ in range(args.workers)]
        for p in self.ps: p.start()
        self.found,self.end = {},args.start+args.seconds
        self.common = dict(benchmark='levers', date=time.strftime('%F'), commit=os.environ.get('COMMIT', ''),
            command=' '.join(['benchmarks/levers.py', *sys.argv[1:]]),
            versions=dict(torch=torch.__version__, python=platform.python_version()), workers=args.workers,
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu', cpus=os.cpu_count())

    def do(self, jobs):
        "`jobs`: (set, case, its levers, seed, images)"
        for o in jobs: self.jobs.put(o)
        for _ in jobs:
            try: res = self.results.get(timeout=max(0.1, self.end-time.time()))
            except Exception: return False
            self.found[res['data'],res['case'],res['seed']] = res
            line = json.dumps(dict(self.common, **res))
            with (self.args.out/'levers.jsonl').open('a') as f: f.write(line+'\n')
            nets = {k:list(res[k].values()) for k in ('student','teacher') if k in res}
            at = round(time.time()-self.args.start)
            print(at, res['data'], res['case'], res['seed'], res.get('seconds'), nets, res.get('error', ''), flush=True)
        return True

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--prepare', type=Path)
    p.add_argument('--data', type=Path, default=Path('/tmp/levers'))
    p.add_argument('--out', type=Path, default=Path(__file__).parent/'results')
    p.add_argument('--seconds', type=float, default=450)
    p.add_argument('--workers', type=int, default=10)
    p.add_argument('--images', type=int, default=n_images)
    p.add_argument('--only', help="names of levers, with ';' between: these and no more")
    p.add_argument('--sets', default='emoji,tiles', help="for --only")
    p.add_argument('--seeds', default='0', help="for --only")
    args = p.parse_args()
    if args.prepare: return prepare(args.prepare)
    args.start = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    sets,names = ['emoji','tiles'],list(levers())
    def jobs(cases, seeds, sets=sets, images=args.images):
        return [(s, nm, parts, i, images) for i in seeds for nm,parts in cases for s in sets]
    pool = Pool(args)
    if args.only:
        seeds = [int(o) for o in args.seeds.split(',')]
        return pool.do(jobs([(nm,[nm]) for nm in args.only.split(';')], seeds, args.sets.split(',')))
    if not pool.do(jobs([(nm,[nm]) for nm in names], [0])): return
    first = {nm:gain(pool.found, nm, sets, [0]) for nm in names}
    paid = sorted((o for o in names if first[o][0]>-0.005 and first[o][1]>0.005), key=lambda o: -first[o][1])[:8]
    print('paid with one seed:', {o:first[o] for o in paid}, flush=True)
    again = list(dict.fromkeys(['plain']+paid+papers))
    if not pool.do(jobs([(nm,[nm]) for nm in again], [1,2])): return
    three = {nm:gain(pool.found, nm, sets, [0,1,2]) for nm in again}
    best,known = [],levers()
    for nm in sorted((o for o in again if three[o][0]>0 and o!='plain'), key=lambda o: -three[o][1]):
        if not any(known[nm].keys() & known[o].keys() for o in best): best.append(nm)  # the best of each kind
    print('paid with three seeds:', {o:three[o] for o in best}, flush=True)
    combos = [(' + '.join(best[:n]), best[:n]) for n in range(2, min(4, len(best))+1)]
    if not pool.do(jobs(combos, [0,1,2])): return
    if not pool.do(jobs([('plain',['plain'])] + [(o,[o]) for o in best[:1]] + combos, [0,1,2], ['fashion'])): return
    pool.do(jobs([('plain, 4 x', ['plain'])] + [(f'{nm}, 4 x', parts) for nm,parts in combos],
                 [0,1,2], images=4*args.images))

if __name__=='__main__': main()
