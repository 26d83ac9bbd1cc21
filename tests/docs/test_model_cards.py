"""The published encoders load, their cards are those of the files, and a published accuracy is found again."""

import json
import os

import pytest
import torch

import byol_func
from benchmarks import model_cards, results_table
from byol_func.evaluation import knn
from byol_func.runtime import prng
from byol_func.utils import dataset

FILES = sorted(results_table.RESULTS.glob(f'*/{model_cards.FILE}'))


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.parent.name)
def test_a_published_encoder_loads_and_its_card_describes_it(path):
    name = path.parent.name
    assert (path.parent / model_cards.CARD).read_text() == model_cards.card(name), (
        f'run python benchmarks/model_cards.py --name={name}'
    )
    encoder = byol_func.load_encoder(path)
    side = encoder.config['image_size']
    features = encoder.embed(torch.zeros(2, encoder.num_channels, side, side, dtype=torch.uint8))
    assert features.shape == (2, encoder.output_size) and features.isfinite().all()
    assert encoder.config['dataset']['root'] in ('', 'DIR', '~/data')
    assert path.stat().st_size < 6 * 2**20


@pytest.mark.parametrize('name', [path.parent.name for path in FILES])
def test_a_published_accuracy_is_found_again(name):
    """Nearest neighbours have nothing to train. Digits come with scikit-learn; name the folder of other images."""
    folder = results_table.RESULTS / name
    encoder = byol_func.load_encoder(folder / model_cards.FILE)
    source = encoder.config['dataset']
    if source['name'] != 'digits' and not (source := source | {'root': os.environ.get(f'DATA_OF_{name}', '')})['root']:
        pytest.skip(f'DATA_OF_{name} names no folder with the images')
    train, test = dataset.load_train_and_test(**source)
    size = encoder.config['monitoring']['knn_bank_size']
    bank = torch.randperm(train.num_examples, generator=prng.fold_in(0, 'knn_bank'))[:size]
    train = train if size >= train.num_examples else train.take(bank.sort().values)
    features = [encoder.embed(data.images) for data in (train, test)]
    labels = test.labels, train.labels
    found = knn.accuracy(features[1], labels[0], features[0], labels[1], num_classes=train.num_classes, k=20)
    published = json.loads((folder / 'summary.json').read_text())['test/online_knn_top1']
    assert found == pytest.approx(published, abs=0.012)  # Four of 355 images: another CPU rounds differently.
