"""Training and evaluation loops. Namesake of the official `byol/main_loop.py`.

The only clock, the only mutable variable and the only transfer of numbers to the host are here.
"""

from collections.abc import Callable, Mapping, Sequence
import math
import time
from typing import Any, NamedTuple

from absl import logging
import optree
import torch

from byol_func.experiment import Experiment
from byol_func.reporting import MetricsFile, Progress
from byol_func.runtime import collectives, compilation, transfer
from byol_func.step_logs import LoggedStep, StepLogs
from byol_func.utils import checkpointing, dataset
from byol_func.utils.helpers import UserError


class LoopConfig(NamedTuple):
    """How a loop runs, whatever it runs."""

    mode: str
    workdir: str
    device: torch.device
    compiled: bool
    seed: int
    config: Mapping[str, Any]  # The resolved config of plain values, saved with every checkpoint.
    save_every_seconds: float
    save_every_steps: int  # 0: by time only.
    keep: int
    log_every_steps: int
    log_every_seconds: float

    @property
    def checkpoint_dir(self) -> str:
        return f'{self.workdir}/checkpoints'


class Probe(NamedTuple):
    """A look at the state now and then while it trains, such as an evaluation.

    `measure(state, step) -> scalars`; it must leave the state as it is. All replicas call it.
    """

    every_steps: int
    measure: Callable[[Any, int], Mapping[str, float]]


class TrainResult(NamedTuple):
    """What a finished loop leaves; rates and seconds are of this process, not of earlier ones.

    `logs` are those of the last step, `steps` is how many this process did.
    """

    state: Any
    logs: dict[str, float]
    steps: int
    images_per_second: float
    seconds: float


def restore_latest(loop: LoopConfig, template: Any) -> tuple[Any, int]:
    """The newest state of this mode in the workdir and the next step, or the template and 0.

    Raises:
      UserError: the checkpoint is damaged, does not fit, or was made with another config.
    """
    found = checkpointing.list_checkpoints(loop.checkpoint_dir, loop.mode)
    if not found:
        return template, 0
    check_continues(loop)
    checkpoint = checkpointing.load(found[-1][1])
    state = checkpointing.restore(checkpoint, template)
    logging.info('Resuming from %s, saved after step %d', checkpoint.path, checkpoint.step)
    return state, checkpoint.step + 1


def check_continues(loop: LoopConfig) -> None:
    """Checks that the workdir's newest checkpoint of this mode, if any, is of the same config.

    Raises:
      UserError: it is of another, or of another encoder.
    """
    found = checkpointing.list_checkpoints(loop.checkpoint_dir, loop.mode)
    saved = checkpointing.load(found[-1][1]).config if found else loop.config
    other_protocols = [p for p in ('linear_eval', 'fine_tune') if not loop.mode.startswith(p)]
    free = [*_FREE_FIELDS, *other_protocols]
    for field, (old, new) in _differences(saved, loop.config, free).items():
        if field != 'backbone':
            what = f'a run with config.{field}={old!r}, not {new!r}; go on with the same value'
        elif new is None:  # The encoder is not known yet.
            continue
        else:
            what = f'a {loop.mode} of another encoder; remove its checkpoints'
        raise UserError(f'--workdir={loop.workdir}: holds {what} or choose another --workdir')


# Fields that may change between a run and its continuation: they do not touch the numbers.
_FREE_FIELDS = (
    'checkpointing', 'compile', 'dataset.max_bad_fraction', 'dataset.max_gib', 'dataset.root', 'evaluation',
    'final_linear_eval', 'log_every_steps', 'num_seeds',
)


def _differences(saved: Mapping[str, Any], asked: Mapping[str, Any], free: Sequence[str], prefix: str = ''):
    different = {}
    for key in sorted(set(saved) | set(asked)):
        old, new = saved.get(key), asked.get(key)
        if prefix + key in free:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            different |= _differences(old, new, free, f'{prefix}{key}.')
        elif old != new:
            different[prefix + key] = (old, new)
    return different


