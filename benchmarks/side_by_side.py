"""Trains the official code and this code on the same views, and measures how far they are apart.

Three states are trained: the official one, ours, and the official one again on views of which one image is moved by
one unit in the last place. How far the two official states are apart says what rounding alone does to this training.
"""

import copy
import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import optree
import torch

import measuring
from byol_func import byol_experiment
from byol_func.bridge.official import read, to_state
from byol_func.experiment import assemble
from byol_func.runtime import compilation, memory
from byol_func.utils import augmentations, dataset
from byol_func.utils.checkpointing import leaf_names

# The trees of a state, in the words of the tables.
TREES = {
    'gradients': 'gradients',
    'online_params': 'online network',
    'target_params': 'target network',
    'online_state': 'BatchNorm',
    'target_state': 'target BatchNorm',
    'momentum': 'momentum',
    'params': 'network',  # These two of a protocol.
    'state': 'BatchNorm',
}
_LOGS = ('loss', 'learning_rate', 'tau')  # Those that are compared; an accuracy jumps when a rank changes.


class Views(NamedTuple):
    """The views or images of one step, with the labels: ours `[B, 3, S, S]`, the others `[B, S, S, 3]`."""

    ours: dict[str, torch.Tensor]
    official: dict[str, np.ndarray]
    moved: dict[str, np.ndarray]  # As `official`, with one image moved by one unit in the last place.
    crops: dict[str, np.ndarray]  # Before the augmentation.


class Ours:
    """Our experiment, started from an official checkpoint and trained on given views.

    Args:
      config: the config of the experiment.
      data: the images.
      checkpoint: an official checkpoint.
      num_examples: the size of an epoch, from which the schedules follow.
      dtype: float32 or float64.
    """

    def __init__(self, config, data: dataset.Dataset, checkpoint: bytes, num_examples: int, dtype: torch.dtype):
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory, 'pretrain.pkl')
            path.write_bytes(checkpoint)
            state = to_state(read(path), config.network.to_dict())
        self.config, self.dtype = config, dtype
        self.state = self.cast(state)
        experiment = byol_experiment.make(
            config, num_examples=num_examples, num_classes=data.num_classes, image_shape=(3, *data.images.shape[2:])
        )
        self.max_steps, self.sample = experiment.max_steps, experiment.sample
        self.with_augmentation = experiment.update
        parts = experiment.parts
        if dtype == torch.float64:
            warmup = config.lr_schedule.warmup_epochs * num_examples // config.batch_size
            schedule = functools.partial(_as_with_x64, parts.learning_schedule, warmup)
            parts = parts._replace(learning_schedule=schedule)
        given_views = assemble(parts._replace(postprocess=lambda inputs, draws: inputs))
        self._forward, self._loss_fn = parts.forward, given_views.loss_fn
        self.update = lambda state, step, views: given_views.update_fn(state, step, None, views)

    def cast(self, tree):
        return optree.tree_map(lambda x: x.to(self.dtype) if x.is_floating_point() else x, tree)

    def step(self, step: int, views: dict[str, torch.Tensor]) -> dict[str, float]:
        """Does one update and returns its logs."""
        # With a float64 step, schedules are computed in float64, as in JAX.
        global_step = torch.tensor(step, dtype=torch.float64 if self.dtype == torch.float64 else None)
        self.state, logs = self.update(self.state, global_step, views)
        return {name: float(value) for name, value in logs.items()}

    def trees(self, views: dict[str, torch.Tensor] | None = None) -> dict[str, dict[str, torch.Tensor]]:
        """Returns the trees of our state, as `Official.trees` does for the official one."""
        momentum = next(s.mu for s in self.state.opt_state if hasattr(s, 'mu'))
        trees = {**{name: getattr(self.state, name) for name in self.state._fields[:4]}, 'momentum': momentum}
        if views is not None:
            trees['gradients'], _ = torch.func.grad(self._loss_fn, has_aux=True)(*self.state[:4], None, views)
        return {
            name: dict(zip(leaf_names(tree), optree.tree_leaves(tree), strict=True)) for name, tree in trees.items()
        }

    def sign_changes(self, official: dict[str, dict[str, torch.Tensor]], views) -> tuple[int, int]:
        """Counts the inputs of ReLUs that our forward pass and a float64 pass of the official state put on two sides.

        Args:
          official: the trees of the official state.
          views: our views.

        Returns:
          The number of inputs whose sign differs, and the number of all inputs.
        """
        exact = [
            optree.tree_unflatten(optree.tree_structure(tree), [official[name][leaf] for leaf in leaf_names(tree)])
            for name, tree in (('online_params', self.state.online_params), ('online_state', self.state.online_state))
        ]
        apply = lambda *args: self._forward.apply(*args, is_training=True)
        return count_sign_changes(apply, (self.state.online_params, self.state.online_state, views), (*exact, views))

    def make_views(self, data: dataset.Dataset, step: int, official_code, seed: int) -> Views:
        """Returns the views of a step from the operators of both sides; both have the same crops and draws."""
        config = self.config
        batch = dataset.train_batch(data, step, seed=seed, batch_size=config.batch_size)
        presets = config.augmentations.to_dict()
        draws = self.cast(self.sample(step, random_seed=seed))
        crops = {
            view: augmentations.random_crop(batch['images'], draws[view].crop.float(), config.image_size).to(self.dtype)
            for view in ('view1', 'view2')
        }
        labels = {'labels': batch['labels'].numpy().astype(np.int32)}
        nhwc = {view: np.ascontiguousarray(crop.permute(0, 2, 3, 1).numpy()) for view, crop in crops.items()}
        official = {
            view: official_code.augment(crop, {k: v.numpy() for k, v in draws[view]._asdict().items()}, presets[view])
            for view, crop in nhwc.items()
        }
        return Views(
            augmentations.postprocess({**crops, 'labels': batch['labels']}, draws, presets),
            {**official, **labels},
            {**official, 'view1': move_first(official['view1']), **labels},
            {**nhwc, **labels},
        )


