"""Lets replicas tell each other why they end, so that each of them ends with one line about the cause."""

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Iterator

import torch.distributed as dist

from byol_func.errors import Stopped, UserError
from byol_func.runtime import collectives, launchers, rendezvous

_PATIENCE = 5.0  # Seconds after which a replica that has not said that it ends counts as lost.
_PATIENCE_AT_START = 60.0  # Seconds for the process that holds the store to start.
_PAUSE = 0.05


@contextlib.contextmanager
def shared(advice: str) -> Iterator[None]:
    """Ends this replica with the error of another one if that one is the reason why the work in this context failed.

    A replica that fails leaves its message in the store through which the processes found each other. Communication
    with it then fails on the others, or their launcher sends them SIGTERM; they look for its message.

    Args:
      advice: what to do if a replica was lost, that is, if it ended without a message.

    Raises:
      UserError: another replica has failed or was lost; the message says which one and why.
    """
    world = launchers.find()
    try:
        yield
    except Exception as error:
        if world is None or world.size == 1:
            raise
        with _sigterm_ignored():
            reason = _reason(error, world, advice)
        if reason is None:
            raise
        raise UserError(reason) from error


@contextlib.contextmanager
def _sigterm_ignored() -> Iterator[None]:
    """Ignores SIGTERM: torchrun sends it as soon as one process fails, while the others still look for the reason."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _reason(error: Exception, world: launchers.World, advice: str) -> str | None:
    """Returns why other replicas made this one end; None if its own error is the reason."""
    is_cause = not isinstance(error, Stopped) and not _is_failed_collective(error)
    own = f'{"" if isinstance(error, UserError) else f"{type(error).__name__}: "}{error}' if is_cause else ''
    others = [rank for rank in range(world.size) if rank != world.rank]
    try:
        ended = _exchange(own, world, others, waits=not is_cause or world.hosts_store)
    except (RuntimeError, OSError):  # The store is gone, and with it the process that held it.
        ended = {rank: '' for rank in others if rank or world.has_agent}
    if is_cause:
        return None
    for rank, message in ended.items():
        if message:
            return f'replica {rank} ended with an error: {message}'
    lost = [str(rank) for rank in others if rank not in ended]
    if isinstance(error, Stopped) and not lost:
        return None
    if len(lost) > 1:
        return f'replicas {", ".join(lost)} were lost; {advice}'
    return f'{f"replica {lost[0]}" if lost else "another replica"} was lost; {advice}'


def _exchange(own: str, world: launchers.World, others: list[int], waits: bool) -> dict[int, str]:
    """Tells the others that this replica ends, and returns the messages of those that end too, by rank.

    Args:
      own: the error of this replica; '' if it only follows others.
      world: the processes of the run.
      others: the other ranks.
      waits: whether to wait for the others.
    """
    if not world.hosts_store:  # PyTorch would print a page if nothing answered.
        _wait_until_open(world)
    store = rendezvous.store(world)
    store.set(f'ended_{world.rank}', own)
    collectives.hang_up()  # Others may wait for this replica.
    ended = _present(store, 'ended', others) if waits else []
    messages = {rank: store.get(f'ended_{rank}').decode() for rank in ended}
    store.set(f'left_{world.rank}', '')
    if world.hosts_store:  # The store ends with this process.
        _present(store, 'left', ended)
    return messages


def _wait_until_open(world: launchers.World) -> None:
    """Waits until the store answers; before the replicas have met, its process may still be starting."""
    deadline = time.monotonic() + (0.0 if dist.is_initialized() else _PATIENCE_AT_START)
    while True:
        try:
            return socket.create_connection((world.address, world.port), timeout=_PATIENCE).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE)


def _is_failed_collective(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and ('gloo' in text or 'nccl' in text)


def _present(store: dist.Store, what: str, ranks: list[int]) -> list[int]:
    """Returns the ranks that have set their key, after waiting for it; `store.wait` would print warnings."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        found = [rank for rank in ranks if store.check([f'{what}_{rank}'])]
        if found == ranks or time.monotonic() > deadline:
            return found
        time.sleep(_PAUSE)
