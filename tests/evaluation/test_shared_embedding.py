"""Replicas that share an evaluation get the numbers of one that does all of it."""

import pytest
import torch

from byol_func import eval_experiment
from byol_func.evaluation import features
from byol_func.utils import dataset
from golden_processes import run_in_processes

BATCH = 8


def _embed(rank, num_images, shared=True):
    backbone = eval_experiment.make_backbone(
        encoder_class='TinyResNet',
        encoder_config=dict(resnet_v2=False, width_multiplier=1.0, stem='cifar'),
        bn_config=dict(decay_rate=0.9, eps=1e-5, cross_replica=False),
    )
    rng = torch.Generator().manual_seed(0)
    params, state = backbone.init(rng)
    images = torch.randint(0, 256, (num_images, 3, 8, 8), dtype=torch.uint8, generator=rng)
    data = dataset.Dataset(images, torch.arange(num_images) % 3, ('a', 'b', 'c'))
    seen = 0

    def preprocess(batch):
        nonlocal seen
        seen += len(batch['labels'])
        return batch['images'] / 255

    state = features.calibrate(backbone, params, state, [images / 255])
    found = features.extract(backbone, params, state, data, preprocess=preprocess, batch_size=BATCH, shared=shared)
    assert found.num_examples == num_images
    return found.embeddings, found.labels, found.positions, seen


@pytest.mark.parametrize('num_images', [3 * BATCH + 5, 4 * BATCH, BATCH - 1])
def test_each_replica_does_its_part(num_images, tmp_path):
    """Bit for bit, also with a short last batch and with fewer batches than replicas."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # As in the processes below: sums depend on it.
    alone = _embed(0, num_images, shared=False)
    torch.set_num_threads(threads)
    results = run_in_processes(_embed, 2, tmp_path, num_images)
    for shared in results:
        for ours, theirs in zip(shared[:3], alone[:3], strict=True):
            assert torch.equal(ours, theirs)
    seen = [result[3] for result in results]
    assert sum(seen) == num_images == alone[3] and max(seen) - min(seen) <= BATCH
