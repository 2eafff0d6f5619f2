"""Start several processes that train together on the CPU, forked from this one, which has everything imported."""

import os, tempfile, traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

def _run(rank, job, args, folder, env):
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    size = int(env['WORLD_SIZE'])
    how = dict(store=dist.FileStore(f'{folder}/store', size), timeout=timedelta(seconds=180))
    dist.init_process_group('gloo', rank=rank, world_size=size, **how)
    try: res = job(*args)
    except Exception:
        traceback.print_exc()
        raise
    torch.save(res, f'{folder}/{rank}.pth')

def together(n, job, *args):
    "What `job(*args)` gives in each of `n` processes, which are to a training what a launcher's are"
    env = dict(WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT='29500', GLOO_SOCKET_IFNAME='lo')
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_run, (job, args, folder, env), nprocs=n, start_method='fork')
        return [torch.load(Path(folder)/f'{i}.pth', weights_only=False) for i in range(n)]
