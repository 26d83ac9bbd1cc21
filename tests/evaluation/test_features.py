"""Embeddings of a data set, and moving averages for an encoder that was never trained."""

import optree
import pytest
import torch

from byol_func import eval_experiment
from byol_func.evaluation import features
from byol_func.utils import dataset

EPS = 1e-5


@pytest.fixture(scope='module')
def backbone():
    """The smallest encoder, for grey images."""
    return eval_experiment.make_backbone(
        encoder_class='TinyResNet',
        encoder_config=dict(width_multiplier=1.0, stem='cifar'),
        bn_config=dict(decay_rate=0.9, eps=EPS),
        in_channels=1,
    )


@pytest.fixture(scope='module')
def images() -> torch.Tensor:
    """Noise."""
    return torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_calibrated_encoder_normalises_as_in_training(backbone, images):
    """Moving averages of one batch over and over are its statistics: both modes agree."""
    params, state = backbone.init(torch.Generator().manual_seed(0))
    before = optree.tree_map(torch.clone, (params, state))
    calibrated = features.calibrate(backbone, params, state, (images for _ in range(50)))
    training, _ = backbone.apply(params, state, images, is_training=True)
    evaluation, _ = backbone.apply(params, calibrated, images, is_training=False)
    torch.testing.assert_close(evaluation, training, rtol=1e-3, atol=1e-4)
    uncalibrated, _ = backbone.apply(params, state, images, is_training=False)
    assert not torch.allclose(uncalibrated, training, rtol=0.1, atol=0.1)
    assert all(map(torch.equal, optree.tree_leaves(before), optree.tree_leaves((params, state))))
    assert int(calibrated['encoder']['initial_batchnorm']['mean_ema']['counter']) == 50


@pytest.mark.parametrize('batch_size', [1, 3, 10, 100])
def test_features_are_in_order_and_complete(backbone, images, batch_size):
    """Whatever the batches: every embedding depends on its own image only."""
    params, state = backbone.init(torch.Generator().manual_seed(0))
    state = features.calibrate(backbone, params, state, [images])
    data = dataset.Dataset((images * 255).to(torch.uint8), torch.arange(10), tuple('0123456789'))
    halved = lambda batch: batch['images'].float() / 510
    found = features.extract(backbone, params, state, data, preprocess=halved, batch_size=batch_size)
    assert torch.equal(found.labels, data.labels) and found.class_names == data.class_names
    expected, _ = backbone.apply(params, state, halved({'images': data.images}), is_training=False)
    assert found.embeddings.dtype == torch.float32 and not found.embeddings.requires_grad
    torch.testing.assert_close(found.embeddings, expected, rtol=1e-4, atol=1e-5)
