"""What random numbers promise across versions of PyTorch and platforms: the values that were recorded here.

Recorded with torch 2.14.1; torch 2.11.0 gives the same.
"""

import hashlib

import pytest
import torch

from byol_func.runtime import layers, prng
from byol_func.utils import dataset, sampling


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.blake2b(tensor.numpy().tobytes(), digest_size=8).hexdigest()


@pytest.mark.parametrize(
    'data, seed',
    [
        ((0, 'augment', 3, 1), 2138719653569964542),
        ((7, 12), 8264451164881959629),
        ((-1, 'x'), 7639014938728950534),
    ],
)
def test_seeds(data, seed):
    assert prng.fold_in(*data).initial_seed() == seed


def test_uniform_numbers_and_permutations():
    first = torch.rand(3, generator=prng.fold_in(0, 'augment', 3, 1))
    assert first.tolist() == [0.7864927649497986, 0.5963484048843384, 0.28533440828323364]
    assert _digest(torch.rand(1000, 20, generator=prng.fold_in(1))) == '4295a22b70e6e895'
    assert _digest(torch.randperm(50_000, generator=prng.fold_in(1))) == '5fade5aaf78209e8'


def test_the_order_of_images_and_the_images_of_a_split():
    order = [dataset.batch_indices(step, seed=7, num_examples=8, batch_size=4).tolist() for step in (4, 5)]
    assert order == [[0, 4, 2, 6], [7, 3, 5, 1]]
    chosen = dataset.split_mask(torch.arange(60) % 3, 0.3, seed=5).nonzero()[:, 0]
    assert chosen.tolist() == [1, 2, 5, 8, 13, 20, 27, 28, 30, 36, 39, 41, 43, 45, 46, 47, 51, 55]


def test_augmentations():
    """Decisions are equal; numbers are as far as another processor may round them."""
    presets = sampling.AUGMENT_CONFIG['view2']
    draws = sampling.sample(prng.fold_in(0, 'augment', 3, 1), 64, presets, (37, 53))
    recorded = dict(
        flip='d17797e738fe219f',
        jitter='03fadfd68beed5c5',
        order='3b899c24c6c0432b',
        grayscale='bc77893328b7db5a',
        blur='e8c726d646a8300f',
        solarize='8446603d6a52407c',
    )
    assert {name: _digest(getattr(draws, name)) for name in recorded} == recorded
    assert draws.crop[0].tolist() == [0.0, 19.0, 37.0, 33.0]
    first = [draws.brightness[0], draws.contrast[0], draws.saturation[0], draws.hue[0], draws.sigma[0]]
    expected = [0.09199446439743042, 1.1991937160491943, 1.015336036682129, 0.06044400483369827, 1.4540647268295288]
    torch.testing.assert_close(torch.stack(first), torch.tensor(expected))


def test_initial_weights_are_the_same_only_under_one_version():
    """So no values are recorded: PyTorch changed its truncated normal numbers between 2.11 and 2.14."""
    draw = lambda *data: layers.truncated_normal(prng.fold_in(*data), (8, 4), 4)
    assert torch.equal(draw(0, 'online'), draw(0, 'online'))
    assert not torch.equal(draw(0, 'online'), draw(0, 'target'))
