"""Training and evaluation loops. Namesake of the official `byol/main_loop.py`.

Between experiments, which are pure, and the world: here the state is replaced step by step. Clocks,
files and transfers of numbers to the host are in its helpers too: `records` (rate, lines, bar),
`step_logs` (logs on their way from the device) and `saving` (checkpoints); nothing of the method is.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import optree
import torch
from absl import logging

from byol_func.errors import Stopped
from byol_func.experiment import Experiment, TrainResult
from byol_func.runtime import collectives, compilation, transfer
from byol_func.training import nonfinite, recorder, resuming, saving, signals
from byol_func.training.device_logs import StepLogs
from byol_func.training.loop_config import LoopConfig
from byol_func.utils import checkpointing, dataset


class Probe(NamedTuple):
    """A look at the state now and then while it trains, such as an evaluation.

    `measure(state, step, draws, inputs) -> scalars` gets the state after the step, and the draws and
    the batch of the step; it must leave them as they are. All replicas call it.
    """

    every_steps: int
    measure: Callable[[Any, int, Any, dataset.Batch], Mapping[str, float]]


def train_loop(
    experiment: Experiment, data: dataset.Examples, loop: LoopConfig, probes: Sequence[Probe] = ()
) -> TrainResult:
    """Trains from the newest checkpoint of the workdir, or from the start, to the last step.

    Counterpart of the official `train_loop`; the random numbers and the batch of a step are
    functions of (seed, step), so no generator is carried along or saved.

    Args:
      experiment: of `byol_experiment.make` or `eval_experiment.make`.
      data: the training set, on the device.
      loop: how to run.
      probes: each runs after every `every_steps`-th step and after the last one; its time is not
        counted in the rate.

    Raises:
      UserError: the loss of a step is not finite, or a file cannot be read or written.
      Stopped: a signal asked for it; the last finished step is saved.
    """
    start_time = time.monotonic()
    state, first_step = resuming.restore_latest(loop, transfer.place(experiment.init(), loop.device))
    batch_size, max_steps = experiment.batch_size, experiment.max_steps
    if not max_steps:
        logging.warning('%s: no epochs, so nothing is trained', loop.mode)
    rank, num_replicas = collectives.replica_index(), collectives.num_replicas()
    update = compilation.compile_update(
        experiment.update,
        compiled=loop.compiled,
        num_steps=max_steps,
        warn=lambda text: rank == 0 and logging.warning(text),
    )
    logs_so_far = StepLogs()
    record = recorder.Record(experiment, data, loop, first_step, is_writer=rank == 0)
    saver = saving.Saver(
        loop,
        batch_size=batch_size,
        num_examples=data.num_examples,
        max_steps=max_steps,
        first_step=first_step,
        is_writer=rank == 0,
        class_names=data.class_names,
    )
    batches = dataset.train_batches(
        data,
        range(first_step, max_steps),
        seed=loop.seed,
        batch_size=batch_size,
        rank=rank,
        num_replicas=num_replicas,
        crops=experiment.crops,
        image_size=experiment.image_size,
    )
    all_probed = max((probe.every_steps for probe in probes), default=1)  # Steps until each has run.

    def collect(leave: int | None) -> None:
        for logged in logs_so_far.take(leave):
            record.add(logged)

    try:
        with signals.requests() as requested:
            step = first_step - 1
            for step in range(first_step, max_steps):
                inputs = next(batches)
                draws = transfer.to_device(_share(experiment.sample(step), rank, num_replicas), loop.device)
                global_step = torch.full((), step, device=loop.device)  # No copy: those make the host wait.
                state, logs = update(state, global_step, draws, inputs)
                logs_so_far.add(step, logs)

                with nonfinite.on_all_replicas(step, loop):
                    is_first, is_last = step == first_step, step == max_steps - 1
                    asked = requested() is not None
                    saves = saver.is_due(step) or asked
                    due = [probe for probe in probes if is_last or (step + 1) % probe.every_steps == 0]
                    logs_now = is_first or saves or record.is_due(step)
                    if logs_now or due:
                        logs_so_far.close_block()
                    # One block may stay under way: the host runs ahead of the device, but not out of sight. A
                    # probe waits for the device: its time holds no steps, and it sees no loss that is not finite.
                    collect(leave=0 if is_first or saves or due else 1 if logs_now else None)
                    record.show(step)
                    for probe in due:
                        record.add_probe(step, functools.partial(probe.measure, state, step, draws, inputs))
                    if step - first_step + 1 == all_probed or is_last:
                        saver.check_metric(record.names)
                    if saver.is_better(record.probed(step)) and not saves:
                        saves = True
                        logs_so_far.close_block()
                        collect(leave=0)  # What is resumed from has its lines behind it.
                    if saves:
                        nonfinite.check_finite(state, step, loop)
                        saver.save(state, step, record.of_step(step), record.descriptor())
                    saver.check()
                if asked:
                    break
            saver.wait()
            if asked := requested():
                collectives.barrier()  # torchrun ends all as soon as the first has gone.
                raise Stopped(_farewell(loop, asked, step, max_steps))
    except nonfinite.Diverged as diverged:
        saver.wait()
        raise nonfinite.keep_step(diverged, experiment, data, loop, state, update) from None
    finally:
        batches.close()  # Ends the workers of a stream.
        saver.close()
        record.close()
    state = collectives.of_first_replica(state)  # Some averages may be each replica's own.
    seconds = time.monotonic() - start_time
    # An imported checkpoint may lie behind the last step.
    return TrainResult(state, record.scalars, max(0, max_steps - first_step), record.rate, seconds)


def _share(draws: Any, rank: int, num_replicas: int) -> Any:
    """This replica's part of the draws of the whole batch: the numbers of a run do not depend on
    how many replicas share it.
    """
    return optree.tree_map(lambda d: d.chunk(num_replicas)[rank], draws)


def _farewell(loop: LoopConfig, asked: str, step: int, max_steps: int) -> str:
    path = checkpointing.file_name(loop.checkpoint_dir, loop.mode, step)
    return f'Stopped by {asked}: step {step + 1} of {max_steps} of {loop.mode} is done and saved in {path}.'


def eval_loop(
    evaluate: Callable[[Any, dataset.Batch], dict[str, torch.Tensor]],
    state: Any,
    data: dataset.Examples,
    batch_size: int,
) -> dict[str, float]:
    """Means of the per-example scalars over a data set. Port of `_eval_epoch`; differences: none.

    Args:
      evaluate: of an experiment.
      state: its state.
      data: the data set, on the device; its last batch may be short.
      batch_size: images at a time.
    """
    sums: dict[str, torch.Tensor] = {}
    count = 0  # A stream leaves out files that cannot be read.
    with torch.no_grad():
        for inputs in dataset.eval_batches(data, batch_size):
            count += len(inputs['labels'])
            for name, values in evaluate(state, inputs).items():
                sums[name] = sums.get(name, 0.0) + values.double().sum()
    return {name: float(total) / count for name, total in sums.items()}
