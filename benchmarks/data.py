"""Measures the images per second of augmentation, decoding and streaming, here and in torchvision.

Command:   python benchmarks/data.py --root=DIR --out=benchmarks/results/data_cpu --noworkers
Data:      a folder of JPEGs (DIR/train/CLASS/*); the published results use Imagenette at 160 pixels.
           Augmentation needs no data.

Everything runs in one thread and, except for the rows with workers, in one process. Rates are per second of
processor time, so they are per core and unaffected by other work on the machine; the rows with workers use
the wall clock. In augmentation and streaming, one image means a pair of views. torchvision's transforms are
those commonly used for BYOL and SimCLR: PIL images, bicubic crops and torchvision's own colour jitter.
"""

import datetime
import glob
import json
import os
import pathlib
import sys
import time

import numpy as np
import torch
from absl import app, flags
from torchvision import transforms
from torchvision.transforms import InterpolationMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from benchmarks import measuring  # noqa: E402
from byol_func.data import decoding  # noqa: E402
from byol_func.runtime import prng  # noqa: E402
from byol_func.utils import augmentations, dataset, sampling  # noqa: E402

_ROOT = flags.DEFINE_string('root', None, 'Folder with train/CLASS/*; without it, streaming is not measured.')
_OUT = flags.DEFINE_string('out', None, 'Folder for log.txt and results.json; none by default.')
_SECONDS = flags.DEFINE_float('seconds', 5.0, 'Seconds of one measurement; each is made three times.')
_WORKERS = flags.DEFINE_bool('workers', True, 'Whether to stream with two workers too; needs an idle machine.')
_REPEATS = 3
_CPU = torch.device('cpu')
_LINES: list[str] = []


def main(argv) -> None:
    """Measures everything, prints the tables and writes them to files."""
    del argv
    torch.set_num_threads(1)
    _say(f'{datetime.datetime.now():%Y-%m-%d %H:%M} {measuring.machine(_CPU)}, {os.cpu_count()} cores')
    results = {'machine': measuring.machine(_CPU), 'augmentation': _augmentation()}
    if _ROOT.value:
        paths = sorted(glob.glob(f'{_ROOT.value}/train/*/*'))
        results['decoding'] = _decoding(paths[:: max(1, len(paths) // 1000)])
        results['streaming'] = _streaming()
    if _OUT.value:
        out = pathlib.Path(_OUT.value)
        out.mkdir(parents=True, exist_ok=True)
        (out / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
        (out / 'log.txt').write_text('\n'.join(_LINES) + '\n')


def _say(line: str) -> None:
    print(line, flush=True)
    _LINES.append(line)


def _rate(fn, images: int) -> float:
    """Returns the images per second of this process's processor time, the median of a few stretches."""
    fn()
    rates = []
    for _ in range(_REPEATS):
        start, count = time.process_time(), 0
        while time.process_time() - start < _SECONDS.value:
            fn()
            count += images
        rates.append(count / (time.process_time() - start))
    return measuring.median(rates)


def _augmentation(size: int = 32, batch_size: int = 512) -> dict[str, float]:
    """Measures two views of 32 px images with the official presets: crop, flip, jitter, gray, blur, solarize."""
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2048, 3, size, size), dtype=np.uint8))
    data = dataset.Dataset(pixels, torch.zeros(len(pixels), dtype=torch.int64), ('0',))
    presets = sampling.AUGMENT_CONFIG

    def transform(inputs, draws):
        views = augmentations.postprocess(inputs, draws, presets, size)
        return [dataset.normalize_images(views[name]) for name in ('view1', 'view2')]

    def run(transform):
        def step():
            inputs = dataset.train_batch(data, 0, seed=0, batch_size=batch_size)
            draws = sampling.sample_pair(prng.fold_in(0, 1), prng.fold_in(0, 2), batch_size, presets, (size, size))
            return transform(inputs, draws)

        return step

    theirs = _torchvision_views(size, presets)
    images = [transforms.ToPILImage()(image) for image in pixels[:batch_size]]
    found = {
        'ours, compiled': _rate(run(torch.compile(transform, fullgraph=True)), batch_size),
        'ours, eager': _rate(run(transform), batch_size),
        'torchvision on PIL images': _rate(lambda: torch.stack([v for i in images for v in theirs(i)]), batch_size),
    }
    return _table(f'Augmentation in memory: pairs of {size} px views, one core', found)


def _torchvision_views(size: int, presets):
    """Returns `image -> [view1, view2]`, the operations of the official presets as torchvision transforms."""

    def view(config):
        color, blur = config['color_transform'], config['gaussian_blur']
        taps = 2 * int(size / blur['blur_divider'] / 2) + 1
        jitter = transforms.ColorJitter(*(color[n] for n in ('brightness', 'contrast', 'saturation', 'hue')))
        sigma = (blur['sigma_min'], blur['sigma_max'])
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(),
                transforms.RandomApply([jitter], color['color_jitter_prob']),
                transforms.RandomGrayscale(color['to_grayscale_prob']),
                transforms.RandomApply([transforms.GaussianBlur(taps, sigma)], blur['apply_prob']),
                transforms.RandomSolarize(128, config['solarize']['apply_prob']),
                transforms.ToTensor(),
                transforms.Normalize(dataset.MEAN_RGB, dataset.STDDEV_RGB),
            ]
        )

    views = [view(presets[name]) for name in ('view1', 'view2')]
    return lambda image: [v(image) for v in views]


