"""Saves checkpoints in the background and decides which of them to keep.

The state is copied at its step, and a thread writes the copy while the loop continues. Only one write runs at
a time: a save waits for the previous write to finish, so no save is skipped.
"""

import contextlib
import math
import os
import pathlib
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import optree
import torch
from absl import logging

from byol_func.errors import UserError
from byol_func.training.loop_config import LoopConfig
from byol_func.utils import checkpointing


def steps_to_keep(
    values: Mapping[int, float | None], *, keep: int, highest: bool, milestones: frozenset[int] | set[int]
) -> set[int]:
    """Returns the steps whose checkpoints are kept: the newest, the best and the milestones.

    Args:
      values: step -> value of the metric that selects the best step; None where it was not measured.
      keep: number of newest checkpoints to keep.
      highest: whether the best value is the highest; the earliest of equal values is the best.
      milestones: steps that are always kept.

    Returns:
      The steps to keep, a subset of the keys of `values`.
    """
    steps = sorted(values)
    measured = {step: v for step, v in values.items() if v is not None and math.isfinite(v)}
    sign = -1 if highest else 1
    best = min(measured, key=lambda step: (sign * measured[step], step), default=None)
    return {*steps[-keep:], *(step for step in steps if step == best or step in milestones)}


def highest_is_best(metric: str, best_is: str) -> bool:
    """Returns whether a higher metric is better; for 'auto', lower is better for losses and errors alone."""
    if best_is == 'auto':
        return not any(word in metric.lower() for word in ('loss', 'error'))
    return best_is == 'highest'


