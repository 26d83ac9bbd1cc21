"""The work that follows every step of a loop: logs, metrics lines, probes and checkpoints."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from byol_func.errors import Stopped, counted
from byol_func.experiment import Experiment
from byol_func.runtime import collectives
from byol_func.training import nonfinite
from byol_func.training.device_logs import StepLogs
from byol_func.training.loop_config import LoopConfig
from byol_func.training.meetings import Meetings
from byol_func.training.recorder import Recorder
from byol_func.training.saving import Saver
from byol_func.utils import checkpointing, dataset


class Probe(NamedTuple):
    """A periodic measurement of the state during training, such as an evaluation.

    `measure(state, step, draws, inputs) -> scalars` receives the state after the step, and the draws and
    the batch of the step; it must not modify them. All replicas call it.
    """

    every_steps: int
    measure: Callable[[Any, int, Any, dataset.Batch], Mapping[str, float]]


class Bookkeeper:
    """Logs, probes and saves after every step; never changes the state.

    `requested` returns the name of the signal that asked this process to stop, or None. `fingerprint` is that of the
    training set. `first_step` is the first step of this process. `seconds` returns the seconds of the run so far.
    Several replicas stop after a step at which they meet (see `meetings`), and so does a trial of which one replica
    diverges.
    """

    def __init__(
        self,
        experiment: Experiment,
        data: dataset.Examples,
        loop: LoopConfig,
        probes: Sequence[Probe],
        first_step: int,
        requested: Callable[[], str | None],
        fingerprint: Mapping[str, Any],
        seconds: Callable[[], float],
    ):
        self._loop, self._probes, self._requested, self._seconds = loop, probes, requested, seconds
        self._first_step, self._max_steps = first_step, experiment.max_steps
        self._all_probed = max((probe.every_steps for probe in probes), default=1)  # Steps until each probe has run.
        self._logs, self._meetings = StepLogs(), Meetings()
        self._diverged: nonfinite.Diverged | None = None  # Of a trial, until the replicas meet.
        is_writer = collectives.replica_index() == 0
        self.recorder = Recorder(experiment, data, loop, first_step, is_writer)
        self._saver = Saver(
            loop,
            batch_size=experiment.batch_size,
            num_examples=data.num_examples,
            max_steps=experiment.max_steps,
            first_step=first_step,
            is_writer=is_writer,
            class_names=data.class_names,
            data=fingerprint,
        )

    def after_step(
        self, state: Any, step: int, logs: Mapping[str, torch.Tensor], draws: Any, inputs: dataset.Batch
    ) -> None:
        """Takes the logs of a step, then writes the lines, runs the probes and saves the checkpoint that are due.

        Raises:
          Stopped: a signal asked the run to stop; the step is saved.
          Diverged: a loss or a parameter is not finite.
          UserError: a file cannot be written.
        """
        self._logs.add(step, logs)
        is_last = step == self._max_steps - 1
        due = [probe for probe in self._probes if is_last or (step + 1) % probe.every_steps == 0]
        meets = self._meetings.is_due(at_once=is_last or bool(due))
        asked = self._signal() if meets else None
        try:
            if self._diverged is None:
                self._record(state, step, draws, inputs, due, saves=asked is not None or self._saver.is_due(step))
        except nonfinite.Diverged as error:
            if not self._loop.is_trial:  # The error ends all processes of the run.
                raise
            self._diverged = error
        if meets:
            self._end_trial(step)
        if asked is not None:
            self._stop(asked, step)

    def _record(self, state, step: int, draws, inputs, due: Sequence[Probe], saves: bool) -> None:
        is_first, is_last = step == self._first_step, step == self._max_steps - 1
        logs_now = is_first or saves or self.recorder.is_due(step) or self.recorder.is_line_due()
        if logs_now or due:
            self._logs.close_block()
        # One block may stay in flight, so that the host runs ahead of the device, but not far. A probe waits for
        # the device, so that its time includes no step and it never sees a non-finite loss.
        self._collect(leave=0 if is_first or saves or due else 1 if logs_now else None)
        self.recorder.show(step)
        for probe in due:
            self.recorder.add_probe(step, functools.partial(probe.measure, state, step, draws, inputs))
        if step - self._first_step + 1 == self._all_probed or is_last:
            self._saver.check_metric(self.recorder.names)
        if saves or self._saver.is_better(self.recorder.probed(step)):
            self._save(state, step)
        self._saver.check()

    def _signal(self) -> str | None:
        """Returns the signal that any replica has received, or None; all replicas call it after the same steps."""
        name = self._requested()
        return name or 'a signal to another replica' if self._meetings.any_replica(name is not None) else None

    def _end_trial(self, step: int) -> None:
        """Ends a trial on all replicas after the same step if one of them has diverged.

        A replica that went on alone would wait for the others, or meet them in another loop.

        Raises:
          Diverged: one has diverged.
        """
        if self._loop.is_trial and any(collectives.largest([self._diverged is not None])):
            raise self._diverged or nonfinite.Diverged('numbers of another replica', step, self._loop)

    def _collect(self, leave: int | None) -> None:
        for logged in self._logs.take(leave):
            self.recorder.add(logged)

    def _save(self, state: Any, step: int) -> None:
        self._logs.close_block()
        self._collect(leave=0)  # The metrics are flushed before the checkpoint is saved.
        nonfinite.check_finite(state, step, self._loop)
        scalars = {**self.recorder.of_step(step), 'seconds': self._seconds()}
        self._saver.save(state, step, scalars, self.recorder.descriptor())

    def _stop(self, asked: str, step: int) -> None:
        self._saver.wait()
        collectives.barrier()  # torchrun ends all replicas as soon as the first one exits.
        path = checkpointing.file_name(self._loop.checkpoint_dir, self._loop.mode, step)
        done = f'{step + 1} of {counted(self._max_steps, "step")} of {self._loop.mode}'
        raise Stopped(f'Stopped by {asked} after {done}, saved in {path}.')

    def finish(self) -> None:
        """Waits until the last checkpoint is on disk.

        Raises:
          Stopped: a signal arrived after the last step.
          UserError: the checkpoint could not be written.
        """
        self._saver.wait()
        if asked := self._signal():
            self._stop(asked, self._max_steps - 1)

    def wait(self) -> None:
        """Waits until the last checkpoint is on disk, without checking for signals.

        Raises:
          UserError: the checkpoint could not be written.
        """
        self._saver.wait()

    def close(self) -> None:
        """Closes the files and the progress bar; logs an error instead of raising it, since the loop may be failing."""
        self._saver.close()
        self.recorder.close()
