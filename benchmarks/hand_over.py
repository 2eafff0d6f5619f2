"""Is the hand-over worth the time of pretraining? Colour pictures, 5, 10 and 50 labels per class.

One JSON line per set and seed in results/hand_over.jsonl. Seconds are of processor time on one thread, so that what
else runs on the machine takes nothing from one row and gives nothing to another. About eight minutes a line.

    apt-get install plasma-workspace-wallpapers mate-backgrounds lomiri-wallpapers-20.04 lomiri-wallpapers-16.04
    # tiles
    npm install --prefix /tmp/emoji emoji-datasource-twitter emoji-datasource-google  # emoji
    .venv/bin/python benchmarks/hand_over.py
    .venv/bin/python benchmarks/hand_over.py --data tiles --seeds 0 --labels 5 --minutes 0.1   # tries it

tiles: 37 photographs of Debian's wallpaper packages, cut into 9 x 12 squares of 32 pixels, 8 pixels apart. No pixel
is in two tiles, and the nearest pixels of a test tile and a training tile are 8 pixels, a quarter of a tile, apart.
The class is the photograph; 30 tiles of each, drawn at random, are the test.

emoji: pretrained on the 7,572 pictures of two vendors at 32 pixels, without labels; labels for Twitter's, tested on
Google's. The nine categories are those with more than five pictures. More than half of them are people in six skin
tones, so that accuracy says little there: read `balanced_accuracy`, the mean over classes.

Compared on the same draws of labels, with the package's defaults, nothing tuned for a set:

- `classifier`, what README says: `learn.to_classifier(dls)`; `teacher`, the same with the teacher's encoder
- `probe`, what `linear_probe` says of frozen features and logistic regression
- `from scratch`, the same network with fastai's augmentation, for as many seconds as pretraining and hand-over took
  together
- `fine_tune(10)`, what README said before, on `to_vision_learner`: few steps with few labels; `fine-tuned`, the same
  learner, unfrozen, for a third of the seconds of pretraining; `trained on`, the classifier, unfrozen, for as long, at
  a tenth of the learning rate
- logistic regression on a `random encoder` (with the batch statistics of the pictures since 28 November), on `pixels`
  averaged down to 8 x 8, on a `colour histogram` of 8 x 8 x 8 bins
"""

import json, os, time
from contextlib import contextmanager
from pathlib import Path

import numpy as np, torch
from fastai.callback.core import CancelFitException
from fastai.callback.schedule import ParamScheduler, combined_cos
from fastai.vision.all import aug_transforms, set_seed
from fastcore.script import call_parse
from PIL import Image, ImageOps
from sklearn.metrics import recall_score

from common import emoji, receipt
from ressl_fastai.data import tensor_dls
from ressl_fastai.evaluate import embed, fit_logistic, pixel_features
from ressl_fastai.label_efficiency import NoValidation, draw_labels, labelled_part
from ressl_fastai.learner import ressl_learner
from ressl_fastai.models import small_resnet
from ressl_fastai.transfer import encoder_learner
from ressl_fastai.loaders import clean_dl
from ressl_fastai.views import strong_tfms

folder = Path(os.environ.get('ENCODERS', '/tmp/hand_over'))
size,lr = 32,2e-3
all_rows = ('classifier','teacher','probe','trained on','fine-tuned','fine_tune(10)','from scratch','random encoder',
            'pixels','colour histogram')

photographs = {
    'backgrounds/{}.jpg': '''
        Bridge_by_Sander_Klootwijk Dragonfly_by_Bolly Kleiber_by_Lukas_Baubkus Picture_0B_by_freespace
        Picture_1A_by_freespace Wine_by_Jakkub_Mede aitzgorri_by_Aitzol_Berasategi free_by_Peter_Nerlich
        friends_by_Aitzol_Berasategi greentock_by_Peter_Nerlich life_by_Aitzol_Berasategi
        picosdeeuropa_by_Aitzol_Berasategi
        seeding_by_Clements_Engelhardt sunset_by_Aitzol_Berasategi''',
    'backgrounds/mate/nature/{}.jpg': '''
        Aqua Blinds Dune FreshFlower Garden GreenMeadow LadyBird RainDrops Storm TwoWings
        Wood YellowFlower''',
    'wallpapers/{}/contents/images/2560x1600.jpg': '''
        BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf
        Grey Kite OneStandsOut Path summer_1am''',
}


