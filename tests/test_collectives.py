"""What replicas tell each other, in real processes."""

import datetime
import os
import socket
import time

from golden_processes import run_in_processes
import torch
import torch.distributed as dist

from byol_func.runtime import collectives


def _set_patience_of_devices(seconds: float) -> None:
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), dist.group.WORLD)


def _wait_for_the_first(rank, port):
    """When each of two came through; devices would not have waited so long."""
    dist.destroy_process_group()
    os.environ |= dict(
        WORLD_SIZE='2', RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    collectives.initialize(torch.device('cpu'))
    _set_patience_of_devices(1.0)
    with collectives.first_replica_first():
        if rank == 0:
            time.sleep(3.0)
        done = time.time()
    _set_patience_of_devices(60.0)
    return done


def test_the_others_wait_for_the_first_as_long_as_it_takes(tmp_path):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    first, second = run_in_processes(_wait_for_the_first, 2, tmp_path, port)
    assert first <= second
