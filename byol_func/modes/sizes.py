"""Checks, before a training starts, that its views fit the images and that a step fits in memory."""

from collections.abc import Callable
from typing import Any

import optree
import torch
from absl import logging

from byol_func.errors import UserError, counted
from byol_func.experiment import Experiment, step_arguments
from byol_func.modes import inputs
from byol_func.runtime import collectives, costs
from byol_func.utils import dataset
from byol_func.workdir.run import Run

_FAR_ABOVE = 2  # Views larger than this multiple of the image side cause a warning; CIFAR at 64 pixels is common.
# The estimate takes seconds, so it is skipped if the largest activations of both views take less than this share of the
# free memory. The estimate was up to 65 times those activations in ResNet-18, and is more in deeper networks.
_PLENTY = 0.0025
_WIDEST = 64  # Number of channels of the largest activations of a ResNet.


def check_image_size(run: Run, data: dataset.Examples) -> None:
    """Warns if the views are far larger than the images that they are cut from."""
    side = min((s for s in data.image_shape[1:] if s is not None), default=None)
    for field in ('image_size', 'view_size'):
        size = run.config[field]
        if side is not None and size > _FAR_ABOVE * side:
            logging.warning(
                'config.%s=%d: the images have a side of %s; larger views show no more detail, and a step '
                'takes %.0f times as long as with config.%s=%d',
                field,
                size,
                counted(side, 'pixel'),
                (size / side) ** 2,
                field,
                side,
            )


# The measured peak of resident memory as a multiple of the estimate, lowest and highest (see `check_memory`).
_PLAIN, _TRACED, _FORWARD = (1.4, 2.0), (0.6, 1.7), (1.0, 1.2)


def check_memory(run: Run, experiment: Experiment, data: dataset.Examples, mode: str = '') -> None:
    """Estimates the memory that a step needs, unless there is clearly enough.

    The estimate (`costs.peak_bytes`) knows neither the gaps between blocks of the allocator nor the buffers of its
    kernels. The peak of resident memory was 1.4 to 2.0 times as high for steps as they stand, 0.6 to 1.7 times for
    traced ones and 0.7 and 1.5 times for two compiled ones (TinyResNet, ResNet10 and ResNet18 on one core, 32 to 128
    pixels, batches of 16 to 128, in float32 and bfloat16). A step is therefore refused if the lowest of these does not
    fit, and a warning is logged if the highest may not. Nothing was measured on GPUs.

    Args:
      run: the run.
      experiment: the pre-training, or what trains on top of an encoder.
      data: its training set.
      mode: '' for pre-training, else 'linear_eval' or 'fine_tune'.

    Raises:
      UserError: the step needs more memory than the device has free.
    """
    compiled, steps = run.config.compile, experiment.max_steps
    is_plain = compiled is False or compiled is None and not costs.worth_tracing(steps)
    share = experiment.batch_size // collectives.num_replicas()
    at_once = share if mode else share // run.config.accumulate_steps
    _check(
        run,
        f'a step with config.{f"{mode}." if mode else ""}batch_size={experiment.batch_size}',
        2 * at_once,
        lambda: costs.peak_bytes(experiment.update, *step_arguments(experiment, data.image_shape)),
        _PLAIN if is_plain else _TRACED,
        'image_size' if mode or not run.config.view_size else 'view_size',
        'a smaller batch' if mode else 'a smaller batch, a larger config.accumulate_steps',
    )


def check_encoder_memory(run: Run, data: dataset.Examples, params: Any, state: Any) -> None:
    """Does the same as `check_memory` for embedding a batch of images; the peak was 1.04 and 1.12 times as high."""
    count, side = min(run.config.evaluation.batch_size, data.num_examples), run.config.image_size
    images = torch.zeros(1).expand(count, data.image_shape[0] or 1, side, side)
    backbone = inputs.make_backbone(run.config, data)

    def embed(params, state, images):
        with torch.no_grad():
            return backbone.apply(params, state, images, is_training=False)

    what = f'embedding with config.evaluation.batch_size={run.config.evaluation.batch_size}'
    _check(run, what, count, lambda: costs.peak_bytes(embed, params, state, images), _FORWARD)


def _check(
    run: Run,
    what: str,
    images: int,
    estimate: Callable[[], int],
    ratios: tuple[float, float],
    field: str = 'image_size',
    fewer: str = 'a smaller batch',
) -> None:
    available, side = costs.available_bytes(run.device), run.config[field]
    if images * side**2 * _WIDEST * 4 < _PLENTY * available:
        return
    estimated = estimate()
    least, greatest = (ratio * estimated / 2**30 for ratio in ratios)
    free = available / 2**30
    needs = f'config.{field}={side}: {what} needs about {least:,.1f} to {greatest:,.1f} GiB'
    advice = f'smaller views, {fewer} or a smaller network'
    if least > free:
        raise UserError(f'{needs}, but {free:,.1f} GiB are free; expected {advice}')
    if greatest > free:
        logging.warning('%s, and %.1f GiB are free; if it is killed, take %s', needs, free, advice)


def outline(run: Run, experiment: Experiment, train: dataset.Examples, test: dataset.Examples | None) -> str:
    """Returns the lines printed at the start of a pre-training: its data, network, steps, device and workdir."""
    config = run.config
    epochs = experiment.max_steps * experiment.batch_size / train.num_examples  # `max_images` may shorten the run.
    state = experiment.init()
    encoder, online = state.online_params['encoder'], state.online_params
    count = lambda tree: sum(leaf.numel() for leaf in optree.tree_leaves(tree)) / 1e6
    shape = ' x '.join('any' if side is None else str(side) for side in train.image_shape)
    k = config.accumulate_steps
    size = counted(experiment.batch_size // (collectives.num_replicas() * k), 'image')
    parts = f'in micro-batches of {size}, ' if k > 1 else ''
    held = f', {test.num_examples:,} to evaluate on ({config.dataset.eval_split})' if test is not None else ''
    return '\n'.join(
        [
            f'Data:    {config.dataset.name}, {dataset.describe(train)}{held}; {shape} pixels',
            f'Network: {config.network.encoder_class}, {count(encoder):.2f} million parameters, '
            f'{count(online):.2f} with its heads',
            f'Steps:   {experiment.max_steps:,} of {counted(experiment.batch_size, "image")}, {parts}'
            f'{counted(round(epochs, 2 if epochs < 10 else 1), "epoch", ",g")}, '
            f'views of {counted(config.view_size or config.image_size, "pixel")}'
            + (f'; {counted(config.num_seeds, "seed")}' if config.num_seeds > 1 else ''),
            f'Runs on: {run.device}, {config.precision}, {counted(collectives.num_replicas(), "process")}',
            f'Workdir: {run.workdir}',
        ]
    )
