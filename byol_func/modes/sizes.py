"""Checks, before a pre-training starts, that its views fit the images and that a step fits in memory."""

import optree
import torch
from absl import logging

from byol_func.errors import UserError
from byol_func.experiment import Experiment
from byol_func.runtime import collectives, costs
from byol_func.utils import dataset
from byol_func.workdir.run import Run

_FAR_ABOVE = 2  # Views larger than this multiple of the image side cause a warning; CIFAR at 64 pixels is common.
# Below this share of the free memory the estimate, which takes seconds, is skipped.
_PLENTY = 0.1
_WIDEST = 64  # Number of channels of the largest activations of a ResNet.


def check_image_size(run: Run, data: dataset.Examples) -> None:
    """Warns if the views are far larger than the images that they are cut from."""
    side, image_size = min((s for s in data.image_shape[1:] if s is not None), default=None), run.config.image_size
    if side is not None and image_size > _FAR_ABOVE * side:
        logging.warning(
            'config.image_size=%d: the images have a side of %d pixels; larger views show no more detail, and a step '
            'takes %.0f times as long as with config.image_size=%d',
            image_size,
            side,
            (image_size / side) ** 2,
            side,
        )


def step_arguments(run: Run, experiment: Experiment, data: dataset.Examples) -> tuple:
    """Returns the state, step, draws and batch of this replica for `experiment.update`; the images are all zeros."""
    share = experiment.batch_size // collectives.num_replicas()
    channels, *size = data.image_shape
    names = ('view1', 'view2') if None in size else ('images',)
    shape = [share, channels or 1, *(side or run.config.image_size for side in size)]
    inputs = {name: torch.zeros(1, dtype=torch.uint8).expand(shape) for name in names}
    inputs['labels'] = torch.zeros(share, dtype=torch.int64)
    draws = optree.tree_map(lambda draw: draw[:share], experiment.sample(0))
    return experiment.init(), torch.zeros((), dtype=torch.int64), draws, inputs


def check_memory(run: Run, experiment: Experiment, data: dataset.Examples) -> None:
    """Estimates the memory that a step needs, unless there is clearly enough.

    Raises:
      UserError: the step needs more memory than the device has free.
    """
    available = costs.available_bytes(run.device)
    share = experiment.batch_size // collectives.num_replicas()
    if 2 * share * run.config.image_size**2 * _WIDEST * 4 < _PLENTY * available:
        return
    needed = costs.peak_bytes(experiment.update, *step_arguments(run, experiment, data))
    if needed > available:
        raise UserError(
            f'config.image_size={run.config.image_size}: a step with config.batch_size={experiment.batch_size} needs '
            f'about {needed / 2**30:,.1f} GiB, but {available / 2**30:,.1f} GiB are free; expected smaller views, a '
            'smaller batch or a smaller network'
        )


def outline(run: Run, experiment: Experiment, train: dataset.Examples, test: dataset.Examples | None) -> str:
    """Returns the lines printed at the start of a pre-training: its data, network, steps, device and workdir."""
    config = run.config
    state = experiment.init()
    encoder, online = state.online_params['encoder'], state.online_params
    count = lambda tree: sum(leaf.numel() for leaf in optree.tree_leaves(tree)) / 1e6
    shape = ' x '.join('any' if side is None else str(side) for side in train.image_shape)
    held = f', {test.num_examples:,} to evaluate on ({config.dataset.eval_split})' if test is not None else ''
    return '\n'.join(
        [
            f'Data:    {config.dataset.name}, {dataset.describe(train)}{held}; {shape} pixels',
            f'Network: {config.network.encoder_class}, {count(encoder):.2f} million parameters, '
            f'{count(online):.2f} with its heads',
            f'Steps:   {experiment.max_steps:,} of {experiment.batch_size} images, {config.num_epochs:g} epochs, '
            f'views of {config.image_size} pixels' + (f'; {config.num_seeds} seeds' if config.num_seeds > 1 else ''),
            f'Runs on: {run.device}, {config.precision}, {collectives.num_replicas()} process(es)',
            f'Workdir: {run.workdir}',
        ]
    )
