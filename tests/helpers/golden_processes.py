"""Runs a function in several processes that form one gloo group, as several devices would."""

import datetime
import pathlib
from collections.abc import Callable

import torch
import torch.distributed as dist


def run_in_processes(function: Callable, world_size: int, directory: pathlib.Path, *args) -> list:
    """Calls `function(rank, *args)` in `world_size` processes; returns their results by rank.

    The function must be importable, and arguments and results are pickled.
    """
    # A fork server imports torch once, for all calls.
    torch.multiprocessing.get_context('forkserver').set_forkserver_preload(['torch'])
    torch.multiprocessing.start_processes(
        _main,
        args=(world_size, directory, function, args),
        nprocs=world_size,
        start_method='forkserver',
    )
    paths = [directory / f'result{rank}.pt' for rank in range(world_size)]
    return [torch.load(path, weights_only=False) for path in paths]


def _main(rank, world_size, directory, function, args):
    torch.set_num_threads(1)
    rendezvous = f'file://{directory}/rendezvous'
    dist.init_process_group(
        'gloo',
        init_method=rendezvous,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(minutes=2),  # Should one fail while another waits for it.
    )
    torch.save(function(rank, *args), directory / f'result{rank}.pt')
    dist.barrier()
    dist.destroy_process_group()
