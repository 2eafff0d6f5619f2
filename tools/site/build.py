"""The site in _docs/: nbdev processes the notebooks as it does for Quarto, Sphinx renders them, `check.py` looks at
them.

    python tools/site/build.py          # what `make docs` calls

Addresses and anchors are nbdev's (losses.html#ressl_loss), the order is that of nbs/sidebar.yml, and beside each page
lies
the Markdown that llms.txt and the docstrings of the modules point to (losses.html.md)."""

import ast, html, json, re, shutil, subprocess, sys
from importlib import import_module
from pathlib import Path

import yaml
from fastai.callback.core import Callback
from fastcore.docments import DocmentTbl
from fastcore.nbio import read_nb
from nbdev.config import get_config, nbpath2html
from nbdev.doclinks import NbdevLookup
from nbdev.processors import FilterDefaults
from nbdev.showdoc import BasicMarkdownRenderer

here = Path(__file__).resolve().parent
root = here.parent.parent


def inherits_init(sym):
    "Is `sym` a callback that takes no arguments? fastai's own takes events by name, which no caller uses"
    return isinstance(sym, type) and issubclass(sym, Callback) and sym.__init__ is Callback.__init__


def entry(doc):
    "A symbol in Markdown: anchor, source, how it is called, what it does, its parameters as a table"
    source = NbdevLookup().code(doc.fn)
    names = [p for p in doc.dm.dm if p!='return'] if hasattr(doc.dm, 'dm') else []
    if inherits_init(doc.sym): names = []
    parts = [f'<span id="{html.escape(doc.nm.lower())}"></span>', f'### {doc.nm}']
    if source: parts.append(f'<a class="source" href="{source}">source</a>')
    parts.append(f"```python\n{doc.nm}({', '.join(names)})\n```")
    if doc.docs: parts.append(f'*{doc.docs}*')
    return '\n\n'.join([*parts, str(DocmentTbl(doc.sym))])


def directives(source):
    "nbdev's comments of a cell by name, and the rest of it"
    found = dict(re.findall(r'^#\|\s*([\w-]+):?\s*(.*)$', source, flags=re.M))
    return found,re.sub(r'^#\|.*\n?', '', source, flags=re.M)


def shown(options, source):
    "What Sphinx makes of the code of a cell: it stays out if it says so or only sets up, or is folded"
    sets_up = all(l.startswith(('plt.rcParams[','set_seed(')) for l in source.strip().splitlines())
    if options.get('echo')=='false' or sets_up: return ['remove-input']
    return ['hide-input'] if options.get('code-fold')=='true' else []


def as_table(rows):
    "Lines that fastai prints without a bar, `[epoch, losses, metrics, time]`, as a table; metrics here are accuracies"
    rows = [ast.literal_eval(o) for o in rows]
    names = ['epoch','train_loss','valid_loss',*['accuracy']*(len(rows[0])-4),'time']
    def text(o): return f'{o:.3f}' if isinstance(o, float) else o
    def cells(tag, row): return ''.join(f'<{tag}>{text(o)}</{tag}>' for o in row)
    body = ''.join(f"<tr>{cells('td', o)}</tr>" for o in rows)
    return f"<table><thead><tr>{cells('th', names)}</tr></thead><tbody>{body}</tbody></table>"


def with_tables(outputs):
    "Outputs with consecutive lines of losses as one table"
    res,rows = [],[]
    def flush():
        if rows: res.append(dict(output_type='display_data', metadata={}, data={'text/html':as_table(rows)}))
        rows.clear()
    for o in outputs:
        lines = [l for l in ''.join(o.get('text', [])).splitlines() if l.strip()]
        if lines and all(re.fullmatch(r"\[\d+, [-\d., e]+, '\d+:\d\d'\]", l) for l in lines): rows.extend(lines)
        else:
            flush()
            res.append(o)
    flush()
    return res


