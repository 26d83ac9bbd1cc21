"""Lets the processes of a launcher find each other."""

import functools
import time

import torch.distributed as dist
from absl import logging

from byol_func.errors import UserError, counted
from byol_func.runtime import launchers

# In seconds.
_UNTIL_TOLD, _UNTIL_REPLACED, _PAUSE = 10.0, 3.0, 0.1
_PATIENCE, _PATIENCE_OF_THE_LOST = 1800.0, 60.0
_joined: dict[launchers.World, int] = {}


def store(world: launchers.World) -> dist.Store:
    """Returns the part of the launcher's store that belongs to this start of the processes.

    The store of torchrun's agent outlives processes that die. The processes started in their place must not find the
    old addresses, so replica 0 opens a new meeting whenever it starts, and the others join the newest one that nobody
    has joined with their rank. The agents' counts of restarts would not do: an agent that replaces a lost one starts
    again at 0.

    Raises:
      TimeoutError: replica 0 has not opened a meeting.
    """
    deadline = time.monotonic() + _PATIENCE_OF_THE_LOST
    while not _join(world):
        if time.monotonic() > deadline:
            raise TimeoutError('replica 0 has not started')
        time.sleep(_PAUSE)
    return dist.PrefixStore(f'meeting_{_joined[world]}', _whole_store(world))


@functools.cache
def _whole_store(world: launchers.World) -> dist.Store:
    return dist.TCPStore(world.address, world.port, world.size, world.hosts_store, wait_for_workers=False)


def _join(world: launchers.World, leave: bool = False) -> bool:
    """Tries to join a meeting, if this process is in none; `leave` goes on to a newer one, if there is any."""
    whole = _whole_store(world)
    if world.rank == 0 and world not in _joined:
        _joined[world] = whole.add('meetings', 1)
    elif world.rank > 0 and (leave or world not in _joined):
        newest = whole.add('meetings', 0)
        if newest > _joined.get(world, 0) and whole.add(f'meeting_{newest}/joined_{world.rank}', 1) == 1:
            _joined[world] = newest
    return world in _joined


def _absent(world: launchers.World) -> list[int]:
    """Returns the ranks that are not in the newest meeting, or [0] until replica 0 has seen all of them there.

    Raises:
      DistError: a replica has ended.
    """
    if not _join(world, leave=True):
        return [0]
    here = store(world)
    here.set(f'here_{world.rank}', '')
    absent = [rank for rank in range(world.size) if not here.check([f'here_{rank}'])]
    if any(here.check([f'ended_{rank}']) for rank in range(world.size)):
        meeting = _joined[world]
        time.sleep(_UNTIL_REPLACED)  # It may have ended in an earlier start, and torchrun is replacing it.
        if _join(world, leave=True) and _joined[world] != meeting:
            return [0]
        raise dist.DistError('another replica has ended')  # `endings.shared` finds out which one, and why.
    if world.rank == 0 and not absent:
        here.set('all_here', '')
    # A replica 0 that has died in the meantime does not set it.
    return absent if absent or here.check(['all_here']) else [0]


def wait_for_all(world: launchers.World) -> None:
    """Waits until all processes have started; unlike in PyTorch, a signal or the error of another one ends the wait.

    Raises:
      UserError: some processes cannot be found or do not start.
    """
    try:
        since, told = time.monotonic(), False
        while absent := _absent(world):
            if not told and time.monotonic() > since + _UNTIL_TOLD:
                told = True
                logging.info('replica %d waits at %s:%d for %s', world.rank, world.address, world.port, absent)
            if time.monotonic() > since + _PATIENCE:
                raise UserError(
                    f'MASTER_ADDR={world.address}: {len(absent)} of {counted(world.size, "replica")} did not start '
                    f'within {_PATIENCE / 60:.0f} minutes (rank {", ".join(map(str, absent))})'
                )
            time.sleep(_PAUSE)
    except dist.DistNetworkError as error:
        first = 'cannot be opened' if world.hosts_store else 'does not answer'
        raise UserError(
            f'MASTER_ADDR={world.address}, MASTER_PORT={world.port}: {first} ({str(error).splitlines()[0]}); expected '
            'the machine of replica 0 and a port of its own for every run'
        ) from error
