"""The nearest pairs and the outliers of a set of embeddings."""

import numpy as np
import pytest
import torch

from byol_func.evaluation import odd_images
from byol_func.report import plots


def _around_one_direction(num: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor([1.0] + [0.0] * 15) + 0.1 * torch.randn(num, 16, generator=generator)


def test_what_was_planted_is_found():
    embeddings = _around_one_direction(60)
    embeddings[41] = 3.0 * embeddings[7]  # A duplicate up to its length.
    embeddings[20] = embeddings[52] + 1e-4
    embeddings[33] = torch.eye(16)[3]
    found = odd_images.find(embeddings, num_pairs=2, num_outliers=1)
    assert found.pairs.tolist() == [[7, 41], [20, 52]] and found.outliers.tolist() == [33]
    assert found.pair_cosines[0] == pytest.approx(1.0) and found.pair_cosines[1] < found.pair_cosines[0] + 1e-12
    unit = torch.nn.functional.normalize(embeddings.double())
    nearest = (unit[33] @ unit.T).sort(descending=True).values[1:6]
    assert found.outlier_cosines[0] == pytest.approx(nearest.mean().item())


def test_many_equal_images():
    """More of them than neighbours: no image is its own pair, and none is in two."""
    embeddings = torch.cat([torch.ones(20, 4), torch.eye(4)])
    found = odd_images.find(embeddings, num_pairs=16, num_outliers=4)
    assert (found.pairs[:, 0] < found.pairs[:, 1]).all()
    assert len(found.pairs.unique()) == found.pairs.numel()
    assert sorted(found.outliers.tolist()) == [20, 21, 22, 23]


@pytest.mark.parametrize('num', [2, 3])
def test_hardly_any_images(num):
    found = odd_images.find(_around_one_direction(num), num_pairs=16, num_outliers=16)
    assert len(found.pairs) == 1 and sorted(found.outliers.tolist()) == list(range(num))


def test_of_a_large_set_every_second_image(monkeypatch):
    monkeypatch.setattr(odd_images, 'MOST_IMAGES', 30)
    embeddings = _around_one_direction(59)
    embeddings[44] = embeddings[2]
    assert odd_images.find(embeddings, num_pairs=1, num_outliers=1).pairs.tolist() == [[2, 44]]


@pytest.mark.parametrize('num_pairs, singles', [(5, 3), (1, 2), (0, 1)])
def test_the_picture(num_pairs, singles, tmp_path):
    count = 2 * num_pairs + singles
    images = [(np.full((8, 8, 1 + 2 * (i % 2)), 10 * i, np.uint8), f'{i}$_name') for i in range(count)]
    plots.odd_images(tmp_path / 'odd.png', images, [0.5] * (num_pairs + singles), 'Title')
    assert (tmp_path / 'odd.png').stat().st_size > 1000
