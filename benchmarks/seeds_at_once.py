"""Measures `torch.func.vmap` over the update: several seeds in one step, beside one seed after the other.

  python benchmarks/seeds_at_once.py

The step is that of configs/digits.py, traced, on one thread. The times are those of the processor, so work of others
on the same machine counts less. Prints how much sooner all seeds have made their step, and the range over the rounds.
"""

import argparse
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import optree
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import byol_func  # noqa: E402
from byol_func import byol_experiment  # noqa: E402
from byol_func.experiment import step_arguments  # noqa: E402
from byol_func.runtime import compilation, precision  # noqa: E402

IMAGE_SHAPE = (1, 8, 8)


def make(seed: int, batch_size: int) -> byol_experiment.Experiment:
    """Returns the pre-training of the digits with another seed and batch."""
    config = byol_func.get_config('digits', batch_size=batch_size, random_seed=seed, precision='float32')
    return byol_experiment.make(config, num_examples=1442, num_classes=10, image_shape=IMAGE_SHAPE)


def stack(trees: list[Any]) -> Any:
    """Returns one tree whose leaves have a first dimension for the seeds."""
    return optree.tree_map(lambda *leaves: torch.stack(leaves), *trees)


def seconds(steps_and_arguments: list[tuple[Callable, tuple]], steps: int, rounds: int) -> list[list[float]]:
    """Returns, for each round in which all take turns, the time of a step of each on the processor."""
    states = [arguments[0] for _, arguments in steps_and_arguments]
    times: list[list[float]] = []
    for _ in range(rounds + 1):  # The first round traces, and does not count.
        times.append([])
        for i, (update, (_, *rest)) in enumerate(steps_and_arguments):
            start = time.process_time()
            for _ in range(steps):
                states[i], _ = update(states[i], *rest)
            times[-1].append((time.process_time() - start) / steps)
    return times[1:]


def main() -> None:
    """Prints a line for each number of seeds and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=10, help='steps of each in a round')
    parser.add_argument('--rounds', type=int, default=5, help='rounds')
    flags = parser.parse_args()
    torch.set_num_threads(1)
    precision.set_backend('float32')
    for seeds, batch_size in ((8, 16), (4, 64)):
        experiments = [make(seed, batch_size) for seed in range(seeds)]
        arguments = [step_arguments(experiment, IMAGE_SHAPE) for experiment in experiments]
        update = experiments[0].update
        traced = [
            compilation.compile_update(step, compiled=None, num_steps=500)
            for step in (update, torch.func.vmap(update, in_dims=(0, None, 0, 0)))
        ]
        times = seconds(list(zip(traced, (arguments[0], stack_all(arguments)), strict=True)), flags.steps, flags.rounds)
        one, all_seeds = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        gains = sorted(seeds * one / all_seeds for one, all_seeds in times)
        print(
            f'{seeds} seeds x batch {batch_size:2d}: one step {one:.0f} ms, a step of all seeds {all_seeds:.0f} ms, '
            f'{statistics.median(gains):.1f} times as fast as one after the other ({gains[0]:.1f} to {gains[-1]:.1f})',
            flush=True,
        )


def stack_all(arguments: list[tuple]) -> tuple:
    """Returns the arguments of the vmapped update: the step is the same for all seeds."""
    states, steps, draws, inputs = zip(*arguments, strict=True)
    return stack(list(states)), steps[0], stack(list(draws)), stack(list(inputs))


if __name__ == '__main__':
    main()
