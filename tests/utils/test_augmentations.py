"""Contracts of the augmentations: crops, draws, purity, tracing, presets.

What the official code says about pixels and distributions is in test_golden_augmentations.py.
"""

import copy
import math

import numpy as np
import pytest
import torch

from byol_func.utils import augmentations, sampling
from byol_func.utils.sampling import AUGMENT_CONFIG

ATOL = 3e-6  # float32 in [0, 1], a few roundings apart.
SIGMAS = 5.0  # Statistics of 20,000 draws.
OPERATIONS = ('brightness', 'contrast', 'saturation', 'hue')
DECISIONS = ('flip', 'jitter', 'grayscale', 'blur', 'solarize')
VIEWS = ('view1', 'view2')


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _presets(**changes) -> dict:
    """The official presets with fields of both views replaced, as color_transform__hue=0.2."""
    presets = copy.deepcopy(AUGMENT_CONFIG)
    for path, value in changes.items():
        *section, field = path.split('__')
        for view in VIEWS:
            (presets[view][section[0]] if section else presets[view])[field] = value
    return presets


# --- Sampler contracts -------------------------------------------------------------------------


def test_draws_have_the_declared_types():
    draws = sampling.sample(_generator(0), 5, AUGMENT_CONFIG['view2'], (20, 30))
    for name, value in draws._asdict().items():
        shape = [5, 4] if name in ('crop', 'order') else [5]
        dtype = torch.bool if name in DECISIONS else torch.float32
        assert list(value.shape) == shape, name
        assert value.dtype == (torch.int64 if name == 'order' else dtype), name
    assert draws.order.sort(dim=1).values.equal(torch.arange(4).repeat(5, 1))


def test_draws_are_a_function_of_the_generator():
    first, again, other = (
        sampling.sample(_generator(seed), 64, AUGMENT_CONFIG['view2'], (32, 32)) for seed in (7, 7, 8)
    )
    assert all(a.equal(b) for a, b in zip(first, again, strict=False))
    assert not any(a.equal(b) for a, b in zip(first, other, strict=False))
    pair = sampling.sample_pair(_generator(7), _generator(8), 64, _presets(), (32, 32))
    assert pair['view2'].sigma.equal(other.sigma)
    assert pair['view1'].sigma.equal(first.sigma)


def test_probabilities_zero_and_one():
    never = _presets(
        random_flip=False,
        color_transform__apply_prob=0.0,
        gaussian_blur__apply_prob=0.0,
        solarize__apply_prob=0,
        random_crop__apply_prob=0.0,
        color_transform__shuffle=False,
    )
    draws = sampling.sample(_generator(0), 5000, never['view1'], (20, 30))
    assert not any(getattr(draws, name).any() for name in DECISIONS)
    assert draws.crop.equal(torch.tensor([[0.0, 0.0, 20.0, 30.0]]).repeat(5000, 1))
    assert draws.order.equal(torch.arange(4).repeat(5000, 1))
    images = torch.rand(5000, 1, 2, 3, generator=_generator(1))
    assert augmentations.postprocess_view(images, draws, never['view1']).equal(images)
    always = _presets(
        color_transform__color_jitter_prob=1.0,
        gaussian_blur__apply_prob=1.0,
        color_transform__to_grayscale_prob=1.0,
        solarize__apply_prob=1.0,
    )
    draws = sampling.sample(_generator(0), 5000, always['view1'], (20, 30))
    assert all(getattr(draws, name).all() for name in DECISIONS if name != 'flip')


def test_apply_prob_gates_jitter_and_grayscale_together():
    presets = _presets(
        color_transform__apply_prob=0.5, color_transform__color_jitter_prob=1.0, color_transform__to_grayscale_prob=1.0
    )
    draws = sampling.sample(_generator(0), 20000, presets['view1'], (8, 8))
    assert draws.jitter.equal(draws.grayscale)
    assert abs(draws.jitter.double().mean() - 0.5) < SIGMAS * 0.5 / math.sqrt(20000)


