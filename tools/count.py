"""What the package looks like from outside: sizes of modules and functions, lengths of lines, names that are private
and where they are used.

python tools/count.py [TREE ...]    # default: this one; a worktree of another commit to compare with
"""

import ast, re, statistics, sys
from pathlib import Path

def code(tree):
    "Module name to source, without what nbdev makes for itself"
    files = sorted((Path(tree)/'ressl_fastai').glob('*.py'))
    return {p.stem: p.read_text(encoding='utf-8') for p in files if p.stem not in ('__init__', '_modidx', 'all')}

def function_lengths(source):
    "Lines from the first statement after the signature and the docstring to the end"
    res = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): continue
        body = node.body[1:] if ast.get_docstring(node) and len(node.body)>1 else node.body
        res.append(node.end_lineno-body[0].lineno+1)
    return res

def top_level_names(source):
    "Names of functions and classes of a module"
    kinds = ast.FunctionDef,ast.ClassDef
    return [n.name for n in ast.parse(source).body if isinstance(n, kinds)]

def private_imports(source):
    "Private names that a module takes from another of the package"
    res = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom): continue
        if not (node.level or (node.module or '').startswith('ressl_fastai')): continue
        res += [a.name for a in node.names if a.name.startswith('_') and not a.name.startswith('__')]
    return res

def percentile(values, share): return sorted(values)[min(len(values)-1, int(share*len(values)))]

def report(tree):
    "Print the figures of one tree"
    modules = code(tree)
    print(f"{tree}\n{'module':<18}{'lines':>6}{'public':>8}{'private':>8}{'private imports':>17}")
    for nm,source in modules.items():
        names = top_level_names(source)
        private = sum(o.startswith('_') for o in names)
        taken = len(private_imports(source))
        print(f"{nm:<18}{len(source.splitlines()):>6}{len(names)-private:>8}{private:>8}{taken:>17}")
    lines = [l for source in modules.values() for l in source.splitlines()]
    lengths = [n for source in modules.values() for n in function_lengths(source)]
    taken = sum(len(private_imports(source)) for source in modules.values())
    print(
        f"{len(modules)} modules, {len(lines)} lines, "
        f"{sum(len(l) > 100 for l in lines) / len(lines):.1%} over 100, "
        f"{sum(len(l) > 120 for l in lines) / len(lines):.1%} over 120; "
        f"{len(lengths)} functions of {statistics.median(lengths):.0f} lines (median), "
        f"{percentile(lengths, 0.9)} (90 %), "
        f"{max(lengths)} (largest); {taken} private names from other modules\n"
    )


if __name__=='__main__':
    for tree in sys.argv[1:] or [Path(__file__).resolve().parent.parent]: report(tree)
