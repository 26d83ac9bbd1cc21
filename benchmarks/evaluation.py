"""Measures the cost of the protocols on cached features, and compares their accuracy with scikit-learn's.

  python benchmarks/evaluation.py --json=OUT.json
  python benchmarks/evaluation.py --embeddings=WORKDIR --json=OUT.json

Costs are measured on random features of CIFAR-10's size (50,000 x 512 for training, 10,000 for testing, 10
classes): a sweep of 45 linear heads compared with one head, on cached features and with the encoder in every
step, and k-nearest neighbours and logistic regression, including the choice of their settings. Accuracies are
compared with scikit-learn's on the pixels of its digits (the mean over five folds, each training on four fifths
and testing on one) and on the embeddings that --mode=embed has written to WORKDIR for train and test.
"""

import functools
import json
import pathlib
import statistics
import sys
import time

import numpy as np
import tabulate
import torch
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

import measuring  # noqa: E402
from byol_func import eval_experiment  # noqa: E402
from byol_func.evaluation import knn, logistic
from byol_func.evaluation.heads import grid, stack  # noqa: E402
from byol_func.forward import ENCODER_FIELDS, make_backbone  # noqa: E402
from byol_func.utils import dataset, helpers  # noqa: E402
from configs import cifar10, digits  # noqa: E402

FLAGS = flags.FLAGS
flags.DEFINE_integer('num_train', 50_000, 'Training examples.')
flags.DEFINE_integer('num_test', 10_000, 'Test examples.')
flags.DEFINE_integer('size', 512, 'Numbers of an embedding.')
flags.DEFINE_integer('steps', 60, 'Steps of the sweep that are timed.')
flags.DEFINE_list('batch_sizes', ['256', '1024'], 'Batches of the sweep.')
flags.DEFINE_string('encoder', 'TinyResNet', 'Encoder of the sweep without cached embeddings, on 32 px images.')
flags.DEFINE_bool('costs', True, 'Whether to measure the cost of each method.')
flags.DEFINE_string('embeddings', None, 'A workdir with embeddings.train.npz and embeddings.test.npz.')
flags.DEFINE_string('json', None, 'JSON file to write the numbers to.')

RATES = tuple(float(rate) for rate in np.geomspace(0.01, 10.0, 9))
DECAYS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2)
FOLDS = 5


def clusters(num: int, size: int, seed: int) -> dataset.Features:
    """Returns ten overlapping clusters, which a linear classifier cannot separate completely."""
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(10, size, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(10, (num,), generator=rng)
    features = centres[labels] * 0.13 + torch.randn(num, size, generator=rng)
    return dataset.Features(features, labels, tuple('0123456789'))


def make_heads(data: dataset.Examples, config, pairs, encoder=({}, {})):
    """Returns two experiments on an encoder's parameters and state: one with a single head, one with a sweep."""
    facts = dict(num_examples=data.num_examples, num_classes=10, image_shape=data.image_shape)
    config.linear_eval.lr_schedule.base_learning_rate = 1.0
    one = eval_experiment.make(config, 'linear_eval', *encoder, **facts)
    return one, stack(one, pairs, momentum=0.9, nesterov=True)


def train(experiment, data: dataset.Examples, steps: int):
    """Returns the state after the given number of steps."""
    state = experiment.init()
    for step in range(steps):
        inputs = dataset.train_batch(data, step, seed=0, batch_size=experiment.batch_size)
        state, _ = experiment.update(state, torch.tensor(step), experiment.sample(step), inputs)
    return state


def sweep_cost(data: dataset.Examples, config, steps: int, encoder=({}, {})) -> dict[str, float]:
    """Returns the milliseconds of a step with one head and with 45, and their ratio."""
    found = {}
    for name, experiment in zip(
        ('one', 'heads_45'), make_heads(data, config, grid(RATES, DECAYS), encoder), strict=False
    ):
        train(experiment, data, 5)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            train(experiment, data, steps)
            seconds.append((time.perf_counter() - start) / steps)
        found[name] = 1000 * measuring.median(seconds)
    return {**found, 'ratio': found['heads_45'] / found['one']}


def sweep_costs(data: dataset.Features) -> dict[str, dict[str, float]]:
    """Returns `sweep_cost` on cached features for each batch size, and on augmented images of 32 pixels."""
    found = {}
    for batch_size in map(int, FLAGS.batch_sizes):
        config = cifar10.get_config()
        config.linear_eval.batch_size = batch_size
        found[f'cached, {batch_size}'] = sweep_cost(data, config, FLAGS.steps)
    config = cifar10.get_config()
    config.network.encoder_class = FLAGS.encoder
    config.linear_eval.update(cache_features=False, batch_size=256)
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2048, 3, 32, 32), dtype=torch.uint8, generator=rng)
    images = dataset.Dataset(images, torch.arange(2048) % 10, data.class_names)
    network = config.network.to_dict()
    backbone = make_backbone(**{name: network[name] for name in ENCODER_FIELDS}, in_channels=3)
    found[f'{FLAGS.encoder} in the step, 256'] = sweep_cost(images, config, 5, backbone.init(rng))
    return found


def timed(fn):
    """Returns the result of a call and the seconds it took."""
    start = time.perf_counter()
    result = fn()
    return result, time.perf_counter() - start


