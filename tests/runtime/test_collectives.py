"""What replicas tell each other, in real processes."""

import datetime
import os
import socket
import time

import torch
import torch.distributed as dist

from byol_func.runtime import collectives
from golden_processes import run_in_processes


def _set_patience_of_devices(seconds: float) -> None:
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), dist.group.WORLD)


def _wait_for_the_first(rank, port):
    """When each of two came through; devices would not have waited so long."""
    dist.destroy_process_group()
    os.environ |= dict(
        WORLD_SIZE='2', RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port)
    )
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


def _mean_of_a_tree(rank):
    """Means, derivatives and the number of collectives that each took."""
    calls = []
    all_reduce = collectives.funcol.all_reduce

    def counted(x, *args):
        calls.append(x.dtype)
        return all_reduce(x, *args)

    collectives.funcol.all_reduce = counted
    images = torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    tree = {
        'w': images + rank,
        'b': [torch.full((3,), 1.0 + rank), torch.tensor(4.0 * rank, dtype=torch.float64)],
        'none': None,
        'empty': torch.zeros(0),
        'loss': torch.tensor(0.1 * (rank + 1)),
        'wide': torch.tensor([1 / 3 + rank], dtype=torch.float64),
    }
    means = collectives.pmean(tree)
    forward = [calls.copy(), calls.clear()][0]
    # Every replica weighs its own copy of the means; the derivative is the mean of the weights.
    loss = lambda x, y: sum(((1 + rank) * leaf.sum()) for leaf in collectives.pmean((x, y)))
    gradients = torch.func.grad(loss, argnums=(0, 1))(tree['w'], tree['loss'])
    backward = [calls.copy(), calls.clear()][0]
    assert collectives.pmean({}) == {} and collectives.pmean(()) == () and not calls
    return means, gradients, forward, backward


def test_a_mean_takes_one_collective_for_each_dtype(tmp_path):
    shares = run_in_processes(_mean_of_a_tree, 2, tmp_path)
    for means, gradients, forward, backward in shares:
        assert forward == [torch.float32, torch.float64]
        assert backward == [torch.float32, torch.float32]  # There and back.
        assert torch.equal(means['w'], torch.arange(24.0).view(1, 2, 3, 4) + 0.5)
        assert torch.equal(means['b'][0], torch.full((3,), 1.5)) and means['b'][1].item() == 2.0
        assert means['b'][1].dtype == means['wide'].dtype == torch.float64
        assert means['wide'].item() == (1 / 3 + (1 / 3 + 1)) / 2 and means['empty'].shape == (0,)
        assert torch.equal(means['loss'], (torch.tensor(0.1) + torch.tensor(0.2)) / 2)
        assert torch.equal(gradients[0], torch.full((1, 2, 3, 4), 1.5)) and gradients[1].item() == 1.5
