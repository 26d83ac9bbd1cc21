"""Augmentations against the official code: its pixels, then its distributions."""

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from byol_func.utils import augmentations, sampling
from byol_func.utils.sampling import AUGMENT_CONFIG

GOLDEN_DIR = Path(os.environ.get('BYOL_GOLDEN_DIR', Path(__file__).parent))
# Both sides are float32 in [0, 1]; seen are differences up to 6e-7, and 1e-6 for a whole pipeline.
ATOL = 3e-6
# Two samples of 20,000 draws each are compared; several hundred comparisons at 5 sigma.
SIGMAS = 5.0
OPERATIONS = ('brightness', 'contrast', 'saturation', 'hue')
DECISIONS = ('flip', 'jitter', 'grayscale', 'blur', 'solarize')
VIEWS = ('view1', 'view2')
# The quantity drawn and its range, for the official presets.
RANGES = dict(brightness=(-0.4, 0.4), contrast=(0.6, 1.4), saturation=(0.8, 1.2), hue=(-0.1, 0.1), sigma=(0.1, 2.0))

_PIXELS = np.load(GOLDEN_DIR / 'augmentations.npz')
_GROUPS = sorted({key.split('/')[0] for key in _PIXELS.files} - {'factors', 'blur'})
SIZES = [group for group in _GROUPS if not group.startswith('postprocess_')]
PIPELINES = [group for group in _GROUPS if group.startswith('postprocess_')]


@pytest.fixture(scope='module')
def statistics() -> Mapping[str, np.ndarray]:
    with np.load(GOLDEN_DIR / 'augmentation_statistics.npz') as file:
        return dict(file)


@pytest.fixture(scope='module')
def many_draws(statistics) -> dict[str, sampling.ViewDraws]:
    rng1, rng2 = _generator(1), _generator(2)
    return sampling.sample_pair(rng1, rng2, int(statistics['draws']), AUGMENT_CONFIG, (32, 32))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _nchw(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def _planes(array: np.ndarray) -> tuple[torch.Tensor, ...]:
    return torch.from_numpy(array).unbind(-1)


def _assert_close(ours: torch.Tensor, official: np.ndarray, atol: float = ATOL) -> None:
    """`ours` [B, C, H, W], `official` [B, H, W, C]."""
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), official, rtol=0, atol=atol)


def _golden_draws(group: str, view: str) -> sampling.ViewDraws:
    values = {
        name: torch.from_numpy(_PIXELS[f'{group}/{view}/{name}'])
        for name in sampling.ViewDraws._fields
        if name != 'crop'
    }
    values['order'] = values['order'].long()
    height, width = _PIXELS[f'{group}/{view}/input'].shape[1:3]
    whole = torch.tensor([[0.0, 0.0, height, width]])
    return sampling.ViewDraws(crop=whole.repeat(len(values['flip']), 1), **values)


# --- Official pixels ---------------------------------------------------------------------------


def test_every_golden_key_is_used():
    known = {
        'images',
        'rgb_to_hsv',
        'hsv_to_rgb',
        'hsv_input',
        'hsv_input_to_rgb',
        'grayscale',
        'blur',
        'solarize',
        *OPERATIONS,
    }
    assert SIZES and PIPELINES
    for size in SIZES:
        keys = {key.split('/')[1] for key in _PIXELS.files if key.startswith(f'{size}/')}
        assert keys == known


@pytest.mark.parametrize('size', SIZES)
def test_rgb_to_hsv(size):
    ours = torch.stack(augmentations.rgb_to_hsv(*_planes(_PIXELS[f'{size}/images'])), dim=-1)
    np.testing.assert_allclose(ours.numpy(), _PIXELS[f'{size}/rgb_to_hsv'], rtol=0, atol=ATOL)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('source, result', [('rgb_to_hsv', 'hsv_to_rgb'), ('hsv_input', 'hsv_input_to_rgb')])
def test_hsv_to_rgb(size, source, result):
    ours = torch.stack(augmentations.hsv_to_rgb(*_planes(_PIXELS[f'{size}/{source}'])), dim=-1)
    np.testing.assert_allclose(ours.numpy(), _PIXELS[f'{size}/{result}'], rtol=0, atol=ATOL)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('operation', OPERATIONS)
