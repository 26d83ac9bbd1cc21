"""Processes against threads on one machine: images/s, the share of collectives, CPU time, and memory per process.

    python benchmarks/scaling.py --encoder=ResNet18 --size=32
    python benchmarks/scaling.py --digits

Starts one process with one and with two threads, and two processes with one and with two threads each, in turns, on
traced steps of a batch of `--batch` images in all. The collectives of a step are counted, and the time that a process
waits for them is measured, by PyTorch's profiler, in a step of its own. The batch is ready before, so reading images is
not part of it. Prints a line for each turn, about replica 0:

  waiting  the share of a step spent in collectives, which is gloo and the wait for the slower process
  CPU      seconds of CPU time of the process per second of the clock
  all      all threads of the process, those of gloo and OpenMP included

What two processes with one thread each lose against one process with two threads is collectives and fixed costs; what
two processes with two threads each lose beyond that is oversubscription.
"""

import os
import pathlib
import subprocess
import sys
import time

import optree
import torch
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from byol_func import byol_experiment
from byol_func.experiment import step_arguments
from byol_func.runtime import collectives, compilation, memory
from configs import byol, digits

FLAGS = flags.FLAGS
SHAPES = ((1, 1), (1, 2), (2, 1), (2, 2))  # Processes, threads of each.


def make_step():
    """Returns a function that does one traced step on this replica's share of a batch."""
    config = (digits.get_config() if FLAGS.digits else byol.get_config('100')).copy_and_resolve_references()
    config.batch_size, config.precision, shape = FLAGS.batch, 'float32', (1, 8, 8)
    if not FLAGS.digits:
        config.image_size, config.network.encoder_class = FLAGS.size, FLAGS.encoder
        shape = (3, FLAGS.size, FLAGS.size)
    experiment = byol_experiment.make(config, num_examples=10_000, num_classes=10, image_shape=shape)
    update = compilation.compile_update(experiment.update, compiled=None, num_steps=1000)
    state, *arguments = optree.tree_map(torch.clone, step_arguments(experiment, shape))

    def step() -> None:
        nonlocal state
        state, _ = update(state, *arguments)

    return step


def measure() -> None:
    """Measures one process of a turn; replica 0 speaks."""
    torch.set_num_threads(FLAGS.threads)
    memory.keep_freed_memory()
    collectives.initialize(torch.device('cpu'))
    step = make_step()
    step()
    collectives.barrier()
    begin, cpu = time.perf_counter(), time.process_time()
    for _ in range(FLAGS.steps):
        step()
    collectives.barrier()
    seconds = time.perf_counter() - begin
    rate, cpu = FLAGS.batch * FLAGS.steps / seconds, (time.process_time() - cpu) / seconds
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        begin = time.perf_counter()
        step()
        seconds = time.perf_counter() - begin
    waits = [event for event in profile.key_averages() if event.key == '_c10d_functional::wait_tensor']
    status = pathlib.Path('/proc/self/status').read_text()
    threads, resident = (
        next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name))
        for name in ('Threads:', 'VmHWM:')
    )
    if collectives.replica_index() == 0:
        print(
            f'{collectives.num_replicas():9} {FLAGS.threads:7} {rate:9.1f} {sum(event.count for event in waits):11} '
            f'{sum(event.cpu_time_total for event in waits) / 1e6 / seconds:10.1%} {cpu:6.2f} {threads:4} '
            f'{resident / 2**10:11.0f}',
            flush=True,
        )
    collectives.leave()


def main(argv: list[str]) -> None:
    """Prints the table, or measures one process of it."""
    if FLAGS.threads:
        return measure()
    network = 'the network of configs/digits.py, 8 pixels' if FLAGS.digits else f'{FLAGS.encoder}, {FLAGS.size} pixels'
    print(f'{network}, batch {FLAGS.batch}, torch {torch.__version__}')
    print('processes threads  images/s collectives    waiting    CPU  all MiB/process', flush=True)
    quiet = {'OMP_WAIT_POLICY': 'passive', 'KINETO_LOG_LEVEL': '99'}
    for _ in range(FLAGS.turns):
        for processes, threads in SHAPES:
            launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}']
            subprocess.run(
                [sys.executable, *launcher, __file__, *sys.argv[1:], f'--threads={threads}'],
                env=os.environ | quiet | {'OMP_NUM_THREADS': str(threads)},
                check=True,
            )


if __name__ == '__main__':
    flags.DEFINE_string('encoder', 'TinyResNet', 'The encoder, in the recipe of the paper.')
    flags.DEFINE_bool('digits', False, 'Take network and recipe of configs/digits.py instead.')
    flags.DEFINE_integer('size', 32, 'Side of the images in pixels.')
    flags.DEFINE_integer('batch', 64, 'Images per step in all.')
    flags.DEFINE_integer('steps', 20, 'Steps that are timed.')
    flags.DEFINE_integer('turns', 3, 'How often every shape is measured.')
    flags.DEFINE_integer('threads', 0, 'Set by the benchmark itself: measure this process.')
    app.run(main)