def _decoding(paths: list[str]) -> dict[str, float]:
    """Measures the decoding of files to RGB pixels by each available decoder."""
    from PIL import Image

    def pillow(path):
        with Image.open(path) as file:
            return np.asarray(file.convert('RGB'))

    decoders = {'ours (torchvision.io for ordinary JPEGs)': decoding.decode_file, 'Pillow': pillow}
    try:  # simplejpeg and OpenCV are optional and measured only if installed.
        import simplejpeg

        decoders['simplejpeg'] = lambda path: simplejpeg.decode_jpeg(pathlib.Path(path).read_bytes())
    except ImportError:
        pass
    try:
        import cv2

        cv2.setNumThreads(1)
        decoders['OpenCV'] = cv2.imread
    except ImportError:
        pass
    found = {name: _rate(lambda d=d: [d(path) for path in paths], len(paths)) for name, d in decoders.items()}
    return _table(f'Decoding {len(paths)} files, one core', found)


def _streaming(size: int = 128, batch_size: int = 256) -> dict[str, float]:
    """Measures the loading of two crops of every JPEG as uint8 batches, with the same folder and settings."""
    presets, found = sampling.AUGMENT_CONFIG, {}
    clock_of = lambda num_workers: time.perf_counter if num_workers else time.process_time

    def crops(step):
        return {
            view: sampling.sample_relative_crops(prng.fold_in(0, step, view), batch_size, presets[view])
            for view in ('view1', 'view2')
        }

    def ours(num_workers, source_size=0, cache_dir=''):
        data = dataset.load(
            'train',
            name='folder',
            root=_ROOT.value,
            source_size=source_size,
            grayscale=False,
            max_gib=0.0,
            max_bad_fraction=0.0,
            num_workers=num_workers,
            cache_dir=cache_dir,
        )
        batches = dataset.train_batches(
            data, range(10**6), seed=0, batch_size=batch_size, relative_crops=crops, image_size=size
        )
        return _rate_of(batches, batch_size, clock_of(num_workers))

    def theirs(num_workers):
        from torchvision.datasets import ImageFolder

        crop = transforms.Compose(
            [transforms.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC), transforms.PILToTensor()]
        )
        folder = ImageFolder(f'{_ROOT.value}/train', lambda image: (crop(image), crop(image)))
        loader = torch.utils.data.DataLoader(folder, batch_size, shuffle=True, drop_last=True, num_workers=num_workers)

        def batches():
            while True:
                yield from loader

        return _rate_of(batches(), batch_size, clock_of(num_workers))

    for workers, where in ((0, 'one core'), (2, 'two workers, by the clock'))[: 2 if _WORKERS.value else 1]:
        found[f'ours, decode and crop two views, {where}'] = ours(workers)
        found[f'torchvision ImageFolder + DataLoader, {where}'] = theirs(workers)
        found[f'ours, squares of 160 px for the device to crop, {where}'] = ours(workers, source_size=160)
    return _table(f'Streaming: pairs of {size} px crops of JPEG files', found)


def _rate_of(batches, batch_size: int, clock=time.perf_counter) -> float:
    """Returns the images per second after the first batches, which include the start of the workers."""
    for _ in range(4):
        next(batches)
    start, count = clock(), 0
    while clock() - start < _REPEATS * _SECONDS.value:
        next(batches)
        count += batch_size
    rate = count / (clock() - start)
    batches.close()
    return rate


def _table(title: str, found: dict[str, float]) -> dict[str, float]:
    _say(f'\n{title}')
    for name, rate in found.items():
        _say(f'  {name:55} {rate:9.0f} images/s')
    return found


if __name__ == '__main__':
    app.run(main)
