"""What the protocols on cached features cost, and how they compare with scikit-learn's.

  python benchmarks/evaluation.py --json=OUT.json

On random features of CIFAR-10's size (50,000 x 512 to train, 10,000 to test, 10 classes): a sweep of 45
linear heads beside one head, nearest neighbours and logistic regression with the choice of their
settings. On the pixels of scikit-learn's digits: test accuracies beside scikit-learn's.
"""

import functools
import json
import pathlib
import sys
import time

from absl import app
from absl import flags
import numpy as np
import tabulate
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

import measuring  # noqa: E402

from byol_func import eval_experiment  # noqa: E402
from byol_func.evaluation import held_out, knn, logistic, sweep  # noqa: E402
from byol_func.utils import dataset, helpers  # noqa: E402
from configs import cifar10, digits  # noqa: E402

FLAGS = flags.FLAGS
flags.DEFINE_integer('num_train', 50_000, 'Training examples.')
flags.DEFINE_integer('num_test', 10_000, 'Test examples.')
flags.DEFINE_integer('size', 512, 'Numbers of an embedding.')
flags.DEFINE_integer('steps', 60, 'Steps of the sweep that are timed.')
flags.DEFINE_list('batch_sizes', ['256', '1024'], 'Batches of the sweep.')
flags.DEFINE_string('json', None, 'Write the numbers there.')

RATES = tuple(float(rate) for rate in np.geomspace(0.01, 10.0, 15))
DECAYS = (0.0, 1e-6, 1e-4)


