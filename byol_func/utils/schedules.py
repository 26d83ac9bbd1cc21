"""Schedules as functions of the step. Namesake of the official `byol/utils/schedules.py`.

Every schedule takes the index of the step about to run, counted from 0, so with warm-up the first learning rate
is 0.
"""

import functools
import math
from collections.abc import Callable

import torch

from byol_func.errors import UserError, counted, one_of
from byol_func.runtime.precision import at_least_float32


def target_ema(global_step: torch.Tensor, base_ema: float, max_steps: int) -> torch.Tensor:
    """Returns the decay rate of the target network, tau = 1 - (1 - base_ema) (cos(pi k / K) + 1) / 2.

    It rises from `base_ema` to 1 (section 3.2 of the paper). Port of `schedules.target_ema`;
    differences: none.

    Args:
      global_step: k, an integer tensor of any shape.
      base_ema: tau at step 0, in 0..1.
      max_steps: K, the number of training steps.

    Returns:
      float32 in the shape of `global_step`; float64 if `global_step` is float64.
    """
    return 1.0 - (1.0 - base_ema) * _cosine_decay(global_step, max_steps, 1.0)


def learning_schedule(
    global_step: torch.Tensor,
    batch_size: int,
    base_learning_rate: float,
    total_steps: int,
    warmup_steps: int,
) -> torch.Tensor:
    """Returns base_learning_rate * batch_size / 256 with linear warm-up from 0, then cosine decay to 0.

    Port of `schedules.learning_schedule`; differences: a run that consists only of warm-up
    (`total_steps == warmup_steps`) ends at the full rate instead of 0/0.

    Args:
      global_step: an integer tensor of any shape.
      batch_size: the total batch size over all replicas.
      base_learning_rate: the rate for a batch of 256.
      total_steps: the number of training steps, warm-up included.
      warmup_steps: steps of linear warm-up; 0 for none.

    Returns:
      float32 in the shape of `global_step`; float64 if `global_step` is float64.
    """
    scaled_lr = base_learning_rate * batch_size / 256.0
    decayed = _cosine_decay(global_step - warmup_steps, total_steps - warmup_steps, scaled_lr)
    if warmup_steps == 0:
        return decayed
    warming_up = at_least_float32(global_step) / warmup_steps * scaled_lr
    return torch.where(global_step < warmup_steps, warming_up, decayed)


def constant_schedule(global_step: torch.Tensor, learning_rate: float, warmup_steps: int = 0) -> torch.Tensor:
    """Returns a constant rate, after an optional linear warm-up from 0, that is not scaled by the batch size.

    The official code has no counterpart.

    Args:
      global_step: an integer tensor of any shape.
      learning_rate: the rate.
      warmup_steps: steps of linear warm-up; 0 for none.

    Returns:
      float32 in the shape of `global_step`.
    """
    constant = torch.full_like(global_step, learning_rate, dtype=torch.float32)
    if warmup_steps == 0:
        return constant
    return constant * (global_step.float() / warmup_steps).clamp_max(1.0)


def num_steps(num_epochs: float, num_examples: int, batch_size: int) -> int:
    """Returns the number of steps in `num_epochs` epochs, rounded down as in the official `configs/byol.py`."""
    return int(num_epochs * num_examples // batch_size)


def make_learning_schedule(
    name: str,
    base_learning_rate: float,
    warmup_epochs: float,
    *,
    batch_size: int,
    num_examples: int,
    total_steps: int,
    section: str = 'config',
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Binds all arguments of a schedule except the step; the first three arguments are `config.lr_schedule`.

    Args:
      name: 'cosine' (`learning_schedule`) or 'constant' (`constant_schedule` at `base_learning_rate`, which is
        not scaled by the batch size).
      base_learning_rate: the rate for a batch of 256, or the constant rate.
      warmup_epochs: epochs of linear warm-up.
      batch_size: the total batch size.
      num_examples: the number of training examples.
      total_steps: the number of training steps.
      section: the config section that holds the schedule, for error messages: 'config' or 'config.linear_eval'.

    Returns:
      A function from the step to the learning rate.

    Raises:
      UserError: the name is unknown, or the warm-up is negative or longer than the run.
    """
    one_of(f'{section}.lr_schedule.name', name, ('cosine', 'constant'))
    warmup_steps = num_steps(warmup_epochs, num_examples, batch_size)
    if not 0 <= warmup_steps <= total_steps:
        raise UserError(
            f'{section}.lr_schedule.warmup_epochs={warmup_epochs}: {counted(warmup_steps, "step")}, '
            f'expected 0 to {total_steps}, the steps of the whole run'
        )
    if name == 'constant':
        return functools.partial(constant_schedule, learning_rate=base_learning_rate, warmup_steps=warmup_steps)
    return functools.partial(
        learning_schedule,
        batch_size=batch_size,
        base_learning_rate=base_learning_rate,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
    )


def _cosine_decay(global_step: torch.Tensor, max_steps: int, initial_value: float) -> torch.Tensor:
    progress = at_least_float32(global_step.clamp_max(max_steps)) / max(max_steps, 1)
    return initial_value * 0.5 * (1.0 + torch.cos(math.pi * progress))
