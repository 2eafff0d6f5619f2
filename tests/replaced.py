"""A device in the place of a GPU: `meta`, whose tensors hold nothing, so that whoever reads a value is found out,
and whoever copies."""

from contextlib import contextmanager, nullcontext

import pytest, torch
from fastai.torch_core import defaults
from torch.utils._python_dispatch import TorchDispatchMode

from ressl_fastai.callback import ReSSL
from ressl_fastai.feature_queue import FeatureQueue

def there(o): return isinstance(o, torch.Tensor) and o.device.type=='meta'

class Replaced(TorchDispatchMode):
    """Counts what goes to the device, what is read from it, and what an operation takes from both sides; what it
    reads are zeros"""

    def __init__(self):
        super().__init__()
        self.clear()

    def clear(self): self.to,self.waits,self.mixed,self.launches = [],[],[],0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs,name = kwargs or {},str(func)
        flat = torch.utils._pytree.tree_leaves((args, kwargs))
        on = any(map(there, flat))
        if name.startswith(('aten._to_copy','aten.to.')):  # inference mode shows the latter
            target = next(
                (torch.device(o) for o in (*args[1:], *kwargs.values()) if isinstance(o, (torch.device, str))),
                args[0].device,
            )
            later = kwargs.get('non_blocking', False) or args[3:4]==(True,)
            if on and target.type=='cpu':
                self.read(name, later)
                return torch.zeros(args[0].shape, dtype=kwargs.get('dtype') or args[0].dtype)
            if target.type=='meta' and not on: self.to.append((tuple(args[0].shape), args[0].dtype, later))
        elif on:
            self.launches += 1
            if name.startswith('aten.copy_') and not there(args[1]):
                self.to.append(
                    (tuple(args[1].shape), args[1].dtype, kwargs.get('non_blocking', False) or args[2:] == (True,))
                )
            elif any(isinstance(o, torch.Tensor) and not there(o) and o.ndim for o in flat): self.mixed.append(name)
            if (
                name.startswith(('aten._local_scalar_dense', 'aten.nonzero', 'aten.equal', 'aten.is_nonzero'))
                or name == 'aten.item.default'
            ):
                self.read(name)
                return 0
        return func(*args, **kwargs)
    def read(self, name, non_blocking=False):
        if not non_blocking: self.waits.append(name)

class Event:
    "What waits for a single thing"
    def record(self): pass
    def synchronize(self): pass

@contextmanager
def replaced():
    "`meta` is a GPU as far as fastai and we ask"
    with pytest.MonkeyPatch.context() as m, Replaced() as device:
        m.setattr(defaults, 'use_cuda', None)
        m.setattr(torch, 'autocast', lambda *args, **kwargs: nullcontext())
        m.setattr(torch.cuda, 'Event', Event)
        m.setattr(ReSSL, '_on_gpu', lambda self, x: True)
        m.setattr(FeatureQueue, 'filled', property(lambda self: self.feats))  # a count read from it would be 0
        yield device