def train_loop(
    experiment: Experiment, data: dataset.Dataset, loop: LoopConfig, probes: Sequence[Probe] = ()
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
    """
    start_time = time.monotonic()
    to_device = lambda x: torch.empty_like(x, device=loop.device).copy_(x)
    state = optree.tree_map(to_device, experiment.init())
    state, first_step = restore_latest(loop, state)
    update = compilation.compile_update(experiment.update, compiled=loop.compiled)
    rank, num_replicas = collectives.replica_index(), collectives.num_replicas()
    batch_size, max_steps = experiment.batch_size, experiment.max_steps
    logs_so_far = StepLogs()
    record = _Record(experiment, data, loop, first_step, is_writer=rank == 0)
    last_save = time.monotonic()
    try:
        for step in range(first_step, max_steps):
            inputs = dataset.train_batch(
                data, step, seed=loop.seed, batch_size=batch_size, rank=rank, num_replicas=num_replicas
            )
            draws = transfer.to_device(_share(experiment.sample(step), rank, num_replicas), loop.device)
            global_step = torch.tensor(step, device=loop.device)
            state, logs = update(state, global_step, draws, inputs)
            logs_so_far.add(step, logs)

            is_first, is_last = step == first_step, step == max_steps - 1
            saves = is_last or time.monotonic() - last_save >= loop.save_every_seconds or (
                loop.save_every_steps > 0 and (step + 1) % loop.save_every_steps == 0
            )
            logs_now = is_first or saves or record.is_due(step)
            if logs_now:
                logs_so_far.close_block()
            # One block may stay under way: the host runs ahead of the device, but not out of sight.
            for logged in logs_so_far.take(leave=0 if is_first or saves else 1 if logs_now else None):
                record.add(logged)
            record.show(step)
            for probe in probes:
                if is_last or (step + 1) % probe.every_steps == 0:
                    record.add_probe(step, lambda probe=probe: probe.measure(state, step))
            if saves and rank == 0:
                last_save = time.monotonic()
                _check_finite(state, step, loop)
                checkpointing.save(
                    loop.checkpoint_dir, state,
                    mode=loop.mode, step=step, config=loop.config, keep=loop.keep,
                )
    finally:
        record.close()
    seconds = time.monotonic() - start_time
    return TrainResult(state, record.scalars, max_steps - first_step, record.rate, seconds)


class _Record:
    """What a training loop tells of its steps: lines of `metrics.jsonl`, and the progress bar."""

    def __init__(self, experiment: Experiment, data: dataset.Dataset, loop: LoopConfig, first_step: int,
                 is_writer: bool):
        self._loop, self._first_step = loop, first_step
        self._batch_size, self._num_examples = experiment.batch_size, data.num_examples
        self._max_steps = experiment.max_steps
        self._metrics = MetricsFile(loop.workdir, loop.mode, first_step) if is_writer else None
        self._progress = Progress(
            loop.mode, self._max_steps * self._batch_size, first_step * self._batch_size,
            loop.log_every_seconds, shown=is_writer,
        )
        self.scalars: dict[str, float] = self._metrics.last() if self._metrics else {}
        self.rate = 0.0  # Images per second since the first step of this process, without that step.
        self._first_step_done: float | None = None
        self._probing = 0.0  # Seconds.
        self._loss: float | None = None

    def is_due(self, step: int) -> bool:
        """Whether a step has a line in `metrics.jsonl`, however often the run was interrupted."""
        return step in (0, self._max_steps - 1) or (step + 1) % self._loop.log_every_steps == 0

    def add(self, logged: LoggedStep) -> None:
        """Takes the numbers of a step, which has just been done.

        Raises:
          UserError: a loss is not finite.
        """
        for step, loss in logged.losses:
            if not math.isfinite(loss):
                raise _diverged(f'loss={loss}', step, self._loop)
        now = time.monotonic()
        if self._first_step_done is None:
            self._first_step_done = now  # Compiling belongs to the first step.
        done, seconds = logged.step - self._first_step, now - self._first_step_done - self._probing
        self.rate = done * self._batch_size / seconds if done else 0.0
        self.scalars, self._loss = logged.scalars, logged.losses[-1][1]
        if self.is_due(logged.step):
            self._write(logged.step, {**self.scalars, 'images_per_second': self.rate})

    def add_probe(self, step: int, measure: Callable[[], Mapping[str, float]]) -> None:
        """Runs a probe after a step and writes down what it found."""
        start = time.monotonic()
        scalars = measure()
        self._probing += time.monotonic() - start
        self._write(step, scalars)

    def _write(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._metrics:
            epoch = (step + 1) * self._batch_size / self._num_examples
            self._metrics.write(step, {'epoch': epoch, **scalars})

    def show(self, step: int) -> None:
        """Moves the bar on by a step."""
        done, loss = (step + 1) * self._batch_size, self._loss
        self._progress.update(self._batch_size, done, self.rate, time.monotonic(), loss)
        self._loss = None

    def close(self) -> None:
        """Closes bar and file."""
        self._progress.close()
        if self._metrics:
            self._metrics.close()


def _share(draws: Any, rank: int, num_replicas: int) -> Any:
    """This replica's part of the draws of the whole batch: the numbers of a run do not depend on
    how many replicas share it."""
    return optree.tree_map(lambda d: d.chunk(num_replicas)[rank], draws)


def _check_finite(state: Any, step: int, loop: LoopConfig) -> None:
    """The loss of a step is finite before its update; what is saved must be so after it.

    Raises:
      UserError: a number of the state is not finite.
    """
    leaves = [leaf for leaf in optree.tree_leaves(state) if leaf.is_floating_point()]
    if leaves and not torch.stack([leaf.isfinite().all() for leaf in leaves]).all().item():
        raise _diverged('the parameters after the update', step, loop)


def _diverged(what: str, step: int, loop: LoopConfig) -> UserError:
    found = checkpointing.list_checkpoints(loop.checkpoint_dir, loop.mode)
    kept = f'the last good checkpoint is {found[-1][1]}' if found else 'there is no checkpoint yet'
    protocol = next((f'{p}.' for p in ('linear_eval', 'fine_tune') if loop.mode.startswith(p)), '')
    return UserError(
        f'step {step}: {what}: expected finite numbers; {kept}; '
        f'try a smaller config.{protocol}lr_schedule.base_learning_rate'
    )


def eval_loop(
    evaluate: Callable[[Any, dataset.Batch], dict[str, torch.Tensor]],
    state: Any,
    data: dataset.Dataset,
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
    with torch.no_grad():
        for inputs in dataset.eval_batches(data, batch_size):
            for name, values in evaluate(state, inputs).items():
                sums[name] = sums.get(name, 0.0) + values.double().sum()
    return {name: float(total) / data.num_examples for name, total in sums.items()}
