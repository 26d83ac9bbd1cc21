"""Small folders of images, and the flags of runs on them."""

import numpy as np
from PIL import Image

from byol_func.utils import dataset
from cli import TINY_NETWORK, config
from runs import step_records, without_rates


def smooth(rng, height, width):
    """A picture with some structure, so that JPEG keeps it and a wrong place shows."""
    small = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def make_folder(root, size_of, num_train=6, suffix='.jpg'):
    rng = np.random.default_rng(0)
    for split, count in (('train', num_train), ('test', 3)):
        for name in 'ab':
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                smooth(rng, *size_of(rng)).save(folder / f'{i}{suffix}')
    return root


def load(root, split='train', **kwargs):
    defaults = dict(
        name='folder', source_size=20, grayscale=False, max_gib=1.0, max_bad_fraction=0.0, num_workers=0, cache_dir=''
    )
    return dataset.load(split, root=str(root), **defaults | kwargs)


def flags(root, **overrides):
    small = dict(
        **TINY_NETWORK,
        dataset__root=root,
        dataset__source_size=0,
        dataset__max_gib=0.0,
        dataset__num_workers=2,
        image_size=16,
        batch_size=4,
        num_epochs=2,
        compile=False,
        log_every_steps=1,
        lr_schedule__warmup_epochs=0.0,
        linear_eval__num_epochs=1,
        linear_eval__batch_size=4,
        linear_eval__compare_untrained=False,
        pictures=False,
        eval_every_epochs=0.0,
        monitoring__health_every_steps=10**6,
    )
    return config('folder.py', **small | overrides)


def lines_of(workdir):
    """The steps of the loops; what a run measures beside them (test set, health) is left out."""
    return without_rates(step_records(workdir))
