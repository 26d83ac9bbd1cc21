"""Colour jitter with torchvision's semantics against torchvision itself."""

import copy
import itertools

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from byol_func.utils import augmentations, sampling

# Both sides are float32 in [0, 1]. The hue divides by differences of colours, torchvision's by another route.
ATOL = 5e-6
RANGES = dict(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5)
ADJUST = [getattr(functional, f'adjust_{name}') for name in RANGES]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _presets(**changes) -> dict:
    presets = copy.deepcopy(sampling.AUGMENT_CONFIG['view1'])
    presets['color_transform'] |= dict(semantics='torchvision', color_jitter_prob=1.0) | RANGES | changes
    return presets


def _images(batch_size: int, channels: int, size: tuple[int, int] = (9, 7)) -> torch.Tensor:
    """Noise, then greys, black, white and pure colours, where hue and saturation have their corners."""
    images = torch.rand(batch_size, channels, *size, generator=_generator(0))
    images[:2] = images[:2, :1]
    images[2], images[3] = 0.0, 1.0
    return images.where(torch.arange(batch_size)[:, None, None, None] != 4, images.round())


def _torchvision(images, draws, operations=range(4)) -> torch.Tensor:
    """torchvision's functions, image by image, in each image's order with its factors."""
    out = []
    for i, image in enumerate(images):
        for k in draws.order[i].tolist():
            if k in operations:
                image = ADJUST[k](image, getattr(draws, list(RANGES)[k])[i].item())
        out.append(image)
    return torch.stack(out)


def _jitter(images, draws, presets) -> torch.Tensor:
    """Through the public door, without grayscale."""
    plain = presets['color_transform'] | dict(to_grayscale_prob=0.0)
    return augmentations.color_transform(images, draws, plain)


@pytest.mark.parametrize('channels', [1, 3])
def test_every_order_equals_torchvision(channels):
    orders = torch.tensor(list(itertools.permutations(range(4)))).repeat(4, 1)
    images, presets = _images(len(orders), channels), _presets()
    draws = sampling.sample(_generator(1), len(orders), presets, (9, 7))._replace(order=orders)
    expected = _torchvision(images, draws)
    torch.testing.assert_close(_jitter(images, draws, presets), expected, rtol=0, atol=ATOL)
    assert (expected - images)[5:].abs().amax(dim=(1, 2, 3)).min() > 0.01


@pytest.mark.parametrize('operation', range(4))
@pytest.mark.parametrize('alone', [True, False])
def test_operations_of_range_0_are_left_out(operation, alone):
    """Each operation alone, and all others, whatever the draws say."""
    wanted = [k for k in range(4) if (k == operation) == alone]
    presets = _presets(**{name: 0.0 for k, name in enumerate(RANGES) if k not in wanted})
    images = _images(48, 3)
    draws = sampling.sample(_generator(1), 48, _presets(), (9, 7))
    expected = _torchvision(images, draws, wanted)
    torch.testing.assert_close(_jitter(images, draws, presets), expected, rtol=0, atol=ATOL)


def test_factors_have_the_range_of_torchvision():
    """Those of its `ColorJitter`; all else is drawn as with the official semantics."""
    presets = _presets(brightness=1.0, hue=0.3)
    draws = sampling.sample(_generator(1), 20000, presets, (9, 7))
    theirs = v2.ColorJitter(1.0, *(presets['color_transform'][name] for name in list(RANGES)[1:]))
    for name in RANGES:
        low, high = getattr(theirs, name)
        values = getattr(draws, name)
        assert low <= values.min() < low + 1e-3 and high - 1e-3 < values.max() <= high
    official = copy.deepcopy(presets)
    official['color_transform']['semantics'] = 'official'
    drawn = sampling.sample(_generator(1), 20000, official, (9, 7))
    same = [name for name in draws._fields if getattr(draws, name).equal(getattr(drawn, name))]
    assert set(draws._fields) - set(same) == {'brightness'}
    torch.testing.assert_close(draws.brightness - 1.0, drawn.brightness, rtol=0, atol=1e-6)


def test_semantics_differ_where_they_should():
    """One image, the same draws, two results; without jitter there is no difference."""
    images, presets = _images(64, 3), _presets(color_jitter_prob=0.5)
    draws = sampling.sample(_generator(1), 64, presets, (9, 7))
    official = copy.deepcopy(presets)
    official['color_transform']['semantics'] = 'official'
    ours = augmentations.postprocess_view(images, draws, presets)
    other = augmentations.postprocess_view(images, draws, official)
    differs = (ours - other).abs().amax(dim=(1, 2, 3)) > 1e-3
    assert differs.any() and not (differs & ~draws.jitter).any()
    assert ours.min() >= 0 and ours.max() <= 1


def test_compiled_in_one_graph():
    images, presets = _images(16, 3), _presets()
    draws = sampling.sample(_generator(1), 16, presets, (9, 7))
    compiled = torch.compile(augmentations.postprocess_view, backend='aot_eager', fullgraph=True)
    expected = augmentations.postprocess_view(images, draws, presets)
    torch.testing.assert_close(compiled(images, draws, presets), expected, rtol=0, atol=ATOL)
