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
from byol_func.runtime import collectives, compilation
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
    'checkpointing', 'compile', 'dataset.max_gib', 'dataset.root', 'evaluation', 'final_linear_eval',
    'log_every_steps', 'num_seeds',
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


def train_loop(experiment: Experiment, data: dataset.Dataset, loop: LoopConfig) -> TrainResult:
    """Trains from the newest checkpoint of the workdir, or from the start, to the last step.

    Counterpart of the official `train_loop`; the random numbers and the batch of a step are
    functions of (seed, step), so no generator is carried along or saved.

    Args:
      experiment: of `byol_experiment.make` or `eval_experiment.make`.
      data: the training set, on the device.
      loop: how to run.

    Raises:
      UserError: the loss of a step is not finite, or a file cannot be read or written.
    """
    start_time = time.monotonic()
    to_device = lambda x: torch.empty_like(x, device=loop.device).copy_(x)
    state = optree.tree_map(to_device, experiment.init())
    state, first_step = restore_latest(loop, state)
    update = compilation.compile_update(experiment.update, compiled=loop.compiled)
    rank, num_replicas = collectives.replica_index(), collectives.num_replicas()
    is_writer = rank == 0
    batch_size, max_steps = experiment.batch_size, experiment.max_steps
    metrics = MetricsFile(loop.workdir, loop.mode, first_step) if is_writer else None
    progress = Progress(
        loop.mode, max_steps * batch_size, first_step * batch_size, loop.log_every_seconds,
        shown=is_writer,
    )
    pending: list[tuple[int, dict[str, torch.Tensor]]] = []
    scalars = metrics.last() if metrics else {}
    last_save = first_step_done = time.monotonic()
    try:
        for step in range(first_step, max_steps):
            inputs = dataset.train_batch(
                data, step, seed=loop.seed, batch_size=batch_size, rank=rank, num_replicas=num_replicas
            )
            draws = _share(experiment.sample(step), rank, num_replicas, loop.device)
            global_step = torch.tensor(step, device=loop.device)
            state, logs = update(state, global_step, draws, inputs)
            pending.append((step, logs))

            is_last = step == max_steps - 1
            logs_now = is_last or (step + 1) % loop.log_every_steps == 0 or step == first_step
            now = time.monotonic()
            saves_now = is_last or now - last_save >= loop.save_every_seconds or (
                loop.save_every_steps > 0 and (step + 1) % loop.save_every_steps == 0
            )
            loss = None
            if logs_now or saves_now:
                scalars = _fetch(pending, loop)
                loss = scalars.get('loss', scalars.get('train_loss'))
                now = time.monotonic()
            if step == first_step:
                first_step_done = now  # Compiling belongs to the first step.
            rate = _rate(step - first_step, batch_size, now - first_step_done)
            progress.update(batch_size, (step + 1) * batch_size, rate, now, loss)
            if logs_now and is_writer:
                epoch = (step + 1) * batch_size / data.num_examples
                metrics.write(step, {'epoch': epoch, **scalars, 'images_per_second': rate})
            if saves_now and is_writer:
                last_save = now
                _check_finite(state, step, loop)
                checkpointing.save(
                    loop.checkpoint_dir, state,
                    mode=loop.mode, step=step, config=loop.config, keep=loop.keep,
                )
    finally:
        progress.close()
        if metrics:
            metrics.close()
    seconds = time.monotonic() - start_time
    done = max_steps - first_step
    rate = _rate(done - 1, batch_size, time.monotonic() - first_step_done)
    return TrainResult(state, scalars, done, rate, seconds)


def _rate(steps: int, batch_size: int, seconds: float) -> float:
    return steps * batch_size / seconds if steps > 0 and seconds > 0 else 0.0


def _share(draws: Any, rank: int, num_replicas: int, device: torch.device) -> Any:
    """This replica's part of the draws of the whole batch: the numbers of a run do not depend on
    how many replicas share it."""
    return optree.tree_map(lambda d: d.chunk(num_replicas)[rank].to(device, non_blocking=True), draws)


def _fetch(pending: list[tuple[int, dict[str, torch.Tensor]]], loop: LoopConfig) -> dict[str, float]:
    """The logs of the last pending step as numbers; empties `pending`.

    Raises:
      UserError: the loss of one of the pending steps is not finite.
    """
    name = 'loss' if 'loss' in pending[-1][1] else 'train_loss'
    losses = torch.stack([logs[name] for _, logs in pending]).tolist()
    for (step, _), loss in zip(pending, losses, strict=True):
        if not math.isfinite(loss):
            raise _diverged(f'{name}={loss}', step, loop)
    names, values = zip(*pending[-1][1].items())
    pending.clear()
    return dict(zip(names, torch.stack([value.double() for value in values]).tolist()))


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
