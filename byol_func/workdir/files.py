"""Reads and writes the files of a workdir: JSON, text, npz and `metrics.jsonl`."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from byol_func.errors import UserError
from byol_func.runtime import atomic


@contextlib.contextmanager
def reporting_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turns an OSError in this context, which writes a file of a workdir, into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        path = pathlib.Path(path)
        raise UserError(f'--workdir={path.parent}: cannot write {path.name} ({error.strerror})') from error


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes indented JSON atomically: the file is either complete or absent."""
    write_text(path, json.dumps(content, indent=2) + '\n')


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the object in a JSON file; an empty one if the file is missing or damaged."""
    try:
        content = json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_text(path: str | os.PathLike, content: str) -> None:
    """Writes a text file atomically: it is either complete or absent."""
    with reporting_errors(path):
        atomic.write_bytes(path, content.encode())


def write_npz(path: str | os.PathLike, /, **arrays: Any) -> None:
    """Writes named numpy arrays, none of them of objects, atomically: the file is either complete or absent."""
    import numpy as np

    with reporting_errors(path), atomic.replacing(path) as temporary, open(temporary, 'wb') as file:
        np.savez(file, **arrays)


def parse_record(line: str | bytes) -> dict[str, Any] | None:
    """Returns the object in a line of JSON; None for a partial line, which a killed process may leave behind."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def read_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the records of `metrics.jsonl` or `eval.jsonl` with a mode and a step; none if there is no file.

    Raises:
      OSError: the file cannot be read.
    """
    path = pathlib.Path(path)
    records = map(parse_record, path.read_bytes().splitlines() if path.exists() else ())
    return [r for r in records if r and isinstance(r.get('mode'), str) and isinstance(r.get('step'), int)]


def removed(workdir: str | os.PathLike) -> UserError:
    """Returns a UserError that the workdir of a run is gone."""
    return UserError(f'--workdir={os.fspath(workdir)}: was removed or moved during the run')


class MetricsFile:
    """Writes `metrics.jsonl`: one JSON object per logged step, for all modes that ran in the workdir.

    A resumed run first drops the lines after its checkpoint, so that no step appears twice.
    """

    def __init__(self, workdir: str | os.PathLike, mode: str, first_step: int):
        self._mode, self._workdir = mode, workdir
        path = pathlib.Path(workdir) / 'metrics.jsonl'
        with reporting_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                kept = [line for line in path.read_bytes().splitlines() if self._keeps(line, first_step)]
                atomic.write_bytes(path, b''.join(line + b'\n' for line in kept))
            self._file = open(path, 'a')  # noqa: SIM115 (`close` closes it)

    def _keeps(self, line: bytes, first_step: int) -> bool:
        record = parse_record(line)
        return record is not None and (record.get('mode') != self._mode or record.get('step', -1) < first_step)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one line and flushes it to the operating system.

        Raises:
          UserError: the line could not be written, or the file is gone.
        """
        if not os.path.exists(self._file.name):
            raise removed(self._workdir)
        with reporting_errors(self._file.name):
            self._file.write(json.dumps({'mode': self._mode, 'step': step, **scalars}) + '\n')
            self._file.flush()

    def fileno(self) -> int:
        """Returns the descriptor of the file."""
        return self._file.fileno()

    def last(self) -> dict[str, float]:
        """Returns the logs of this mode's last logged step, without the scalars of probes; empty if there is none."""
        records = [r for r in read_records(self._file.name) if r['mode'] == self._mode and 'images_per_second' in r]
        extra = ('mode', 'step', 'epoch', 'images_per_second')
        return {k: v for k, v in records[-1].items() if k not in extra} if records else {}

    def close(self) -> None:
        """Closes the file; ignores errors, which `write` has already raised."""
        with contextlib.suppress(OSError):
            self._file.close()


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Returns the leaves of a config under dotted names such as 'network.encoder_class'."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        is_tree = isinstance(value, Mapping) and value
        flat |= flatten(value, f'{prefix}{key}.') if is_tree else {f'{prefix}{key}': value}
    return flat
