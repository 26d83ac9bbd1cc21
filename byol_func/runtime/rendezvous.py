"""Lets the processes of a launcher find each other."""

import functools
import time

import torch.distributed as dist
from absl import logging

from byol_func.errors import UserError, counted
from byol_func.runtime import launchers

_SECONDS_UNTIL_TOLD, _PATIENCE = 10.0, 1800.0


@functools.cache
def store(world: launchers.World) -> dist.Store:
    """Returns the store through which the processes of a launcher find each other.

    The store of torchrun's agent outlives processes that die. The processes started in their place must not
    find the old addresses, so every attempt has its own key prefix.
    """
    store = dist.TCPStore(world.address, world.port, world.size, world.hosts_store, wait_for_workers=False)
    return dist.PrefixStore(f'attempt_{world.attempt}', store)


def wait_for_all(world: launchers.World) -> None:
    """Waits until all processes have started; unlike in PyTorch, a signal or the error of another one ends the wait.

    Raises:
      UserError: some processes cannot be found or do not start.
    """
    try:
        here, since, told = store(world), time.monotonic(), False
        here.set(f'here_{world.rank}', '')
        while absent := [rank for rank in range(world.size) if not here.check([f'here_{rank}'])]:
            if any(here.check([f'ended_{rank}']) for rank in absent):
                raise dist.DistError('another replica has ended')  # `endings.shared` finds out which one, and why.
            if not told and time.monotonic() > since + _SECONDS_UNTIL_TOLD:
                told = True
                logging.info('replica %d waits at %s:%d for %s', world.rank, world.address, world.port, absent)
            if time.monotonic() > since + _PATIENCE:
                raise UserError(
                    f'MASTER_ADDR={world.address}: {len(absent)} of {counted(world.size, "replica")} did not start '
                    f'within {_PATIENCE / 60:.0f} minutes (rank {", ".join(map(str, absent))})'
                )
            time.sleep(0.1)
    except dist.DistNetworkError as error:
        first = 'cannot be opened' if world.hosts_store else 'does not answer'
        raise UserError(
            f'MASTER_ADDR={world.address}, MASTER_PORT={world.port}: {first} ({str(error).splitlines()[0]}); expected '
            'the machine of replica 0 and a port of its own for every run'
        ) from error