def test_crop_windows_follow_the_official_rule():
    """On images so large that rounding to pixels hardly shows."""
    height, width, n = 3000, 4000, 20000
    presets = _presets(random_crop__max_area=0.4)['view1']  # Small enough never to be clamped.
    crop = sampling.sample(_generator(0), n, presets, (height, width)).crop
    top, left, h, w = crop.double().unbind(1)
    area, log_aspect = h * w / (height * width), (w / h).log()
    for values, low, high in (
        (area, 0.08, 0.4),
        (log_aspect, math.log(3 / 4), math.log(4 / 3)),
        (top / (height - h), 0.0, 1.0),
        (left / (width - w), 0.0, 1.0),
    ):
        values = (values.numpy() - low) / (high - low)
        levels = np.linspace(0, 1, 11)
        error = SIGMAS * np.sqrt(levels * (1 - levels) / n) + 1e-3  # 1e-3: rounding to pixels.
        assert (np.abs(np.quantile(values, levels) - levels) <= error).all()
    correlations = np.corrcoef(np.stack([area, log_aspect, top / (height - h), left / (width - w)]))
    assert np.abs(correlations - np.eye(4)).max() < SIGMAS / math.sqrt(n)


@pytest.mark.parametrize('source_size', [(32, 32), (33, 47), (28, 90), (1, 1), (2, 40)])
def test_crop_windows_lie_inside_the_image(source_size):
    crop = sampling.sample(_generator(0), 20000, AUGMENT_CONFIG['view1'], source_size).crop
    top, left, height, width = crop.unbind(1)
    assert crop.equal(crop.round()) and crop.min() >= 0
    assert height.min() >= 1 and width.min() >= 1
    assert (top + height).max() == source_size[0] and (left + width).max() == source_size[1]
    if source_size == (32, 32):
        # A clamp, not another attempt: 32 is every sqrt(area * aspect) from 31.5, integrated here.
        areas, log_aspects = np.meshgrid(
            np.linspace(0.08, 1, 2001), np.linspace(math.log(3 / 4), math.log(4 / 3), 2001)
        )
        expected = (np.sqrt(areas * np.exp(log_aspects)) * 32 >= 31.5).mean()
        for side in (height, width):
            rate = (side == 32).double().mean().item()
            assert abs(rate - expected) < SIGMAS * math.sqrt(expected * (1 - expected) / 20000)
        # Every offset there is, equally often: windows 20 high have 13 of them.
        offsets = top[height == 20].long().bincount(minlength=13)
        assert len(offsets) == 13
        assert (offsets / offsets.sum() - 1 / 13).abs().max() < SIGMAS * math.sqrt(1 / 13 / offsets.sum().item())


# --- Operations ---------------------------------------------------------------------------------


def test_gaussian_blur_has_a_sigma_per_image_and_none_below_two_pixels():
    images = torch.rand(3, 3, 8, 10, generator=_generator(0))
    sigma = torch.tensor([0.3, 0.9, 1.7])
    together = augmentations.gaussian_blur(images, sigma, 4.0)
    for i in range(3):
        alone = augmentations.gaussian_blur(images[i : i + 1], sigma[i : i + 1], 4.0)
        torch.testing.assert_close(together[i : i + 1], alone)
    torch.testing.assert_close(augmentations.gaussian_blur(images, sigma, 1.9), images)


@pytest.mark.parametrize(
    'left_out',
    [(), ('saturation',), ('hue',), ('saturation', 'hue'), ('brightness',), ('brightness', 'contrast'), OPERATIONS],
)
def test_colour_jitter_is_the_operations_one_after_the_other(left_out):
    """All 24 orders, and presets that leave operations out, against the plain loop."""
    orders = torch.cartesian_prod(*[torch.arange(4)] * 4)
    orders = orders[orders.sort(dim=1).values.eq(torch.arange(4)).all(dim=1)]
    draws = sampling.sample(_generator(3), 24, AUGMENT_CONFIG['view1'], (12, 12))
    draws = draws._replace(order=orders, jitter=torch.ones(24).bool(), grayscale=torch.zeros(24).bool())
    presets = dict(AUGMENT_CONFIG['view1']['color_transform'], **dict.fromkeys(left_out, 0.0))
    images = torch.rand(24, 3, 12, 12, generator=_generator(4))
    expected = images.clone()
    for i, order in enumerate(orders.tolist()):
        image = images[i : i + 1]
        for name in [OPERATIONS[k] for k in order if OPERATIONS[k] not in left_out]:
            value = getattr(draws, name)[i : i + 1]
            if name in ('brightness', 'contrast'):
                image = getattr(augmentations, f'adjust_{name}')(image, value)
            else:
                hsv = augmentations.rgb_to_hsv(*image.unbind(1))
                hsv = getattr(augmentations, f'adjust_{name}')(*hsv, value)
                image = torch.stack(augmentations.hsv_to_rgb(*hsv), dim=1)
            image = image.clamp(0.0, 1.0)
        expected[i] = image[0]
    before = images.clone()
    ours = augmentations.color_transform(images, draws, presets)
    assert images.equal(before)
    torch.testing.assert_close(ours, expected, rtol=0, atol=ATOL)


