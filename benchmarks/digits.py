"""The main job, measured: `ressl_pretrain digits` for several seeds, one JSON line each in results/digits.jsonl.

    .venv/bin/python benchmarks/digits.py 42 1 2
"""
import json, os, subprocess, sys, tempfile, time
from datetime import date
from pathlib import Path

root = Path(__file__).resolve().parent.parent
git = lambda *args: subprocess.run(['git', *args], cwd=root, capture_output=True, text=True).stdout.strip()

for seed in sys.argv[1:] or ['42', '1', '2']:
    with tempfile.TemporaryDirectory() as tmp:
        start = time.time()
        subprocess.run([Path(sys.executable).parent/'ressl_pretrain', 'digits', '--out', tmp, '--seed', seed], check=True)
        config = json.loads((Path(tmp)/'config.json').read_text())
    line = dict(benchmark='digits', date=str(date.today()), seconds=round(time.time()-start, 1), cpus=os.cpu_count(), commit=git('rev-parse', '--short', 'HEAD'),
                changed=bool(git('status', '--porcelain', '--', 'ressl_fastai')), **{k: config[k] for k in ('command', 'seed', 'versions', 'knn_accuracy')})
    with (root/'benchmarks'/'results'/'digits.jsonl').open('a') as f: f.write(json.dumps(line)+'\n')
    print(json.dumps(line))
