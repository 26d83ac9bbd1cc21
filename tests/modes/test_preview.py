"""The contact sheet: its pictures are the views, its words are what was done, and no run notices it."""

import copy

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from byol_func.report import contact_sheet
from byol_func.utils import augmentations, sampling
from cli import config, run_launch, succeed, tiny_digits
from runs import records

VIEWS = ('view1', 'view2')


def _sheet_of(channels, size, image_size, num_images=3, num_draws=2, captions=None):
    """A sheet of noise, and what it was made of."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num_images, channels, *size), generator=rng, dtype=torch.uint8)
    presets = copy.deepcopy(sampling.AUGMENT_CONFIG)
    draws = [sampling.sample_pair(rng, rng, num_images, presets, size) for _ in range(num_draws)]
    inputs = {'images': images, 'labels': torch.zeros(num_images)}
    views = [augmentations.postprocess(inputs, d, presets, image_size) for d in draws]
    captions = captions or [f'class {i}' for i in range(num_images)]
    return contact_sheet.contact_sheet(images, draws, views, presets, title='title', captions=captions), images, views


def _find(sheet: np.ndarray, tile: np.ndarray) -> list[tuple[int, int]]:
    """Where the tile lies in the sheet, (y, x)."""
    height, width = tile.shape[:2]
    starts = np.argwhere((sheet == tile[0, 0]).all(-1) & (np.roll(sheet, -width + 1, 1) == tile[0, -1]).all(-1))
    return [(y, x) for y, x in starts if np.array_equal(sheet[y : y + height, x : x + width], tile)]


@pytest.mark.parametrize(
    'channels, size, image_size, scale', [(1, (8, 8), 8, 16), (3, (32, 20), 28, 4), (3, (160, 160), 128, 1)]
)
def test_every_view_is_on_the_sheet_unsmoothed(channels, size, image_size, scale):
    """One row for each image; in it view 1 to the left of view 2, the draws in order."""
    sheet, images, views = _sheet_of(channels, size, image_size)
    assert sheet.mode == 'RGB'
    pixels, rows = np.asarray(sheet), []
    for i in range(len(images)):
        row = []
        for view in VIEWS:
            for drawn in views:
                tile = (drawn[view][i] * 255).round().to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0).numpy()
                found = _find(pixels, tile.repeat(scale, 0).repeat(scale, 1))
                assert len(found) == 1
                row += found
        assert len({y for y, _ in row}) == 1 and [x for _, x in row] == sorted(x for _, x in row)
        rows.append(row[0][0])
    assert rows == sorted(rows) and len(set(rows)) == len(rows)


@pytest.mark.parametrize('size, image_size', [((1, 1), 1), ((3, 300), 5), ((400, 2), 200), ((256, 256), 224)])
def test_images_of_any_size_fit(size, image_size):
    for channels in (1, 3):
        sheet, *_ = _sheet_of(channels, size, image_size, num_images=1, num_draws=1, captions=['grün 中\n'])
        assert 300 < sheet.width < 1000 and 100 < sheet.height < 1000


def _draws(**values) -> sampling.ViewDraws:
    """One image for which everything was decided."""
    plain = dict(
        crop=[3.0, 5.0, 17.0, 21.0],
        flip=True,
        jitter=True,
        order=[3, 1, 0, 2],
        brightness=0.311,
        contrast=1.2,
        saturation=0.919,
        hue=-0.05,
        grayscale=True,
        blur=True,
        sigma=1.24,
        solarize=True,
    )
    return sampling.ViewDraws(**{name: torch.tensor([value]) for name, value in (plain | values).items()})


def _presets(**sections) -> dict:
    presets = copy.deepcopy(sampling.AUGMENT_CONFIG['view2'])
    for name, value in sections.items():
        presets[name] = presets[name] | value if isinstance(value, dict) else value
    return presets


_ALL = ['crop 21x17 at 5,3', 'flip', 'H-0.05', 'Cx1.20', 'B+0.31', 'Sx0.92', 'gray', 'blur 1.2', 'solarize']
_OFF = dict(apply_prob=0.0)


@pytest.mark.parametrize(
    'draws, presets, channels, missing',
    [
        ({}, {}, 3, []),
        ({}, {}, 1, ['H-0.05', 'Sx0.92', 'gray']),
        (dict(flip=False, jitter=False), {}, 3, ['flip', 'H-0.05', 'Cx1.20', 'B+0.31', 'Sx0.92']),
        (dict(grayscale=False, blur=False, solarize=False), {}, 3, ['gray', 'blur 1.2', 'solarize']),
        ({}, dict(random_flip=False, color_transform=dict(hue=0.0, contrast=0.0)), 3, ['flip', 'H-0.05', 'Cx1.20']),
        ({}, dict(color_transform=_OFF), 3, ['H-0.05', 'Cx1.20', 'B+0.31', 'Sx0.92', 'gray']),
        ({}, dict(color_transform=dict(color_jitter_prob=0.0)), 3, ['H-0.05', 'Cx1.20', 'B+0.31', 'Sx0.92']),
        ({}, dict(color_transform=dict(to_grayscale_prob=0.0)), 3, ['gray']),
        ({}, dict(gaussian_blur=_OFF, solarize=_OFF), 3, ['blur 1.2', 'solarize']),
        ({}, dict(gaussian_blur=dict(blur_divider=20.0)), 3, ['blur 1.2']),  # One tap at 32 pixels.
    ],
)
def test_only_what_was_done_is_told_in_its_order(draws, presets, channels, missing):
    told = contact_sheet.operations(_draws(**draws), _presets(**presets), 0, channels, (32, 32), 32)
    assert told == [word for word in _ALL if word not in missing]


def test_words_for_torchvisions_semantics_and_whole_images():
    presets = _presets(color_transform=dict(semantics='torchvision'))
    draws = _draws(brightness=1.311, crop=[0.0, 0.0, 32.0, 32.0])
    told = contact_sheet.operations(draws, presets, 0, 3, (32, 32), 32)
    assert told[0] == 'whole image' and 'Bx1.31' in told and 'H-0.05' in told


def test_what_is_not_told_does_not_matter():
    """Whatever was drawn for an operation that is not told: the view is the same."""
    n, size = 64, (24, 24)
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(n, 3, *size, generator=rng)
    presets = _presets(gaussian_blur=dict(apply_prob=0.5))
    draws, other = (sampling.sample(rng, n, presets, size) for _ in range(2))
    told = [contact_sheet.operations(draws, presets, i, 3, size, 24) for i in range(n)]
    untold = {
        **{
            name: [not any(w[0] == letter for w in words) for words in told]
            for name, letter in dict(brightness='B', contrast='C', saturation='S', hue='H').items()
        },
        'order': [not any(w[0] in 'BCSH' for w in words) for words in told],
        'sigma': [not any(w.startswith('blur') for w in words) for words in told],
    }
    assert all(any(where) and not all(where) for where in untold.values())
    mixed = draws._replace(
        **{
            name: torch.where(
                torch.tensor(where).reshape(-1, *[1] * (getattr(draws, name).ndim - 1)),
                getattr(other, name),
                getattr(draws, name),
            )
            for name, where in untold.items()
        }
    )
    ours, same = (augmentations.postprocess_view(images, d, presets) for d in (draws, mixed))
    assert ours.equal(same)


def test_presets_in_a_line():
    official = sampling.AUGMENT_CONFIG
    assert contact_sheet.summarize_presets(official['view2'], 3, 32) == (
        'crop to 8..100 % of the area, aspect 0.75..1.33; flip 50 %; jitter 80 % (B 0.4 C 0.4 S 0.2 H 0.1); '
        'gray 20 %; blur 10 %, sigma 0.1..2, 3 taps; solarize 20 % at 0.5'
    )
    assert contact_sheet.summarize_presets(official['view1'], 1, 8) == (
        'crop to 8..100 % of the area, aspect 0.75..1.33; flip 50 %; jitter 80 % (B 0.4 C 0.4)'
    )
    nothing = _presets(
        random_flip=False, **dict.fromkeys(('random_crop', 'color_transform', 'gaussian_blur', 'solarize'), _OFF)
    )
    assert contact_sheet.summarize_presets(nothing, 3, 32) == 'nothing'


def _numbers(workdir):
    """Everything a run computed."""
    lines = records(workdir)
    (path,) = workdir.glob('checkpoints/*')
    return [{k: v for k, v in line.items() if k != 'images_per_second'} for line in lines], safetensors.torch.load_file(
        path
    )


def test_every_pretraining_writes_the_sheet_of_the_preview_and_does_not_notice(tmp_path):
    argv = tiny_digits(batch_size=512, preview__num_images=2)
    outcome = succeed(*argv, '--mode=preview', f'--workdir={tmp_path}/look', cwd=tmp_path)
    assert outcome.stdout.startswith(f'{tmp_path}/look/augmentations.png: ')
    assert [path.name for path in (tmp_path / 'look').iterdir()] == ['augmentations.png']
    succeed(*argv, f'--workdir={tmp_path}/with', cwd=tmp_path)
    succeed(*argv, '--config.preview.num_images=0', f'--workdir={tmp_path}/without', cwd=tmp_path)
    sheet = (tmp_path / 'look/augmentations.png').read_bytes()
    assert (tmp_path / 'with/augmentations.png').read_bytes() == sheet
    with Image.open(tmp_path / 'look/augmentations.png') as image:
        image.verify()
    assert not (tmp_path / 'without/augmentations.png').exists()
    (lines, tensors), (other_lines, other_tensors) = (_numbers(tmp_path / name) for name in ('with', 'without'))
    assert lines == other_lines and all(tensors[name].equal(other_tensors[name]) for name in tensors)
    # A run goes on with another size of sheet; a look at other augmentations leaves its own sheet alone.
    succeed(*argv, '--config.preview.num_draws=1', f'--workdir={tmp_path}/with', cwd=tmp_path)
    outcome = run_launch(
        *argv, '--config.augmentations_preset=none', '--mode=preview', f'--workdir={tmp_path}/without', cwd=tmp_path
    )
    assert outcome.code == 1 and 'another --workdir' in outcome.stderr
    assert not (tmp_path / 'without/augmentations.png').exists()


def test_preview_without_labels_and_workdir(tmp_path):
    """Into a new folder under runs/; a set without labels has no captions, and needs none."""
    for i in range(4):
        (tmp_path / 'images/train').mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (9, 12), (60 * i, 0, 0)).save(tmp_path / f'images/train/{i}.png')
    argv = config(
        'folder.py', dataset__root='images', dataset__source_size=8, image_size=8, batch_size=2, compile=False
    )
    outcome = succeed(*argv, '--mode=preview', cwd=tmp_path)
    (path,) = tmp_path.glob('runs/folder-*/augmentations.png')
    assert outcome.stdout.startswith(str(path.relative_to(tmp_path)))


def test_trouble_is_told_in_one_line(tmp_path):
    (tmp_path / 'file').write_text('mine')
    for argv, *fragments in (
        ([*tiny_digits(preview__num_images=0), '--workdir=run'], 'config.preview.num_images=0', 'expected 1 to 64'),
        ([*tiny_digits(preview__num_images=65), '--workdir=run'], 'config.preview.num_images=65', '0 to 64'),
        ([*tiny_digits(preview__num_draws=0), '--workdir=run'], 'config.preview.num_draws=0', '1 to 16'),
        ([*tiny_digits(), '--workdir=file'], '--workdir=file', 'cannot write augmentations.png'),
    ):
        outcome = run_launch(*argv, '--mode=preview', cwd=tmp_path)
        assert outcome.code == 1 and 'Traceback' not in outcome.stderr, outcome.stderr
        error = outcome.stderr.splitlines()[-1]
        assert error.startswith('Error: ') and all(fragment in error for fragment in fragments), error
    assert (tmp_path / 'file').read_text() == 'mine'
