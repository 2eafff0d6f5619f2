"""Fail unless the notebooks are clean, the modules and the README files are what they export, and the docs can be
made of them.

The tools run on a copy of the tree, so nothing of a developer's work is touched."""

import os, shutil, subprocess, sys, tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def files(*args):
    "Files git knows (with `args` of ls-files), or all of them where there is no git"
    try:
        out = subprocess.run(
            ['git', 'ls-files', '-z', *args], cwd=root, capture_output=True, check=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        skip = {'.venv', '.git', 'build', '__pycache__'}
        return [
            p.relative_to(root) for p in root.rglob('*') if p.is_file() and not skip & set(p.relative_to(root).parts)
        ]
    return [Path(p) for p in out.split('\0') if p and (root/p).is_file()]


def contents(folder):
    "What the tools write: {path: bytes} of notebooks, modules and README"
    ps = [
        p
        for pat in (
            'nbs/**/*.ipynb',
            'ressl_fastai/*.py',
            'nbs/llms.txt',
            'README.md',
            'README_files/*',
            'benchmarks/README.md',
            'benchmarks/README_files/*',
        )
        for p in folder.glob(pat)
    ]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in ps if '.ipynb_checkpoints' not in p.parts}


def make_docs(tree):
    """What `nbdev-docs` does before it calls quarto: nbdev executes the exported cells and the imports of each
    notebook again, and no others"""
    res = subprocess.run(
        [Path(sys.executable).parent / 'nbdev-proc-nbs'],
        cwd=tree,
        env={**os.environ, 'PYTHONPATH': str(tree), 'OMP_NUM_THREADS': '1'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    made = list((tree/'_proc').rglob('*.ipynb'))
    if res.returncode or not made:
        sys.exit(
            f'{res.stdout}\nnbdev-proc-nbs fails, so no docs would be published (imports belong in cells of their own)'
        )
    return made


def main():
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        for p in files('-co', '--exclude-standard'):
            (tmp/p).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root/p, tmp/p)
        bin = Path(sys.executable).parent
        for cmd in ([bin / 'nbdev-clean'], [bin / 'nbdev-export'], [sys.executable, 'tools/readme.py']):
            subprocess.run(cmd, cwd=tmp, check=True)
        before,after = contents(root),contents(tmp)
        docs = make_docs(tmp) if before==after else []
    changed = sorted(k for k in before.keys()|after.keys() if before.get(k)!=after.get(k))
    if changed: sys.exit("not clean or not in sync, mend with `make sync`:\n  " + '\n  '.join(changed))
    untracked = (
        sorted({p.as_posix() for p in files('-o', '--exclude-standard')} & after.keys())
        if (root / '.git').exists()
        else []
    )
    if untracked: sys.exit("made but not added, mend with `git add`:\n  " + '\n  '.join(untracked))
    print(
        f'{len(after)} notebooks, modules and README files are clean and in sync, '
        f'{len(docs)} pages of the docs can be made'
    )


if __name__=='__main__': main()
