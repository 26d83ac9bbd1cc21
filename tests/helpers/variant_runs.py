"""A variant of the update rule on tiny networks and images, as a user's file would be run."""

import functools
import importlib.util
import os
import pathlib

import ml_collections
import optree
import torch

from byol_func import byol_experiment
from byol_func.utils import dataset, optimizers
from byol_func.utils.checkpointing import leaf_names

BATCH_SIZE, SIDE = 16, 8
TINY = {
    'random_seed': 0,
    'num_seeds': 1,
    'num_epochs': 15,
    'batch_size': BATCH_SIZE,
    'network.encoder_class': 'TinyResNet',
    'network.encoder_config.width_multiplier': 1.0,
    'network.projector_hidden_size': 16,
    'network.projector_output_size': 8,
    'network.predictor_hidden_size': 16,
    'lr_schedule.warmup_epochs': 0.0,
    'pictures': False,
    'preview.num_images': 0,
    'final_linear_eval': False,
    'linear_eval.compare_untrained': False,
    'linear_eval.num_epochs': 1,
    'linear_eval.batch_size': 32,
    'monitoring.health_every_steps': 1000,
    'checkpointing.save_every_steps': 0,
    'log_every_steps': 10,
    'evaluation.batch_size': 32,
    'compile': False,
    'precision': 'float32',
}


def load_config(path: str | os.PathLike, **fields) -> ml_collections.ConfigDict:
    """The config of a variant's file, on a network and a data set of seconds."""
    spec = importlib.util.spec_from_file_location(f'config_{pathlib.Path(path).stem}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config('digits')
    config.update_from_flattened_dict(TINY | fields)
    return config


@functools.cache
def data() -> tuple[dataset.Dataset, dataset.Dataset]:
    """A training and a test set of noisy images of 8 x 8 pixels in four classes."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randint(256, (4, 1, SIDE, SIDE), generator=generator)
    sets = []
    for size in (2 * BATCH_SIZE, 32):
        labels = torch.arange(size) % 4
        images = (centres[labels] + torch.randint(64, (size, 1, SIDE, SIDE), generator=generator)) // 2
        sets.append(dataset.Dataset(images.byte(), labels, tuple('abcd')))
    return sets[0], sets[1]


def make(config: ml_collections.ConfigDict) -> byol_experiment.Experiment:
    """The experiment on `data()`."""
    train, _ = data()
    return byol_experiment.make(
        config, num_examples=train.num_examples, num_classes=train.num_classes, image_shape=train.image_shape
    )


def arguments(experiment: byol_experiment.Experiment, step: int) -> tuple:
    """Step, draws and batch of a step."""
    batch = dataset.train_batch(data()[0], step, seed=0, batch_size=experiment.batch_size)
    return torch.tensor(step), experiment.sample(step), batch


def _of_rounded(optimizer):
    @functools.wraps(optimizer)
    def rounded(learning_rate, **arguments):
        init, update = optimizer(learning_rate, **arguments)
        without_noise = lambda grads: optree.tree_map(lambda g: g.round(decimals=12), grads)
        return optimizers.GradientTransformation(init, lambda grads, *rest: update(without_noise(grads), *rest))

    return rounded


def share_in_float64(
    rank: int, paths: list[str], fields: dict | None = None
) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, float]]]:
    """Leaves of the state by name, and logs, after two steps of every variant, in float64 and on this replica's share.

    Rank -1 is one process with the whole batch. SGD, and for rules with an optimiser of their own gradients without
    rounding, because Adam and Lion make whole steps of the rounding in gradients of 0.
    """
    double = lambda x: x.double() if x.is_floating_point() else x
    found = {}
    for path in paths:
        parts = make(load_config(path, optimizer='sgd', **fields or {})).parts
        experiment = byol_experiment.make_experiment(parts._replace(optimizer=_of_rounded(parts.optimizer)))
        state = optree.tree_map(double, experiment.init())
        for step in range(2):
            global_step, draws, batch = arguments(experiment, step)
            images, sizes = batch.pop('images').double() / 255, experiment.image_size  # A crop would be float32.
            batch |= {view: images[:, :, :side, :side] for view, side in sizes.items()}
            share = slice(None) if rank < 0 else slice(rank * BATCH_SIZE // 2, (rank + 1) * BATCH_SIZE // 2)
            draws, batch = optree.tree_map(lambda x, share=share: double(x)[share], (draws, batch))
            state, logs = experiment.update(state, global_step.double(), draws, batch)
        leaves = dict(zip(leaf_names(state), optree.tree_leaves(state), strict=True))
        found[path] = leaves, {name: float(value) for name, value in logs.items()}
    return found
