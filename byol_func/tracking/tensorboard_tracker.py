"""Event files for TensorBoard, in the folder `tensorboard` of the workdir; `--tensorboard` imports the library.

A thread reads the lines that the training appends to `metrics.jsonl`, as the tracker for mlflow does. Each mode is a
run of TensorBoard, with a folder of its own. A process that resumes a run writes the whole of `metrics.jsonl` again,
after an event that makes TensorBoard forget what it has. So no step appears twice, and a run that was started without
the flag is complete.
"""

import pathlib
import shutil
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from byol_func.errors import UserError
from byol_func.tracking import tail
from byol_func.tracking.finder import FOLLOWER
from byol_func.workdir.files import flatten
from byol_func.workdir.run import Run

_EVERY_SECONDS = 2.0  # Interval between reads of the file.
_PATIENCE = 60.0  # Seconds that the end of a run waits for the last events to be written.


def start(run: Run, mode: str, parent: Any) -> 'TensorBoard | None':
    """Returns the tracker of a mode; None without --tensorboard.

    Raises:
      UserError: TensorBoard is not installed.
    """
    return TensorBoard(run, mode) if run.tensorboard else None


def library() -> Any:
    """Returns the class `SummaryWriter` of PyTorch.

    Raises:
      UserError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"--tensorboard: {error}; pip install tensorboard, or 'byol_func[tensorboard]'") from error
    return SummaryWriter


def _new_writer(folder: pathlib.Path) -> Any:
    """Returns a writer whose first event replaces all that earlier writers wrote to the folder."""
    return library()(str(folder), purge_step=0)


def write_embeddings(workdir: str, split: str, features: np.ndarray, shown: Mapping[str, Sequence[Any]]) -> None:
    """Writes embeddings for TensorBoard's projector.

    Args:
      workdir: the folder of the run.
      split: the name of the split.
      features: float32 `[N, D]`.
      shown: what to show of each embedding, N values by name.
    """
    folder = pathlib.Path(workdir, 'tensorboard', f'embeddings.{split}')
    shutil.rmtree(folder, ignore_errors=True)
    with _new_writer(folder) as writer:
        rows = [list(map(str, row)) for row in zip(*shown.values(), strict=True)]
        if len(shown) == 1:  # The projector expects a header only above several columns.
            writer.add_embedding(features, [row[0] for row in rows], tag=split)
        else:
            writer.add_embedding(features, rows, metadata_header=list(shown), tag=split)


class TensorBoard:
    """The event files of one mode and the thread that writes them."""

    def __init__(self, run: Run, mode: str):
        self._run, self._mode = run, mode
        self._folder = pathlib.Path(run.workdir, 'tensorboard')
        self._tail, self._version = tail.of_mode(run, mode), 0
        self._since = tail.file_time(run.workdir)
        self._writers: dict[str, Any] = {}
        library()
        self._is_done, self._has_failed = threading.Event(), False
        self._status = 'RUNNING'
        self._thread = threading.Thread(target=self._work, name=f'tensorboard {mode}', daemon=True)
        self._thread.start()

    def _work(self) -> None:
        """The body of the thread: writes events until the run is closed."""
        while not self._has_failed:
            is_done = self._is_done.wait(_EVERY_SECONDS)
            try:
                self._write_scalars()
                if is_done:
                    self._finish()
                    return
            except Exception as error:  # No error of tracking may stop the training.
                self._has_failed = True
                logging.warning('%s: no more events are written (%s)', self._folder, ' '.join(str(error).split()))

    def _write_scalars(self) -> None:
        while lines := self._tail.read():
            if self._tail.version != self._version:  # The file was replaced, for example by a run that resumes.
                if self._version:
                    self._close_writers()
                self._version = self._tail.version
            for line in lines:
                for name, value in line.scalars.items():
                    mode, _, tag = name.partition('/')
                    # The results of a follower are those of mode eval, which has a run of its own.
                    self._writer(self._mode if self._mode == FOLLOWER else mode).add_scalar(tag, value, line.step)
        for writer in self._writers.values():
            writer.flush()

    def _finish(self) -> None:
        """Writes the pictures of every run; of one that finished, the config and the results too."""
        writer = self._writer(self._mode)
        found = tail.results(self._run.workdir, self._mode, self._since)
        for path in tail.own_files(self._run.workdir, self._mode, self._since):
            if path.suffix == '.png':
                with Image.open(path) as image:
                    writer.add_image(path.stem, np.asarray(image.convert('RGB')), found.steps, dataformats='HWC')
        if self._status == 'FINISHED':
            config = {
                name: value if isinstance(value, (bool, int, float, str)) else str(value)
                for name, value in flatten(self._run.plain_config()).items()
            }
            results = {f'result/{name}': value for name, value in found.metrics.items()}  # Curves have the plain names.
            writer.add_hparams(config, results, run_name='.', global_step=found.steps)
        self._close_writers()

    def _writer(self, mode: str) -> Any:
        if mode not in self._writers:
            self._writers[mode] = _new_writer(self._folder / mode)
        return self._writers[mode]

    def _close_writers(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

    def close(self, status: str) -> None:
        """Writes the rest and ends the thread; `status` is FINISHED, FAILED or KILLED."""
        self._status = status
        self._is_done.set()
        self._thread.join(_PATIENCE)
