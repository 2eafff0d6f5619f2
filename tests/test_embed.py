"`ressl_embed`: the file holds what `embed` gives, image by image, in every format, or is refused before the work."

import numpy as np
import pandas as pd
import pytest
import torch
from fastcore.script import CliError
from PIL import Image
from sklearn.datasets import load_digits
from helpers import trained_on, write_digits, write_run

from fastai.learner import Learner
from ressl_fastai import cli
from ressl_fastai.cli import Interrupted, ressl_embed
from ressl_fastai.data import find_images, folder_dls
from ressl_fastai.transfer import encoder_learner


@pytest.fixture(scope='module')
def there(tmp_path_factory):
    "Digits in class folders, without folders, and in folders for training and test; an encoder of a run"
    tmp = tmp_path_factory.mktemp('embed')
    for folder,n in {'classes':70, 'parts/train':12, 'parts/test':12}.items(): write_digits(tmp/folder, n)
    write_digits(tmp/'flat', 10, flat=True)
    write_run(trained_on(tmp/'classes'), tmp/'run')
    return tmp


def one_by_one(tmp, data):
    "The oracle: every file opened by PIL, alone, in the order of the names"
    files = find_images(tmp/data)
    learn = encoder_learner(tmp/'run'/'encoder.pth', folder_dls(tmp/'classes', 8, 16, gray=True, num_workers=0))
    norm = next(f for f in learn.dls.train.after_batch.fs if type(f).__name__=='Normalize')
    net = learn.model.encoder.eval()
    def vector(file):
        x = torch.tensor(np.asarray(Image.open(file).convert('L')), dtype=torch.float32)[None,None]/255
        with torch.no_grad(): return net((x-norm.mean.cpu())/norm.std.cpu())[0]
    return list(map(str, files)),torch.stack([vector(f) for f in files])


def read(file):
    "Paths, labels or None, vectors, with the library that the notebook names"
    if file.suffix=='.csv':
        df = pd.read_csv(file, dtype={'label':str})
        first = 2 if 'label' in df else 1
        assert list(df.columns[first:])==list(map(str, range(df.shape[1]-first)))
        return df.path.tolist(),df.label.tolist() if first==2 else None,df.iloc[:,first:].to_numpy(np.float32)
    if file.suffix=='.npy':
        o = np.load(file)                                     # without pickle
        labels = o['label'].tolist() if 'label' in o.dtype.names else None
        return o['path'].tolist(),labels,o['vector']
    o = torch.load(file, weights_only=True)
    return o['paths'],o['labels'],o['vectors'].numpy()


@pytest.mark.parametrize('suffix', ['csv','npy','pt'])
@pytest.mark.parametrize('data,labels', [('classes',True), ('flat',False), ('parts',True)])
def test_a_file_holds_what_embed_gives(there, tmp_path, monkeypatch, capsys, suffix, data, labels):
    out = tmp_path/f'e.{suffix}'
    ressl_embed(str(there/'run'), str(there/data), str(out), num_workers=0)
    said = capsys.readouterr().out
    paths,got_labels,x = read(out)
    want_paths,want = one_by_one(there, data)
    assert paths==want_paths                                 # all images, also of a folder for testing, none twice
    assert got_labels==([p.split('/')[-2] for p in paths] if labels else None)
    np.testing.assert_allclose(x, want, atol=1e-5)
    assert not np.allclose(x, np.roll(want, 1, 0), atol=1e-3)    # control: the vectors of the image before
    assert f'embedding {len(paths)} images' in said
    assert said.splitlines()[-1].startswith(f'{len(paths)} images') and str(out) in said
    assert [o.name for o in tmp_path.iterdir()]==[out.name]


def test_digits_are_all_embedded(there, tmp_path):
    ressl_embed(str(there/'run'), 'digits', str(tmp_path/'e.npy'))
    _,labels,x = read(tmp_path/'e.npy')
    assert len(x)==1797
    assert np.bincount(np.array(labels, int)).tolist()==np.bincount(load_digits().target).tolist()


def test_parquet_needs_an_engine_and_says_so(there, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, 'find_spec', lambda nm: None)
    with pytest.raises(CliError, match='needs pyarrow, which is not installed: pip install pyarrow, or take .csv'):
        ressl_embed(str(there/'run'), str(there/'flat'), str(tmp_path/'e.parquet'))


def test_parquet(there, tmp_path):
    pytest.importorskip('pyarrow')
    ressl_embed(str(there/'run'), str(there/'classes'), str(tmp_path/'e.parquet'), num_workers=0)
    df = pd.read_parquet(tmp_path/'e.parquet')
    want_paths,want = one_by_one(there, 'classes')
    assert df.path.tolist()==want_paths and list(df.columns[:3])==['path','label','0']
    np.testing.assert_allclose(df.iloc[:,2:].to_numpy(), want, atol=1e-5)


mistakes = {'encoder':(dict(encoder='nowhere'), 'no encoder file'), 'data':(dict(data='nowhere'), 'no such folder'),
            'suffix':(dict(out='e.txt'), 'out must end in .csv, .parquet, .npy, .pt, got e.txt'),
            'there':(dict(out='there.csv'), 'out must be the name of a new file, there.csv is there already'),
            'folder':(dict(out='there.csv/e.csv'), 'out must be in a folder, there.csv is a file'),
            'bs':(dict(bs=0), 'bs must be'),
            'size':(dict(size=0), 'size must be'), 'workers':(dict(num_workers=-1), 'num_workers must be')}

@pytest.mark.parametrize('nm', mistakes)
def test_a_mistake_is_one_sentence_before_the_work(there, nm, monkeypatch, capsys):
    args,text = mistakes[nm]
    monkeypatch.chdir(there)
    (there/'there.csv').write_text('mine')
    before = sorted(p.name for p in there.iterdir())
    usual = dict(encoder='run', data='flat', out='e.csv', num_workers=0)
    with pytest.raises(CliError) as e: ressl_embed(**{**usual, **args})
    assert text in str(e.value) and '\n' not in str(e.value) and capsys.readouterr().out==''
    assert sorted(p.name for p in there.iterdir())==before and (there/'there.csv').read_text()=='mine'


def test_ctrl_c_writes_nothing(there, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(Learner, 'embed', interrupt)
    with pytest.raises(Interrupted):
        ressl_embed(str(there/'run'), str(there/'flat'), str(tmp_path/'e.csv'), num_workers=0)
    assert capsys.readouterr().err.strip()=='ressl_embed: interrupted; nothing was written'
    assert not any(tmp_path.iterdir())


def test_a_grey_encoder_sees_colours_as_grey(there, tmp_path):
    (tmp_path/'ims').mkdir()
    for i in range(3): Image.new('RGB', (9,7), (10*i,200,3)).save(tmp_path/'ims'/f'{i}.png')
    ressl_embed(str(there/'run'), str(tmp_path/'ims'), str(tmp_path/'e.pt'), num_workers=0)
    assert torch.load(tmp_path/'e.pt')['vectors'].isfinite().all()
