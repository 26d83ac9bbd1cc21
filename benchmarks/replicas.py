"""What replicas cost on a CPU: one step alone and shared, a meeting of the hosts, the mean of gradients, buckets.

    python benchmarks/replicas.py
    torchrun --nproc-per-node=2 benchmarks/replicas.py

Every number is milliseconds of the clock and milliseconds of CPU time of one process. On cores that are shared, only
the CPU time can be compared.
"""

import pathlib
import sys
import time
from collections.abc import Callable

import optree
import torch
import torch.distributed as dist

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from byol_func import byol_experiment
from byol_func.runtime import collectives, compilation, memory
from byol_func.utils import dataset
from configs import digits

BUCKETS = 4


def measure(what: str, run: Callable[[], object], calls: int) -> None:
    """Prints the time of one call; replica 0 speaks."""
    run()
    collectives.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if collectives.replica_index() == 0:
        print(f'{what:44} {1e3 * wall / calls:9.2f} {1e3 * cpu / calls:9.2f}', flush=True)


def make_step() -> Callable[[], None]:
    """Returns a function that does one traced step of the digits network on this replica's share of the batch."""
    config = digits.get_config().copy_and_resolve_references()
    config.precision = 'float32'
    data, _ = dataset.load_train_and_test(**config.dataset)
    experiment = byol_experiment.make(
        config, num_examples=data.num_examples, num_classes=data.num_classes, image_shape=data.image_shape
    )
    rank, replicas = collectives.replica_index(), collectives.num_replicas()
    batch = dataset.train_batch(data, 0, seed=0, batch_size=experiment.batch_size, rank=rank, num_replicas=replicas)
    draws = optree.tree_map(lambda d: d.chunk(replicas)[rank], experiment.sample(0))
    update = compilation.compile_update(experiment.update, compiled=None, num_steps=1000)
    state = experiment.init()

    def step() -> None:
        nonlocal state
        state, _ = update(state, torch.tensor(0), draws, batch)

    return step


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    memory.keep_freed_memory()
    started = collectives.initialize(torch.device('cpu'))
    if collectives.replica_index() == 0:
        print(f'{started or "one process"}, one thread each\n{"":44} {"clock ms":>9} {"CPU ms":>9}')
    step = make_step()
    measure('step of the digits network, batch 64 in all', step, 20)
    if collectives.num_replicas() > 1:
        measure('a meeting of the hosts', lambda: collectives.largest([0, -1]), 200)
        for millions in (0.4, 3.2):
            leaves = [torch.randn(int(1e6 * millions) // 60) for _ in range(60)]
            measure(f'pmean of {millions} million floats', lambda leaves=leaves: collectives.pmean(leaves), 10)
        block, matrix = torch.randn(3_200_000), torch.randn(400, 400)

        def after() -> None:
            for _ in range(40 * BUCKETS):
                matrix @ matrix
            dist.all_reduce(block)

        def during() -> None:
            handles = []
            for part in block.split(len(block) // BUCKETS):
                for _ in range(40):
                    matrix @ matrix
                handles.append(dist.all_reduce(part, async_op=True))
            for handle in handles:
                handle.wait()

        for _ in range(3):
            measure('work, then one block of 3.2 million floats', after, 4)
            measure(f'work, with {BUCKETS} buckets sent meanwhile', during, 4)
    collectives.leave()


if __name__ == '__main__':
    main()
