"README.md from nbs/index.ipynb, without Quarto: nbconvert writes the Markdown, pictures go to README_files/."
import re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbdev.config import get_config, nbpath2html


def render(root):
    "{path relative to `root`: bytes} of README.md and its pictures"
    nb = nbformat.read(Path(root)/'nbs'/'index.ipynb', as_version=4)
    nb.cells = [c for c in nb.cells if not re.match(r'#\|\s*hide\b', c.source)]
    nb.metadata['language_info'] = {'name': 'python'}  # nbdev-clean takes it away; without it code is not highlighted
    for c in nb.cells:
        echo = not re.search(r'^#\|\s*echo:\s*false', c.source, flags=re.M)
        c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M) if echo else ''
    md,res = MarkdownExporter().from_notebook_node(nb, resources={'output_files_dir': 'README_files', 'unique_key': 'index'})
    doc_url = get_config(root).doc_url
    md = re.sub(r'\]\((?!https?:)([^)#]+\.ipynb)', lambda m: f"]({doc_url}{nbpath2html(m[1]).as_posix()}", md)
    md = md.replace('```python\n\n```', '')  # cells that show only what they give
    md = re.sub(r'<style>.*?</style>', '', md, flags=re.S)  # of progress tables; GitHub would show it as text
    note = '<!-- made from nbs/index.ipynb by tools/readme.py: edit the notebook -->\n\n'
    return {'README.md': (note + re.sub(r'\n([ \t]*\n){2,}', '\n\n', md).strip() + '\n').encode(), **res.get('outputs', {})}


def write_readme(root):
    "Write what `render` gives; pictures that are no longer used go"
    root,new = Path(root),render(root)
    for old in root.glob('README_files/*'):
        if old.relative_to(root).as_posix() not in new: old.unlink()
    for name,content in new.items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(content)


if __name__=='__main__': write_readme(Path(__file__).parent.parent)
