"""The pictures of the site that no notebook draws: nbs/images/method.png, one image, its two views and their relations
as a trained network has them, and _static/card.png, which is shown where a page is shared.

    python tools/site/draw.py          # half a minute on one core"""

from pathlib import Path

import torch
from fastai.vision.all import set_seed
from matplotlib import pyplot as plt

from ressl_fastai.data import tensor_dls
from ressl_fastai.learner import ressl_learner
from ressl_fastai.loaders import get_normalize
from ressl_fastai.losses import relation
from ressl_fastai.models import small_resnet
from ressl_fastai.signs import draw_signs
from ressl_fastai.views import strong_tfms, weak_tfms

root = Path(__file__).resolve().parent.parent.parent
blue,orange,grey = '#3b7dd8','#e8743b','#666666'


def trained():
    "A learner that has seen coloured signs for a moment, and the signs"
    set_seed(42, reproducible=True)
    images,kinds = draw_signs(1200, seed=1, size=32)
    crops = dict(size=32, scale=(0.5,1.))
    strong = strong_tfms(**crops, jitter=(0.4,0.4,0.4,0.5), gray_p=0.5, blur_p=0.)
    learn = ressl_learner(tensor_dls(images, bs=64), small_resnet, stem='standard', weak_tfms=weak_tfms(**crops),
                          strong_tfms=strong, teacher_momentum=0.97, n_hidden=512)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(18, 4e-3)
    return learn,torch.tensor(images).permute(0,3,1,2)/255,kinds


@torch.no_grad()
def embedded(learn, x, teacher):
    "Of images in [0, 1] what the loss compares"
    normalize,model = get_normalize(learn.dls),learn.model.eval().cpu()
    x = (x-normalize.mean.cpu())/normalize.std.cpu()
    return model.teacher(x) if teacher else model.embedder(x)


@torch.no_grad()
def relations(learn, images, i):
    "Views of an image, and how teacher and student relate them to the others: `((weak, strong), (p, p))`"
    torch.manual_seed(i)
    weak,strong = learn.ressl.weak_tfms(images[i:i+1]),learn.ressl.strong_tfms(images[i:i+1])
    bank = embedded(learn, images[:600], True)
    teacher = relation(embedded(learn, weak, True), bank, 0.04)[0]
    student = relation(embedded(learn, strong, False), bank, 0.1)[0]
    teacher[i] = student[i] = 0
    return (weak[0],strong[0]),(teacher,student)


def clear_case(learn, images, kinds, n=60, k=6):
    "Of `n` images the one whose views are both related to its own kind, so that a reader sees it at once"
    def share(i):
        near = torch.cat([p.topk(k).indices for p in relations(learn, images, i)[1]])
        return sum(kinds[j]==kinds[i] for j in near)
    return max(range(n), key=share)


def method(learn, images, kinds, file, n_queue=12):
    "One image, its views, and how teacher and student relate them to the same other images"
    i = clear_case(learn, images, kinds)
    (weak,strong),p = relations(learn, images, i)
    shown = torch.cat([p[0].topk(n_queue-5).indices, torch.linspace(40, 560, 5).long()])
    fig = plt.figure(figsize=(8,3.1), dpi=110)
    def picture(x, box, title, **kwargs):
        ax = fig.add_axes(box)
        ax.imshow(x.permute(1,2,0).clamp(0,1))
        ax.axis('off')
        ax.set_title(title, fontsize=11, color=grey, **kwargs)
    picture(images[i], (0.0,0.33,0.13,0.34), 'an image')
    picture(weak, (0.19,0.60,0.12,0.31), 'weak view, to the teacher')
    picture(strong, (0.19,0.12,0.12,0.31), 'strong view, to the student', y=-0.3)
    arrow = dict(arrowstyle='->', color=grey, lw=1.5)
    for start,end in (((0.135,0.55),(0.185,0.75)), ((0.135,0.45),(0.185,0.27))):
        fig.add_artist(plt.matplotlib.patches.FancyArrowPatch(start, end, **arrow, mutation_scale=12))
    for k,(y,colour) in enumerate(((0.60,blue),(0.12,orange))):
        ax = fig.add_axes((0.42,y,0.57,0.31))
        ax.bar(range(n_queue), p[k][shown], color=colour, width=0.7)
        ax.set(xlim=(-0.6,n_queue-0.4), xticks=[], ylim=(0,float(max(p[k][shown]))*1.15), yticks=[])
        ax.spines[['top','right','left']].set_visible(False)
        name = ("teacher's relation: the target","student's relation: learns to equal it")[k]
        ax.set_title(name, fontsize=11, color=colour, loc='left', y=(1.,-0.26)[k])
        end = y+0.155
        fig.add_artist(plt.matplotlib.patches.FancyArrowPatch((0.325,end), (0.41,end), **arrow, mutation_scale=12))
    step = 0.57/n_queue
    for k,j in enumerate(shown):
        ax = fig.add_axes((0.42+step*(k+0.1),0.455,step*0.8,0.12))
        ax.imshow(images[j].permute(1,2,0))
        ax.axis('off')
    fig.text(0.408, 0.515, 'some images\nof the queue', fontsize=10, color=grey, ha='right', va='center')
    fig.savefig(file)
    plt.close(fig)


def card(images, file):
    "1200 x 630 pixels, as social networks want it"
    fig = plt.figure(figsize=(12,6.3), dpi=100, facecolor='white')
    for k in range(24):
        ax = fig.add_axes((k%12/12+0.008, 0.03+0.16*(k//12), 0.067, 0.127))
        ax.imshow(images[k].permute(1,2,0))
        ax.axis('off')
    fig.text(0.05, 0.74, 'ressl_fastai', fontsize=64, color=blue, weight='bold')
    fig.text(0.05, 0.58, 'Many images, few labels:', fontsize=34, color=grey)
    fig.text(0.05, 0.46, 'learn the encoder from the images alone', fontsize=34, color=orange)
    fig.savefig(file)
    plt.close(fig)


def main():
    learn,images,kinds = trained()
    (root/'nbs'/'images').mkdir(exist_ok=True)
    method(learn, images, kinds, root/'nbs'/'images'/'method.png')
    card(images, root/'tools'/'site'/'static'/'card.png')


if __name__=='__main__': main()
