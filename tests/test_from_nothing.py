"""The page 'ReSSL from nothing' is an oracle: its own cells, run here for one epoch, give what the library gives, at
each step. The same cells with a mistake put in do not."""

import json
from pathlib import Path

import pytest, torch

page = Path(__file__).resolve().parent.parent/'nbs'/'explanations'/'ressl_from_nothing.ipynb'
cells = [''.join(c['source']) for c in json.loads(page.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']
first_of_library = next(i for i,s in enumerate(cells) if 'ressl_fastai' in s)
method,library = cells[:first_of_library],cells[first_of_library]

def run(cells, replace=()):
    "Names that the cells leave, without pictures and after one epoch"
    source = '\n\n'.join(s for s in cells if 'plt.subplots' not in s)
    for old,new in [('n_epoch = 20', 'n_epoch = 1'), *replace]:
        assert source.count(old)==1, old
        source = source.replace(old, new)
    before,names = torch.get_default_dtype(),{}
    try: exec(source, names)
    finally: torch.set_default_dtype(before)
    return names

@pytest.fixture(scope='module')
def both():
    torch.set_num_threads(1)
    return run([*method, library])

def distance(a, b): return (torch.tensor(a)-torch.tensor(b)).abs().max().item()

tol = 1e-9  # of losses of about 5, in float64, over 45 steps

def test_every_step_is_the_librarys(both):
    losses = both['learn'].losses.all
    assert len(losses)==len(both['losses'])==45
    assert distance(losses, both['losses'])<tol
    assert both['after']==both['theirs']

def test_the_method_takes_about_a_hundred_lines():
    n_lines = sum(bool(line.strip()) for s in method for line in s.splitlines())
    assert n_lines<=110
    assert not any('ressl_fastai' in s or 'fastai' in s for s in method)

mistakes = dict(
    temperatures_swapped=[('student_temp,teacher_temp = 0.1,0.04', 'student_temp,teacher_temp = 0.04,0.1')],
    views_swapped=[('embed(student, strong(b)),embed(teacher, weak(b))',
                    'embed(student, weak(b)),embed(teacher, strong(b))')],
    another_momentum=[('momentum = 0.97', 'momentum = 0.9')],
    teacher_stands_still=[('    follow(teacher, student)\n', '')],
    teacher_follows_before_the_step=[
        ('    follow(teacher, student)\n', ''), ('    opt.step()\n', '    follow(teacher, student)\n    opt.step()\n')],
    queue_takes_the_picture_first=[
        ('    loss = relational_loss(z_student, z_teacher, queue)',
         '    loss = relational_loss(z_student, z_teacher, torch.cat([queue, z_teacher])[-queue_size:])')],
    queue_loses_the_newest=[('[queue, z_teacher])[-queue_size:]', '[queue, z_teacher])[:queue_size]')],
    embeddings_of_any_length=[('return F.normalize(net(x), dim=1)', 'return net(x)')],
)

@pytest.mark.parametrize('nm', mistakes)
def test_mistakes_are_noticed(both, nm):
    wrong = run(method, mistakes[nm])
    assert distance(wrong['losses'], both['learn'].losses.all)>1e6*tol