def test_colour_operation(size, operation):
    images = _nchw(_PIXELS[f'{size}/images'])
    for i, factor in enumerate(_PIXELS[f'factors/{operation}']):
        values = torch.full([len(images)], float(factor))
        adjust = getattr(augmentations, f'adjust_{operation}')
        if operation in ('brightness', 'contrast'):
            ours = adjust(images, values)
        else:
            hsv = augmentations.rgb_to_hsv(*images.unbind(1))
            ours = torch.stack(augmentations.hsv_to_rgb(*adjust(*hsv, values)), dim=1)
        _assert_close(ours, _PIXELS[f'{size}/{operation}'][i])


@pytest.mark.parametrize('size', SIZES)
def test_grayscale_and_solarize(size):
    images = _nchw(_PIXELS[f'{size}/images'])
    _assert_close(augmentations.to_grayscale(images), _PIXELS[f'{size}/grayscale'])
    _assert_close(augmentations.solarize(images, 0.5), _PIXELS[f'{size}/solarize'])


@pytest.mark.parametrize('size', SIZES)
def test_gaussian_blur(size):
    images = _nchw(_PIXELS[f'{size}/images'])
    for i, kernel_size in enumerate(_PIXELS['blur/kernel_sizes']):
        for j, sigma in enumerate(_PIXELS['blur/sigmas']):
            sigmas = torch.full([len(images)], float(sigma))
            ours = augmentations.gaussian_blur(images, sigmas, float(kernel_size))
            _assert_close(ours, _PIXELS[f'{size}/blur'][i, j])


@pytest.mark.parametrize('group', PIPELINES)
def test_postprocess(group):
    """The whole pipeline, given the official decisions, gives the official pixels."""
    inputs = {view: _nchw(_PIXELS[f'{group}/{view}/input']) for view in VIEWS}
    inputs['labels'] = torch.arange(len(inputs['view1']))
    draws = {view: _golden_draws(group, view) for view in VIEWS}
    out = augmentations.postprocess(inputs, draws, AUGMENT_CONFIG)
    assert sorted(out) == ['labels', *VIEWS]
    assert out['labels'] is inputs['labels']
    for view in VIEWS:
        _assert_close(out[view], _PIXELS[f'{group}/{view}/output'])


# --- Official distributions --------------------------------------------------------------------


def _assert_same_rate(ours: float, official: float, expected: float, n: int) -> None:
    """`ours` against `official`, two samples of n, and against the expectation."""
    sigma = math.sqrt(expected * (1 - expected) / n)
    assert abs(ours - official) <= SIGMAS * math.sqrt(2) * sigma + 1e-9
    assert abs(ours - expected) <= SIGMAS * sigma + 1e-9


@pytest.mark.parametrize('view', VIEWS)
def test_decision_rates(statistics, many_draws, view):
    presets, draws, n = AUGMENT_CONFIG[view], many_draws[view], int(statistics['draws'])
    expected = dict(
        flip=0.5,
        jitter=0.8,
        grayscale=0.2,
        blur=presets['gaussian_blur']['apply_prob'],
        solarize=presets['solarize']['apply_prob'],
    )
    for name in DECISIONS:
        decisions = getattr(draws, name).double()
        _assert_same_rate(decisions.mean().item(), statistics[f'{view}/{name}/rate'], expected[name], n)
        assert abs(decisions.std(correction=0).item() - statistics[f'{view}/{name}/std']) < 0.03
    for first, second in (('jitter', 'grayscale'), ('blur', 'solarize')):
        joint = (getattr(draws, first) & getattr(draws, second)).double().mean().item()
        _assert_same_rate(joint, statistics[f'{view}/{first}_and_{second}/rate'], expected[first] * expected[second], n)