def tiles(cols=12, rows=9, gap=8, size=size):
    "(n, size, size, 3) uint8 squares of the photographs, and which photograph each is of"
    pitch,xs,ys = size+gap,[],[]
    files = [Path('/usr/share')/form.format(nm) for form,names in photographs.items() for nm in names.split()]
    for i,f in enumerate(files):
        if not f.exists(): raise FileNotFoundError(f"{f} is missing: see the packages at the head of {__file__}")
        im = ImageOps.exif_transpose(Image.open(f)).convert('RGB')
        im = np.asarray(ImageOps.fit(im, (cols*pitch,rows*pitch), Image.BICUBIC))
        tops,lefts = range(gap//2, rows*pitch, pitch),range(gap//2, cols*pitch, pitch)
        xs += [im[r:r+size,c:c+size] for r in tops for c in lefts]
        ys += [i]*cols*rows
    return np.stack(xs),np.array(ys)

def arrays(data, size=size):
    "Images that are pretrained on, then training images and labels, test images and labels"
    if data=='tiles':
        x,y = tiles(gap=size//4, size=size)
        rng = np.random.default_rng(0)
        test = np.sort(np.concatenate([rng.permutation(np.flatnonzero(y==c))[:30] for c in np.unique(y)]))
        train = np.setdiff1d(np.arange(len(y)), test)
        return x[train],x[train],y[train],x[test],y[test]
    pics = {v:emoji(v, size) for v in ('twitter','google')}
    keep = {v:y!='Component' for v,(_,y,_) in pics.items()}   # five pictures of hair and skin
    return np.concatenate([x for x,_,_ in pics.values()]),*(o[keep[v]] for v in pics for o in pics[v][:2])

@contextmanager
def quiet(learn):
    "No bar, no table"
    with learn.no_bar(), learn.no_logging(): yield

class CPUBudget(NoValidation):
    "One cycle over so many seconds of processor time, then an end"
    order = ParamScheduler.order
    def __init__(self, seconds, lr):
        self.seconds,self.lr = seconds,combined_cos(0.25, lr/25, lr, lr/1e5)
        self.mom = combined_cos(0.25, 0.95, 0.85, 0.95)

    def before_fit(self): self.start = time.process_time()

    def before_batch(self):
        share = (time.process_time()-self.start)/self.seconds
        if share>=1: raise CancelFitException
        self.learn.pct_train = share  # by which schedules of the method go
        self.opt.set_hypers(lr=self.lr(share), mom=self.mom(share))

def train(learn, seconds, lr=lr):
    "Train for `seconds` of processor time; how many steps these were"
    learn.opt = None
    with quiet(learn): learn.fit(10**6, lr, cbs=CPUBudget(seconds, lr))
    return learn.train_iter

def pretrain(data, x, seed, minutes, colour):
    "Encoder files of student and teacher, and how many steps they were trained; made unless they are there"
    files = [folder/f"{data}-{seed}-{minutes:g}{'-colour'*colour}-{nm}.pth" for nm in ('student','teacher')]
    note = files[0].with_suffix('.json')
    if not note.exists():
        folder.mkdir(exist_ok=True, parents=True)
        set_seed(seed, reproducible=True)
        dls = tensor_dls(x, valid_idx=range(64))
        strong = strong_tfms(size, jitter=(0.4,0.4,0.,0.), gray_p=0.) if colour else None
        learn = ressl_learner(dls, small_resnet, stem='small_pool', n_hidden=512, queue_size=1024, strong_tfms=strong)
        steps = train(learn, 60*minutes) if minutes else 0
        for file,teacher in zip(files, (False,True)): learn.save_encoder(file, teacher=teacher)
        note.write_text(json.dumps(steps))
    return *files,json.loads(note.read_text())

def predicted(clf): return clf.get_preds(dl=clean_dl(clf.dls.valid))[0].argmax(1).numpy()

def histogram(x, bins=8):
    "(n, bins**3) shares of pixels"
    idxs = (x.astype(np.int64)*bins//256)@[bins*bins,bins,1]
    counts = np.stack([np.bincount(o.ravel(), minlength=bins**3) for o in idxs])
    return torch.tensor(counts/idxs[0].size, dtype=torch.float32)

class Task:
    "One set, one seed: what is computed once for all draws"
    def __init__(self, data, seed, minutes, colour=False):
        unlabelled,tx,ty,vx,vy = arrays(data)
        *files,self.steps = pretrain(data, unlabelled, seed, minutes, colour)
        tfms = aug_transforms(size=size, max_rotate=10., max_zoom=1.2, max_lighting=0.2, max_warp=0.)
        x,y = np.concatenate([tx,vx]),np.concatenate([ty,vy])
        self.dls = tensor_dls(x, y, valid_idx=range(len(tx), len(x)), batch_tfms=tfms)
        self.student,self.teacher = (encoder_learner(f, self.dls) for f in files)
        set_seed(seed)
        self.random = encoder_learner(files[0], self.dls, trained=False)
        self.seconds = 60*minutes
        (self.y,),(self.valid_y,) = self.dls.train.targets,self.dls.valid.targets
        self.pixels = tuple(pixel_features(dl, side=8)[0] for dl in self.dls)  # 32 x 32 take minutes to fit
        self.histograms = histogram(tx),histogram(vx)
        self.sizes = dict(n_pretrain=len(unlabelled), n_train=len(tx), n_test=len(vx), classes=len(self.dls.vocab))

    def logistic(self, idxs, x, vx, **kwargs): return fit_logistic(x[idxs], self.y[idxs], **kwargs).predict(vx.numpy())

    def classifier(self, row, part, seconds):
        "The trained classifier of `row`; `seconds` are those that other rows took"
        if row=='classifier': return self.student.to_classifier(part)
        if row=='teacher': return self.teacher.to_classifier(part)
        if row=='trained on':
            clf = self.student.to_classifier(part)
            clf.unfreeze()
            train(clf, self.seconds/3, lr/10)
        elif row=='fine_tune(10)':
            clf = self.student.to_vision_learner(part)
            with quiet(clf): clf.fine_tune(10, cbs=NoValidation())
        elif row=='fine-tuned':
            clf = self.student.to_vision_learner(part)
            clf.unfreeze()
            train(clf, self.seconds/3)
        elif row=='from scratch':
            clf = self.random.to_vision_learner(part)
            clf.unfreeze()
            train(clf, self.seconds+seconds['classifier'])
        return clf

    def predict(self, row, idxs, seconds):
        "Predictions for the test images; the seconds that `row` took go into `seconds`"
        start = time.process_time()
        if row=='random encoder': pred = self.logistic(idxs, *(embed(self.random, dl)[0] for dl in self.dls))
        elif row=='pixels': pred = self.logistic(idxs, *self.pixels, scale_x=self.pixels[0])
        elif row=='colour histogram': pred = self.logistic(idxs, *self.histograms, scale_x=self.histograms[0])
        else: clf,pred = self.classifier(row, labelled_part(self.dls, idxs), seconds),None
        seconds[row] = time.process_time()-start
        if pred is not None: return pred
        with clf.no_bar(): return predicted(clf)

@call_parse
def main(
    data:str='tiles,emoji', # What to run
    seeds:str='0,1,2', # Seeds of pretraining, first weights and draws of labels
    labels:str='5,10,50', # Labels per class
    minutes:float=1., # Of pretraining, of processor time; 0 is for the rows that need none
    rows:str='', # Rows, all without it
    colour:bool=False # Views that keep the colour, for pictures that it tells apart
):
    torch.set_num_threads(1)
    rows = rows.split(',') if rows else list(all_rows)
    for seed in map(int, seeds.split(',')):
        for nm in data.split(','):
            task,accuracy,balanced,seconds = Task(nm, seed, minutes, colour),{},{},{}
            for n in map(int, labels.split(',')):
                idxs,took = draw_labels(task.y, n, seed=seed),{}
                for row in sorted(rows, key=lambda o: o!='classifier'):  # its seconds go into those of `from scratch`
                    set_seed(seed)
                    if row=='probe':
                        part = labelled_part(task.dls, idxs)
                        top1 = task.student.linear_probe(part.train, part.valid)['top1']
                        accuracy.setdefault(row, {})[n] = round(top1, 4)
                        continue
                    pred = task.predict(row, idxs, took)
                    accuracy.setdefault(row, {})[n] = round(float((pred==task.valid_y.numpy()).mean()), 4)
                    recall = recall_score(task.valid_y, pred, average='macro', zero_division=0)
                    balanced.setdefault(row, {})[n] = round(recall, 4)
                seconds[n] = {k:round(v, 1) for k,v in took.items()}
            receipt('hand_over', seed, data=nm, **task.sizes, minutes=minutes, colour=colour,
                    pretrain_steps=task.steps, cpu_seconds=seconds, accuracy=accuracy, balanced_accuracy=balanced)
