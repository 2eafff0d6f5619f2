"`ressl_evaluate` as a shell user meets it: the numbers of the saved encoder, one clear line for each mistake."
import subprocess, sys
from configparser import ConfigParser
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from fastcore.script import CliError
from PIL import Image
from helpers import trained_on, write_digits, write_run

from ressl_fastai.cli import ressl_evaluate
from ressl_fastai.data import folder_dls
from ressl_fastai.evaluate import knn_accuracy, linear_accuracy
from ressl_fastai.transfer import load_encoder
from ressl_fastai.models import create_encoder, small_resnet
from ressl_fastai.loaders import clean_dl

def shell(*args, cwd):
    "The command in its own process, as its console script starts it"
    (cwd/'ressl_evaluate').write_text('from ressl_fastai.cli import ressl_evaluate\nressl_evaluate()')
    return subprocess.run(
        [sys.executable, '-W', 'ignore', cwd / 'ressl_evaluate', *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope='module')
def tmp(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('evaluate')
    write_digits(tmp/'digits', 200)
    write_digits(tmp/'flat', 20, flat=True)
    learn = trained_on(tmp/'digits')
    write_run(learn, tmp/'run')
    learn.save_encoder(tmp/'alone.pth')
    (tmp/'broken.pth').write_bytes(b'no encoder')
    return tmp

def test_numbers_are_those_of_the_saved_encoder(tmp):
    res = shell(
        'run',
        './digits',
        '--out=out',
        '--labels-per-class=1,3',
        '--seeds=2',
        '--steps=3',
        '--valid-pct=0.3',
        '--num-workers=0',
        cwd=tmp,
    )
    assert res.returncode==0, res.stderr
    dls = folder_dls(tmp/'digits', 8, 64, gray=True, valid_pct=0.3, num_workers=0)
    encoder = load_encoder(create_encoder(small_resnet, 1, size=8), tmp/'run'/'encoder.pth').eval()
    mean,std = (torch.tensor(o)[:,None,None] for o in torch.load(tmp/'run'/'encoder.pth')['normalize'])
    def both(dl, f):
        bs = [(f((x.as_subclass(torch.Tensor)-mean)/std), y.as_subclass(torch.Tensor)) for x,y in clean_dl(dl)]
        return torch.cat([x for x,_ in bs]).detach(),torch.cat([y for _,y in bs])
    scores = pd.read_csv(tmp/'out'/'scores.csv', index_col=0)
    for row,f in (('encoder',encoder), ('raw pixels',lambda x: x.flatten(1))):
        feats = *both(dls.train, f),*both(dls.valid, f)
        linear = linear_accuracy(*feats, seed=42)
        np.testing.assert_allclose(scores.loc[row], [knn_accuracy(*feats), linear['top1'], linear['top5']], atol=1e-6)
    assert not np.allclose(scores.loc['encoder'], scores.loc['random encoder'])
    few = pd.read_csv(tmp/'out'/'label_efficiency.csv')
    assert len(few)==5*2*2 and few.n_labels.unique().tolist()==[10,30]
    for v in scores.to_numpy().flat: assert f'{v:.4f}' in res.stdout
    assert np.asarray(Image.open(tmp/'out'/'label_efficiency.png').convert('L')).std()>10

def test_the_random_encoder_alone_is_in_half_precision_and_only_where_that_is_right(tmp, monkeypatch):
    """The exact features, up to the eight bits of bfloat16 in each of some twenty layers: twice 2**-8 times the root of
    20; the encoder that is judged stays in float32"""
    from ressl_fastai import runs
    how = dict(valid_pct=0.3, num_workers=0, seed=0, skip_bad=False)
    learn,random_learn,*_ = runs._prepared(str(tmp/'run'), str(tmp/'digits'), None, None, 'logistic', how)
    def rough(dtype, fault=''):
        monkeypatch.setattr(runs, 'choose_precision', lambda *args: (dtype,False))
        monkeypatch.setattr(runs, 'half_fault', lambda *args: fault)
        return runs._roughly_embedded(learner(), random_learn.dls.train)[0]
    def learner():  # features are kept by learner
        return type(random_learn)(random_learn.dls, random_learn.model, loss_func=random_learn.loss_func)
    exact = runs._embedded(learner(), random_learn.dls.train)[0]
    half,float32,faulty = rough(torch.bfloat16),rough(None),rough(torch.bfloat16, 'wrong')
    assert (float32==exact).all() and (faulty==exact).all()
    assert 0<(half-exact).norm()/exact.norm()<20**0.5*2**-7 and half.dtype==torch.float32
    seen = []
    monkeypatch.setattr(runs, '_roughly_embedded', lambda learn, dl: seen.append(learn) or runs._embedded(learn, dl))
    runs._scores(learn, random_learn, 20, 'logistic', 0)
    assert seen==[random_learn]*2

mistakes = {
    'encoder': (dict(encoder='nowhere'), 'no encoder file'),
    'broken': (dict(encoder='broken.pth'), 'cannot be read'),
    'size': (dict(encoder='alone.pth'), 'size must be given'),
    'data': (dict(data='nowhere'), 'there is no such folder'),
    'labels': (dict(data='flat'), 'must have labels'),
    'numbers': (dict(labels_per_class='1,few'), 'such as 1,5,10'),
    'too_many': (dict(labels_per_class='1,900'), 'is more than'),
    'k': (dict(k=0), 'k must be'),
    'protocol': (dict(protocol='sgd'), 'protocol must be'),
}

@pytest.mark.parametrize('nm', mistakes)
def test_a_mistake_is_one_line(tmp, nm, monkeypatch):
    args,text = mistakes[nm]
    monkeypatch.chdir(tmp)
    with pytest.raises(CliError) as e:
        ressl_evaluate(**{'encoder': 'run', 'data': 'digits', 'out': f'out-{nm}', 'num_workers': 0, **args})
    assert text in str(e.value) and '\n' not in str(e.value) and not Path(f'out-{nm}').exists()

def test_in_the_shell_a_mistake_is_that_line(tmp):
    res = shell('nowhere', 'digits', cwd=tmp)
    assert (
        res.returncode == 1
        and res.stdout == ''
        and len(res.stderr.strip().splitlines()) == 1
        and 'no encoder file' in res.stderr
    )


def test_it_is_installed():
    ini = ConfigParser(delimiters=['='])
    ini.read(Path(__file__).parent.parent/'settings.ini')
    for nm in ('ressl_pretrain','ressl_evaluate','ressl_embed','ressl_prepare'):
        assert f'{nm}=ressl_fastai.cli:{nm}' in ini['DEFAULT']['console_scripts'].split()
