"""What a run tells: a progress bar or lines, `metrics.jsonl`, `summary.json` and tables."""

import contextlib
import datetime
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import tabulate
import tqdm
from absl import logging

from byol_func.utils.helpers import UserError


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes readable JSON; the file is whole or not there."""
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + '.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=2) + '\n')
        temporary.replace(path)
    except OSError as error:
        raise UserError(f'--workdir={path.parent}: cannot write {path.name} ({error.strerror})') from error


def write_npz(path: str | os.PathLike, /, **arrays: Any) -> None:
    """Writes numpy arrays, none of objects, under their names; the file is whole or not there."""
    import numpy as np

    path = pathlib.Path(path)
    temporary = path.with_name(path.name + '.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, 'wb') as file:
            np.savez(file, **arrays)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f'--workdir={path.parent}: cannot write {path.name} ({error.strerror})') from error


def parse_record(line: str | bytes) -> dict[str, Any] | None:
    """The object that a line of JSON holds; None for half a line, which a killed process leaves behind."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def read_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` or `eval.jsonl` that have a mode and a step; none where there is no file.

    Raises:
      OSError, UnicodeDecodeError: the file cannot be read.
    """
    path = pathlib.Path(path)
    records = map(parse_record, path.read_text().splitlines() if path.exists() else ())
    return [r for r in records if r and isinstance(r.get('mode'), str) and isinstance(r.get('step'), int)]


class MetricsFile:
    """`metrics.jsonl`: one JSON object per logged step, of all modes that ran in the workdir.

    A resumed run first drops the lines after its checkpoint, so that no step stands there twice.
    """

    def __init__(self, workdir: str | os.PathLike, mode: str, first_step: int):
        self._mode, self._workdir = mode, workdir
        path = pathlib.Path(workdir) / 'metrics.jsonl'
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                kept = [line for line in path.read_text().splitlines() if self._keeps(line, first_step)]
                temporary = path.with_name(path.name + '.tmp')
                temporary.write_text(''.join(line + '\n' for line in kept))
                temporary.replace(path)
            self._file = open(path, 'a')
        except OSError as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(f'--workdir={self._workdir}: cannot write metrics.jsonl ({error.strerror})')

    def _keeps(self, line: str, first_step: int) -> bool:
        record = parse_record(line)
        return record is not None and (record.get('mode') != self._mode or record.get('step', -1) < first_step)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one line and hands it to the operating system.

        Raises:
          UserError: the line could not be written.
        """
        try:
            self._file.write(json.dumps({'mode': self._mode, 'step': step, **scalars}) + '\n')
            self._file.flush()
        except OSError as error:
            raise self._cannot_write(error) from error

    def fileno(self) -> int:
        """The descriptor of the file."""
        return self._file.fileno()

    def last(self) -> dict[str, float]:
        """The logs of this mode's last logged step, without what probes found; empty without one."""
        records = [r for r in read_records(self._file.name) if r['mode'] == self._mode and 'images_per_second' in r]
        extra = ('mode', 'step', 'epoch', 'images_per_second')
        return {k: v for k, v in records[-1].items() if k not in extra} if records else {}

    def close(self) -> None:
        """Closes the file; what could not be written was told before."""
        with contextlib.suppress(OSError):
            self._file.close()


class Progress:
    """A bar on a terminal; elsewhere a line every `every_seconds`.

    Args:
      what: a word for the phase.
      total_images: of the whole run.
      done_images: that an earlier run has done.
      every_seconds: between two lines.
      shown: False says nothing at all, for all replicas but one.
    """

    def __init__(self, what: str, total_images: int, done_images: int, every_seconds: float, shown: bool):
        self._what, self._total, self._every, self._shown = what, total_images, every_seconds, shown
        self._is_terminal = shown and sys.stderr.isatty()
        self._bar = tqdm.tqdm(
            desc=what,
            total=total_images,
            initial=done_images,
            unit=' images',
            unit_scale=True,
            smoothing=0.05,
            disable=not self._is_terminal,
            dynamic_ncols=True,
        )
        self._last_line = None

    def update(
        self,
        images: int,
        done_images: int,
        rate: float,
        now: float,
        loss: float | None,
        accuracies: Mapping[str, float] | None = None,
    ):
        """Shows `images` more; `loss` is None where it was not fetched, accuracies are in 0..1."""
        percent = {name: f'{100 * value:.1f} %' for name, value in (accuracies or {}).items()}
        if self._is_terminal:
            if loss is not None:
                self._bar.set_postfix({'loss': f'{loss:.4f}', **percent}, refresh=False)
            self._bar.update(images)
        elif self._shown and loss is not None and (self._last_line is None or now - self._last_line >= self._every):
            self._last_line = now
            left = datetime.timedelta(seconds=round((self._total - done_images) / rate)) if rate else '?'
            logging.info(
                '%s: %d of %d images, loss %.4f, %s%.1f images/s, %s left',
                self._what,
                done_images,
                self._total,
                loss,
                ''.join(f'{name} {value}, ' for name, value in percent.items()),
                rate,
                left,
            )

    def close(self) -> None:
        self._bar.close()


def mean_and_std(values: Sequence[float]) -> dict[str, Any]:
    """`{'mean', 'std', 'values'}`; the standard deviation is the sample's, 0 for one value."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {'mean': statistics.fmean(values), 'std': std, 'values': list(values)}


def choice_in_words(chosen: Mapping[str, Any] | Sequence[Mapping[str, Any]], seeds: Sequence[int] = ()) -> str:
    """What was chosen: 'k = 20, temperature 0.07 (top-1 79.3 %)'; of several seeds that of each.

    Args:
      chosen: settings by name, and `held_out_top1`, their top-1 in 0..1 on the images they were chosen on.
      seeds: where `chosen` is a list, whose it is.
    """
    if not isinstance(chosen, Mapping):
        return '; '.join(f'seed {seed}: {choice_in_words(one)}' for seed, one in zip(seeds, chosen, strict=True))
    words = [
        f'{name.replace("_", " ")} {"= " * (len(name) == 1)}{value:.4g}'
        for name, value in chosen.items()
        if name != 'held_out_top1' and isinstance(value, (int, float))
    ]
    return f'{", ".join(words)} (top-1 {100 * chosen["held_out_top1"]:.1f} %)'


def accuracy_table(title: str, rows: Mapping[str, Sequence[float]]) -> str:
    """A table of top-1 accuracies in percent; with several seeds their mean, spread and values.

    Args:
      title: of the first column.
      rows: name -> accuracies in 0..1, one per seed.
    """
    seeds = max(len(values) for values in rows.values())
    headers = [title, 'top-1 %'] + (['std', 'each seed'] if seeds > 1 else [])
    lines = []
    for name, values in rows.items():
        percent = mean_and_std([100 * value for value in values])
        line = [name, f'{percent["mean"]:.2f}']
        if seeds > 1:
            line += [f'{percent["std"]:.2f}', '  '.join(f'{value:.2f}' for value in percent['values'])]
        lines.append(line)
    return tabulate.tabulate(lines, headers, disable_numparse=True, colalign=('left', 'right')[:2])
