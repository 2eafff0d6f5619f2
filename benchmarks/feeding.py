"""What loading a photograph costs, by way and by the size of the files: milliseconds of processor time per image on one
core. Photographs of Debian's wallpapers are cut into pictures of 500 x 375 pixels (as ImageNet's) and shrunk to 2000 x
1500 (as a phone's), JPEG quality 90. One JSON line for each size in results/feeding.jsonl, two minutes.

    cd benchmarks; python -W ignore feeding.py [--n 60]

pil            what a `DataLoader` of `folder_dls` does for each image: `open_image`, squeeze to 375 pixels, tensor
pil_draft      the same, the decoder asked for a half, quarter or eighth where that is still large enough
torchvision    torchvision's decode_jpeg, and resize with antialias
prepared       as pil, of files that `ressl_prepare` resized once to a short side of 256, to 256 pixels
prepared_tar   the same files in one tar, read by an index of positions
prepare        resizing a file once
"""

import argparse, io, statistics, tarfile, tempfile, time
from pathlib import Path

import numpy as np, torch
from fastai.data.transforms import ToTensor
from fastai.vision.augment import Resize
from fastai.vision.core import PILImage
from PIL import Image
from torchvision.io import decode_jpeg, read_file
from torchvision.transforms.v2.functional import resize

from common import receipt
from hand_over import photographs
from ressl_fastai.images import open_image
from ressl_fastai.prepare import prepare_image

def save_files(folder, size, n):
    "About `n` pictures of `size`, parts of the photographs"
    names = [Path('/usr/share')/form.format(name) for form,names in photographs.items() for name in names.split()]
    for i in range(n):
        im = Image.open(names[i%len(names)]).convert('RGB')
        rng = np.random.default_rng(i)
        scale = max(size[0]/im.width, size[1]/im.height, 0.5)
        im = im.resize((round(im.width*scale)+1, round(im.height*scale)+1), Image.LANCZOS)
        left,top = rng.integers(0, im.width-size[0]),rng.integers(0, im.height-size[1])
        im.crop((left, top, left+size[0], top+size[1])).save(folder/f'{i:04}.jpg', quality=90)
    return sorted(folder.glob('*.jpg'))

def pil(file, size=375): return ToTensor()(Resize(size, method='squish')(PILImage(open_image(file)), split_idx=1))

def prepared(file): return pil(file, 256)

def prepared_now(file, out):
    out.unlink(missing_ok=True)
    prepare_image(file, out, 256, 90)

def pil_draft(file):
    with Image.open(file) as im:
        im.draft('RGB', (375,375))
        return pil(im)

def torchvisions(file): return resize(decode_jpeg(read_file(str(file))), [375,375], antialias=True)

def in_tar(files, folder):
    "A function from a file to its image, read from one tar"
    with tarfile.open(folder/'all.tar', 'w') as tar:
        for f in files: tar.add(f, f.name)
    with tarfile.open(folder/'all.tar') as tar: at = {o.name:(o.offset_data,o.size) for o in tar}
    shard = open(folder/'all.tar', 'rb')
    def load(file):
        start,size = at[Path(file).name]
        shard.seek(start)
        return prepared(io.BytesIO(shard.read(size)))
    return load

def main(n):
    torch.set_num_threads(1)
    for size in ((500,375), (2000,1500)):
        with tempfile.TemporaryDirectory() as d:
            d = Path(d)
            for nm in ('files','small','again'): (d/nm).mkdir()
            files = save_files(d/'files', size, n if size[0]<1000 else n//3)
            for f in files: prepare_image(f, d/'small'/f.name, 256, 90)
            small = sorted((d/'small').glob('*.jpg'))
            cases = dict(pil=(pil, files), pil_draft=(pil_draft, files), torchvision=(torchvisions, files),
                         prepared=(prepared, small), prepared_tar=(in_tar(small, d), small),
                         prepare=(lambda f: prepared_now(f, d/'again'/f.name), files))
            ms = {k:[] for k in cases}
            for _ in range(4):  # the first does not count
                for k,(f,fs) in cases.items():
                    start = time.process_time()
                    for o in fs: f(o)
                    ms[k].append(1e3*(time.process_time()-start)/len(fs))
            kb = {k:round(np.mean([f.stat().st_size for f in fs])/1024, 1)
                  for k,fs in (('files',files), ('prepared',small))}
            receipt('feeding', size=list(size), n=len(files), kb=kb,
                    cpu_ms={k:round(statistics.median(v[1:]), 2) for k,v in ms.items()})

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--n', type=int, default=60)
    main(p.parse_args().n)