def top1(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Returns the top-1 accuracy in percent."""
    return 100 * float(helpers.topk_accuracy(scores, labels, topk=1).double().mean())


def protocol_seconds(data: dataset.Features, test: dataset.Features) -> dict[str, float]:
    """Returns the seconds that both protocols take, including the choice of settings and the test."""
    mask = dataset.split_mask(data.labels, 0.1)
    found = {}
    for name, module in (('knn', knn), ('logistic', logistic)):
        arguments = (test.embeddings, data.embeddings, data.labels, mask)
        _, found[name] = timed(functools.partial(module.choose_and_predict, *arguments, num_classes=10))
    return found


def compare(train_set: dataset.Features, test_set: dataset.Features) -> dict[str, float]:
    """Returns the top-1 on the test set in percent, for features `[N, D]`, of our protocols and scikit-learn's."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    standard = logistic.standardise(train_set.embeddings)
    train_set, test_set = (s._replace(embeddings=standard(s.embeddings)) for s in (train_set, test_set))
    mask = dataset.split_mask(train_set.labels, 0.1)
    arguments = (test_set.embeddings, train_set.embeddings, train_set.labels, mask)
    ours = logistic.choose_and_predict(*arguments, num_classes=10)
    neighbours = knn.choose_and_predict(*arguments, num_classes=10)
    linear = linear_logits(train_set, test_set.embeddings, mask)

    x, y, test_x, test_y = (t.numpy() for s in (train_set, test_set) for t in (s.embeddings, s.labels))
    reference = LogisticRegression(C=1 / (len(x) * ours.penalty), max_iter=5000).fit(x, y)
    weights = lambda distances: np.exp((1 - distances) / neighbours.temperature)
    reference_knn = KNeighborsClassifier(neighbours.k, weights=weights, metric='cosine', algorithm='brute').fit(x, y)
    return {
        'linear (sweep of 45)': top1(linear, test_set.labels),
        'logistic': top1(ours.logits, test_set.labels),
        'logistic, scikit-learn': 100 * reference.score(test_x, test_y),
        'knn': top1(neighbours.probabilities, test_set.labels),
        'knn, scikit-learn': 100 * reference_knn.score(test_x, test_y),
    }


def linear_logits(train_set: dataset.Features, test_x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the logits of linear evaluation by SGD.

    45 heads are compared on held-out data; then one head with the best settings is trained on all of the data.
    """
    part, rest = (train_set.take(m.nonzero()[:, 0]) for m in (~mask, mask))
    pairs = grid(RATES, DECAYS)
    _, heads = make_heads(part, digits.get_config(), pairs)
    state = train(heads, part, heads.max_steps)
    hits = heads.evaluate(state, rest.batch(torch.arange(rest.num_examples)))['top1_accuracy']
    chosen = pairs[int(hits.double().mean(dim=0).argmax())]
    _, head = make_heads(train_set, digits.get_config(), [chosen])
    state = train(head, train_set, head.max_steps)
    return head.predict(state, {'images': test_x})[:, 0]


def on_digits() -> dict[str, float]:
    """Returns the means of `compare` over the folds of the digits, in which every image is tested once."""
    both = dataset.load_train_and_test(**digits.get_config().dataset)
    images, labels = (torch.cat([getattr(s, name) for s in both]) for name in ('images', 'labels'))
    data = dataset.Features(images.flatten(1).float(), labels, both[0].class_names)
    found = []
    for fold in range(FOLDS):
        tested = torch.arange(data.num_examples) % FOLDS == fold
        found.append(compare(*(data.take(m.nonzero()[:, 0]) for m in (~tested, tested))))
    return {name: statistics.fmean(f[name] for f in found) for name in found[0]}


def on_embeddings(workdir: pathlib.Path) -> dict[str, float]:
    """Returns `compare` on the files that --mode=embed wrote."""
    sets = []
    for split in ('train', 'test'):
        with np.load(workdir / f'embeddings.{split}.npz') as file:
            features, labels = torch.from_numpy(file['features']).float(), torch.from_numpy(file['labels'])
            sets.append(dataset.Features(features, labels, tuple(file['class_names'])))
    return compare(*sets)


def main(argv: list[str]) -> None:
    """Measures everything and prints the tables."""
    del argv
    found = {
        'command': ' '.join(['python benchmarks/evaluation.py', *sys.argv[1:]]),
        'machine': measuring.machine(torch.device('cpu')),
    }
    if FLAGS.costs:
        data, test = (clusters(n, FLAGS.size, i) for i, n in enumerate((FLAGS.num_train, FLAGS.num_test)))
        found |= {'sweep': sweep_costs(data), 'seconds': protocol_seconds(data, test)}
        rows = [
            [name, *(f'{c[key]:.2f}' for key in ('one', 'heads_45', 'ratio'))] for name, c in found['sweep'].items()
        ]
        print(tabulate.tabulate(rows, ['features, batch', 'one head, ms a step', '45 heads', 'ratio']), '\n')
        shape = f'{data.num_examples} x {FLAGS.size} features, {test.num_examples} to test'
        print(tabulate.tabulate([[n, f'{s:.1f}'] for n, s in found['seconds'].items()], [shape, 'seconds']), '\n')
    found['top1'] = {'digits': on_digits()}
    if FLAGS.embeddings:
        found['top1'][FLAGS.embeddings] = on_embeddings(pathlib.Path(FLAGS.embeddings))
    rows = [[name, *(f'{column[name]:.2f}' for column in found['top1'].values())] for name in found['top1']['digits']]
    print(tabulate.tabulate(rows, ['top-1 %', *found['top1']]))
    if FLAGS.json:
        pathlib.Path(FLAGS.json).write_text(json.dumps(found, indent=2) + '\n')


if __name__ == '__main__':
    app.run(main)
