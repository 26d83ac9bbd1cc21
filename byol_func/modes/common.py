"""What the modes share: the data of a run, its networks and its checkpoint."""

from collections.abc import Mapping, Sequence
import os
from typing import Any

from absl import logging
import optree
import torch

from byol_func import byol_experiment, eval_experiment, resuming
from byol_func.experiment import Experiment
from byol_func.runs import Run
from byol_func.runtime import collectives
from byol_func.runtime.precision import DTYPES
from byol_func.utils import checkpointing, dataset, networks
from byol_func.utils.helpers import UserError


def encoder_part(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder's part of params or state of the whole network, as `make_backbone` has it."""
    return {'encoder': tree['encoder']}


def to_device(tree: Any, device: torch.device) -> Any:
    """The tree on `device`."""
    return optree.tree_map(lambda x: x.to(device), tree)


def load_data(run: Run) -> tuple[dataset.Dataset, dataset.Dataset | None]:
    """The sets to train on and to evaluate on, on the run's device; None for the latter without labels."""
    with collectives.first_replica_first():
        train, test = dataset.load_train_and_test(**run.config.dataset)
    center_crop = (run.config.image_size, run.config.eval_crop_fraction)
    train, test = (s._replace(center_crop=center_crop) if isinstance(s, dataset.Stream) else s for s in (train, test))
    logging.info('Training set: %s', dataset.describe(train))
    if test is not None:
        logging.info('%s set: %s', run.config.dataset.eval_split.capitalize(), dataset.describe(test))
        test = dataset.to_device(test, run.device)
    return dataset.to_device(train, run.device), test


def load_labelled_data(run: Run) -> tuple[dataset.Dataset, dataset.Dataset]:
    """`load_data` for a mode that cannot do without labels.

    Raises:
      UserError: there are none.
    """
    train, test = load_data(run)
    if test is None:
        raise UserError(
            f'config.dataset.root={run.config.dataset.root!r}: no labels, which only pre-training can do without; '
            'expected DIR/train/CLASS/* and DIR/test/CLASS/*'
        )
    return train, test


def facts(data: dataset.Dataset, image_shape: Sequence[int]) -> dict[str, Any]:
    """What an experiment's `make` wants to know of its data, whose images have that shape."""
    return dict(
        num_examples=data.num_examples, num_classes=data.num_classes, image_shape=tuple(image_shape)
    )


def make_byol(run: Run, data: dataset.Dataset) -> Experiment:
    """The pre-training experiment of the run."""
    return byol_experiment.make(run.config, **facts(data, data.image_shape))


def make_backbone(run: Run, data: dataset.Dataset) -> networks.Network:
    """The run's encoder alone, from images in 0..1 to embeddings."""
    network = run.config.network.to_dict()
    names = ('encoder_class', 'encoder_config', 'bn_config')
    return eval_experiment.make_backbone(
        **{name: network[name] for name in names}, in_channels=data.image_shape[0],
        compute_dtype=DTYPES[run.config.precision],
    )


def find_checkpoint(run: Run, modes: tuple[str, ...]) -> checkpointing.Checkpoint:
    """The file of --checkpoint, or the newest of the workdir; the first of `modes` that has one.

    Raises:
      UserError: there is none, or the one asked for was written by another mode.
    """
    path = run.checkpoint
    if not path:
        directory = os.path.join(run.workdir, 'checkpoints')
        for mode in modes:
            checkpoint, _ = resuming.newest_good(directory, mode, run.resume)
            if checkpoint is not None:
                return checkpoint
        raise UserError(
            f'--workdir={run.workdir}: no checkpoint of {" or ".join(modes)} in {directory}; '
            'run --mode=pretrain first or give --checkpoint=FILE'
        )
    checkpoint = checkpointing.load(path)
    if checkpoint.mode not in modes:
        raise UserError(
            f'--checkpoint={path}: written by --mode={checkpoint.mode}, expected one of {", ".join(modes)}'
        )
    return checkpoint
