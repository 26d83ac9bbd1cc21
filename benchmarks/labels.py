"""Measures label efficiency: how much a pre-trained encoder helps when few images are labelled.

  python benchmarks/labels.py --workdir=PRETRAINED --out=benchmarks/results/labels_NAME
  python benchmarks/labels.py --workdir=benchmarks/results/cifar10_cpu --root=DIR --out=OUT

The second command starts from published weights, `encoder.safetensors` beside `config.json`, in place of a checkpoint.
For 1, 2, 5, ... labels per class and several draws of the labelled images, it trains on the same images

  * the whole network from the pre-trained encoder (fine-tuning),
  * the same network from its random initialisation,
  * a logistic regression on the frozen features of the pre-trained encoder,
  * a logistic regression on the raw pixels,

and reports the top-1 accuracy on a fixed subset of the test set as a table, `labels.json` and `labels.png`. Both
networks are trained for the same number of steps. Each has its own learning rate, chosen from --learning_rates on
training images that no draw contains; the penalties of the regressions are chosen on the same images. Finished
results are kept in `labels.json`, so repeating the command after an interruption resumes it.
"""

import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import ml_collections
import optree
import tabulate
import torch
from absl import app, flags, logging

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

import byol_func  # noqa: E402
import measuring  # noqa: E402
from byol_func import eval_experiment, main_loop  # noqa: E402
from byol_func.evaluation import logistic  # noqa: E402
from byol_func.modes import checkpoints, inputs, on_top  # noqa: E402
from byol_func.runtime import compilation, memory, prng  # noqa: E402
from byol_func.utils import dataset, helpers  # noqa: E402
from byol_func.workdir.run import Run  # noqa: E402

FLAGS = flags.FLAGS
flags.DEFINE_string('workdir', None, 'The workdir of a finished pre-training.', required=True)
flags.DEFINE_string('out', None, 'The folder for table, numbers and picture.', required=True)
flags.DEFINE_string('root', None, 'The folder of the data set, if it differs from that of the pre-training.')
flags.DEFINE_multi_integer('labels', [1, 2, 5, 10, 20, 50, 100], 'Labels per class.')
flags.DEFINE_integer('draws', 3, 'Draws of labelled images for every number of labels.')
flags.DEFINE_integer('steps', 200, 'Steps of each training, rounded up to whole epochs.')
flags.DEFINE_integer('batch_size', 64, 'Images per step; fewer if fewer carry a label.')
flags.DEFINE_multi_float('learning_rates', [0.02, 0.1, 0.5], 'Base learning rates to choose from.')
flags.DEFINE_integer('num_test', 2000, 'Test images that are evaluated, drawn once.')
flags.DEFINE_integer('num_val', 1000, 'Training images that settings are chosen on.')

METHODS = {
    'fine_tuned': 'fine-tuned from BYOL',
    'scratch': 'the same network from scratch',
    'features': 'logistic regression on BYOL features',
    'pixels': 'logistic regression on raw pixels',
}
PENALTIES = (1e-3, 1e-2, 1e-1)
CHOOSE_AT = 10  # Labels per class at which learning rates and penalties are chosen.


def load_run(workdir: str) -> Run:
    """Returns the run recorded in a workdir."""
    found = [pathlib.Path(workdir) / name for name in ('config.pretrain.json', 'config.json')]
    config = ml_collections.ConfigDict(json.loads(next(p for p in found if p.exists()).read_text()))
    if FLAGS.root:
        config.dataset.root = FLAGS.root
    config.dataset.eval_split = 'test'
    config.precision = 'float32'
    return Run(config=config, workdir=workdir, device=torch.device('cpu'), checkpoint=None, log_every_seconds=1e9)


