"""What a step costs in operations and memory, and whether compiling or tracing it pays."""

import contextlib
import os
import pathlib
from collections.abc import Callable
from typing import Any

import optree
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from byol_func.runtime.torch_internals import TorchDispatchMode

# Compiling takes one to two minutes and saves a quarter of a step or more. On a CPU that is won back
# by runs of more than about five minutes; a GPU runs so many kernels per step that it pays sooner.
_LEAST_CPU_FLOPS = 2e13
_LEAST_GPU_STEPS = 1000
# Tracing takes as long as 50 to 100 steps and saves half of a step or less.
_LEAST_TRACED_STEPS = 200


def count_flops(fn: Callable[..., Any], *args: Any) -> int:
    """Floating-point operations of the products and convolutions in `fn(*args)`.

    They follow from shapes alone, so `fn` runs on tensors without data. A function that needs data, because it
    closes over a tensor or looks at a value, runs once as it is.
    """
    try:
        return _count(fn, optree.tree_map(lambda x: x.to('meta'), args))
    except (RuntimeError, NotImplementedError):
        return _count(fn, args)


def _count(fn: Callable[..., Any], args: Any) -> int:
    from torch.utils.flop_counter import FlopCounterMode  # Loads Triton, where that is installed.

    with FlopCounterMode(display=False) as counter:
        fn(*args)
    return counter.get_total_flops()


class _LiveBytes(TorchDispatchMode):
    """Follows which results of operations are alive; `peak` is the most they took at a time, in bytes."""

    def __init__(self):
        super().__init__()
        self._live: dict[StorageWeakRef, int] = {}
        self._now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in optree.tree_leaves(out, namespace='torch'):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key = StorageWeakRef(storage)
                if key not in self._live:
                    self._live[key] = storage.nbytes()
                    self._now += storage.nbytes()
        if self._now > self.peak:  # Only then is it worth looking who is gone.
            self._live = {key: size for key, size in self._live.items() if not key.expired()}
            self._now = sum(self._live.values())
            self.peak = max(self.peak, self._now)
        return out


def peak_bytes(fn: Callable[..., Any], *args: Any) -> int:
    """Memory that fn(*args) takes beside its arguments where it is run operation by operation, from shapes alone.

    A compiled step takes less, since it keeps fewer intermediate results. A function that needs data is not
    estimated: 0.
    """
    with contextlib.suppress(RuntimeError, NotImplementedError), _LiveBytes() as live:
        fn(*optree.tree_map(lambda x: x.to('meta'), args))
        return live.peak
    return 0


def available_bytes(device: torch.device) -> int:
    """Memory that a process can still get: of a GPU its free memory, else the machine's or the container's."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    meminfo, cgroup = pathlib.Path('/proc/meminfo'), pathlib.Path('/sys/fs/cgroup')
    if meminfo.exists():
        lines = dict(line.split(':') for line in meminfo.read_text().splitlines())
        free = int(lines['MemAvailable'].split()[0]) * 1024
    # Version 2 of cgroups and version 1; the limit is the word 'max' or a huge number where there is none.
    for limit, used in (
        ('memory.max', 'memory.current'),
        ('memory/memory.limit_in_bytes', 'memory/memory.usage_in_bytes'),
    ):
        with contextlib.suppress(OSError, ValueError):
            free = min(free, int((cgroup / limit).read_text()) - int((cgroup / used).read_text()))
    return max(free, 0)


def worth_compiling(step: Callable[..., Any], args: tuple, num_steps: int) -> bool:
    """Whether a run of `num_steps` steps ends sooner if the step is compiled first.

    A rule of what is computed, not of how fast it runs: a resumed run gets the same answer, and with it
    the same numbers.

    Args:
      step: the function that would be compiled.
      args: its arguments, trees of tensors.
      num_steps: of the whole run.
    """
    if optree.tree_leaves(args)[0].is_cuda:
        return num_steps >= _LEAST_GPU_STEPS
    return num_steps * count_flops(step, *args) >= _LEAST_CPU_FLOPS


def worth_tracing(num_steps: int) -> bool:
    """Whether a run of `num_steps` steps ends sooner if the step is traced first and not compiled."""
    return num_steps >= _LEAST_TRACED_STEPS
