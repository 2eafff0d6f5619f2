"""README.md from nbs/index.ipynb, and the results in benchmarks/README.md from nbs/explanations/how_fast.ipynb,
without Quarto: nbconvert writes the Markdown,
pictures go to README_files/ beside it."""

import posixpath, re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter


def markdown(root, path, folder, keep):
    """The cells of a notebook that `keep`, as Markdown for a file in `folder`, and {path relative to `root`: bytes}
    of its pictures"""
    nb = nbformat.read(Path(root)/path, as_version=4)
    nb.cells = [c for c in nb.cells if not re.match(r'#\|\s*hide\b', c.source) and keep(c)]
    nb.metadata['language_info'] = {'name': 'python'}  # nbdev-clean takes it away; without it code is not highlighted
    md, res = MarkdownExporter().from_notebook_node(
        nb, resources={'output_files_dir': 'README_files', 'unique_key': Path(path).stem}
    )
    here = posixpath.dirname(path)
    def at(m): return f"]({posixpath.relpath(posixpath.normpath(posixpath.join(here, m[1])), folder or '.')}"
    md = re.sub(r'\]\((?!https?:|README_files)([^)#]+\.(?:ipynb|png))', at, md)  # to files, which need no site
    md = md.replace('```python\n\n```', '')  # cells that show only what they give
    md = re.sub(r'<style.*?</style>', '', md, flags=re.S)  # of tables; GitHub would show it as text
    md = re.sub(r'(<div>\s*)?<table.*?</table>(\s*</div>)?', pipes, md, flags=re.S)
    return re.sub(r'\n([ \t]*\n){2,}', '\n\n', md).strip() + '\n', {
        (Path(folder) / k).as_posix(): v for k, v in res.get('outputs', {}).items()
    }


def pipes(table):
    "A match of an HTML table as a Markdown one"
    rows = [
        [re.sub('<[^>]*>', '', c).strip() for c in re.findall(r'<t[hd].*?</t[hd]>', r, flags=re.S)]
        for r in re.findall(r'<tr.*?</tr>', table[0], flags=re.S)
    ]
    return '\n'+'\n'.join(f"| {' | '.join(r)} |" for r in [rows[0], ['---']*len(rows[0]), *rows[1:]])+'\n'


def shown(c):
    "Code as it is, without its directives, or not at all where they say so"
    if c.cell_type == 'code':
        c.source = (
            re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
            if not re.search(r'^#\|\s*echo:\s*false', c.source, flags=re.M)
            else ''
        )
    return True


def results(c):
    "Headings, and what code shows as a table or a plot"
    if c.cell_type=='code':
        c.source,c.outputs = '',[o for o in c.outputs if o.output_type in ('display_data','execute_result')]
        return bool(c.outputs)
    c.source = '\n'.join(l for l in c.source.splitlines() if l.startswith('## '))
    return bool(c.source)


def render(root):
    "{path relative to `root`: bytes} of the READMEs and their pictures"
    top,pictures = markdown(root, 'nbs/index.ipynb', '', shown)
    latest,plots = markdown(root, 'nbs/explanations/how_fast.ipynb', 'benchmarks', results)
    latest = re.sub(r'^## .*\n+(?=## |\Z)', '', latest, flags=re.M)  # sections without results
    note = '<!-- made from nbs/{} by tools/readme.py: edit the notebook -->\n\n'
    mark = note.format('explanations/how_fast.ipynb')
    by_hand = (Path(root)/'benchmarks'/'README.md').read_text().split(mark)[0].rstrip()+'\n\n'
    return {
        'README.md': (note.format('index.ipynb') + top).encode(),
        'benchmarks/README.md': (by_hand + mark + latest).encode(),
        **pictures,
        **plots,
    }


def write_readme(root):
    "Write what `render` gives; pictures that are no longer used go"
    root,new = Path(root),render(root)
    for old in [*root.glob('README_files/*'), *root.glob('benchmarks/README_files/*')]:
        if old.relative_to(root).as_posix() not in new: old.unlink()
    for name,content in new.items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(content)


if __name__=='__main__': write_readme(Path(__file__).parent.parent)