class Saver:
    """Writes and prunes the checkpoints of a loop.

    `keep_every_epochs` and `best_metric` apply to pre-training only; other loops keep their newest checkpoints. Only
    the first replica is the writer. `class_names` and `data`, the fingerprint of the training set, are saved with every
    checkpoint.
    """

    def __init__(
        self,
        loop: LoopConfig,
        *,
        batch_size: int,
        num_examples: int,
        max_steps: int,
        first_step: int,
        is_writer: bool,
        class_names: Sequence[str] = (),
        data: Mapping[str, Any] | None = None,
    ):
        if loop.mode != 'pretrain':
            loop = loop._replace(keep_every_epochs=0.0, best_metric='')
        self._loop, self._max_steps, self._is_writer = loop, max_steps, is_writer
        self._batch_size, self._num_examples = batch_size, num_examples
        self._class_names, self._data = class_names, data
        self._highest = highest_is_best(loop.best_metric, loop.best_is)
        self._last_save = time.monotonic()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix='checkpoint')
        self._write: Future | None = None
        self._found: dict[int, float | None] = {}  # Step of each checkpoint -> its metric.
        for step, path in checkpointing.list_checkpoints(loop.checkpoint_dir, loop.mode):
            with contextlib.suppress(UserError):  # Unreadable files are never removed.
                if step < first_step:
                    self._found[step] = checkpointing.load_scalars(path).get(loop.best_metric)
        measured = [value for value in self._found.values() if value is not None]
        self._best = (max if self._highest else min)(measured, default=None)
        if is_writer:
            self._remove_halves()

    def _remove_halves(self) -> None:
        """Removes partial files that a process left behind when it died during a write."""
        for path in pathlib.Path(self._loop.checkpoint_dir).glob(f'{self._loop.mode}_*.tmp'):
            with contextlib.suppress(OSError):
                path.unlink()

    def is_milestone(self, step: int) -> bool:
        """Returns whether this step completes a multiple of `keep_every_epochs`."""
        if not self._loop.keep_every_epochs:
            return False
        images = self._loop.keep_every_epochs * self._num_examples
        done = (step + 1) * self._batch_size
        return math.floor(done / images) > math.floor((done - self._batch_size) / images)

    def is_due(self, step: int) -> bool:
        """Returns whether a save is due after this step, by its index or by the clock."""
        every = self._loop.save_every_steps
        return (
            step == self._max_steps - 1
            or time.monotonic() - self._last_save >= self._loop.save_every_seconds
            or (every > 0 and (step + 1) % every == 0)
            or self.is_milestone(step)
        )

    def check_metric(self, names: Collection[str]) -> None:
        """Checks that `best_metric` is among the logged names.

        Raises:
          UserError: it is not.
        """
        metric = self._loop.best_metric
        if metric and metric not in names:
            raise UserError(f'config.checkpointing.best_metric={metric!r}: expected one of {", ".join(sorted(names))}')

    def is_better(self, scalars: Mapping[str, float]) -> bool:
        """Returns whether these scalars contain `best_metric` with a better value than any checkpoint so far."""
        value = scalars.get(self._loop.best_metric)
        if value is None or not math.isfinite(value):
            return False
        return self._best is None or (value > self._best if self._highest else value < self._best)

    def save(self, state: Any, step: int, scalars: Mapping[str, float], metrics: int | None = None) -> None:
        """Copies the state for a thread to write; first waits for the previous write.

        Args:
          state: the state after the step; it may be overwritten as soon as this returns.
          step: index of the finished step.
          scalars: the scalars logged for the step.
          metrics: descriptor of the metrics file, which is synced first: if the checkpoint survives a power
            cut, so do the metrics of this and earlier steps.

        Raises:
          UserError: the previous write failed.
        """
        self._last_save = time.monotonic()
        if self.is_better(scalars):
            self._best = scalars[self._loop.best_metric]
        if self._is_writer:
            self.wait()
            copy, ready = snapshot(state)
            self._write = self._pool.submit(self._write_and_prune, copy, ready, step, dict(scalars), metrics)

    def _write_and_prune(self, copy, ready, step: int, scalars: dict[str, float], metrics: int | None) -> None:
        loop = self._loop
        if ready is not None:
            ready.synchronize()
        if metrics is not None:
            with contextlib.suppress(OSError):  # A pipe cannot be synced; its lines are already written.
                os.fsync(metrics)
        checkpointing.save(
            loop.checkpoint_dir,
            copy,
            mode=loop.mode,
            step=step,
            config=loop.config,
            scalars=scalars,
            class_names=self._class_names,
            data=self._data,
        )
        self._found[step] = scalars.get(loop.best_metric)
        kept = steps_to_keep(
            self._found,
            keep=loop.keep,
            highest=self._highest,
            milestones={found for found in self._found if self.is_milestone(found)},
        )
        for old in set(self._found) - kept:
            path = checkpointing.file_name(loop.checkpoint_dir, loop.mode, old)
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(
                    f'--workdir={loop.workdir}: the old checkpoint {path.name} cannot be removed ({error.strerror})'
                ) from error
            del self._found[old]

    def check(self) -> None:
        """Raises the error of a background write that has failed; does not wait."""
        if self._write is not None and self._write.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the last checkpoint is on disk.

        Raises:
          UserError: it could not be written.
        """
        write, self._write = self._write, None
        if write is not None:
            write.result()

    def close(self) -> None:
        """Waits for the last write; logs its error instead of raising it, since the loop may be failing."""
        try:
            self.wait()
        except UserError as error:
            logging.error('%s', error)
        self._pool.shutdown()


def snapshot(state: Any) -> tuple[Any, torch.cuda.Event | None]:
    """Returns a copy of a state in host memory, and the event after which it is complete (None: already complete).

    On a GPU the copies are queued after the step that produces the state and before the step that
    overwrites it, so the host waits for neither.
    """
    ready = None

    def copy(leaf):
        nonlocal ready
        host = torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=leaf.is_cuda)
        if leaf.is_cuda and ready is None:
            ready = torch.cuda.Event()
        return host.copy_(leaf.detach(), non_blocking=True)

    copied = optree.tree_map(copy, state)
    if ready is not None:
        ready.record()
    return copied, ready
