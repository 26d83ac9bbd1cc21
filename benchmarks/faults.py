"""Kills a run at random moments and damages its checkpoints, to check that the run recovers.

    python benchmarks/faults.py --kills=100 --every=97

First it kills a small run on the digits repeatedly, half of the times while a checkpoint is being written,
lets it finish, and compares it with an undisturbed run: the lines of metrics.jsonl and every bit of the
final checkpoints. Then it flips one bit in every k-th byte of a checkpoint (k is --every), truncates the
checkpoint in as many places, and counts how often the damage is detected. Writes faults.json into --output.
"""

import json
import pathlib
import random
import sys
import tempfile
import time

from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests' / 'helpers'), str(ROOT / 'tests' / 'contracts')]

import test_kills  # noqa: E402

import cli  # noqa: E402
from byol_func.errors import UserError  # noqa: E402
from byol_func.utils import checkpointing  # noqa: E402

FLAGS = flags.FLAGS


def kill_runs(folder: pathlib.Path) -> dict[str, int | bool]:
    """Kills a run repeatedly and compares it with an undisturbed one.

    Returns:
      The number of kills, of kills during a write and of attempts after the run had ended, the number of lines in
      the undisturbed run's metrics.jsonl, and whether both runs are equal bit for bit.
    """
    run = cli.tiny_digits(
        num_epochs=max(8, FLAGS.kills // 2),
        batch_size=128,
        checkpointing__save_every_steps=3,
        checkpointing__keep=2,
        checkpointing__best_metric='repr_loss',
        lr_schedule__warmup_epochs=1.0,
    )
    undisturbed, killed = folder / 'undisturbed', folder / 'killed'
    cli.succeed(*run, f'--workdir={undisturbed}', cwd=folder)
    rng, found = random.Random(FLAGS.seed), []
    for i in range(FLAGS.kills):
        running = cli.start_launch(*run, f'--workdir={killed}', cwd=folder)
        found.append(test_kills.kill(running.process, killed, rng, in_write=i % 2 == 1))
        running.output.cleanup()
    cli.succeed(*run, f'--workdir={killed}', cwd=folder)
    try:
        test_kills.assert_equal(undisturbed, killed)
    except AssertionError as error:
        print(error)
        equal = False
    else:
        equal = True
    return dict(
        kills=sum(f is not None for f in found),
        during_a_write=sum(f is True for f in found),
        ended_before=sum(f is None for f in found),
        lines=len(test_kills.metrics(undisturbed)),
        equal_bit_for_bit=equal,
    )


def damage(path: pathlib.Path, folder: pathlib.Path) -> dict[str, int]:
    """Damages a checkpoint in many ways; returns how often, and how many of the damages were detected."""
    content, target = path.read_bytes(), folder / 'damaged.safetensors'
    counts = dict(bytes=len(content), bits_flipped=0, bits_noticed=0, cut=0, cuts_noticed=0)
    for i in range(0, len(content), FLAGS.every):
        flipped = bytearray(content)
        flipped[i] ^= 1 << i % 8
        for damaged, kind, noticed in (
            (flipped, 'bits_flipped', 'bits_noticed'),
            (content[:i], 'cut', 'cuts_noticed'),
        ):
            target.write_bytes(damaged)
            counts[kind] += 1
            try:
                checkpointing.load(target)
            except UserError:
                counts[noticed] += 1
    return counts


def main(argv: list[str]) -> None:
    """Runs both parts and writes the results."""
    del argv
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        kills = kill_runs(folder)
        print(json.dumps(kills), flush=True)
        newest = max((folder / 'undisturbed/checkpoints').glob('pretrain_*'))
        figures = {'kills': kills, 'damage': damage(newest, folder)}
    figures['seconds'] = round(time.monotonic() - start)
    output = pathlib.Path(FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / 'faults.json').write_text(json.dumps(figures, indent=2) + '\n')
    print(json.dumps(figures, indent=2))


if __name__ == '__main__':  # The killed processes import this file too, and define other flags.
    flags.DEFINE_integer('kills', 100, 'How many runs are killed.')
    flags.DEFINE_integer('every', 97, 'Bytes of a checkpoint between two flipped bits.')
    flags.DEFINE_integer('seed', 0, 'Random seed of the times of the kills.')
    flags.DEFINE_string('output', str(ROOT / 'benchmarks/results/faults'), 'Folder for faults.json.')
    app.run(main)
