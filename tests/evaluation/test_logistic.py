"""Logistic regression against scikit-learn's, and the numbers that describe a classifier."""

import numpy as np
import pytest
import sklearn.datasets
import torch
from sklearn.linear_model import LogisticRegression

from byol_func.evaluation import logistic, metrics
from byol_func.utils import dataset


@pytest.fixture(scope='module')
def digits():
    """Pixels and labels of the digits: 1,200 to train, 597 to test."""
    data = sklearn.datasets.load_digits()
    features, labels = torch.tensor(data.data).float(), torch.tensor(data.target)
    return features[:1200], labels[:1200], features[1200:], labels[1200:]


@pytest.mark.parametrize('penalty', [1e-1, 1e-3])
def test_minimum_is_that_of_scikit_learn(digits, penalty):
    train, labels, *_ = digits
    features = logistic.standardise(train)(train).double()
    w, b = logistic.fit(features, labels, num_classes=10, penalty=penalty, max_iterations=2000)
    reference = LogisticRegression(C=1 / (len(train) * penalty), tol=1e-8, max_iter=5000)
    reference.fit(features.numpy(), labels.numpy())
    torch.testing.assert_close(w.T, torch.tensor(reference.coef_), rtol=1e-2, atol=5e-3)
    shift = b - torch.tensor(reference.intercept_)  # Free up to a constant.
    assert shift.max() - shift.min() < 1e-2


def test_agrees_with_scikit_learn_on_the_digits(digits):
    """Both choose on the same held-out data, and end within 0.3 points on the test set."""
    train, labels, test, test_labels = digits
    mask = dataset.split_mask(labels, 0.2)
    result = logistic.choose_and_predict(test, train, labels, mask, num_classes=10)
    standard = logistic.standardise(train)
    x, y = standard(train).numpy(), labels.numpy()
    scores = {}
    for penalty in logistic.PENALTIES:
        part = LogisticRegression(C=1 / (int((~mask).sum()) * penalty), max_iter=2000)
        part.fit(x[~mask], y[~mask])
        scores[penalty] = part.score(x[mask], y[mask])
    assert result.held_out_top1 == pytest.approx(scores[result.penalty], abs=0.005)
    assert result.held_out_top1 == pytest.approx(max(scores.values()), abs=0.005)
    reference = LogisticRegression(C=1 / (len(x) * result.penalty), max_iter=2000).fit(x, y)
    ours = (result.logits.argmax(1) == test_labels).double().mean()
    assert float(ours) == pytest.approx(reference.score(standard(test).numpy(), test_labels.numpy()), abs=0.003)


def test_constant_features_do_no_harm():
    features = torch.cat(
        [torch.full((40, 3), 1e4), torch.randn(40, 2, generator=torch.Generator().manual_seed(0))], dim=1
    )
    labels = (features[:, 3] > 0).long()
    standard = logistic.standardise(features)
    assert torch.equal(standard(features)[:, :3], torch.zeros(40, 3))
    w, b = logistic.fit(standard(features), labels, num_classes=2, penalty=1e-3)
    assert ((standard(features) @ w + b).argmax(1) == labels).double().mean() > 0.9


def test_held_out_part_is_stratified_and_always_the_same():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 10)
    mask = dataset.split_mask(labels, 0.1)
    assert torch.bincount(labels[mask]).tolist() == [5, 2, 1]
    assert torch.equal(mask, dataset.split_mask(labels, 0.1))
    assert not torch.equal(mask, dataset.split_mask(labels, 0.1, seed=1))


def test_confusions_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.2, 0.1], [0.0, 0.1, 0.9]])  # In a tie the later class wins.
    assert metrics.confusion_matrix(scores, torch.tensor([0, 0, 2])).tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


def test_calibration_error_by_hand():
    """Two bins: confidence 0.6 and right once in two, 0.9 and always right."""
    probabilities = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9], [0.9, 0.1]])
    error = metrics.expected_calibration_error(probabilities, torch.tensor([0, 1, 1, 0]))
    assert error == pytest.approx(0.5 * 0.1 + 0.5 * 0.1)
    sure = torch.eye(3)
    assert metrics.expected_calibration_error(sure, torch.arange(3)) == 0.0
    assert metrics.expected_calibration_error(sure, torch.tensor([1, 2, 0])) == 1.0


def test_calibration_error_of_honest_probabilities_is_small():
    rng = torch.Generator().manual_seed(0)
    probabilities = torch.softmax(2 * torch.randn(20000, 5, generator=rng), dim=1)
    labels = torch.multinomial(probabilities, 1, generator=rng)[:, 0]
    assert metrics.expected_calibration_error(probabilities, labels) < 0.015
    sharpened = torch.softmax(3 * probabilities.log(), dim=1)
    assert metrics.expected_calibration_error(sharpened, labels) > 0.1


def test_report_by_hand():
    probabilities = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.9, 0.1, 0.0], [0.4, 0.4, 0.2]])
    found = metrics.report(probabilities, torch.tensor([0, 1, 1, 0]), ('a', 'b', 'c'))
    assert found['top1'] == 0.5 and found['top5'] == 1.0  # The tie goes to the later class.
    assert found['confusion_matrix'] == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert found['per_class'][0] == dict(name='a', precision=0.5, recall=0.5, examples=2)
    assert found['per_class'][2] == dict(name='c', precision=0.0, recall=0.0, examples=0)
    assert np.sum(found['confusion_matrix']) == 4
