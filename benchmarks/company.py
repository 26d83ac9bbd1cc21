"""Measures what a training loses to its company on one machine: a second training, a follower, or replicas of its own.

  python benchmarks/company.py --out=OUT [--streamed=FOLDER]

Starts real commands: `launch.py` alone, two at once, one beside `--mode=eval --follow`, and under torchrun two
processes of one thread each and of two threads each. They train a small network (that of configs/digits.py, batch
64) and a larger one (ResNet-18 with the official stem, 32 pixels, batch 16) for some 250 traced steps. A row's share is
its images per second, all trainings together, divided by that of the run alone. Writes OUT/company.txt and .json.
"""

import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

import tabulate
import torch
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLAGS = flags.FLAGS
flags.DEFINE_string('out', 'runs/company', 'Where the table is written.')
flags.DEFINE_string('streamed', None, 'A folder of images: also train TinyResNet on it, read from disk at every step.')
flags.DEFINE_list('precisions', ['float32', 'bfloat16'], 'What is measured; bfloat16 is slow on a CPU without it.')
flags.DEFINE_integer('repeats', 1, 'How often every situation is measured; the table shows the medians.')
flags.DEFINE_integer('steps', 250, 'Steps of each training; from 200 on they are traced.')

NETWORKS = {
    'digits network': ['--config.batch_size=64'],
    'ResNet-18, 32 px': [
        '--config.batch_size=16',
        '--config.image_size=32',
        '--config.network.encoder_class=ResNet18',
        '--config.network.encoder_config.width_multiplier=1.0',
        '--config.network.encoder_config.stem=imagenet',
    ],
}
QUIET = [
    '--config.num_seeds=1',
    '--config.final_linear_eval=False',
    '--config.pictures=False',
    '--config.preview.num_images=0',
    '--config.eval_every_epochs=0.0',
    '--config.lr_schedule.warmup_epochs=0.0',
]


STREAMED = [
    '--config.batch_size=64',
    '--config.dataset.source_size=0',
    '--config.dataset.max_gib=0.0',
    '--config.dataset.num_workers=1',
    '--config.image_size=64',
    '--config.network.encoder_class=TinyResNet',
]


def start(workdir: pathlib.Path, flags_of_run: list[str], processes: int = 1, threads: int = 1) -> subprocess.Popen:
    """Starts `launch.py`, under torchrun with so many threads in each if there are several processes."""
    program = [sys.executable]
    environment = dict(os.environ)
    if processes > 1:
        program += ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}']
        environment['OMP_NUM_THREADS'] = str(threads)
    command = [*program, str(ROOT / 'launch.py'), f'--workdir={workdir}', *flags_of_run]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    """Waits for a command, and fails with its last words if it does."""
    _, words = process.communicate()
    if process.returncode:
        sys.exit(f'{" ".join(process.args)}:\n{words[-2000:]}')


def rate(workdir: pathlib.Path) -> float:
    """Returns the images per second of a finished training."""
    return json.loads((workdir / 'summary.pretrain.json').read_text())['images_per_second']


def measure(training: list[str], folder: pathlib.Path) -> dict[str, float]:
    """Returns images per second in each situation, all trainings together."""
    found = {}
    alone = folder / 'alone'
    finish(start(alone, training))
    found['alone'] = rate(alone)
    both = [folder / 'first', folder / 'second']
    for process in [start(workdir, training) for workdir in both]:
        finish(process)
    found['two trainings at once'] = sum(map(rate, both))
    followed = folder / 'followed'
    process = start(followed, [*training, '--config.checkpointing.save_every_seconds=2.0'])
    while process.poll() is None and not (followed / 'config.json').exists():
        pass
    follower = start(followed, ['--mode=eval', '--follow'])
    finish(process)
    finish(follower)
    found['beside a follower'] = rate(followed)
    for threads in (1, 2):
        replicas = folder / f'replicas_{threads}'
        finish(start(replicas, training, processes=2, threads=threads))
        found[f'two replicas, threads of each: {threads}'] = rate(replicas)
    shutil.rmtree(folder)
    return found


def main(argv: list[str]) -> None:
    """Measures every network and precision, and writes the table after each."""
    del argv
    out = pathlib.Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    results = []
    networks = {name: ('digits.py', fields) for name, fields in NETWORKS.items()}
    if FLAGS.streamed:
        networks['TinyResNet, streamed'] = ('folder.py', [*STREAMED, f'--config.dataset.root={FLAGS.streamed}'])
    for network, (file, fields) in networks.items():
        batch = int(fields[0].split('=')[1])
        for precision in FLAGS.precisions:
            training = [
                f'--config={ROOT / "configs" / file}',
                *QUIET,
                *fields,
                f'--config.precision={precision}',
                f'--config.max_images={batch * FLAGS.steps}',
            ]
            turns = []
            for _ in range(FLAGS.repeats):
                with tempfile.TemporaryDirectory() as folder:
                    turns.append(measure(training, pathlib.Path(folder, 'runs')))
            rates = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
            results.append({'network': network, 'precision': precision, 'images_per_second': rates, 'turns': turns})
            rows = [
                [r['network'], r['precision'], name, f'{value:.1f}', f'{value / r["images_per_second"]["alone"]:.2f}']
                for r in results
                for name, value in r['images_per_second'].items()
            ]
            headers = ['network', 'precision', 'situation', 'images/s in all', 'share of alone']
            text = tabulate.tabulate(rows, headers, disable_numparse=True, colalign=('left',) * 3 + ('right',) * 2)
            text += f'\n\n{os.cpu_count()} cores, torch {torch.__version__}, measured {FLAGS.repeats} times\n'
            (out / 'company.txt').write_text(text)
            (out / 'company.json').write_text(json.dumps(results, indent=2) + '\n')
    print(text)


if __name__ == '__main__':
    app.run(main)
