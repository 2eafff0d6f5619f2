"`ressl_prepare`: a copy of a folder in which images are small and the same pictures, whole after any interruption."
import json, os
from pathlib import Path

import numpy as np, pytest, torch
from fastcore.script import CliError
from PIL import ExifTags, Image
from sklearn.datasets import load_sample_images

from ressl_fastai.cli import ressl_prepare
from ressl_fastai.data import find_images, folder_dls
from ressl_fastai.images import open_image
from ressl_fastai.prepare import prepare_image, prepare_images

china = Image.fromarray(load_sample_images().images[0])  # 640 x 427

@pytest.fixture
def images(tmp_path):
    "Photographs in class folders: large and small JPEG, one on its side, PNG with transparency, 16 bits, grey"
    path = tmp_path/'images'
    for nm in ('a/deep','b'): (path/nm).mkdir(parents=True)
    china.save(path/'a'/'large.jpg', quality=95)
    china.resize((60,40)).save(path/'b'/'small.jpg')
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turn by 90 degrees
    china.save(path/'b'/'side.JPG', exif=exif)
    clear = china.convert('RGBA')
    clear.putalpha(Image.fromarray(np.where(np.arange(640)[None]<320, 0, 255).astype(np.uint8).repeat(427, 0)))
    clear.save(path/'a'/'deep'/'clear.png')
    Image.fromarray((np.arange(200*300).reshape(200,300)).astype(np.uint16)).save(path/'b'/'deep.png')
    china.convert('L').save(path/'b'/'gray.png')
    return path

def there(out):
    files = [f for f in sorted(out.rglob('*')) if f.is_file() and f.name!='config.json']
    return {str(f.relative_to(out)):f for f in files}

def difference(a, b):
    "Mean difference of two pictures, in grey values, at the size of the first"
    a,b = a.convert('RGB'),b.convert('RGB').resize(a.size, Image.BICUBIC)
    return np.abs(np.asarray(a, float)-np.asarray(b, float)).mean()

def test_the_copy_holds_the_same_pictures_in_the_same_folders(images, tmp_path):
    out = tmp_path/'small'
    assert prepare_images(images, out, short_side=100, num_workers=0)==(6, [])
    got = there(out)
    assert set(got)=={'a/large.jpg','a/deep/clear.png.jpg','b/small.jpg','b/side.JPG','b/deep.png','b/gray.png.jpg'}
    for nm in ('b/small.jpg','b/deep.png'): assert got[nm].read_bytes()==(images/nm).read_bytes()
    sizes = {nm:Image.open(f).size for nm,f in got.items()}
    assert sizes['a/large.jpg']==(150,100) and sizes['b/side.JPG']==(100,150)  # upright
    assert Image.open(got['b/gray.png.jpg']).mode=='L'
    for nm,original in (('a/large.jpg','a/large.jpg'), ('b/side.JPG','b/side.JPG'),
                        ('a/deep/clear.png.jpg','a/deep/clear.png')):
        assert difference(open_image(got[nm]), open_image(images/original))<6
        mirrored = open_image(images/original).transpose(Image.FLIP_LEFT_RIGHT)
        assert difference(open_image(got[nm]), mirrored)>20  # control
    a,b = (folder_dls(o, 32, 2, gray=True, num_workers=0, split=False) for o in (images,out))
    assert list(a.vocab)==list(b.vocab) if hasattr(a, 'vocab') else not hasattr(b, 'vocab')

def test_an_interrupted_copy_goes_on_and_what_changed_is_made_anew(images, tmp_path, monkeypatch):
    out,made = tmp_path/'small',[]
    def until(n):
        def prepare(file, *args):
            if len(made)==n: raise KeyboardInterrupt
            before = there(out)
            prepare_image(file, *args)
            if there(out)!=before or file in changed: made.append(file)
        return prepare
    changed = set()
    monkeypatch.setattr('ressl_fastai.prepare.prepare_image', until(3))
    with pytest.raises(KeyboardInterrupt): prepare_images(images, out, short_side=100, num_workers=0)
    assert len(there(out))==3
    monkeypatch.setattr('ressl_fastai.prepare.prepare_image', until(-1))
    assert prepare_images(images, out, short_side=100, num_workers=0)==(6, []) and len(made)==len(set(made))==6
    stamps = {nm:f.stat().st_ino for nm,f in there(out).items()}
    os.utime(images/'a'/'large.jpg')
    prepare_images(images, out, short_side=100, num_workers=0)
    assert [nm for nm,f in there(out).items() if f.stat().st_ino!=stamps[nm]]==['a/large.jpg']

def test_many_processes_make_the_same(images, tmp_path):
    for nm,n in (('one',0), ('two',2)): prepare_images(images, tmp_path/nm, short_side=50, num_workers=n)
    one,two = ({k:f.read_bytes() for k,f in there(tmp_path/nm).items()} for nm in ('one','two'))
    assert one==two and len(one)==6

def test_the_command_says_what_it_did_and_what_it_could_not_read(images, tmp_path, capsys):
    (images/'a'/'broken.jpg').write_bytes((images/'a'/'large.jpg').read_bytes()[:300])
    def go(out='small', **kwargs): ressl_prepare(str(images), str(tmp_path/out), short_side=64, num_workers=0, **kwargs)
    with pytest.raises(CliError, match='1 of 7 images cannot be read'): go()
    assert 'broken.jpg' in capsys.readouterr().err and len(there(tmp_path/'small'))==6
    go(skip_bad=True)
    assert '6 images with a short side of at most 64 pixels' in capsys.readouterr().out
    (tmp_path/'full').mkdir()
    (tmp_path/'full'/'mine.txt').write_text('precious')
    for out,text in (('full','must be a new or empty folder'), ('images','another folder'), ('small','short_side=64')):
        how = dict(short_side=32) if out=='small' else {}
        with pytest.raises(CliError, match=text):
            ressl_prepare(str(images), str(tmp_path/out), num_workers=0, **how)
    assert (tmp_path/'full'/'mine.txt').read_text()=='precious'

def test_a_copy_among_the_images_is_not_taken_for_images(images):
    n = len(find_images(images))
    for _ in range(2): assert prepare_images(images, images/'small', short_side=64, num_workers=0)[0]==n
    assert len(find_images(images))==n and len(find_images(images/'small'))==n
    config = images/'small'/'config.json'
    assert json.loads(config.read_text())['command'].startswith('ressl_prepare')
    config.unlink()  # control
    assert len(find_images(images))==2*n