def count_sign_changes(apply: Callable, ours: tuple, official: tuple) -> tuple[int, int]:
    """Counts the inputs of ReLUs whose sign differs between `apply(*ours)` and `apply(*official)` in float64.

    Returns:
      The number of inputs whose sign differs, and the number of all inputs.
    """
    double = optree.tree_map(lambda x: x.double() if x.is_floating_point() else x, official)
    found = []
    for args in (ours, double):
        with torch.no_grad(), _ReluInputs() as relus:
            apply(*args)
        found.append(torch.cat(relus.signs))
    return int((found[0] != found[1]).sum()), len(found[0])


def _as_with_x64(schedule, warmup_steps: float, step: torch.Tensor) -> torch.Tensor:
    """Returns the learning rate as the official code rounds it where JAX runs in float64.

    With a warm-up the official rate is always float32: the warm-up casts the step to it, and the weak type of the
    cosine gives way in `jnp.where`.
    """
    if not warmup_steps:
        return schedule(step)
    return (schedule(step.float()) if step < warmup_steps else schedule(step).float()).double()


class _ReluInputs(torch.overrides.TorchFunctionMode):
    """Records in this context which inputs of ReLUs are positive."""

    def __init__(self):
        super().__init__()
        self.signs: list[torch.Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.relu:
            self.signs.append((args[0] > 0).flatten())
        return function(*args, **(kwargs or {}))


def move_first(images: np.ndarray) -> np.ndarray:
    """Returns the images `[B, ...]` in 0..1 with the first one moved by one unit in the last place."""
    first = images[:1]
    return np.concatenate([np.nextafter(first, first.dtype.type(0.5)), images[1:]])


def differences(ours: dict[str, Any], official: dict[str, Any]) -> dict[str, float]:
    """Returns the largest difference in each module of each tree, relative to the module's largest element.

    Args:
      ours: trees, from `Ours.trees` or `Official.trees`, with or without gradients.
      official: the trees to compare with.

    Returns:
      A dict such as `{'gradients of encoder/block_group_1': 1e-15}`.
    """
    found = {}
    for tree, words in TREES.items():
        if tree not in ours:
            continue
        assert ours[tree].keys() == official[tree].keys(), sorted(ours[tree].keys() ^ official[tree].keys())
        modules: dict[str, list[str]] = {}
        for name, leaf in official[tree].items():
            if leaf.is_floating_point():
                depth = 2 if name.startswith('encoder/') else 1
                modules.setdefault('/'.join(name.split('/')[:depth]), []).append(name)
        for module, names in modules.items():
            pairs = [(ours[tree][name].double(), official[tree][name].double()) for name in names]
            difference = max((x - y).abs().max().item() for x, y in pairs)
            largest = max(y.abs().max().item() for _, y in pairs)
            found[f'{words} of {module}'] = _relative(difference, largest)
    return found


def _relative(difference: float, size: float) -> float:
    return float(f'{difference / max(size, 1e-30):.2e}')  # As recorded: the verdict follows from what is written.


def _of_logs(ours: dict[str, float], official: dict[str, float], largest: dict[str, float]) -> dict[str, float]:
    return {
        name.replace('_', ' '): _relative(abs(ours[name] - official[name]), value) for name, value in largest.items()
    }


def compare(ours: Ours, official, data: dataset.Dataset, official_code, steps: list[int], seed: int) -> Iterator[dict]:
    """Trains all three states; yields a record after each update.

    Args:
      ours: our side.
      official: the official side.
      data: the images.
      official_code: the module of that name.
      steps: the global step of each update, as the schedules see it.
      seed: the seed of the images.

    Yields:
      `step`; the logs `ours`, `official` and `moved` (the official code with one image moved); the relative
      differences to the official code of `differences` (ours) and `own` (moved); `views`, the largest difference
      between the views; `sign_changes` and `relu_inputs`, see `Ours.sign_changes`.
    """
    again = copy.copy(official)
    largest: dict[str, float] = {}
    for step in steps:
        views = ours.make_views(data, step, official_code, seed)
        sides = (ours, views.ours), (official, views.official), (again, views.moved)
        gradients = [side.trees(inputs)['gradients'] for side, inputs in sides]
        changed, inputs = ours.sign_changes(official.trees(), views.ours)
        our_logs, official_logs, moved_logs = (side.step(step, inputs) for side, inputs in sides)
        largest = {
            name: max(largest.get(name, 0.0), abs(official_logs[name])) for name in _LOGS if name in official_logs
        }
        a, b, c = ({**side.trees(), 'gradients': g} for (side, _), g in zip(sides, gradients, strict=True))
        yield {
            'step': step,
            'ours': our_logs,
            'official': official_logs,
            'moved': moved_logs,
            'views': max(
                float(np.abs(views.ours[v].permute(0, 2, 3, 1).numpy() - views.official[v]).max())
                for v in views.official.keys() - {'labels'}
            ),
            'sign_changes': changed,
            'relu_inputs': inputs,
            'differences': {**_of_logs(our_logs, official_logs, largest), **differences(a, b)},
            'own': {**_of_logs(moved_logs, official_logs, largest), **differences(c, b)},
        }


def train_over_seeds(ours: Ours, official, data: dataset.Dataset, official_code, seeds: list[int]) -> Iterator[dict]:
    """Trains the official code from each seed, and ours from the first; yields the logs of all after each update.

    Each seed has its own initial state, images and draws; ours starts from the official state of the first seed.
    """
    officials = {seed: official.with_seed(seed) if seed != seeds[0] else official for seed in seeds}
    for step in range(ours.max_steps):
        views = {seed: ours.make_views(data, step, official_code, seed) for seed in seeds}
        logs = {f'official, seed {seed}': side.step(step, views[seed].official) for seed, side in officials.items()}
        yield {'step': step, f'ours, seed {seeds[0]}': ours.step(step, views[seeds[0]].ours), **logs}


def rates(side: str, ours: Ours, official, views: Views, batch, *, compiled: bool, seconds: float) -> dict[str, float]:
    """Returns the images per second of one update of a side, with and without augmentation."""
    draws = ours.sample(0)
    device, step = torch.device('cpu'), torch.tensor(0)  # The speed of a step does not depend on its index.

    if side == 'ours':
        memory.keep_freed_memory()  # As in launch.py.

    def our_step(update, *inputs):
        state = optree.tree_map(torch.clone, ours.state)
        update = compilation.compile_update(update, compiled=compiled)

        def run():
            nonlocal state
            state, _ = update(state, step, *inputs)

        return run

    steps = {
        'official': lambda: (official.augmented_step(views.crops), official.plain_step(views.official)),
        'ours': lambda: (our_step(ours.with_augmentation, draws, batch), our_step(ours.update, views.ours)),
    }[side]()
    return {
        name: ours.config.batch_size / measuring.median(measuring.seconds_per_call(run, device, 3, seconds, warm_up=2))
        for name, run in zip(('augmentation and update', 'update alone'), steps, strict=True)
    }