def pretrained_encoder(run: Run, train: dataset.Examples) -> tuple:
    """Returns the parameters and moving averages of the published weights in the workdir, or of its checkpoint."""
    weights = pathlib.Path(run.workdir) / 'encoder.safetensors'
    if weights.exists():
        encoder = byol_func.load_encoder(weights)
        return encoder.params, encoder.state
    return checkpoints.restore_encoder(run, train, checkpoints.find_checkpoint(run, ('pretrain',)))


def draw(labels: torch.Tensor, num_classes: int, count: int, seed: int) -> torch.Tensor:
    """Returns the indices of `count` random examples of every class."""
    order = torch.randperm(len(labels), generator=prng.fold_in(seed, 'labels', count))
    return torch.cat([order[labels[order] == k][:count] for k in range(num_classes)])


def train_network(run: Run, train: dataset.Examples, encoder: tuple, rate: float, seed: int) -> Any:
    """Trains the encoder and a classifier together; returns the experiment and its last state."""
    config = ml_collections.ConfigDict(json.loads(run.config.to_json_best_effort()))
    config.random_seed = seed
    config.fine_tune.batch_size = min(FLAGS.batch_size, train.num_examples)
    config.fine_tune.num_epochs = math.ceil(FLAGS.steps * config.fine_tune.batch_size / train.num_examples)
    config.fine_tune.lr_schedule.base_learning_rate = rate
    config.fine_tune.bn_config.decay_rate = 0.9
    experiment = eval_experiment.make(config, 'fine_tune', *encoder, **inputs.facts(train))
    update = compilation.compile_update(experiment.update, compiled=None, num_steps=experiment.max_steps)
    state = experiment.init()
    for step in range(experiment.max_steps):
        batch = dataset.train_batch(train, step, seed=seed, batch_size=experiment.batch_size)
        state, _ = update(state, torch.tensor(step), experiment.sample(step), batch)
    return experiment, state


def accuracy_of_network(run: Run, train, test, encoder, rate: float, seed: int) -> float:
    """Returns the top-1 on `test`, in percent, of a network trained on `train`."""
    copied = tuple(optree.tree_map(torch.clone, tree) for tree in encoder)
    experiment, state = train_network(run, train, copied, rate, seed)
    return 100 * main_loop.eval_loop(experiment.evaluate, state, test, 500)['top1_accuracy']


def accuracy_of_regression(features, labels, test_features, test_labels, num_classes: int, penalty: float) -> float:
    """Returns the top-1 of a logistic regression, in percent."""
    standard = logistic.standardise(features)
    w, b = logistic.fit(standard(features), labels, num_classes=num_classes, penalty=penalty)
    hits = helpers.topk_accuracy(standard(test_features) @ w + b, test_labels, topk=1)
    return 100 * float(hits.double().mean())


def best(candidates, score: Callable[[float], float]) -> tuple[float, dict[str, float]]:
    """Returns the candidate with the highest score, and all scores."""
    scores = {str(c): score(c) for c in candidates}
    return max(candidates, key=lambda c: scores[str(c)]), scores