def first_sentence(text):
    "Of a paragraph, without Markdown's marks"
    plain = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', re.sub(r'[`*#>$]', '', text)).strip()
    return re.split(r'(?<=[.:!?])\s', plain.replace('\n', ' '), maxsplit=1)[0][:200]


def front_matter(source):
    "A page's title and description, which nbdev puts into a raw cell, as Markdown"
    fields = yaml.safe_load(source.strip().strip('-'))
    return f"# {fields['title']}\n\n{fields.get('description', '')}"


def text_of(output):
    "What a Markdown reader is shown of an output"
    data = output.get('data', {})
    return ''.join(output.get('text', []) or data.get('text/markdown', '') or data.get('text/plain', ''))


def about(source):
    "Title and description of a page, from its first cell"
    title = re.search(r'^# (.+)', source, flags=re.M)
    what = re.search(r'^> (.+(?:\n> .+)*)|^# .+\n\n(.+)', source, flags=re.M)
    text = (what[1] or what[2]) if what else ''
    return (title[1] if title else ''),text.replace('\n> ', ' ')


def as_markdown(cells):
    "A page as Markdown"
    parts = []
    for c in cells:
        if c['cell_type']=='markdown':
            parts.append(c['source'])
            continue
        parts.append(f"```python\n{c['source']}\n```")
        parts += [f'```\n{text_of(o)}\n```' for o in c['outputs'] if text_of(o)]
    return '\n\n'.join(parts)+'\n'


def entries(cells):
    "Anchors of the symbols that a page has entries of"
    text = '\n'.join(c['source'] for c in cells if c['cell_type']=='markdown')
    return set(re.findall(r'<span id="([^"]+)"></span>', text))


class Site:
    "Notebooks on their way to pages"
    def __init__(self):
        cfg = get_config(root)
        self.nbs,self.url,self.source = cfg.nbs_path,cfg.doc_url.rstrip('/')+'/',root/'_proc'
        nbs = [p.relative_to(self.nbs) for p in sorted(self.nbs.rglob('*.ipynb'))]
        nbs = [p for p in nbs if '.ipynb_checkpoints' not in p.parts]
        self.pages = {p.as_posix(): nbpath2html(p).with_suffix('').as_posix() for p in nbs}
        index = import_module('ressl_fastai._modidx').d['syms'].values()
        self.symbols = {address.split('#')[-1] for names in index for address,_ in names.values()}

    def link(self, to, nb, page):
        "A link to another page, by its address or by its notebook, as a relative one; others as they are"
        target,_,anchor = to.partition('#')
        if to.startswith(self.url): target = target[len(self.url):].removesuffix('.html')
        elif target.endswith('.ipynb') and '://' not in target:
            path = ((self.nbs/nb).parent/target).resolve().relative_to(self.nbs.resolve()).as_posix()
            if path not in self.pages: raise ValueError(f"{nb} links to {to}, which is no notebook")
            target = self.pages[path]
        else: return to
        return f"{'../'*page.count('/')}{target}.html{'#'+anchor if anchor else ''}"

    def linked(self, text, nb, page):
        return re.sub(r'\]\(([^)\s]+)\)', lambda m: f']({self.link(m[1], nb, page)})', text)

    def outputs(self, cell, nb, page):
        "What is shown below a cell: no progress bars, and links that lead somewhere"
        res = []
        for o in json.loads(json.dumps(cell.outputs)):
            data = o.get('data', {})
            if '<progress' in str(o) or 'progress {' in str(data): continue
            if o['output_type']=='execute_result': o['execution_count'] = None
            if 'text/markdown' in data: data['text/markdown'] = self.linked(''.join(data['text/markdown']), nb, page)
            res.append(o)
        return with_tables(res)

    def cell(self, cell, nb, page, before):
        "A cell of the page, None for what readers are not shown; `before` is the latest text"
        options,source = directives(cell.source)
        if cell.cell_type=='raw': return dict(cell_type='markdown', metadata={}, source=front_matter(source))
        if 'AUTOGENERATED' in source: return None
        if 'show_doc(' in source:
            cell.cell_type,source = 'markdown',''.join(o.data['text/markdown'] for o in cell.outputs)
        if cell.cell_type=='markdown':
            return dict(cell_type='markdown', metadata={}, source=self.linked(source, nb, page))
        alt = options.get('fig-alt', '').strip('"') or first_sentence(before)
        metadata = dict(tags=shown(options, source), mystnb=dict(image=dict(alt=alt)))
        return dict(cell_type='code', metadata=metadata, execution_count=None, outputs=self.outputs(cell, nb, page),
                    source=source)

    def cells(self, nb, page):
        processed,res,before = read_nb(self.nbs/nb),[],page
        FilterDefaults()(processed)
        for i,c in enumerate(processed.cells):
            if not (made := self.cell(c, nb, page, before)): continue
            if made['cell_type']=='markdown' and made['source'].strip():
                before = made['source'].strip().split('\n\n')[-1]
            res.append(dict(made, id=f'c{i}'))
        return res

    def sections(self):
        "The notebooks of each section of the sidebar"
        parts = yaml.safe_load((self.nbs/'sidebar.yml').read_text(encoding='utf-8'))
        return {o['section']:o['contents'] for o in parts['website']['sidebar']['contents'] if isinstance(o, dict)}

    def contents(self):
        "The order of the pages, as Sphinx wants it, from the sidebar that Quarto uses"
        sections = self.sections()
        def tree(section, names):
            head = f"```{{toctree}}\n:hidden:\n:caption: {section}\n"
            return '\n'.join([head, *map(self.pages.get, names), '```'])
        listed = [p for names in sections.values() for p in names]
        missing = sorted(self.pages.keys()-{*listed, 'index.ipynb'})
        if missing or len(listed)!=len(set(listed)):
            raise ValueError(f"nbs/sidebar.yml must list each page once, it lacks {missing}")
        return '\n\n'.join(tree(*o) for o in sections.items())

    def without_dead_anchors(self, cells, there):
        "Links to symbols that only other modules use lead to their page: they have no entry on it"
        def at_least_the_page(m):
            page,anchor = m[1].split('/')[-1],m[2]
            lost = anchor in self.symbols and page in there and anchor not in there[page]
            return f']({m[1]}.html)' if lost else m[0]
        for c in cells:
            if c['cell_type']!='markdown': continue
            c['source'] = re.sub(r'\]\(([^)\s#]+)\.html#([^)\s]+)\)', at_least_the_page, c['source'])

    def llms(self, pages, modules):
        "llms.txt: what the package is, the quick start, the pages by purpose, and the modules as nbdev lists them"
        head,_,listed = modules.partition('\n## ')
        intro = '\n\n'.join(c['source'] for c in pages['index.ipynb'][:2])
        quick = re.search(r'```python\n.*?```', intro, flags=re.S)[0]
        parts = [head.strip(), about(pages['index.ipynb'][0]['source'])[1], '## Quick start', quick]
        for section,names in self.sections().items():
            found = [(nb, *about(pages[nb][0]['source'])) for nb in names if '/' in nb]
            lines = [f'- [{title}]({self.url}{self.pages[nb]}.html.md): {what}' for nb,title,what in found]
            if lines: parts += [f'## {section}', '\n'.join(lines)]
        return '\n\n'.join(o for o in parts if o) + f'\n\n## {listed}'

    def write(self):
        "Pages for Sphinx, their Markdown beside them"
        shutil.rmtree(self.source, ignore_errors=True)
        pages = {nb:self.cells(nb, page) for nb,page in self.pages.items()}
        there = {self.pages[nb].split('/')[-1]:entries(cells) for nb,cells in pages.items()}
        for nb,page in self.pages.items():
            cells = pages[nb]
            self.without_dead_anchors(cells, there)
            text = self.source/'_extra'/f'{page}.html.md'
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text(as_markdown(cells), encoding='utf-8')
            if nb=='index.ipynb':
                cells.append(dict(cell_type='markdown', id='toc', metadata={}, source=self.contents()))
            kernel = dict(kernelspec=dict(name='python3', display_name='Python'), language_info=dict(name='python'))
            file = self.source/f'{page}.ipynb'
            file.parent.mkdir(parents=True, exist_ok=True)
            made = dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)
            file.write_text(json.dumps(made), encoding='utf-8')
        shutil.copytree(self.nbs/'images', self.source/'images')
        modules = (self.nbs/'llms.txt').read_text(encoding='utf-8')
        (self.source/'_extra'/'llms.txt').write_text(self.llms(pages, modules), encoding='utf-8')
        shutil.copy(here/'conf.py', self.source/'conf.py')
        shutil.copytree(here/'static', self.source/'_static')


def main():
    BasicMarkdownRenderer._repr_markdown_ = entry
    Site().write()
    out = root/'_docs'
    shutil.rmtree(out, ignore_errors=True)
    sphinx = [sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-b', 'html', root/'_proc', out]
    if subprocess.run(sphinx).returncode: sys.exit('Sphinx found what is said above')
    sys.exit(subprocess.run([sys.executable, here/'check.py', out]).returncode)


if __name__=='__main__': main()
