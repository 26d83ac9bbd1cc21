"""Records the metrics and the throughput of a training loop, and displays its progress."""

import math
from collections.abc import Callable, Mapping

from byol_func.console import Progress
from byol_func.experiment import Experiment
from byol_func.training import nonfinite
from byol_func.training.device_logs import LoggedStep
from byol_func.training.loop_config import LoopConfig
from byol_func.training.stopwatch import Stopwatch
from byol_func.utils import dataset, variants
from byol_func.workdir.files import MetricsFile

# The labels of the accuracies in the progress bar: of the training batch and of the evaluation set.
_SHOWN = {
    'top1_accuracy': 'online',
    'test/online_top1': 'test',
    'val/online_top1': 'val',
    'test/online_knn_top1': 'k-NN',
    'val/online_knn_top1': 'k-NN',
}


class Recorder:
    """Writes the lines of `metrics.jsonl`, updates the progress bar and measures images per second."""

    def __init__(
        self, experiment: Experiment, data: dataset.Examples, loop: LoopConfig, first_step: int, is_writer: bool
    ):
        self._loop, self._first_step = loop, first_step
        self._batch_size, self._num_examples = experiment.batch_size, data.num_examples
        self._max_steps = experiment.max_steps
        self._metrics = MetricsFile(loop.workdir, loop.mode, first_step) if is_writer else None
        self._progress = Progress(
            loop.mode,
            self._max_steps * self._batch_size,
            done=first_step * self._batch_size,
            every_seconds=loop.log_every_seconds,
            shown=is_writer,
        )
        self._doing = 'the first step is running, which takes longer than the others'
        self._stopwatch = Stopwatch(self._say_what_lasts)
        self.scalars: dict[str, float] = self._metrics.last() if self._metrics else {}
        self.rate = 0.0  # Images per second since the first step of this process, without that step.
        self._accuracies: dict[str, float] = {}
        self._first_step_done: float | None = None
        self._probing = 0.0  # Seconds.
        self._loss: float | None = None
        self.names: set[str] = set()  # The names of all scalars so far.
        self._logged: tuple[int, dict[str, float]] = (-1, {})
        self._probed: tuple[int, dict[str, float]] = (-1, {})

    def is_due(self, step: int) -> bool:
        """Returns whether a step gets a line in `metrics.jsonl`; interruptions of the run make no difference."""
        return step in (0, self._max_steps - 1) or (step + 1) % self._loop.log_every_steps == 0

    def _say_what_lasts(self) -> None:
        self._progress.say_that_it_lasts(self._doing)

    def is_line_due(self) -> bool:
        """Returns whether `log_every_seconds` have passed since the last line of progress."""
        return self._progress.is_due()

    def add(self, logged: LoggedStep) -> None:
        """Records the logs of a step that has just finished.

        Raises:
          Diverged: a loss is not finite.
        """
        for step, loss in logged.losses:
            if not math.isfinite(loss):
                raise nonfinite.Diverged(f'loss={loss}', step, self._loop)
        now = self._stopwatch.now()
        if self._first_step_done is None:
            self._first_step_done = now  # Compilation counts towards the first step.
        done, seconds = logged.step - self._first_step, now - self._first_step_done - self._probing
        self.rate = done * self._batch_size / seconds if done else 0.0
        self.scalars, self._loss = logged.scalars, logged.losses[-1][1]
        self._logged = logged.step, logged.scalars
        self.names.update(logged.scalars)
        if self.is_due(logged.step):
            self._write(logged.step, {**self.scalars, 'images_per_second': self.rate})

    def add_probe(self, step: int, measure: Callable[[], Mapping[str, float]]) -> None:
        """Runs a probe after a step and records its scalars."""
        start, doing = self._stopwatch.now(), self._doing
        self._doing = f'an evaluation after step {step} is running'
        scalars = measure()
        self._probing += self._stopwatch.now() - start
        self._doing = doing
        self.names.update(scalars)
        self._probed = step, {**self.probed(step), **scalars}
        self._write(step, scalars)

    def probed(self, step: int) -> dict[str, float]:
        """Returns the scalars of the probes after a step; empty unless it is the last step that was probed."""
        return self._probed[1] if self._probed[0] == step else {}

    def of_step(self, step: int) -> dict[str, float]:
        """Returns the epoch of a step, with its logs and probe scalars if it was the last one logged or probed."""
        logged = self._logged[1] if self._logged[0] == step else {}
        return {'epoch': self._epoch(step), **logged, **self.probed(step)}

    def _epoch(self, step: int) -> float:
        return (step + 1) * self._batch_size / self._num_examples

    def descriptor(self) -> int | None:
        """Returns the file descriptor of `metrics.jsonl`, for syncing; None if this process does not write it."""
        return self._metrics.fileno() if self._metrics else None

    def _write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._accuracies |= {word: scalars[name] for name, word in _SHOWN.items() if name in scalars}
        if self._metrics:
            self._metrics.write(step, {'epoch': self._epoch(step), **scalars})

    def show(self, step: int) -> None:
        """Advances the progress bar by one step."""
        numbers = None
        if self._loss is not None:
            numbers = {'loss': f'{self._loss:.4f}', **{k: f'{100 * v:.1f} %' for k, v in self._accuracies.items()}}
            own = {k: v for k, v in self.scalars.items() if k.startswith(variants.LOGS)}
            numbers |= {k.removeprefix(variants.LOGS): f'{v:.4g}' for k, v in own.items()}
        self._progress.update(self._batch_size, self.rate or None, numbers)
        self._loss = None
        self._doing = f'the step after step {step} is running'

    def close(self) -> None:
        """Stops the stopwatch and closes the progress bar and the file."""
        self._stopwatch.close()
        self._progress.close()
        if self._metrics:
            self._metrics.close()
