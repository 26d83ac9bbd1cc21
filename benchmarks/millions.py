"""Measures what a data set of a million images costs before the first step: as a folder and as tar shards.

Command:   python benchmarks/millions.py --images=DIR --num_images=1300000 --out=benchmarks/results/millions
Data:      a folder of small images, DIR/CLASS/*. The benchmark's own folder has NUM_IMAGES hard links to them in 1,000
           classes; its shards hold the same files. Both are made below --scratch, on the file system of DIR, and stay
           there for the next run (1,300,000 links to images of 1 KB take 0.1 GB as a folder and 2.5 GB as shards).
           --photographs=DIR is a folder of photographs, DIR/train/CLASS/*, for the rates of reading and decoding.

Each row is a process of its own. "index" is the seconds to list the files or to index the shards, without (cold) and
with (warm) the index of an earlier run; the disk's cache is warm in both cases. "first step" is the time from the
command `launch.py` to the record of the first step (TinyResNet, views of 32 pixels, batch 64, not compiled), and the
memory is the peak of the main process until then.
"""

import datetime
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import torch
from absl import app, flags, logging

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from benchmarks import measuring  # noqa: E402
from byol_func.data import listing, packing, shards  # noqa: E402

_IMAGES = flags.DEFINE_string('images', None, 'Folder of small images, DIR/CLASS/*.', required=True)
_PHOTOGRAPHS = flags.DEFINE_string('photographs', None, 'Folder of photographs, DIR/train/CLASS/*; none by default.')
_NUM_IMAGES = flags.DEFINE_integer('num_images', 100_000, 'The number of images.')
_PER_SHARD = flags.DEFINE_integer('images_per_shard', 10_000, 'The number of images in each shard.')
_SCRATCH = flags.DEFINE_string('scratch', '/tmp/byol_func_millions', 'Where folder, shards and indexes are made.')
_OUT = flags.DEFINE_string('out', None, 'Folder for log.txt and results.json; none by default.')
_INDEX = flags.DEFINE_string('index', None, 'Only list this root and print what it took; for the rows themselves.')
_NUM_CLASSES = 1000
_REPEATS = 3
_LAUNCH = pathlib.Path(__file__).resolve().parent.parent / 'launch.py'
_LINES: list[str] = []


