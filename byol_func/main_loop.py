"""Training and evaluation loops; named after the official `byol/main_loop.py`.

Experiments are pure functions; the loops hold their state and replace it at every step, and do the input and output.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from absl import logging

from byol_func.data.fingerprint import fingerprint as fingerprint_of
from byol_func.errors import UserError
from byol_func.experiment import Experiment, TrainResult, step_inputs
from byol_func.runtime import collectives, compilation, transfer
from byol_func.training import nonfinite, resuming, signals
from byol_func.training.bookkeeping import Bookkeeper, Probe
from byol_func.training.loop_config import LoopConfig
from byol_func.utils import dataset

__all__ = ['Probe', 'eval_loop', 'train_loop']


def train_loop(
    experiment: Experiment, data: dataset.Examples, loop: LoopConfig, probes: Sequence[Probe] = ()
) -> TrainResult:
    """Trains from the newest checkpoint of the workdir, or from the start, to the last step.

    Counterpart of the official `train_loop`; the random numbers and the batch of a step are functions of (seed,
    step), so no generator is carried from step to step or saved.

    Args:
      experiment: made by `byol_experiment.make` or `eval_experiment.make`.
      data: the training set, on the device.
      loop: the settings shared by every training loop.
      probes: each runs after every `every_steps`-th step and after the last one; its time is not counted in the
        rate.

    Returns:
      The final state, the last scalars, the number of steps and the rate of this call, and the seconds of the run.

    Raises:
      UserError: the loss of a step is not finite, or a file cannot be read or written.
      Stopped: a signal asked the loop to stop; the last finished step is saved.
    """
    start_time = time.monotonic()
    fingerprint = fingerprint_of(data)
    template = transfer.place(experiment.init(), loop.device)
    state, first_step = resuming.restore_latest(loop, template, fingerprint)
    before = resuming.seconds_before(loop, first_step)
    seconds = lambda: before + time.monotonic() - start_time
    if 0 < experiment.max_steps <= first_step:
        logging.info('%s had finished before: nothing is trained; only the results are measured again', loop.mode)
    update = _compile(experiment, loop)
    steps = range(first_step, experiment.max_steps)
    with contextlib.ExitStack() as stack:
        requested = stack.enter_context(signals.requests())
        books = Bookkeeper(experiment, data, loop, probes, first_step, requested, fingerprint, seconds)
        stack.callback(books.close)
        arguments = step_inputs(experiment, data, steps, seed=loop.seed, device=loop.device)
        stack.enter_context(contextlib.closing(arguments))
        try:
            for step, (global_step, draws, inputs) in zip(steps, arguments, strict=True):
                state, logs = update(state, global_step, draws, inputs)
                books.after_step(state, step, logs, draws, inputs)
            books.finish()
        except nonfinite.Diverged as diverged:
            books.wait()
            raise nonfinite.keep_step(diverged, experiment, data, loop, state, update) from None
    state = collectives.of_first_replica(state)  # Some moving averages may differ between replicas.
    # No steps remain if an imported checkpoint is past the last step.
    return TrainResult(state, books.recorder.scalars, len(steps), books.recorder.rate, seconds())


def _compile(experiment: Experiment, loop: LoopConfig) -> compilation.UpdateFn:
    is_first = collectives.replica_index() == 0
    if not experiment.max_steps:
        logging.warning('%s: no epochs, so nothing is trained', loop.mode)
    return compilation.compile_update(
        experiment.update,
        compiled=loop.compiled,
        num_steps=experiment.max_steps,
        bucket_mb=loop.bucket_mb,
        warn=logging.warning if is_first else lambda text: None,
        inform=functools.partial(logging.info, '%s: %s', loop.mode) if is_first else lambda text: None,
    )


def eval_loop(
    evaluate: Callable[[Any, dataset.Batch], dict[str, torch.Tensor]],
    state: Any,
    data: dataset.Examples,
    batch_size: int,
) -> dict[str, float]:
    """Returns the means of the per-example scalars over a data set. Port of `_eval_epoch`.

    Differences: replicas share the work, so that all have to call this. With n replicas, each evaluates every n-th
    batch; the sums over batches are added in the order of the batches, so the result does not depend on n.

    Args:
      evaluate: the `evaluate` function of an experiment.
      state: the state of the experiment, the same on all replicas.
      data: the data set, on the device; its last batch may be short.
      batch_size: the number of images per batch.
    """
    num_batches, replicas = -(-data.num_examples // batch_size), collectives.num_replicas()
    if num_batches < replicas:  # A replica without a batch would not know the names of the scalars.
        replicas = 1
    rank = collectives.replica_index() if replicas > 1 else 0
    names: list[str] = []
    sums = []  # For every batch, the number of examples (a stream skips unreadable files) and the sums of the scalars.
    with torch.no_grad():
        for inputs in dataset.eval_batches(data, batch_size, rank=rank, num_replicas=replicas):
            found = evaluate(state, inputs)
            names = list(found)
            totals = torch.stack([values.double().sum() for values in found.values()])
            sums.append(torch.cat([torch.full_like(totals[:1], len(inputs['labels'])), totals]))
        if not sums:
            raise UserError(f'none of the images of replica {rank} in the evaluation set can be read')
        of_batches = torch.stack(sums)
        if replicas > 1:
            missing = -(-num_batches // replicas) - len(sums)
            whole = collectives.all_gather(torch.nn.functional.pad(of_batches, (0, 0, 0, missing)))
            of_batches = whole.unflatten(0, (replicas, -1)).transpose(0, 1).flatten(0, 1)
    count, *means = functools.reduce(torch.add, of_batches.cpu()).tolist()  # In order, unlike torch.sum.
    return {name: total / count for name, total in zip(names, means, strict=True)}
