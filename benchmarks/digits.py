"""The main job, measured: `ressl_pretrain digits` for several seeds, one JSON line each in results/digits.jsonl.

    .venv/bin/python benchmarks/digits.py 42 1 2
"""
import json, subprocess, sys, tempfile, time
from pathlib import Path

from common import receipt

for seed in sys.argv[1:] or ['42', '1', '2']:
    with tempfile.TemporaryDirectory() as tmp:
        start = time.time()
        subprocess.run(
            [Path(sys.executable).parent / 'ressl_pretrain', 'digits', '--out', tmp, '--seed', seed], check=True
        )
        seconds,config = time.time()-start,json.loads((Path(tmp)/'config.json').read_text())
    receipt('digits', int(seed), seconds=round(seconds, 1), ran=config['command'], knn_accuracy=config['knn_accuracy'])
