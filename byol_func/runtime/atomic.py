"""Writes files atomically: a file is complete or absent, even if the writing process is killed."""

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, durable: bool = False, shared: bool = False) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path`; on exit, the file written there replaces `path`.

    If the body of the `with` raises, the temporary file is deleted and `path` is left unchanged. The folder is
    created if it does not exist.

    Args:
      path: the file to replace.
      durable: whether the file must survive a power cut once this returns.
      shared: whether several processes may write the file at the same time; the last one wins. A killed process
        then leaves its temporary file behind; without `shared`, the next writer overwrites it.

    Raises:
      OSError: the file cannot be written.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f'{path.name}.{uuid.uuid4().hex}.tmp' if shared else f'{path.name}.tmp')
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        if durable:
            _sync(temporary)
        os.replace(temporary, path)
        if durable and os.name == 'posix':  # Windows cannot sync a folder and does not need to.
            _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike, *parts: bytes | memoryview, durable: bool = False) -> None:
    """Writes the concatenated parts to `path` atomically, see `replacing`.

    Raises:
      OSError: the file cannot be written.
    """
    with replacing(path, durable=durable) as temporary, open(temporary, 'wb') as file:
        for part in parts:
            file.write(part)


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
