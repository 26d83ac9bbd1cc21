"""Whatever lies in a folder: it is read, or refused in one line that says what; never anything else."""

import io
import os
import tempfile

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from byol_func.errors import UserError
from byol_func.utils import dataset

MODES = {
    'RGB': ('png', 'jpg', 'bmp', 'webp', 'tif'),
    'L': ('png', 'jpg', 'pgm'),
    'RGBA': ('png', 'webp', 'tif'),
    'P': ('png', 'bmp'),
    '1': ('png', 'tif'),
    'CMYK': ('jpg', 'tif'),
    'LA': ('png',),
    'I;16': ('png', 'tif'),
    'F': ('tif',),
    'YCbCr': ('jpg', 'tif'),
    'LAB': ('tif',),
}
FORMATS = dict(jpg='JPEG', tif='TIFF', pgm='PPM')


def encode(mode, suffix, width, height, seed):
    """A picture of noise in a mode and format."""
    rng = np.random.default_rng(seed)
    if mode in ('I;16', 'F'):
        image = Image.fromarray(
            rng.integers(0, 65536, (height, width)).astype(np.uint16 if mode != 'F' else np.float32)
        )
    elif mode in ('YCbCr', 'LAB', 'CMYK'):
        bands = 4 if mode == 'CMYK' else 3
        image = Image.frombytes(mode, (width, height), rng.bytes(bands * width * height))
    else:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, FORMATS.get(suffix, suffix.upper()))
    return buffer.getvalue()


@st.composite
def files(draw):
    """A name and the bytes of a file: an image, part of one, one with changed bytes, or no image at all."""
    mode = draw(st.sampled_from(sorted(MODES)))
    suffix = draw(st.sampled_from(MODES[mode]))
    content = encode(mode, suffix, draw(st.integers(1, 20)), draw(st.integers(1, 20)), draw(st.integers(0, 99)))
    kind = draw(st.sampled_from(['whole', 'whole', 'whole', 'short', 'changed', 'noise', 'named otherwise']))
    if kind == 'short':
        content = content[: draw(st.integers(0, len(content) - 1))]
    elif kind == 'changed':
        place = draw(st.integers(0, len(content) - 1))
        content = content[:place] + draw(st.binary(min_size=1, max_size=8)) + content[place + 1 :]
    elif kind == 'noise':
        content = draw(st.binary(max_size=50))
    elif kind == 'named otherwise':
        suffix = draw(st.sampled_from(['png', 'jpg', 'txt', 'JPEG']))
    name = draw(st.text('ab 7é\u4e2d', min_size=1, max_size=3))
    return f'{name}.{suffix}', content


NAMES = st.sampled_from(['a', 'b', 'c d', 'é', '.hidden'])
SPLITS = st.dictionaries(NAMES, st.lists(files(), max_size=3), max_size=3)


@st.composite
def folders(draw):
    """{path: content}; mostly with the layout that is expected."""
    train = draw(SPLITS)
    test = draw(st.one_of(st.just({name: draw(st.lists(files(), min_size=1, max_size=2)) for name in train}), SPLITS))
    splits = {'train': train, draw(st.sampled_from(['test', 'test', 'val', 'other'])): test}
    tree = {}
    for split, classes in splits.items():
        for name, contents in classes.items():
            tree |= {f'{split}/{name}/{file}': content for file, content in contents}
    tree |= {f'train/{file}': content for file, content in draw(st.lists(files(), max_size=2))}
    return tree


def write(root, tree):
    for path, content in tree.items():
        full = os.path.join(root, path)
        os.makedirs(os.path.dirname(full), exist_ok=True)
        with open(full, 'wb') as file:
            file.write(content)


@settings(max_examples=120, deadline=None)
@given(
    tree=folders(),
    source_size=st.sampled_from([0, 8]),
    grayscale=st.booleans(),
    streamed=st.booleans(),
    max_bad_fraction=st.sampled_from([0.0, 0.5, 1.0]),
    cached=st.booleans(),
)
def test_a_folder_is_read_or_refused_in_one_line(tree, source_size, grayscale, streamed, max_bad_fraction, cached):
    with tempfile.TemporaryDirectory() as root:
        write(root, tree)
        try:
            train, test = dataset.load_train_and_test(
                name='folder',
                root=root,
                source_size=source_size,
                grayscale=grayscale,
                max_gib=0.0 if streamed else 1.0,
                max_bad_fraction=max_bad_fraction,
                num_workers=0,
                cache_dir=f'{root}/cache' if cached and source_size else '',
                fraction=1.0,
                eval_split='test',
                val_fraction=0.1,
            )
            for data in (train, test):
                if data is not None:
                    check(data, 1 if grayscale else 3, source_size, data is train)
        except UserError as error:
            assert '\n' not in str(error)
            assert str(error).startswith('config.dataset.'), error


def check(data, channels, source_size, is_train):
    if isinstance(data, dataset.Stream):
        data = data._replace(center_crop=(8, 0.9))
    rows = []
    for batch in dataset.eval_batches(data, 4):
        images = batch.get('images', batch.get('view'))
        assert images.shape[:2] == (len(batch['labels']), channels)
        assert not source_size or images.shape[2:] == (source_size, source_size)
        rows.append(batch['rows'])
    data = dataset.part_read(data, torch.cat(rows))
    assert len(data.paths) == data.num_examples == len(data.labels) == len(data.positions)
    labels, known = set(data.labels.tolist()), set(range(max(1, data.num_classes)))
    assert labels == known if is_train else labels <= known  # A class may be missing from the test set.