def test_views_are_independent(statistics, many_draws):
    n = int(statistics['draws'])
    for name, p in (('flip', 0.5), ('jitter', 0.8), ('grayscale', 0.2)):
        agree = getattr(many_draws['view1'], name) == getattr(many_draws['view2'], name)
        _assert_same_rate(
            agree.double().mean().item(), statistics[f'views_agree/{name}/rate'], p * p + (1 - p) * (1 - p), n
        )


@pytest.mark.parametrize('view', VIEWS)
@pytest.mark.parametrize('name', RANGES)
def test_magnitudes_are_uniform(statistics, many_draws, view, name):
    n, (low, high) = int(statistics['draws']), RANGES[name]
    values = getattr(many_draws[view], name).double().numpy()
    minimum, mean, maximum, std = statistics[f'{view}/{name}/min_mean_max_std']
    width = high - low
    tail = width * 20 / n  # An end is missed by more with probability exp(-20).
    assert low - 1e-6 <= values.min() <= low + tail and abs(minimum - values.min()) <= tail
    assert high + 1e-6 >= values.max() >= high - tail and abs(maximum - values.max()) <= tail
    sigma = width / math.sqrt(12 * n)
    assert abs(values.mean() - (low + high) / 2) <= SIGMAS * sigma
    assert abs(values.mean() - mean) <= SIGMAS * math.sqrt(2) * sigma
    # Standard error of a uniform variable's standard deviation: width sqrt((1/80 - 1/144) / (n/3)).
    assert abs(values.std() - std) <= SIGMAS * width * math.sqrt(2 * (1 / 80 - 1 / 144) * 3 / n)
    levels = statistics['quantiles'].astype(np.float64)
    error = width * np.sqrt(2 * levels * (1 - levels) / n) * SIGMAS + tail
    ours = np.quantile(values, levels)
    assert (np.abs(ours - statistics[f'{view}/{name}/quantiles']) <= error).all()


@pytest.mark.parametrize('view', VIEWS)
def test_orders_are_uniform(statistics, many_draws, view):
    n = int(statistics['draws'])
    for order, frequency in zip(statistics['orders'], statistics[f'{view}/order/frequency'], strict=True):
        hits = (many_draws[view].order == torch.from_numpy(order)).all(dim=1).double()
        _assert_same_rate(hits.mean().item(), frequency, 1 / 24, n)


def test_the_draws_of_an_image_are_independent(many_draws):
    draws = many_draws['view2']
    columns = {name: [value] if value.ndim == 1 else value.unbind(1) for name, value in draws._asdict().items()}
    groups = np.concatenate([[name] * len(values) for name, values in columns.items()])
    matrix = torch.stack(sum(map(list, columns.values()), []), dim=1).double().numpy()
    correlations = np.corrcoef(matrix.T)[groups[:, None] != groups]
    assert np.abs(correlations).max() < SIGMAS / math.sqrt(len(matrix))


@pytest.mark.parametrize('view', VIEWS)
def test_pixels_have_the_official_distribution(statistics, many_draws, view):
    """One image 20,000 times through the pipeline: mean and deviation of every pixel."""
    n, chunk = int(statistics['draws']), 1000
    image = _nchw(statistics['pixels/image'][None])
    moments = torch.zeros(4, *image.shape[1:], dtype=torch.float64)
    centre = _nchw(statistics[f'pixels/{view}/mean'][None])[0].double()
    for start in range(0, n, chunk):
        draws = sampling.ViewDraws(*[x[start : start + chunk] for x in many_draws[view]])
        out = augmentations.postprocess_view(image.expand(len(draws.flip), -1, -1, -1), draws, AUGMENT_CONFIG[view])
        x = out.double() - centre
        moments += torch.stack([(x**k).sum(0) for k in (1, 2, 3, 4)])
    m1, m2, m3, m4 = moments / n
    variance = m2 - m1**2
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    std = variance.sqrt()
    official_std = _nchw(statistics[f'pixels/{view}/std'][None])[0].double()
    mean_error = (2 * variance / n).sqrt()
    std_error = (2 * (fourth - variance**2) / (4 * variance * n)).sqrt()
    assert (m1.abs() / mean_error).max() < SIGMAS
    assert ((std - official_std).abs() / std_error).max() < SIGMAS