def clusters(num: int, size: int, seed: int) -> dataset.Dataset:
    """Ten overlapping clusters, in which a linear classifier gets some examples wrong."""
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(10, size, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(10, (num,), generator=rng)
    features = centres[labels] * 0.13 + torch.randn(num, size, generator=rng)
    return dataset.Dataset(features, labels, tuple('0123456789'))


def make_heads(data: dataset.Dataset, config, pairs):
    """The experiment of the sweep, and that of one head."""
    facts = dict(num_examples=data.num_examples, num_classes=10, image_shape=data.image_shape)
    config.linear_eval.lr_schedule.base_learning_rate = 1.0
    one = eval_experiment.make(config, 'linear_eval', {}, {}, **facts)
    return one, sweep.stack(one, pairs, momentum=0.9, nesterov=True)


def train(experiment, data: dataset.Dataset, steps: int):
    """The state after some steps."""
    state = experiment.init()
    for step in range(steps):
        inputs = dataset.train_batch(data, step, seed=0, batch_size=experiment.batch_size)
        state, _ = experiment.update(state, torch.tensor(step), None, inputs)
    return state


def sweep_cost(data: dataset.Dataset, batch_size: int) -> dict[str, float]:
    """Milliseconds of a step with one head and with 45."""
    config = cifar10.get_config()
    config.linear_eval.batch_size = batch_size
    experiments = make_heads(data, config, sweep.grid(RATES, DECAYS))
    found = {}
    for name, experiment in zip(('one', 'heads_45'), experiments):
        train(experiment, data, 5)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            train(experiment, data, FLAGS.steps)
            seconds.append((time.perf_counter() - start) / FLAGS.steps)
        found[name] = 1000 * measuring.median(seconds)
    return {**found, 'ratio': found['heads_45'] / found['one']}


def timed(fn):
    """The result of a call and its seconds."""
    start = time.perf_counter()
    result = fn()
    return result, time.perf_counter() - start


def top1(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """In percent."""
    return 100 * float(helpers.topk_accuracy(scores, labels, topk=1).double().mean())


def protocol_seconds(data: dataset.Dataset, test: dataset.Dataset) -> dict[str, float]:
    """Seconds of both protocols, choice and test included."""
    mask = held_out.held_out_mask(data.labels, 0.1)
    found = {}
    for name, module in (('knn', knn), ('logistic', logistic)):
        arguments = (test.images, data.images, data.labels, mask)
        _, found[name] = timed(functools.partial(module.choose_and_predict, *arguments, num_classes=10))
    return found


def on_digits() -> dict[str, float]:
    """Top-1 on the digits' test set: ours and scikit-learn's."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    train_set, test_set = dataset.load_train_and_test(**digits.get_config().dataset)
    pixels = [s.images.flatten(1).float() for s in (train_set, test_set)]
    standard = logistic.standardise(pixels[0])
    train_x, test_x = (standard(x) for x in pixels)
    mask = held_out.held_out_mask(train_set.labels, 0.1)
    arguments = (test_x, train_x, train_set.labels, mask)
    ours = logistic.choose_and_predict(*arguments, num_classes=10)
    neighbours = knn.choose_and_predict(*arguments, num_classes=10)
    linear = _linear_on(train_set._replace(images=train_x), test_x, mask)

    x, y, test_y = train_x.numpy(), train_set.labels.numpy(), test_set.labels.numpy()
    reference = LogisticRegression(C=1 / (len(x) * ours.penalty), max_iter=5000).fit(x, y)
    weights = lambda distances: np.exp((1 - distances) / neighbours.temperature)
    reference_knn = KNeighborsClassifier(
        neighbours.k, weights=weights, metric='cosine', algorithm='brute').fit(x, y)
    return {
        'linear (sweep of 45)': top1(linear, test_set.labels),
        'logistic': top1(ours.logits, test_set.labels),
        'logistic, scikit-learn': 100 * reference.score(test_x.numpy(), test_y),
        'knn': top1(neighbours.probabilities, test_set.labels),
        'knn, scikit-learn': 100 * reference_knn.score(test_x.numpy(), test_y),
    }


def _linear_on(train_set: dataset.Dataset, test_x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of the linear evaluation by SGD: 45 heads choose on held-out data, then one on all of it."""
    part, rest = (train_set.take(m.nonzero()[:, 0]) for m in (~mask, mask))
    pairs = sweep.grid(RATES, DECAYS)
    _, heads = make_heads(part, digits.get_config(), pairs)
    state = train(heads, part, heads.max_steps)
    hits = heads.evaluate(state, {'images': rest.images, 'labels': rest.labels})['top1_accuracy']
    chosen = pairs[int(hits.double().mean(dim=0).argmax())]
    _, head = make_heads(train_set, digits.get_config(), [chosen])
    state = train(head, train_set, head.max_steps)
    return head.predict(state, {'images': test_x})[:, 0]


def main(argv: list[str]) -> None:
    """Prints the tables."""
    del argv
    data, test = (clusters(n, FLAGS.size, i) for i, n in enumerate((FLAGS.num_train, FLAGS.num_test)))
    costs = {size: sweep_cost(data, int(size)) for size in FLAGS.batch_sizes}
    seconds = protocol_seconds(data, test)
    accuracies = on_digits()
    rows = [[s, f'{c["one"]:.2f}', f'{c["heads_45"]:.2f}', f'{c["ratio"]:.2f}'] for s, c in costs.items()]
    print(tabulate.tabulate(rows, ['batch', 'one head, ms a step', '45 heads', 'ratio']), '\n')
    shape = f'{data.num_examples} x {FLAGS.size} features, {test.num_examples} to test'
    print(tabulate.tabulate([[n, f'{s:.1f}'] for n, s in seconds.items()], [shape, 'seconds']), '\n')
    print(tabulate.tabulate([[n, f'{a:.2f}'] for n, a in accuracies.items()], ['digits', 'top-1 %']))
    if FLAGS.json:
        content = dict(
            machine=measuring.machine(torch.device('cpu')), sweep=costs, seconds=seconds, digits=accuracies
        )
        pathlib.Path(FLAGS.json).write_text(json.dumps(content, indent=2) + '\n')


if __name__ == '__main__':
    app.run(main)
