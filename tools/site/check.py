"""Look at the pages of a folder: dead links and anchors, pictures missing or without text, symbols without entry,
paths of a machine.

python tools/site/check.py _docs"""

import importlib, re, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote


class Page(HTMLParser):
    "Anchors, links and pictures of a page"
    def __init__(self, text):
        super().__init__()
        self.ids,self.links,self.pictures = set(),[],[]
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get('id'): self.ids.add(attrs['id'])
        if tag=='a' and attrs.get('href'): self.links.append(attrs['href'])
        if tag=='img' and attrs.get('src'): self.pictures.append((attrs['src'], attrs.get('alt') or ''))


def is_elsewhere(address): return re.match(r'(https?|mailto|data):', address) is not None

def target(folder, name, address):
    "The file that a link of page `name` leads to, and the anchor in it"
    path,_,anchor = address.partition('#')
    file = (folder/name).parent/unquote(path) if path else folder/name
    return file.resolve(),unquote(anchor)

def dead_links(folder, pages):
    "`(page, address)` of links to files or anchors that are not there"
    res,by_file = [],{(folder/name).resolve():page for name,page in pages.items()}
    for name,page in pages.items():
        for address in page.links:
            if is_elsewhere(address): continue
            file,anchor = target(folder, name, address)
            if not file.exists(): res.append((name, address))
            elif anchor and file in by_file and anchor not in by_file[file].ids: res.append((name, address))
    return res

def bad_pictures(folder, pages):
    "`(page, picture)` that are missing, or that say nothing to who cannot see them"
    res = []
    for name,page in pages.items():
        for src,alt in page.pictures:
            there = is_elsewhere(src) or target(folder, name, src)[0].exists()
            if not there or len(alt)<3 or alt.startswith(('_images', '../_images')): res.append((name, src))
    return res

def lost_symbols(pages, symbols):
    "`(page, symbol)` of public symbols without an entry"
    return [(page, nm) for page,nm in symbols if page not in pages or nm.lower() not in pages[page].ids]

def public_symbols():
    "Of each module what `import *` brings"
    index = importlib.import_module('ressl_fastai._modidx').d['syms']
    for module,names in index.items():
        public = importlib.import_module(module).__all__
        for nm,(address,_) in names.items():
            if nm.removeprefix(f'{module}.') in public and '#' in address: yield tuple(address.split('#'))

def machine_paths(texts):
    "`(page, path)` of folders that only one machine has"
    return [(name, m[0]) for name,text in texts.items() for m in re.finditer(r'/(?:work|root|home)/[\w./-]+', text)]

def main(folder):
    folder = Path(folder)
    texts = {p.relative_to(folder).as_posix(): p.read_text(encoding='utf-8') for p in folder.rglob('*.html')}
    pages = {name:Page(text) for name,text in texts.items()}
    shown = {name:re.sub(r'<script.*?</script>', '', text, flags=re.S) for name,text in texts.items()}
    faults = {'links that lead nowhere': dead_links(folder, pages),
              'pictures without file or text': bad_pictures(folder, pages),
              'public symbols without an entry': lost_symbols(pages, public_symbols()),
              'paths of one machine': machine_paths(shown)}
    for what,found in faults.items():
        if found: print(f'{what}:', *sorted(set(found)), sep='\n  ')
    if any(faults.values()): sys.exit(1)
    print(f"{len(pages)} pages, {sum(len(p.links) for p in pages.values())} links, "
          f"{sum(len(p.pictures) for p in pages.values())} pictures: nothing amiss")

if __name__=='__main__': main(sys.argv[1])
