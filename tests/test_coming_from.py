"""The pages 'Coming from ...' say the truth: their code is taken out of them and run on a folder of small images, ours
always, that of the others where their package is installed. What they train is loaded here by the lines of the page."""
import json, re
from pathlib import Path

import numpy as np, pytest, torch, yaml
from fastai.learner import Learner
from PIL import Image
from torchvision.models import resnet18

from helpers import seed_all

folder = Path(__file__).resolve().parent.parent/'nbs'/'how_to'
pages = dict(lightly='11_coming_from_lightly', solo_learn='13_coming_from_solo_learn',
             self_supervised='14_coming_from_self_supervised')
small = dict(size=32, bs=16, n_epoch=1, n_warmup=0.5, n_workers=0, queue_size=48)  # instead of the page's settings

def text(name):
    cells = json.loads((folder/f'{pages[name]}.ipynb').read_text(encoding='utf-8'))['cells']
    return '\n\n'.join(''.join(o['source']) for o in cells)

def column(name, which, lang='python'):
    "The code blocks of one side, 'theirs' or 'ours', in the order of the page"
    return re.findall(rf'<div class="{which}">\n\n\*\*[^*\n]+\*\*\n\n```{lang}\n(.*?)```', text(name), flags=re.S)

def alone(name):
    "The code blocks that stand in no column: the settings of the page first, loading a checkpoint last"
    rest = re.sub(r'<div class="beside">.*?</div>\n</div>', '', text(name), flags=re.S)
    return re.findall(r'```python\n(.*?)```', rest, flags=re.S)

def settings(name):
    "The names that the page sets at its top, with the test's values"
    names = [o for line in alone(name)[0].splitlines() for o in line.split(' = ')[0].split(',')]
    return {o:small[o] for o in names}

def photos(path, n=24, size=40):
    rng = np.random.default_rng(0)
    for part,k in (('train',n),('valid',n//2)):
        for kind in 'abc':
            (path/part/kind).mkdir(parents=True)
            for i in range(k):
                image = rng.integers(0, 256, (size,size,3), dtype=np.uint8)
                Image.fromarray(image).save(path/part/kind/f'{i}.png')

@pytest.fixture
def run(tmp_path, monkeypatch):
    "Run code of a page in a folder with photos, with few images and epochs; returns what it has made"
    photos(tmp_path/'photos')
    monkeypatch.chdir(tmp_path)
    seed_all()
    def f(name, code, **made):
        space = {**settings(name), **made}
        for o in code: exec(compile(o.replace('fine_tune(10)', 'fine_tune(1)'), pages[name], 'exec'), space)
        return space
    return f

@pytest.mark.parametrize('name', pages)
def test_both_columns_are_complete(name):
    there = sum(len(column(name, 'theirs', lang)) for lang in ('python','yaml','bash'))
    assert len(column(name, 'ours'))==there==5 and len(alone(name))==2

@pytest.mark.parametrize('name', pages)
def test_lines_fit_in_their_column(name):
    "Fifty-six characters stand beside each other on a wide screen"
    code = [o for which in ('theirs','ours') for lang in ('python','yaml','bash') for o in column(name, which, lang)]
    assert not [line for o in code for line in o.splitlines() if len(line)>56]

@pytest.mark.parametrize('name', pages)
def test_our_side_runs(name, run):
    if name=='self_supervised': pytest.importorskip('timm')
    made = run(name, column(name, 'ours'))
    assert 0<=made['knn']<=1 and 0<=made['linear']<=1
    assert Path('photos/models/encoder.pth').exists()
    assert isinstance(made['clf'], Learner) and made['learn'].model.queue.count>0

def numbered(net): return torch.nn.Sequential(*list(net.children())[:-1])

def file_of(name):
    "A checkpoint as the other package writes it: the file's name, its content, the network in it"
    if name=='self_supervised':
        net = pytest.importorskip('timm').create_model('resnet18', num_classes=0)
        return 'moco.pth',net.state_dict(),net
    net = resnet18()
    net.fc = torch.nn.Identity()
    body = numbered(net) if name=='lightly' else net
    return 'moco.ckpt' if name=='lightly' else 'last.ckpt',dict(
        state_dict={f'backbone.{k}':v for k,v in body.state_dict().items()}),net

def same_features(encoder, net):
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad(): torch.testing.assert_close(encoder.eval()(x), net.eval()(x).flatten(1), rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('name', pages)
def test_a_checkpoint_carries_over(name, run):
    file,state,net = file_of(name)
    torch.save(state, file)
    made = run(name, [column(name, 'ours')[0], alone(name)[1]])
    same_features(made['encoder'], net)
    same_features(made['learn'].model.encoder, net)

def test_the_sides_of_solo_learn_say_the_same(run):
    views,theirs = map(yaml.safe_load, column('solo_learn', 'theirs', 'yaml'))
    made = run('solo_learn', column('solo_learn', 'ours')[:2])
    learn,method = made['learn'],theirs['method_kwargs']
    linear = [m for m in learn.model.modules() if isinstance(m, torch.nn.Linear)]
    assert (linear[0].out_features,linear[1].out_features) == (method['proj_hidden_dim'],method['proj_output_dim'])
    assert (learn.ressl.student_temp,learn.ressl.teacher_temp) == (method['temperature_q'],method['temperature_k'])
    momentum = learn.ressl.teacher_momentum
    assert [momentum(o) for o in (0.,1.)] == [theirs['momentum']['base_tau'],theirs['momentum']['final_tau']]
    assert learn.wd == float(theirs['optimizer']['weight_decay'])
    page = dict(zip(('size','bs','n_epoch','n_warmup'), map(int, re.findall(r'\d+', alone('solo_learn')[0])[:4])))
    assert page == dict(size=views[0]['crop_size'], bs=theirs['optimizer']['batch_size'], n_epoch=theirs['max_epochs'],
                        n_warmup=10)  # solo-learn's default
    assert f"queue_size = {theirs['data']['num_workers']},{method['queue_size']}" in alone('solo_learn')[0]

@pytest.mark.parametrize('name', ['lightly','self_supervised'])
def test_their_side_runs(name, run):
    pytest.importorskip(name)
    made = run(name, column(name, 'theirs'))
    if name=='lightly': net = made['model'].backbone.cpu()
    else:
        net = pytest.importorskip('timm').create_model('resnet18', num_classes=0)
        net.load_state_dict(torch.load('moco.pth'))
    again = run(name, [column(name, 'ours')[0], alone(name)[1]])
    same_features(again['encoder'], net)