# --- Crops -------------------------------------------------------------------------------------


def _reference_resize(image: np.ndarray, size: int) -> np.ndarray:
    """Bicubic resize of [C, H, W] as TensorFlow's, tap by tap in float64, without its table."""

    def kernel(t: float) -> float:
        t, a = abs(t), -0.5
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    def taps(out: int, length: int) -> list[tuple[int, float]]:
        position = (out + 0.5) * length / size - 0.5
        base = math.floor(position)
        inside = [(i, kernel(position - i)) for i in range(base - 1, base + 3) if 0 <= i < length]
        total = sum(weight for _, weight in inside)
        return [(i, weight / total) for i, weight in inside]

    out = np.zeros((image.shape[0], size, size))
    for y in range(size):
        for x in range(size):
            for i, row_weight in taps(y, image.shape[1]):
                for j, column_weight in taps(x, image.shape[2]):
                    out[:, y, x] += row_weight * column_weight * image[:, i, j]
    return out


@pytest.mark.parametrize('image_size', [1, 7, 16, 32])
@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('as_uint8', [False, True])
def test_random_crop_is_a_bicubic_resize_of_the_window(image_size, channels, as_uint8):
    windows = torch.tensor(
        [[0, 0, 21, 26], [3, 5, 7, 7], [20, 25, 1, 1], [0, 1, 21, 2], [8, 0, 13, 26], [2, 2, 16, 16]]
    )
    images = torch.randint(0, 256, (len(windows), channels, 21, 26), generator=_generator(0))
    images[0, :, ::2] = 255 * (images[0, :, ::2] > 128)  # Makes the cubic overshoot.
    images = images.to(torch.uint8)
    inputs = images if as_uint8 else images / 255.0
    ours = augmentations.random_crop(inputs, windows.float(), image_size)
    assert ours.dtype == torch.float32 and ours.shape == (len(windows), channels, *[image_size] * 2)
    for i, (top, left, height, width) in enumerate(windows.tolist()):
        cut = images[i, :, top : top + height, left : left + width].double().numpy()
        expected = np.clip(_reference_resize(cut, image_size) / 255, 0, 1)
        np.testing.assert_allclose(ours[i].numpy(), expected, rtol=0, atol=1e-5)


def test_whole_image_at_its_own_size_is_unchanged():
    images = torch.rand(2, 3, 16, 16, generator=_generator(0))
    crop = torch.tensor([[0.0, 0.0, 16.0, 16.0]]).repeat(2, 1)
    torch.testing.assert_close(augmentations.random_crop(images, crop, 16), images)


@pytest.mark.parametrize('height, width', [(32, 32), (33, 47), (50, 31), (5, 1)])
@pytest.mark.parametrize('crop_fraction', [0.875, 1.0])
def test_center_crop(height, width, crop_fraction):
    images = torch.rand(2, 3, height, width, generator=_generator(0))
    side = max(1, math.floor(crop_fraction * min(height, width)))
    top, left = ((height - side) + 1) // 2, ((width - side) + 1) // 2
    ours = augmentations.center_crop(images, 14, crop_fraction)
    for image, cropped in zip(images, ours, strict=False):
        cut = image[:, top : top + side, left : left + side].double().numpy()
        expected = np.clip(_reference_resize(cut, 14), 0, 1)
        np.testing.assert_allclose(cropped.numpy(), expected, rtol=0, atol=1e-5)


# --- Contracts ---------------------------------------------------------------------------------


