"""The published encoders load, their cards are those of the files, and a published accuracy is found again."""

import json

import pytest
import torch

import byol_func
from benchmarks import model_cards, results_table
from byol_func.evaluation import knn
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


def test_a_published_accuracy_is_found_again():
    """Digits come with scikit-learn; nearest neighbours have nothing to train."""
    folder = results_table.RESULTS / 'digits_cpu'
    encoder = byol_func.load_encoder(folder / model_cards.FILE)
    train, test = dataset.load_train_and_test(**encoder.config['dataset'])
    features = [encoder.embed(data.images) for data in (train, test)]
    found = knn.accuracy(features[1], test.labels, features[0], train.labels, num_classes=10, k=20)
    published = json.loads((folder / 'summary.json').read_text())['test/online_knn_top1']
    assert found == pytest.approx(published, abs=0.012)  # Four of 355 images: another CPU rounds differently.
