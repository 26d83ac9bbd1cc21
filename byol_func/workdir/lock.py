"""One run at a time in a workdir."""

import contextlib
import json
import os
import pathlib
import socket
from collections.abc import Iterator

import filelock

from byol_func.errors import UserError
from byol_func.runtime import collectives


@contextlib.contextmanager
def locked(workdir: str) -> Iterator[None]:
    """Holds the workdir, which is made if it is not there; the first replica does so for all.

    A run that is refused before it has written anything leaves no new folder behind.

    The lock belongs to the process and goes with it, however it ends.

    Raises:
      UserError: another run holds it, or nothing can be written there.
    """
    if collectives.replica_index() > 0:
        yield
        return
    folder = pathlib.Path(workdir)
    owner = folder / '.lock.owner'
    lock = filelock.FileLock(folder / '.lock')
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        owner.write_text(json.dumps({'process': os.getpid(), 'host': socket.gethostname()}))
    except filelock.Timeout:
        raise UserError(
            f'--workdir={workdir}: another run is at work there{_who(owner)}; wait for its end or choose '
            'another --workdir, with --checkpoint=FILE to start from one of its checkpoints'
        ) from None
    except OSError as error:
        lock.release()
        raise UserError(f'--workdir={workdir}: cannot write there ({error.strerror})') from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            owner.unlink(missing_ok=True)
            if is_new and [path.name for path in folder.iterdir()] == ['.lock']:
                (folder / '.lock').unlink()
                folder.rmdir()
        lock.release()


def _who(owner: pathlib.Path) -> str:
    try:
        who = json.loads(owner.read_text())
        return f' (process {who["process"]} on {who["host"]})'
    except (OSError, ValueError, KeyError, TypeError):  # Just made, or just going.
        return ''
