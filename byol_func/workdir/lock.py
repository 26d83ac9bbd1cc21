"""Locks a workdir, so that only one run at a time uses it."""

import contextlib
import json
import os
import pathlib
import socket
from collections.abc import Iterator

import filelock

from byol_func.errors import UserError
from byol_func.runtime import collectives
from byol_func.workdir.files import removed


@contextlib.contextmanager
def locked(workdir: str) -> Iterator[None]:
    """Locks the workdir in this context and creates it if needed; the first replica does so for all.

    A run that ends with a `UserError` before it has written more than its config, command and preview leaves the
    workdir as it was. The lock belongs to the process and is released when the process ends, however it ends.

    Raises:
      UserError: another run holds the lock, or the workdir is not writable.
    """
    if collectives.replica_index() > 0:
        yield
        return
    folder = pathlib.Path(workdir)
    owner = folder / '.lock.owner'
    lock = filelock.FileLock(folder / '.lock')
    try:
        before = _contents(folder)
        was_empty = not folder.exists() or not any(folder.iterdir())
        new = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        owner.write_text(json.dumps({'process': os.getpid(), 'host': socket.gethostname()}))
    except filelock.Timeout:
        raise UserError(
            f'--workdir={workdir}: another run is using it{_who(owner)}; wait until it ends or choose another '
            '--workdir, with --checkpoint=FILE to start from one of its checkpoints'
        ) from None
    except (OSError, NotImplementedError) as error:  # Older filelocks raise the latter where flock is missing.
        lock.release()
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'--workdir={workdir}: cannot write there ({reason})') from error
    try:
        yield
    except UserError:
        _undo(folder, before)
        raise
    finally:
        with contextlib.suppress(OSError):
            owner.unlink(missing_ok=True)
            if was_empty and [path.name for path in folder.iterdir()] == ['.lock']:
                (folder / '.lock').unlink()
                for path in new:
                    path.rmdir()
        lock.release()


def check_still_there(workdir: str) -> None:
    """Checks, on the first replica and within `locked`, that the workdir is the folder that was locked.

    Raises:
      UserError: it was removed or moved; files that were written since are alone in a new folder.
    """
    if collectives.replica_index() == 0 and not os.path.exists(os.path.join(workdir, '.lock.owner')):
        raise removed(workdir)


def _contents(folder: pathlib.Path) -> dict[pathlib.Path, bytes | int]:
    """Returns what every file of a workdir and its seeds holds if it `_comes_first`, and else when it was modified."""
    return {
        path: path.read_bytes() if _comes_first(path) else path.stat().st_mtime_ns
        for path in (*folder.glob('*'), *folder.glob('seed_*/**/*'))
        if path.is_file() and not path.name.startswith('.lock')
    }


def _comes_first(path: pathlib.Path) -> bool:
    """Returns whether a file is written before a run knows whether it can start."""
    return path.match('config*.json') or path.name in ('commands.txt', 'augmentations.png')


def _undo(folder: pathlib.Path, before: dict[pathlib.Path, bytes | int]) -> None:
    """Restores what `_comes_first` as it was before the run, if the run has written nothing else."""
    with contextlib.suppress(OSError):
        changed = [path for path, content in _contents(folder).items() if before.get(path) != content]
        if not all(map(_comes_first, changed)):
            return
        for path in changed:
            if isinstance(content := before.get(path), bytes):
                path.write_bytes(content)
            else:
                path.unlink()
                if path.parent != folder and not any(path.parent.iterdir()):
                    path.parent.rmdir()


def _who(owner: pathlib.Path) -> str:
    try:
        who = json.loads(owner.read_text())
        return f' (process {who["process"]} on {who["host"]})'
    except (OSError, ValueError, KeyError, TypeError):  # The file is just being created or removed.
        return ''
