"""`knn_accuracy`'s search against faiss's exact one (IndexFlatIP): seconds in turns in one process, and peak memory
beyond the features, each in its own process. The
features are random, normalised. One JSON line in results/knn.jsonl. About a minute.

    .venv/bin/pip install -e '.[bench]' && .venv/bin/python benchmarks/knn.py
"""

import argparse

import torch
import torch.nn.functional as F

from common import answer_peak, in_turns, peak, peaks, ratio, receipt, spread
from ressl_fastai.evaluate import knn_accuracy

def features(n_bank, n, dim, n_classes=10):
    torch.manual_seed(0)
    return [o for k in (n_bank, n) for o in (F.normalize(torch.randn(k, dim), dim=1), torch.randint(n_classes, (k,)))]

def with_faiss(bank_x, bank_y, x, y, k=20, temp=0.1):
    "faiss finds, the vote is the same"
    import faiss
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(x.shape[1])
    index.add(bank_x.numpy())
    sims,idxs = map(torch.from_numpy, index.search(x.numpy(), k))
    votes = torch.zeros(len(x), int(bank_y.max())+1).scatter_add_(1, bank_y[idxs], ((sims-sims[:,:1])/temp).exp())
    return (votes.argmax(1)==y).float().mean().item()

cases = dict(ours=knn_accuracy, faiss=with_faiss)

def memory(name, *shape):
    "Megabytes that the search takes"
    n_bank,n,dim = map(int, shape)
    cases[name](*features(1000, 100, dim))
    args = features(n_bank, n, dim)
    return peak(lambda: cases[name](*args))

def main(shape, rounds):
    args = features(*shape)
    found = {k:f(*args) for k,f in cases.items()}
    t = in_turns({k:lambda f=f: f(*args) for k,f in cases.items()}, rounds, warm=0)
    receipt(
        'knn',
        0,
        bank=shape[0],
        queries=shape[1],
        dim=shape[2],
        accuracy={k: round(v, 4) for k, v in found.items()},
        ms={k: spread(v, 0) for k, v in t.items()},
        times_faiss=ratio(t['ours'], t['faiss']),
        mb=peaks(cases, *shape),
    )

if __name__=='__main__':
    answer_peak(memory)
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        '--shape', type=int, nargs=3, default=[60_000, 10_000, 512], help="features in the bank, queries, width"
    )
    p.add_argument('--rounds', type=int, default=3)
    args = p.parse_args()
    main(args.shape, args.rounds)
