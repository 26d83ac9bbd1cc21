"""Replicas that share an evaluation get the numbers of one that does all of it."""

import pytest
import torch

from byol_func import eval_experiment, main_loop
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


def _evaluate(rank, num_images):
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(num_images, 1, 2, 2, generator=rng)
    data = dataset.Features(images.flatten(1), torch.arange(num_images) % 3, ('a', 'b', 'c'))
    seen = []

    def evaluate(state, batch):
        seen.append(len(batch['labels']))
        values = batch['images'].sum(dim=1)
        return {'eval_loss': values * state, 'top1_accuracy': values > 2.0}

    return main_loop.eval_loop(evaluate, torch.tensor(0.3), data, BATCH), seen


@pytest.mark.parametrize('num_images', [3 * BATCH + 5, 4 * BATCH, BATCH - 1])
def test_the_evaluation_of_a_classifier_is_shared(num_images, tmp_path):
    """The same scalars to the last bit, each batch evaluated once; less than a batch for each is not worth sharing."""
    alone, seen_alone = _evaluate(0, num_images)
    results = run_in_processes(_evaluate, 2, tmp_path, num_images)
    assert [scalars for scalars, _ in results] == [alone, alone]
    seen = [seen for _, seen in results]
    assert seen == ([seen_alone[0::2], seen_alone[1::2]] if num_images > BATCH else [seen_alone] * 2)
