"""The memory of a step by the number of its micro-batches: estimated for ResNet-50, measured for a small network.

    python benchmarks/accumulation.py

The estimate follows from shapes (`costs.peak_bytes`): what the operations of a step hold at once besides the state and
the batch. The measured number is the largest resident memory of a process that does two steps on a CPU, without what it
holds before the first one; parameters, moments and gradients of the small network are little of that.
"""

import multiprocessing
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from byol_func import byol_experiment
from byol_func.experiment import step_arguments
from byol_func.runtime import costs
from configs import byol, digits

MICRO_BATCHES = (1, 2, 4)
BATCH = 256


def estimated(k: int) -> float:
    """Returns the GiB of a step of ResNet-50 on 224 pixels, in float32."""
    config = byol.get_config('100').copy_and_resolve_references()
    config.batch_size, config.accumulate_steps, config.precision = BATCH, k, 'float32'
    experiment = byol_experiment.make(config, num_examples=10_000, num_classes=1000, image_shape=(3, 256, 256))
    return costs.peak_bytes(experiment.update, *step_arguments(experiment, (3, 256, 256))) / 2**30


def largest_resident_kib() -> int:
    """Returns the largest resident memory so far; `ru_maxrss` would include that of the process before `exec`."""
    lines = pathlib.Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM:'))


def measured(k: int) -> float:
    """Returns the MiB that two steps of the digits network take on 16 pixels."""
    torch.set_num_threads(1)
    config = digits.get_config().copy_and_resolve_references()
    config.batch_size, config.accumulate_steps, config.image_size, config.precision = BATCH, k, 16, 'float32'
    experiment = byol_experiment.make(config, num_examples=10_000, num_classes=10, image_shape=(1, 16, 16))
    state, *arguments = step_arguments(experiment, (1, 16, 16))
    before = largest_resident_kib()
    for _ in range(2):
        state, _ = experiment.update(state, *arguments)
    return (largest_resident_kib() - before) / 2**10


def main() -> None:
    """Prints the table; every measurement has a process of its own."""
    print(f'batch {BATCH}\nmicro-batches  ResNet-50, 224 px, estimated  digits network, 16 px, measured')
    for k in MICRO_BATCHES:
        with multiprocessing.get_context('spawn').Pool(1) as pool:
            memory = pool.apply(measured, (k,))
        print(f'{k:13} {estimated(k):24.1f} GiB {memory:27.0f} MiB', flush=True)


if __name__ == '__main__':
    main()