def _batch(channels: int, batch_size: int = 8, seed: int = 0):
    images = torch.randint(0, 256, (batch_size, channels, 24, 20), generator=_generator(seed), dtype=torch.uint8)
    draws = sampling.sample_pair(_generator(seed + 1), _generator(seed + 2), batch_size, AUGMENT_CONFIG, (24, 20))
    return dict(images=images, labels=torch.arange(batch_size)), draws


def test_postprocess_crops_then_augments():
    inputs, draws = _batch(3)
    out = augmentations.postprocess(inputs, draws, AUGMENT_CONFIG, 32)
    for view in VIEWS:
        cropped = augmentations.random_crop(inputs['images'], draws[view].crop, 32)
        expected = augmentations.postprocess_view(cropped, draws[view], AUGMENT_CONFIG[view])
        torch.testing.assert_close(out[view], expected)
        assert out[view].shape == (8, 3, 32, 32) and out[view].dtype == torch.float32
        assert out[view].min() >= 0 and out[view].max() <= 1
    assert not out['view1'].equal(out['view2'])


@pytest.mark.parametrize('channels', [1, 3])
def test_inputs_are_not_changed(channels):
    inputs, draws = _batch(channels)
    crops = {view: inputs['images'] / 255.0 for view in VIEWS} | {'labels': inputs['labels']}
    crops['view2'].requires_grad_()
    before = copy.deepcopy((inputs, crops, draws))
    augmentations.postprocess(inputs, draws, AUGMENT_CONFIG, 24)
    out = augmentations.postprocess(crops, draws, AUGMENT_CONFIG)
    augmentations.center_crop(inputs['images'], 24)
    for old, new in zip(before[:2], (inputs, crops), strict=False):
        assert all(old[name].equal(new[name]) for name in old)
    assert all(a.equal(b) for view in VIEWS for a, b in zip(before[2][view], draws[view], strict=False))
    assert not out['view2'].requires_grad  # The official stop_gradient.
    addresses = {x.untyped_storage().data_ptr() for x in crops.values()}
    assert not {out[view].untyped_storage().data_ptr() for view in VIEWS} & addresses


def test_one_channel_has_no_colour():
    """Saturation, hue and grayscale do nothing; all else is what three equal channels give."""
    inputs, draws = _batch(1, batch_size=64)
    one = augmentations.postprocess(inputs, draws, AUGMENT_CONFIG, 24)
    colourless = _presets(
        color_transform__saturation=0.0, color_transform__hue=0.0, color_transform__to_grayscale_prob=0.0
    )
    three = dict(inputs, images=inputs['images'].repeat(1, 3, 1, 1))
    three = augmentations.postprocess(three, draws, colourless, 24)
    for view in VIEWS:
        assert one[view].shape == (64, 1, 24, 24)
        torch.testing.assert_close(one[view].repeat(1, 3, 1, 1), three[view], rtol=0, atol=ATOL)
    assert augmentations.to_grayscale(one['view1']).equal(one['view1'])


@pytest.mark.parametrize('semantics', ['official', 'torchvision'])
@pytest.mark.parametrize('channels', [2, 4])
def test_every_one_of_other_numbers_of_channels_is_an_image_of_one(channels, semantics):
    """The same crop, flip, brightness, contrast, blur and solarization; no saturation, hue or grayscale."""
    inputs, draws = _batch(channels, batch_size=32)
    presets = _presets(color_transform__semantics=semantics)
    many = augmentations.postprocess(inputs, draws, presets, 24)
    for c in range(channels):
        one = augmentations.postprocess(dict(inputs, images=inputs['images'][:, c : c + 1]), draws, presets, 24)
        for view in VIEWS:
            torch.testing.assert_close(many[view][:, c : c + 1], one[view], rtol=0, atol=ATOL)


@pytest.mark.parametrize('channels', [1, 3])
def test_compiled_in_one_graph(channels):
    inputs, draws = _batch(channels)

    def postprocess(inputs, draws):
        out = augmentations.postprocess(inputs, draws, AUGMENT_CONFIG, 16)
        return dict(out, eval=augmentations.center_crop(inputs['images'], 16))

    compiled = torch.compile(postprocess, backend='aot_eager', fullgraph=True)
    expected, ours = postprocess(inputs, draws), compiled(inputs, draws)
    for view in (*VIEWS, 'eval'):
        torch.testing.assert_close(ours[view], expected[view], rtol=0, atol=ATOL)
