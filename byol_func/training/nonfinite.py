"""Detects non-finite losses and parameters, and saves the failing step for replay."""

from collections.abc import Callable
from typing import Any

import optree
import torch
from absl import logging

from byol_func.errors import UserError
from byol_func.experiment import Experiment, step_inputs
from byol_func.runtime import collectives
from byol_func.training.loop_config import LoopConfig
from byol_func.utils import checkpointing, dataset

# Prefix of the mode in the names and headers of the files that hold failing steps.
PREFIX = 'diverged_'


class Diverged(UserError):
    """A step produced a non-finite loss or parameter.

    Args:
      what: names the values that are not finite.
      step: index of the step.
      loop: the settings of the loop.
    """

    def __init__(self, what: str, step: int, loop: LoopConfig):
        self.step = step
        found = checkpointing.list_checkpoints(loop.checkpoint_dir, loop.mode)
        kept = f'the last good checkpoint is {found[-1][1]}' if found else 'there is no checkpoint yet'
        protocol = next((p for p in ('linear_eval', 'fine_tune') if loop.mode.startswith(p)), None)
        settings = loop.config.get(protocol, {}) if protocol else {}
        if settings.get('sweep', {}).get('learning_rates'):
            advice = f'smaller config.{protocol}.sweep.learning_rates'
        else:
            advice = f'a smaller config.{f"{protocol}." if protocol else ""}lr_schedule.base_learning_rate'
        super().__init__(f'step {step}: {what}: expected finite numbers; {kept}; try {advice}')


def check_finite(state: Any, step: int, loop: LoopConfig) -> None:
    """Checks that a state is finite before it is saved; a finite loss does not guarantee a finite update.

    Raises:
      Diverged: a value in the state is not finite.
    """
    leaves = [leaf for leaf in optree.tree_leaves(state) if leaf.is_floating_point()]
    if leaves and not torch.stack([leaf.isfinite().all() for leaf in leaves]).all().item():
        raise Diverged('the parameters after the update', step, loop)


def directory(workdir: str) -> str:
    """Returns the folder that holds the files of failing steps."""
    return f'{workdir}/diverged'


def keep_step(
    diverged: Diverged,
    experiment: Experiment,
    data: dataset.Examples,
    loop: LoopConfig,
    state: Any,
    update: Callable[..., tuple[Any, Any]],
) -> UserError:
    """Saves all inputs of the failing step to a file, and returns the error to raise, which names the file.

    When a non-finite loss arrives, the state before its step has already been overwritten. This function recomputes it,
    in the memory of `state`, by repeating the steps since the last good checkpoint, or since the start, which costs a
    healthy run nothing. Several replicas may notice at different steps and so cannot repeat the steps together: they
    write no file. A trial writes none either.
    """
    if loop.is_trial or collectives.num_replicas() > 1:
        return diverged
    found = [
        (step, path)
        for step, path in checkpointing.list_checkpoints(loop.checkpoint_dir, loop.mode)
        if step < diverged.step
    ]
    try:
        start, first_step = experiment.init(), 0
        if found:
            start, first_step = checkpointing.restore(checkpointing.load(found[-1][1]), start), found[-1][0] + 1
        logging.info(
            'step %d is not finite; repeating the steps from step %d to save the state before it',
            diverged.step,
            first_step,
        )
        optree.tree_map_(lambda leaf, value: leaf.copy_(value), state, start)
        steps = range(first_step, diverged.step)
        for arguments in step_inputs(experiment, data, steps, seed=loop.seed, device=loop.device):
            state, _ = update(state, *arguments)
        draws = experiment.sample(diverged.step)
        indices = dataset.batch_indices(
            diverged.step, seed=loop.seed, num_examples=data.num_examples, batch_size=experiment.batch_size
        )
        path = checkpointing.save(
            directory(loop.workdir),
            {'state': state, 'draws': draws, 'indices': indices},
            mode=f'{PREFIX}{loop.mode}',
            step=diverged.step,
            config=loop.config,
        )
    except UserError as error:  # For example, the disk is full; the first error matters more.
        return UserError(f'{diverged}; the step could not be saved ({error})')
    seed = f' --config.random_seed={loop.seed}' if loop.seed_index else ''
    return UserError(f'{diverged}; inspect the step with --mode=replay --checkpoint={path}{seed}')
