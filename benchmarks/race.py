"""Races this project's BYOL against lightly's: accuracy against minutes of training on the same machine.

  python benchmarks/race.py --out=OUT --config=configs/cifar10.py:small --config.dataset.root=DIR \\
    --config.num_epochs=4 --peer_epochs=3 --slice_minutes=2

Both train on the same images with an encoder of the same depth and width. They take turns: each trains for a slice of
time while the other waits. After every slice the same code measures both, by k nearest neighbours and by logistic
regression on frozen features, of the same training and test images. The clock of each counts its own training,
including compilation and data loading, but no evaluation. Each stops when its schedule is over, so the numbers of
epochs say how long the race is: take those that both finish in about the same time.

lightly's side is the recipe of its CIFAR-10 benchmark (`peer_recipe.py`), with our view size and its own batch size.
Its learning rate is chosen beforehand, on held-out training images, by

  python benchmarks/race.py --out=OUT --config=... --choose 0.03 --choose 0.06 --choose 0.12 --choose_images=50000

as the settings of our preset were. `race.json`, `race.txt` and `race.png` are written to OUT after every slice.
"""

import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import tabulate
import torch
from absl import app, flags, logging
from ml_collections import config_flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

import measuring  # noqa: E402
from byol_func import byol_experiment  # noqa: E402
from byol_func.evaluation import knn, logistic  # noqa: E402
from byol_func.modes import inputs  # noqa: E402
from byol_func.runtime import compilation, memory, precision, prng  # noqa: E402
from byol_func.utils import augmentations, dataset  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file('config', str(ROOT / 'configs/cifar10.py:small'), 'What both train on.')
_OUT = flags.DEFINE_string('out', None, 'The folder for table, numbers and picture.', required=True)
_SLICE_MINUTES = flags.DEFINE_float('slice_minutes', 2.0, 'Minutes of training between two turns.')
_EPOCHS = flags.DEFINE_float('peer_epochs', 3.0, "Epochs of lightly's schedule.")
_RATE = flags.DEFINE_float('peer_learning_rate', 0.0, "lightly's rate; 0: its benchmark's, 0.06 * batch size / 128.")
_BATCH = flags.DEFINE_integer('peer_batch_size', 128, "lightly's batch size; its benchmark has 128 and 512.")
_WORKERS = flags.DEFINE_integer('peer_workers', 0, "Processes of lightly's data loader.")
_CHOOSE = flags.DEFINE_multi_float('choose', [], 'Try these rates of lightly on held-out training images, and stop.')
_CHOOSE_IMAGES = flags.DEFINE_integer('choose_images', 50_000, 'Images to train on for every rate of --choose.')
_NUM_TRAIN = flags.DEFINE_integer('num_train', 5000, 'Labelled training images for both classifiers.')
_NUM_TEST = flags.DEFINE_integer('num_test', 2000, 'Test images.')

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)
# Encoders that both have, with the names that lightly gives them.
ENCODERS = {'ResNet10': 'resnet-9', 'ResNet18': 'resnet-18', 'ResNet34': 'resnet-34'}
COLUMNS = ('minutes', 'epochs', 'knn', 'logistic')


class Racer(NamedTuple):
    """One side: its steps until its schedule ends, the number of images per step, and its encoder as it is."""

    steps: Iterator[None]
    batch_size: int
    embed: Callable[[torch.Tensor], torch.Tensor]  # float [B, C, S, S] in 0..1 -> [B, D]


def ours(config: Any, train: dataset.Dataset) -> Racer:
    """Returns this project's side: the compiled update of `config`."""
    experiment = byol_experiment.make(config, **inputs.facts(train))
    state = experiment.init()
    network = inputs.make_backbone(config, train)

    def steps() -> Iterator[None]:
        nonlocal state
        update = compilation.compile_update(experiment.update, num_steps=experiment.max_steps)
        for step in range(experiment.max_steps):
            batch = dataset.train_batch(train, step, seed=config.random_seed, batch_size=experiment.batch_size)
            state, _ = update(state, torch.tensor(step), experiment.sample(step), batch)
            yield

    @torch.no_grad()
    def embed(images: torch.Tensor) -> torch.Tensor:
        params, averages = ({'encoder': tree['encoder']} for tree in (state.online_params, state.online_state))
        return network.apply(params, averages, images, is_training=False)[0]

    return Racer(steps(), experiment.batch_size, embed)


def theirs(config: Any, train: dataset.Dataset, rate: float, num_epochs: float) -> Racer:
    """Returns lightly's side, on the same images."""
    import peer_recipe

    recipe = peer_recipe.Recipe(
        train.images,
        encoder=ENCODERS[config.network.encoder_class],
        width=config.network.encoder_config.width_multiplier,
        image_size=config.view_size or config.image_size,
        batch_size=_BATCH.value,
        learning_rate=rate,
        num_epochs=num_epochs,
        dtype=precision.DTYPES[config.precision],
        workers=_WORKERS.value,
        seed=config.random_seed,
    )
    return Racer(recipe.steps(), recipe.batch_size, recipe.embed)


