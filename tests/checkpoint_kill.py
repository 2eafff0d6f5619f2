"Run by test_checkpoint.py in a process of its own: trainings that are killed with SIGKILL again and again. Forks, so that fastai is imported once."
import os, random, signal, sys, time
from pathlib import Path

import torch
from test_checkpoint import everything, fit, make

from ressl_fastai import checkpoint
from ressl_fastai.checkpoint import Checkpoint

torch.set_num_threads(1)
tmp = Path(sys.argv[1])

def kill(): os.kill(os.getpid(), signal.SIGKILL)

def train(folder, before=None):
    "In a child: train to the end and keep everything in `folder`.pt"
    if pid := os.fork(): return pid
    try:
        if before: before()
        seed = os.getpid() if any((tmp/folder).glob('epoch_*.pth')) else 0  # the beginning alone is in the script's hands
        torch.save(everything(fit(make(seed), cbs=Checkpoint(tmp/folder, every=1))), tmp/f'{folder}.pt')
    except BaseException as e: print(folder, repr(e), flush=True); os._exit(1)
    os._exit(0)

def ends(pid):
    "How the child ended: 0, an exit status, or minus the signal"
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

# at random moments
start = time.time()
assert ends(train('whole'))==0
length,rng,kills,runs = time.time()-start,random.Random(0),0,[]
while kills<10:
    runs.append(f'random{len(runs)}')
    while kills<10:
        pid = train(runs[-1])
        time.sleep(rng.uniform(0.1, 0.5)*length)
        os.kill(pid, signal.SIGKILL)
        if (how := ends(pid))==0: break
        assert how==-signal.SIGKILL, how
        kills += 1
    assert ends(train(runs[-1]))==0

# in the middle of a save
save,replace,unlink = torch.save,Path.replace,Path.unlink
class Half:
    "A file that takes half of what it should"
    def __init__(self, f): self.f,self.left = f,20_000
    def write(self, b):
        self.f.write(bytes(b)[:self.left]); self.left -= len(b)
        if self.left<0: self.f.flush(); kill()
        return len(b)

def nth(n, f, then):
    "`f`, but `then` at the nth call"
    calls = iter(range(n-1))
    return lambda *args: f(*args) if next(calls, None) is not None else then(*args)

def half():      checkpoint.torch.save = nth(4, save, lambda o,f: save(o, Half(f)))
def no_name():   Path.replace = nth(5, replace, lambda *_: kill())
def just_named():Path.replace = nth(6, replace, lambda *args: (replace(*args), kill()))
def two_many():  Path.unlink = nth(3, unlink, lambda *_: kill())

for where in (half, no_name, just_named, two_many): assert (how := ends(train('saving', where)))==-signal.SIGKILL, (where, how)
assert ends(train('saving'))==0
print(f'{kills} kills at random moments of {len(runs)} runs of {length:.1f} s')