def main(argv) -> None:
    """Trains and evaluates every row, and draws the results."""
    del argv
    logging.set_verbosity(logging.WARNING)
    memory.keep_freed_memory()
    out = pathlib.Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    run = load_run(FLAGS.workdir)
    train, test = inputs.load_labelled_data(run)
    subset = torch.randperm(test.num_examples, generator=prng.fold_in(0, 'test'))[: FLAGS.num_test]
    test = test.take(subset)
    order = torch.randperm(train.num_examples, generator=prng.fold_in(0, 'val'))
    val, pool = train.take(order[: FLAGS.num_val]), train.take(order[FLAGS.num_val :])
    encoders = {
        'fine_tuned': pretrained_encoder(run, train),
        'scratch': on_top.untrained_encoder(run, train),
    }
    found = _read(out / 'labels.json', run)

    def features_of(data, method):
        if method == 'pixels':
            return data.images.flatten(1).float() / 255
        return inputs.embed(run.config, data, *encoders['fine_tuned']).embeddings

    def accuracy(method: str, part, other, setting: float, seed: int) -> float:
        if method in encoders:
            return accuracy_of_network(run, part, other, encoders[method], setting, seed)
        features, other_features = features_of(part, method), features_of(other, method)
        return accuracy_of_regression(features, part.labels, other_features, other.labels, train.num_classes, setting)

    for method in METHODS:
        if method not in found['chosen']:
            part = pool.take(draw(pool.labels, train.num_classes, CHOOSE_AT, seed=1000))
            settings = FLAGS.learning_rates if method in encoders else PENALTIES
            value, scores = best(settings, lambda s, m=method, p=part: accuracy(m, p, val, s, 1000))
            found['chosen'][method] = {'value': value, 'validation_top1': scores}
            _write(out, found)
    for count in FLAGS.labels:
        for seed in range(FLAGS.draws):
            part = pool.take(draw(pool.labels, train.num_classes, count, seed))
            for method in METHODS:
                key = f'{method}/{count}/{seed}'
                if key not in found['top1']:
                    start = time.monotonic()
                    found['top1'][key] = accuracy(method, part, test, found['chosen'][method]['value'], seed)
                    found['seconds'] += time.monotonic() - start
                    _write(out, found)
        print(_table(found), flush=True)
    _draw(out / 'labels.png', found)


def _read(path: pathlib.Path, run: Run) -> dict[str, Any]:
    settings = {
        'dataset': run.config.dataset.name,
        'encoder': run.config.network.encoder_class,
        'steps': FLAGS.steps,
        'batch_size': FLAGS.batch_size,
        'num_test': FLAGS.num_test,
        'num_val': FLAGS.num_val,
    }
    if path.exists():
        found = json.loads(path.read_text())
        if found['settings'] != settings:
            raise SystemExit(f'{path}: made with {found["settings"]}, not {settings}; choose another --out')
        return found
    machine = measuring.machine(torch.device('cpu'))
    return {'settings': settings, 'machine': machine, 'chosen': {}, 'top1': {}, 'seconds': 0.0}


def _write(out: pathlib.Path, found: dict[str, Any]) -> None:
    temporary = out / 'labels.json.tmp'
    temporary.write_text(json.dumps(found, indent=2) + '\n')
    temporary.replace(out / 'labels.json')
    (out / 'labels.txt').write_text(_table(found) + '\n')


def _values(found: dict[str, Any], method: str, count: int) -> list[float]:
    return [v for key, v in found['top1'].items() if key.startswith(f'{method}/{count}/')]


def _counts(found: dict[str, Any]) -> list[int]:
    return sorted({int(key.split('/')[1]) for key in found['top1']})


def _table(found: dict[str, Any]) -> str:
    counts = _counts(found)
    rows = []
    for method, words in METHODS.items():
        cells = [_spread(_values(found, method, count)) for count in counts]
        rows.append([words, *cells])
    return tabulate.tabulate(rows, headers=['labels per class', *map(str, counts)], disable_numparse=True)


def _spread(values: list[float]) -> str:
    if not values:
        return ''
    spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.1f}{spread}'


def _draw(path: pathlib.Path, found: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout='constrained')
    colors = ('#0072B2', '#D55E00', '#009E73', '#999999')
    for (method, words), color in zip(METHODS.items(), colors, strict=True):
        counts = [c for c in _counts(found) if _values(found, method, c)]
        means = [statistics.mean(_values(found, method, c)) for c in counts]
        axes.plot(counts, means, 'o-', color=color, label=words)
        low = [min(_values(found, method, c)) for c in counts]
        high = [max(_values(found, method, c)) for c in counts]
        axes.fill_between(counts, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_xscale('log')
    axes.set_xticks(_counts(found), [str(c) for c in _counts(found)])
    axes.minorticks_off()
    axes.set(xlabel='labels per class', ylabel='test top-1 (%)')
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


if __name__ == '__main__':
    app.run(main)
