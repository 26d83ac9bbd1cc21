"""Reads the files of a run for tracking: new lines of `metrics.jsonl`, results, and the files to upload."""

import json
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

from byol_func.workdir.files import parse_record
from byol_func.workdir.run import Run

_BLOCK = 1 << 16  # Bytes per read.


class MetricsLine(NamedTuple):
    """One line of `metrics.jsonl`: its step, and scalars by name, such as 'pretrain/loss'."""

    step: int
    scalars: dict[str, float]


class MetricsTail:
    """Reads the lines that were added to a `metrics.jsonl` since the last read.

    Args:
      path: path of the file, which need not exist yet and may be replaced by a shorter file.
      modes: prefixes of the modes to read; 'linear_eval' includes 'linear_eval_untrained'.
    """

    def __init__(self, path: str | os.PathLike, modes: Sequence[str]):
        self.path, self._modes = pathlib.Path(path), tuple(modes)
        self._inode, self._offset = -1, 0  # No file has inode -1.
        self.version = 0  # How many files of this name were read from their beginning.

    def read(self) -> list[MetricsLine]:
        """Returns the records in the next block of complete lines; an empty list at the end of the file."""
        try:
            with open(self.path, 'rb') as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self._inode or found.st_size < self._offset:
                    self._inode, self._offset = found.st_ino, 0
                    self.version += 1
                file.seek(self._offset)
                block = file.read(_BLOCK)
                if len(block) == _BLOCK:
                    block += file.readline()
        except FileNotFoundError:
            return []
        whole = block[: block.rfind(b'\n') + 1]
        self._offset += len(whole)
        records = [record for line in whole.splitlines() if (record := self._record(line))]
        return records or (self.read() if whole else [])

    def _record(self, line: bytes) -> MetricsLine | None:
        record = parse_record(line) or {}
        mode, step = str(record.get('mode')), record.get('step')
        if step is None or not mode.startswith(self._modes):
            return None
        scalars = {
            metric_name(f'{mode}/{name}'): float(value)
            for name, value in record.items()
            if name not in ('mode', 'step') and isinstance(value, (int, float))
        }
        return MetricsLine(step, scalars)


def of_mode(run: Run, mode: str) -> MetricsTail:
    """Returns the reader of the lines that a mode, or `follow`, appends to a file of the workdir."""
    if mode == 'follow':
        return MetricsTail(pathlib.Path(run.workdir, 'eval.jsonl'), ('eval',))
    modes = (mode, 'linear_eval') if mode == 'pretrain' and run.config.final_linear_eval else (mode,)
    return MetricsTail(pathlib.Path(run.workdir, 'metrics.jsonl'), modes)


def metric_name(name: str) -> str:
    """Converts a name to one that mlflow accepts: at most 250 ASCII letters, digits, spaces and `_-./:`."""
    return re.sub(r'[^\w\-. /:]', '_', name, flags=re.ASCII)[:250]


class Results(NamedTuple):
    """The contents of a mode's summary: steps, metrics, and the chosen settings as tags."""

    steps: int
    metrics: dict[str, float]
    chosen: dict[str, str]


def results(workdir: str | os.PathLike, mode: str, since: float) -> Results:
    """Reads the summary that a mode wrote after `since` (seconds since 1970); empty if there is none."""
    path = pathlib.Path(workdir, f'summary.{mode}.json')
    summary = json.loads(path.read_text()) if _is_new(path, since) else {}
    metrics = {
        metric_name(name): float(value)
        for name, value in summary.items()
        if name.startswith(('train/', 'val/', 'test/')) and isinstance(value, (int, float))
    }
    chosen = summary.get('chosen', {})  # A list for several seeds, each of which has its own run.
    tags = (
        {f'chosen.{name}': f'{value:.6g}' for name, value in chosen.items() if isinstance(value, (int, float))}
        if isinstance(chosen, dict)
        else {}
    )
    return Results(int(summary.get('steps') or 0), metrics, tags)


def own_files(workdir: str | os.PathLike, mode: str, since: float) -> list[pathlib.Path]:
    """Lists the files that a mode wrote after `since`, without checkpoints; the largest are last."""
    if mode == 'follow':  # The other files of the workdir belong to the training.
        patterns = ['eval.jsonl']
    else:
        patterns = [f'config.{mode}.json', f'summary.{mode}.json', '*.png', 'report.html', 'metrics.jsonl']
    if mode == 'eval':
        patterns += ['eval.*.json', 'predictions.*.npz']
    paths = [path for pattern in patterns for path in sorted(pathlib.Path(workdir).glob(pattern))]
    return [path for path in paths if _is_new(path, since)]


def file_time(folder: str) -> float:
    """Returns the current time by the clock that dates files in a folder; a file server's may be minutes late."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:  # A follower may start before the folder exists.
        return time.time()


def _is_new(path: pathlib.Path, since: float) -> bool:
    return path.exists() and path.stat().st_mtime >= since - 1.0  # Timestamps of files are coarse.