class Judge:
    """Measures frozen features of both sides on the same images: `_NUM_TRAIN` to learn from, `_NUM_TEST` to test."""

    def __init__(self, config: Any, train: dataset.Dataset, test: dataset.Dataset):
        generator = prng.fold_in(config.random_seed, 'race')
        pick = lambda data, count: data.take(torch.randperm(data.num_examples, generator=generator)[:count])
        self._train, self._test = pick(train, _NUM_TRAIN.value), pick(test, _NUM_TEST.value)
        self._config = config
        self._held_out = torch.arange(self._train.num_examples) % 5 == 0

    def __call__(self, embed: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Returns the top-1 accuracies in percent."""
        train, test = (self._features(embed, data.images) for data in (self._train, self._test))
        labels, classes = self._train.labels, self._train.num_classes
        votes = knn.accuracy(test, self._test.labels, train, labels, num_classes=classes)
        fit = logistic.choose_and_predict(test, train, labels, self._held_out, num_classes=classes, penalties=PENALTIES)
        hits = fit.logits.argmax(dim=1) == self._test.labels
        return {'knn': 100 * votes, 'logistic': 100 * float(hits.double().mean())}

    def _features(self, embed, images: torch.Tensor) -> torch.Tensor:
        size, fraction = self._config.image_size, self._config.eval_crop_fraction
        return torch.cat([embed(augmentations.center_crop(part, size, fraction)) for part in images.split(250)])


def train_for(racer: Racer, seconds: float) -> tuple[float, int, bool]:
    """Trains for a slice; returns the seconds and steps that it took, and whether the schedule is over."""
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        if next(racer.steps, StopIteration) is StopIteration:
            return time.perf_counter() - start, count, True
        count += 1
    return time.perf_counter() - start, count, False


def race(racers: dict[str, Racer], judge: Judge, num_examples: int, record: Callable[[str, dict], None]) -> None:
    """Lets the sides take turns until both schedules are over; `record` receives a row after every turn."""
    clocks, counts, running = dict.fromkeys(racers, 0.0), dict.fromkeys(racers, 0), list(racers)
    while running:
        for name in list(running):
            seconds, count, over = train_for(racers[name], 60 * _SLICE_MINUTES.value)
            clocks[name] += seconds
            counts[name] += count
            epochs = counts[name] * racers[name].batch_size / num_examples
            record(name, {'minutes': clocks[name] / 60, 'epochs': epochs, **judge(racers[name].embed)})
            if over:
                running.remove(name)


def choose(config: Any, train: dataset.Dataset, judge: Judge) -> dict[str, dict[str, float]]:
    """Returns the accuracies of lightly's rates after `_CHOOSE_IMAGES` images."""
    found = {}
    for rate in _CHOOSE.value:
        racer = theirs(config, train, rate, _CHOOSE_IMAGES.value / train.num_examples)
        for _ in range(_CHOOSE_IMAGES.value // racer.batch_size):
            next(racer.steps)
        found[f'{rate:g}'] = judge(racer.embed)
        print(rate, found[f'{rate:g}'], flush=True)
    return found


def main(argv: list[str]) -> None:
    """Chooses lightly's learning rate, or runs the race."""
    del argv
    logging.set_verbosity(logging.WARNING)
    memory.keep_freed_memory()
    config, out = _CONFIG.value, pathlib.Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    config.dataset.eval_split = 'val' if _CHOOSE.value else 'test'
    config.precision = measuring.resolved(config.precision, torch.device('cpu'))
    train, test = dataset.load_train_and_test(**config.dataset)
    judge = Judge(config, train, test)
    if _CHOOSE.value:
        (out / 'chosen.json').write_text(json.dumps(choose(config, train, judge), indent=2) + '\n')
        return
    rate = _RATE.value or 0.06 * _BATCH.value / 128
    racers = {'byol_func': ours(config, train), 'lightly': theirs(config, train, rate, _EPOCHS.value)}
    found: dict[str, Any] = {
        'command': sys.argv,
        'machine': measuring.machine(torch.device('cpu')),
        'threads': torch.get_num_threads(),
        'precision': config.precision,
        'peer': {'learning_rate': rate, 'batch_size': _BATCH.value, 'epochs': _EPOCHS.value},
        'labelled': {'train': _NUM_TRAIN.value, 'test': _NUM_TEST.value},
        'rows': {name: [{'minutes': 0.0, 'epochs': 0.0, **judge(racer.embed)}] for name, racer in racers.items()},
    }

    def record(name: str, row: dict[str, float]) -> None:
        found['rows'][name].append(row)
        (out / 'race.json').write_text(json.dumps(found, indent=2) + '\n')
        (out / 'race.txt').write_text(table(found['rows']) + '\n')
        draw(out / 'race.png', found['rows'])
        print(name, {key: round(value, 2) for key, value in row.items()}, flush=True)

    race(racers, judge, train.num_examples, record)
    print(table(found['rows']))


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Returns both sides' rows as text."""
    cells = [[name, *(row[column] for column in COLUMNS)] for name, own in rows.items() for row in own]
    heads = ('', 'minutes', 'epochs', 'k-NN top-1 (%)', 'logistic top-1 (%)')
    return tabulate.tabulate(cells, headers=heads, floatfmt=('', '.1f', '.2f', '.1f', '.1f'))


def draw(path: pathlib.Path, rows: dict[str, list[dict[str, float]]]) -> None:
    """Draws accuracy against minutes of training."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.6), layout='constrained', sharey=True)
    for axes, measure, title in zip(panels, COLUMNS[2:], ('k nearest neighbours', 'logistic regression'), strict=True):
        for (name, own), color in zip(rows.items(), ('#0072B2', '#D55E00'), strict=True):
            axes.plot([row['minutes'] for row in own], [row[measure] for row in own], 'o-', color=color, label=name)
        axes.set(xlabel='minutes of training', title=title)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel('test top-1 (%)')
    panels[0].legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == '__main__':
    app.run(main)
