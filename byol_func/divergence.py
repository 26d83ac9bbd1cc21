"""Numbers that are not finite: found, and told."""

from typing import Any

import optree
import torch

from byol_func.loop_config import LoopConfig
from byol_func.utils import checkpointing
from byol_func.utils.helpers import UserError


def check_finite(state: Any, step: int, loop: LoopConfig) -> None:
    """The loss of a step is finite before its update; what is saved must be so after it.

    Raises:
      UserError: a number of the state is not finite.
    """
    leaves = [leaf for leaf in optree.tree_leaves(state) if leaf.is_floating_point()]
    if leaves and not torch.stack([leaf.isfinite().all() for leaf in leaves]).all().item():
        raise diverged('the parameters after the update', step, loop)


def diverged(what: str, step: int, loop: LoopConfig) -> UserError:
    """The error of a step whose numbers are not finite; `what` names them."""
    found = checkpointing.list_checkpoints(loop.checkpoint_dir, loop.mode)
    kept = f'the last good checkpoint is {found[-1][1]}' if found else 'there is no checkpoint yet'
    protocol = next((f'{p}.' for p in ('linear_eval', 'fine_tune') if loop.mode.startswith(p)), '')
    return UserError(
        f'step {step}: {what}: expected finite numbers; {kept}; '
        f'try a smaller config.{protocol}lr_schedule.base_learning_rate'
    )
