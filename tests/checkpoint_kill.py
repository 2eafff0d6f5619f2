"""Run by test_checkpoint.py in a process of its own: trainings that are killed with SIGKILL again and again. Forks,
so that fastai is imported once.

`python tests/checkpoint_kill.py FOLDER 20` kills 20 times in a pseudo-terminal, and nothing else;
benchmarks/results/kill.jsonl has a line of it."""

import json, os, pty, random, select, signal, subprocess, sys, time
from pathlib import Path

import torch
from crashes import differences, everything, fit, from_folder, make, train as train_all
from helpers import write_digits

from ressl_fastai import files
from ressl_fastai.checkpoint import Checkpoint
from ressl_fastai.data import cached_dls

torch.set_num_threads(1)
tmp = Path(sys.argv[1])
tmp.mkdir(exist_ok=True)

def kill(): os.kill(os.getpid(), signal.SIGKILL)

def train(folder, before=None):
    "In a child: train to the end and keep everything in `folder`.pt"
    if pid := os.fork(): return pid
    try:
        if before: before()
        seed = (
            os.getpid() if any((tmp / folder).glob('epoch_*.pth')) else 0
        )  # the beginning alone is in the script's hands
        torch.save(everything(fit(make(seed), cbs=Checkpoint(tmp/folder, every=1))), tmp/f'{folder}.pt')
    except BaseException as e:
        print(folder, repr(e), flush=True)
        os._exit(1)
    os._exit(0)

def ends(pid):
    "How the child ended: 0, an exit status, or minus the signal"
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

# in a terminal: with bar, loggers, monitors, accumulated gradients, multi-crop, processes that load or a cache, and a
# split without a seed

def in_terminal(folder, workers, seconds=None, checkpoint=True):
    "Train in a child with a terminal of its own, kill it after some seconds; how it ended and what it showed"
    pid,fd = pty.fork()
    if pid==0:
        try:
            seed = (
                os.getpid() if any((tmp / folder / 'state').glob('*.pth')) else 0
            )  # the beginning alone is in the script's hands
            random.seed(seed)
            torch.manual_seed(seed)
            dls = from_folder(tmp/'images', None, num_workers=2*workers)
            if not workers: dls = cached_dls(dls, tmp/folder/'cache')
            torch.save(
                train_all(tmp / folder, seed, dls, *[Checkpoint(tmp / folder / 'state', every=1)] * checkpoint),
                tmp / f'{folder}.pt',
            )
        except BaseException as e:
            print(folder, repr(e), flush=True)
            os._exit(1)
        os._exit(0)
    until,shown = time.time()+(seconds or 600),b''
    while time.time()<until:
        if not select.select([fd], [], [], 0.02)[0]: continue
        try: shown += os.read(fd, 65536)
        except OSError: break  # it has ended
    else: os.kill(pid, signal.SIGKILL)
    how = ends(pid)
    os.close(fd)
    return how,shown.decode()

def kill_in_terminals(most, seed=0):
    """Kills at random moments of runs by turns with processes that load and with a cache; every run must end in the
    bits of the one that nobody killed"""
    write_digits(tmp/'images')
    rng,kills,runs,moments,wholes = random.Random(seed),0,0,[],[]
    for workers in (True,False):
        start = time.time()
        how,shown = in_terminal(f'whole_{workers}', workers, checkpoint=False)
        assert how==0 and 'Epoch 1/4' in shown, shown
        wholes.append((torch.load(tmp/f'whole_{workers}.pt', weights_only=False),time.time()-start))
        (tmp/f'whole_{workers}.pt').unlink()
    while kills<most:
        folder,(whole,length) = f'terminal_{runs}',wholes[runs%2]
        while True:
            how,shown = in_terminal(folder, runs%2==0, rng.uniform(0.15, 0.8)*length if kills<most else None)
            if how==0: break
            assert how==-signal.SIGKILL, shown
            kills += 1
            moments += [o.name for o in sorted((tmp/folder/'state').glob('*.pth'))[-1:]]
        assert (d := differences(whole, torch.load(tmp/f'{folder}.pt', weights_only=False)))==[], (folder, d)
        (tmp/f'{folder}.pt').unlink()
        runs += 1
    assert len(set(moments))>most//3, moments
    print(f'{kills} kills in terminals of {runs} runs, at {len(set(moments))} states')
    return dict(kills=kills, runs=runs, states=len(set(moments)), same_bits=True)

if len(sys.argv)>2:
    import fastai

    commit = subprocess.run(
        ['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    print(
        json.dumps(
            dict(
                command='python tests/checkpoint_kill.py FOLDER ' + sys.argv[2],
                seed=0,
                commit=commit,
                torch=torch.__version__,
                fastai=fastai.__version__,
                python=sys.version.split()[0],
                **kill_in_terminals(int(sys.argv[2])),
            )
        )
    )
    sys.exit()
kill_in_terminals(4)

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
        self.f.write(bytes(b)[: self.left])
        self.left -= len(b)
        if self.left < 0:
            self.f.flush()
            kill()
        return len(b)

def nth(n, f, then):
    "`f`, but `then` at the nth call"
    calls = iter(range(n-1))
    return lambda *args: f(*args) if next(calls, None) is not None else then(*args)

def half():      files.torch.save = nth(4, save, lambda o,f: save(o, Half(f)))
def no_name():   Path.replace = nth(5, replace, lambda *_: kill())
def just_named():Path.replace = nth(6, replace, lambda *args: (replace(*args), kill()))
def two_many():  Path.unlink = nth(3, unlink, lambda *_: kill())

for where in (half, no_name, just_named, two_many):
    assert (how := ends(train('saving', where))) == -signal.SIGKILL, (where, how)
assert ends(train('saving'))==0
print(f'{kills} kills at random moments of {len(runs)} runs of {length:.1f} s')
