"""Files that are whole or not there, whatever ends the process that writes them."""

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, durable: bool = False, shared: bool = False) -> Iterator[pathlib.Path]:
    """Yields a temporary name beside `path`; what was written there takes the place of `path` at the end.

    After an error inside of the `with` nothing is left behind, and `path` is as it was. The folder is made
    if it is not there.

    Args:
      path: of the file.
      durable: whether the file must survive a power cut once this returns.
      shared: whether several processes may write the file at the same time; the last one wins. After a kill
        their temporary files stay, where otherwise the next writer overwrites the one there is.

    Raises:
      OSError: it cannot be written.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f'{path.name}.{uuid.uuid4().hex}.tmp' if shared else f'{path.name}.tmp')
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        if durable:
            _sync(temporary)
        os.replace(temporary, path)
        if durable and os.name == 'posix':  # Windows can sync no folder and need not.
            _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike, *parts: bytes | memoryview, durable: bool = False) -> None:
    """Writes the parts one after the other, the whole file or none of it.

    Raises:
      OSError: it cannot be written.
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