def main(argv) -> None:
    """Makes the images, measures every row and writes the tables."""
    del argv
    if _INDEX.value:
        _print_index(_INDEX.value)
        return
    torch.set_num_threads(1)
    scratch = pathlib.Path(_SCRATCH.value, str(_NUM_IMAGES.value))
    machine = measuring.machine(torch.device('cpu')) | {'cores': os.cpu_count(), 'load': os.getloadavg()[0]}
    _say(f'{datetime.datetime.now():%Y-%m-%d %H:%M} {machine}')
    results = {'machine': machine, 'num_images': _NUM_IMAGES.value, 'num_classes': _NUM_CLASSES}
    results['made in seconds'] = _make(scratch)
    results['start'] = {name: _start(name, scratch) for name in ('folder', 'shards')}
    if _PHOTOGRAPHS.value:
        results['decoding'] = _decoding(_PHOTOGRAPHS.value, scratch)
    if _OUT.value:
        out = pathlib.Path(_OUT.value)
        out.mkdir(parents=True, exist_ok=True)
        (out / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
        (out / 'log.txt').write_text('\n'.join(_LINES) + '\n')


def _say(line: str) -> None:
    print(line, flush=True)
    _LINES.append(line)


def _make(scratch: pathlib.Path) -> dict[str, float]:
    """Makes the folder and the shards, and returns the seconds that each took; 0 if it was there."""
    seconds = {}
    for name, make in (('folder', _link), ('shards', _pack)):
        start = time.perf_counter()
        if not (scratch / name).exists():
            unfinished = scratch / f'{name}.unfinished'
            shutil.rmtree(unfinished, ignore_errors=True)
            make(scratch, unfinished)
            unfinished.rename(scratch / name)
        seconds[name] = round(time.perf_counter() - start, 1)
    size = sum(path.stat().st_size for path in (scratch / 'shards').iterdir())
    count = len(list((scratch / 'shards').iterdir()))
    _say(f'{_NUM_IMAGES.value} images in {_NUM_CLASSES} classes; {count} shards of {size / 2**30:.2f} GiB in all')
    return seconds


def _link(scratch: pathlib.Path, folder: pathlib.Path) -> None:
    del scratch
    images = sorted(path for path in pathlib.Path(_IMAGES.value).glob('*/*') if path.is_file())
    for label in range(_NUM_CLASSES):
        target = folder / 'train' / f'n{label:08}'
        target.mkdir(parents=True)
        for i in range(label, _NUM_IMAGES.value, _NUM_CLASSES):
            os.link(images[i % len(images)], f'{target}/n{label:08}_{i:07}.JPEG')  # As long as the names of ImageNet.


def _pack(scratch: pathlib.Path, folder: pathlib.Path) -> None:
    files = listing.list_files('train', str(scratch / 'folder'))
    packing.pack(files, 'train', str(folder), _PER_SHARD.value)


def _start(name: str, scratch: pathlib.Path) -> dict[str, float]:
    """Measures the index and the first step of one data set."""
    cache = scratch / f'{name}.index'
    shutil.rmtree(cache, ignore_errors=True)
    environ = os.environ | {'BYOL_FUNC_CACHE': str(cache)}
    root = str(scratch / name)
    argv = [sys.executable, __file__, f'--images={_IMAGES.value}', f'--index={root}']
    runs = [
        json.loads(subprocess.run(argv, env=environ, check=True, capture_output=True, text=True).stdout)
        for _ in range(1 + _REPEATS)
    ]
    found = {
        'cold index, s': runs[0]['seconds'],
        'cold index, s of processor time': runs[0]['processor'],
        'warm index, s': measuring.median([run['seconds'] for run in runs[1:]]),
        'warm index, s of processor time': measuring.median([run['processor'] for run in runs[1:]]),
        'peak memory of a cold index, MiB': runs[0]['peak_mib'] - runs[0]['before_mib'],
        'peak memory of a warm index, MiB': runs[1]['peak_mib'] - runs[1]['before_mib'],
        'size of the index, MiB': sum(path.stat().st_size for path in cache.glob('**/*') if path.is_file()) / 2**20,
    }
    shutil.rmtree(cache, ignore_errors=True)
    for state in ('cold', 'warm'):
        seconds, processor, peak = _first_step(name, root, environ, scratch)
        found |= {
            f'first step, {state} index, s': seconds,
            f'first step, {state} index, s of processor time': processor,
            f'peak memory, {state} index, MiB': peak,
        }
    _say(f'\n{name}')
    for what, value in found.items():
        _say(f'  {what:50} {value:9.1f}')
    return {what: round(value, 2) for what, value in found.items()}


def _print_index(root: str) -> None:
    """Lists a root and prints the seconds and the memory before and at the peak."""
    logging.set_verbosity(logging.ERROR)
    before, start, processor = _peak_mib(), time.perf_counter(), time.process_time()
    files = shards.list_shards('train', root) if root.endswith('shards') else listing.list_files('train', root)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    assert files and len(files.paths)
    print(json.dumps({'seconds': seconds, 'processor': processor, 'before_mib': before, 'peak_mib': _peak_mib()}))


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _first_step(name: str, root: str, environ: dict[str, str], scratch: pathlib.Path):
    """Starts a training and stops it after its first step.

    Returns:
      The seconds until then, the processor time of the main process in seconds, and its peak memory in MiB; its two
      workers share most of that.
    """
    workdir = scratch / 'run'
    shutil.rmtree(workdir, ignore_errors=True)
    fields = dict(
        num_epochs=1.0,
        batch_size=64,
        image_size=32,
        compile=False,
        log_every_steps=1,
        pictures=False,
        optimizer='adam',
        num_seeds=1,
    )
    fields |= {
        'dataset.name': name,
        'dataset.root': root,
        'dataset.eval_split': 'val',
        'dataset.source_size': 32,
        'dataset.num_workers': 2,
        'preview.num_images': 0,
        'network.encoder_class': 'TinyResNet',
        'network.projector_hidden_size': 512,
        'network.predictor_hidden_size': 512,
    }
    argv = [sys.executable, str(_LAUNCH), f'--config={_LAUNCH.parent}/configs/shards.py', f'--workdir={workdir}']
    argv += [f'--config.{field}={value}' for field, value in fields.items()]
    start = time.perf_counter()
    with open(scratch / 'launch.log', 'w') as log:
        run = subprocess.Popen(argv, env=environ, stdout=log, stderr=log)
    metrics = workdir / 'metrics.jsonl'
    while not (metrics.exists() and 'images_per_second' in metrics.read_text()):
        time.sleep(0.05)
        if run.poll() is not None:
            raise RuntimeError(f'the training ended: {(scratch / "launch.log").read_text()[-2000:]}')
    seconds = time.perf_counter() - start
    with open(f'/proc/{run.pid}/stat') as file:
        processor = sum(map(int, file.read().rsplit(')', 1)[1].split()[11:13])) / os.sysconf('SC_CLK_TCK')
    with open(f'/proc/{run.pid}/status') as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith('VmHWM'))
    run.send_signal(signal.SIGTERM)
    try:
        run.wait(60)
    except subprocess.TimeoutExpired:
        run.kill()
    return seconds, processor, peak / 2**10


def _decoding(root: str, scratch: pathlib.Path, count: int = 2000) -> dict[str, float]:
    """Measures reading, and reading and decoding, of the same photographs in a folder and in shards, on one core."""
    folder = listing.list_files('train', root)
    target = scratch / 'photographs'
    packing.pack(folder, 'train', str(target), 1000)
    packed = shards.list_shards('train', str(target))
    picked = torch.randperm(len(folder.paths), generator=torch.Generator().manual_seed(0))[:count].tolist()
    found: dict[str, list[float]] = {}
    for _ in range(1 + _REPEATS):  # In turns, so that other work on the machine slows both.
        for name, files in (('folder', folder), ('shards', packed)):
            for what, read in (('read', files.paths.read), ('read and decode', _decoder(files))):
                start = time.process_time()
                for i in picked:
                    read(i)
                found.setdefault(f'{what}, {name}', []).append(count / (time.process_time() - start))
    _say(f'\nImages per second of processor time: {count} photographs of {root.rstrip("/").rsplit("/")[-1]}, one core')
    rates = {what: measuring.median(values[1:]) for what, values in found.items()}  # The first turn warms the disk up.
    for what, rate in rates.items():
        _say(f'  {what:40} {rate:9.0f}')
    return {what: round(rate, 1) for what, rate in rates.items()}


def _decoder(files):
    from byol_func.data import decoding

    return lambda i: files.paths.decode(i, decoding.Form())


if __name__ == '__main__':
    app.run(main)
