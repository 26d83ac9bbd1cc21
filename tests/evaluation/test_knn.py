"""k-nearest neighbours against a loop over all pairs, and the choice of k and temperature."""

import math

import pytest
import torch

from byol_func.evaluation import knn

CLASSES = 4


def _brute_force(features, train_features, train_labels, k, temperature):
    """The votes, one query and one neighbour at a time, in Python's floats."""
    rows = []
    unit = lambda row: [x / math.sqrt(math.fsum(y * y for y in row)) for x in row]
    train = [unit(row) for row in train_features.tolist()]
    for query in map(unit, features.tolist()):
        cosines = [math.fsum(x * y for x, y in zip(query, row, strict=True)) for row in train]
        nearest = sorted(range(len(train)), key=lambda i: (-round(cosines[i], 10), i))[:k]
        votes = [0.0] * CLASSES
        for i in nearest:
            votes[train_labels[i]] += math.exp(cosines[i] / temperature)
        rows.append([vote / sum(votes) for vote in votes])
    return torch.tensor(rows, dtype=torch.float64)


def _clusters(num: int, seed: int, spread: float = 1.0):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (num,), generator=rng)
    centres = torch.randn(CLASSES, 8, generator=torch.Generator().manual_seed(9))
    return centres[labels] + spread * torch.randn(num, 8, generator=rng), labels


@pytest.mark.parametrize('block', [7, 40, 1000])
@pytest.mark.parametrize('k, temperature', [(1, 0.07), (5, 0.02), (20, 0.5), (999, 0.1)])
def test_equals_a_loop_over_all_pairs(monkeypatch, block, k, temperature):
    """Also with duplicates under other labels, which the order of the examples must settle."""
    monkeypatch.setattr(knn, '_BLOCK', block)
    monkeypatch.setattr(knn, '_QUERIES', 6)
    train, train_labels = _clusters(60, seed=0)
    train = torch.cat([train, train[:30] * 2.0])
    train_labels = torch.cat([train_labels, (train_labels[:30] + 1) % CLASSES])
    queries = torch.cat([_clusters(15, seed=1)[0], train[:5]])
    found = knn.predict(queries, train, train_labels, num_classes=CLASSES, k=k, temperature=temperature)
    expected = _brute_force(queries, train, train_labels, k, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(found.argmax(1), expected.argmax(1))


@pytest.mark.parametrize('block', [7, 64])
def test_collapsed_embeddings_have_the_first_examples_as_neighbours(monkeypatch, block):
    monkeypatch.setattr(knn, '_BLOCK', block)
    found = knn.find_neighbours(torch.ones(3, 5), torch.full((50, 5), 0.3), 9)
    assert found.indices.tolist() == [list(range(9))] * 3


def test_a_temperature_whose_weights_no_float_holds():
    """exp(1 / 0.001) is infinite in float64; the weights are relative to the nearest."""
    train, labels = _clusters(30, seed=0, spread=0.1)
    probabilities = knn.predict(train, train, labels, num_classes=CLASSES, k=10, temperature=0.001)
    assert probabilities.isfinite().all()
    assert torch.equal(probabilities.argmax(1), labels)


def test_choice_is_made_on_held_out_data():
    """The test set has no say in it, and the whole training set predicts."""
    train, train_labels = _clusters(200, seed=0, spread=1.5)
    test, test_labels = _clusters(50, seed=1, spread=1.5)
    held_out = torch.arange(200) % 4 == 0
    ks, temperatures = (1, 10, 300), (0.05, 1.0)
    result = knn.choose_and_predict(
        test,
        train,
        train_labels,
        held_out,
        num_classes=CLASSES,
        ks=ks,
        temperatures=temperatures,
    )
    scores = {
        (k, t): knn.accuracy(
            train[held_out],
            train_labels[held_out],
            train[~held_out],
            train_labels[~held_out],
            num_classes=CLASSES,
            k=k,
            temperature=t,
        )
        for k in ks
        for t in temperatures
    }
    assert len(set(scores.values())) > 1
    assert result.held_out_top1 == max(scores.values()) == scores[result.k, result.temperature]
    expected = _brute_force(test, train, train_labels, result.k, result.temperature)
    torch.testing.assert_close(result.probabilities, expected, rtol=1e-9, atol=1e-12)
    assert (result.probabilities.argmax(1) == test_labels).double().mean() > 0.5


@pytest.mark.parametrize('k, top5', [(1, 0.25), (2, 0.5), (3, 0.75), (7, 1.0)])
def test_classes_without_votes_are_no_candidates(k, top5):
    """Nine classes on a line; k neighbours are at most k candidates, whatever the labels' order."""
    angles = torch.arange(9) * 0.1
    train = torch.stack([angles.cos(), angles.sin()], dim=1)
    # Query i lies at the first example; its label is that of its i-th nearest neighbour.
    queries, labels = train[:1].repeat(4, 1), torch.tensor([0, 1, 2, 4])
    train_labels = torch.arange(9)
    found = knn.predict(queries, train, train_labels, num_classes=9, k=k, temperature=0.07)
    assert knn.topk_accuracy(found, labels, 5).double().mean() == top5
    assert knn.topk_accuracy(found, labels, 1).double().mean() == 0.25
    # The same with the labels in reverse, where ties would favour others.
    found = knn.predict(queries, train, 8 - train_labels, num_classes=9, k=k, temperature=0.07)
    assert knn.topk_accuracy(found, 8 - labels, 5).double().mean() == top5


def test_a_vote_of_a_far_neighbour_still_counts():
    """Weights relative to the nearest fall to e^-100 at the lowest temperature, and stay above zero."""
    train = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    found = knn.predict(train[:1], train, torch.tensor([0, 1]), num_classes=8, k=2, temperature=min(knn.TEMPERATURES))
    assert knn.topk_accuracy(found, torch.tensor([1]), 5).item()
    assert not knn.topk_accuracy(found, torch.tensor([7]), 5).item()
