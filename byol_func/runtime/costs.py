"""What a step costs, and whether compiling or tracing it pays."""

from collections.abc import Callable
from typing import Any

import optree

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
