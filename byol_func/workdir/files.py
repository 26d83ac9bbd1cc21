"""What a run tells: a progress bar or lines, `metrics.jsonl`, `summary.json` and tables."""

import contextlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from byol_func.errors import UserError
from byol_func.runtime import atomic


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes readable JSON; the file is whole or not there."""
    write_text(path, json.dumps(content, indent=2) + '\n')


def write_text(path: str | os.PathLike, content: str) -> None:
    """Writes a text; the file is whole or not there."""
    path = pathlib.Path(path)
    try:
        atomic.write_bytes(path, content.encode())
    except OSError as error:
        raise UserError(f'--workdir={path.parent}: cannot write {path.name} ({error.strerror})') from error


def write_npz(path: str | os.PathLike, /, **arrays: Any) -> None:
    """Writes numpy arrays, none of objects, under their names; the file is whole or not there."""
    import numpy as np

    path = pathlib.Path(path)
    try:
        with atomic.replacing(path) as temporary, open(temporary, 'wb') as file:
            np.savez(file, **arrays)
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
      OSError: the file cannot be read.
    """
    path = pathlib.Path(path)
    records = map(parse_record, path.read_bytes().splitlines() if path.exists() else ())
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
                kept = [line for line in path.read_bytes().splitlines() if self._keeps(line, first_step)]
                atomic.write_bytes(path, b''.join(line + b'\n' for line in kept))
            self._file = open(path, 'a')  # noqa: SIM115 (`close` closes it)
        except OSError as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(f'--workdir={self._workdir}: cannot write metrics.jsonl ({error.strerror})')

    def _keeps(self, line: bytes, first_step: int) -> bool:
        record = parse_record(line)
        return record is not None and (record.get('mode') != self._mode or record.get('step', -1) < first_step)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one line and hands it to the operating system.

        Raises:
          UserError: the line could not be written, or the file is gone.
        """
        if not os.path.exists(self._file.name):
            raise UserError(f'--workdir={self._workdir}: was removed or moved away while the run was at work')
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


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """The leaves of a config under names such as 'network.encoder_class'."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        is_tree = isinstance(value, Mapping) and value
        flat |= flatten(value, f'{prefix}{key}.') if is_tree else {f'{prefix}{key}': value}
    return flat
