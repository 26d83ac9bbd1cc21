"""Estimates the operations and memory of a step, and decides whether compiling or tracing it pays."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import optree
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from byol_func.runtime import memory
from byol_func.runtime.torch_internals import TorchDispatchMode

# Compiling takes one to two minutes and saves at least a quarter of the time of a step. On a CPU it pays for runs
# of more than about five minutes; on a GPU it pays sooner, because a step launches so many kernels.
_LEAST_CPU_FLOPS = 2e13
_LEAST_GPU_STEPS = 1000
# Tracing takes as long as 50 to 100 steps and saves at most half of the time of a step.
_LEAST_TRACED_STEPS = 200


def count_flops(fn: Callable[..., Any], *args: Any) -> int:
    """Returns the number of floating-point operations of the matrix products and convolutions in `fn(*args)`.

    The number follows from shapes alone, so `fn` runs on tensors without data. A function that needs data, because
    it closes over a tensor or looks at a value, runs once on the arguments themselves.
    """
    try:
        return _count(fn, optree.tree_map(lambda x: x.to('meta'), args))
    except RuntimeError:
        return _count(fn, args)


def _count(fn: Callable[..., Any], args: Any) -> int:
    from torch.utils.flop_counter import FlopCounterMode  # Imports Triton where it is installed.

    with FlopCounterMode(display=False) as counter:
        fn(*args)
    return counter.get_total_flops()


class _LiveBytes(TorchDispatchMode):
    """Tracks which results of operations are alive; `peak` is the most memory they took at once, in bytes."""

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
        if self._now > self.peak:  # Freed storages only need to be dropped at a new peak.
            self._live = {key: size for key, size in self._live.items() if not key.expired()}
            self._now = sum(self._live.values())
            self.peak = max(self.peak, self._now)
        return out


def peak_bytes(fn: Callable[..., Any], *args: Any) -> int:
    """Returns the bytes that `fn(*args)` takes besides its arguments if its operations run one by one.

    The estimate follows from shapes alone; `modes.sizes.check_memory` says how far it was off. Returns 0 for a function
    that needs data.
    """
    with contextlib.suppress(RuntimeError), _LiveBytes() as live:
        fn(*optree.tree_map(lambda x: x.to('meta'), args))
        return live.peak
    return 0


def available_bytes(device: torch.device) -> int:
    """Returns the bytes that a process can still allocate: on the GPU, or in the machine or its container."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    free = memory.available_gib()
    if free is None:  # Only Linux reports what is free; elsewhere this is all memory of the machine.
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return int(free * 2**30)


def worth_compiling(step: Callable[..., Any], args: tuple, num_steps: int) -> bool:
    """Returns whether a run of `num_steps` steps finishes sooner if the step is compiled first.

    The rule depends on the amount of computation and not on measured times, so that a resumed run gets the same answer
    and hence the same numbers.
    """
    if optree.tree_leaves(args)[0].is_cuda:
        return num_steps >= _LEAST_GPU_STEPS
    return num_steps * count_flops(step, *args) >= _LEAST_CPU_FLOPS


def worth_tracing(num_steps: int) -> bool:
    """Returns whether a run of `num_steps` steps that is not compiled finishes sooner if the step is traced first."""
    return num_steps >= _LEAST_TRACED_STEPS
