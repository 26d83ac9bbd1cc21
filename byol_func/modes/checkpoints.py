"""Finds the checkpoint that a mode starts from and checks that it fits the run."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import torch
from absl import logging
from ml_collections import ConfigDict

from byol_func import library
from byol_func.console import readable
from byol_func.data import listing
from byol_func.errors import UserError, counted
from byol_func.modes import inputs
from byol_func.runtime import transfer
from byol_func.training import agreement, nonfinite, resuming
from byol_func.utils import checkpointing, dataset
from byol_func.workdir import files
from byol_func.workdir.run import Run
from byol_func.workdir.summaries import Length


def length_of(checkpoint: checkpointing.Checkpoint) -> Length:
    """Returns how long a checkpoint was trained, according to its own record."""
    config = checkpoint.config if checkpoint.mode == 'pretrain' else checkpoint.config.get(checkpoint.mode, {})
    return Length(checkpoint.step + 1, checkpoint.scalars.get('epoch'), config.get('batch_size'))


def find_checkpoint(run: Run, modes: tuple[str, ...]) -> checkpointing.Checkpoint:
    """Loads the checkpoint given as --checkpoint, a file or another workdir, or else the newest of the workdir.

    In a workdir the modes are searched in the order of `modes`, and the first one with a checkpoint is taken.

    Raises:
      UserError: there is no checkpoint, or the file was written by a mode that is not among `modes`.
    """
    path = run.checkpoint
    if not path:
        directory = os.path.join(run.workdir, 'checkpoints')
        for mode in modes:
            checkpoint, _ = resuming.newest_good(directory, mode, run.resume)
            if checkpoint is not None:
                logging.info('Using the newest checkpoint of --mode=%s: %s', mode, checkpoint.path)
                warn_of_other_images(run, checkpoint)
                return checkpoint
        seeds = seed_folders(
            run, lambda folder: any(checkpointing.list_checkpoints(folder / 'checkpoints', mode) for mode in modes)
        )
        raise UserError(
            f'--workdir={run.workdir}: no checkpoint of {" or ".join(modes)} in {directory}; '
            + (seeds or 'run --mode=pretrain first or give --checkpoint=FILE')
        )
    checkpoint = library.open_checkpoint(path, modes, f'--checkpoint={path}')
    if checkpoint.mode not in modes:
        raise UserError(f'--checkpoint={path}: written by --mode={checkpoint.mode}, expected one of {", ".join(modes)}')
    warn_of_other_images(run, checkpoint)
    return checkpoint


def seed_folders(run: Run, has_it: Callable[[pathlib.Path], Any]) -> str:
    """Returns a hint for an error message: the seed folders of the workdir that satisfy `has_it`; '' if none does."""
    found = {
        int(path.name[5:]): path
        for path in pathlib.Path(run.workdir).glob('seed_*')
        if path.name[5:].isdecimal() and has_it(path)
    }
    flags = [
        f'--workdir={found[i]}' + (f' --config.random_seed={run.config.random_seed + i}' if i else '')
        for i in sorted(found)
    ]
    more = f' (the first of {len(flags)})' if len(flags) > 1 else ''
    return f'each seed has its own folder: give {flags[0]}{more}' if flags else ''


def seen_in_training(config: ConfigDict, checkpoint: checkpointing.Checkpoint) -> bool | None:
    """Returns whether a checkpoint was trained on images of the run's validation set; None if that is unknown.

    The validation set is the one that `load_split` returns for 'val'. The set for a larger `val_fraction`
    contains the set for a smaller one. An imported checkpoint has no record of its data.
    """
    asked, trained = config.dataset, checkpoint.config.get('dataset')
    if not trained or checkpoint.config.get('imported') or trained.get('name') != asked.name:
        return None
    if trained.get('eval_split') == 'val' and trained.get('val_fraction', 0.0) >= asked.val_fraction:
        return False
    roots = [os.path.realpath(os.path.expanduser(root)) for root in (trained.get('root', ''), asked.root)]
    return True if asked.name not in ('folder', 'shards') or roots[0] == roots[1] else None


def check_held_out(config: ConfigDict, checkpoint: checkpointing.Checkpoint) -> bool | None:
    """Returns `seen_in_training` and warns if the result is None.

    Raises:
      UserError: the result is True, so the validation accuracy would be measured on training images.
    """
    seen, fraction = seen_in_training(config, checkpoint), config.dataset.val_fraction
    if seen:
        trained = checkpoint.config['dataset']
        raise UserError(
            f'--checkpoint={checkpoint.path}: trained on images of this validation set (its config.dataset.eval_split='
            f'{trained.get("eval_split")!r}, val_fraction={trained.get("val_fraction")}); expected one trained with '
            f'--config.dataset.eval_split=val --config.dataset.val_fraction={fraction}, or --split=test'
        )
    if seen is None:
        logging.warning('%s does not say whether it was trained on this validation set', checkpoint.path)
    return seen


def check_classes(checkpoint: checkpointing.Checkpoint, data: dataset.Examples) -> None:
    """Raises a UserError if a checkpoint has no classifier, or if its classes differ from those of the data."""
    names = ('online_params/classifier/b', 'classif_params/classifier/b')
    found = next((len(checkpoint.tensors[n]) for n in names if n in checkpoint.tensors), None)
    if found is None:
        raise UserError(
            f'--checkpoint={checkpoint.path}: holds no classifier (trained without labels, or the encoder alone); '
            'expected --mode=linear_eval, knn or logistic, which measure its encoder'
        )
    if found != data.num_classes:
        raise UserError(
            f'--checkpoint={checkpoint.path}: its classifier has {counted(found, "class")}, the data set has '
            f'{data.num_classes}; expected the data it was trained on (see config.dataset)'
        )
    for i, (trained, given) in enumerate(zip(checkpoint.class_names, data.class_names, strict=False)):
        if listing.normalised(readable(trained)) != listing.normalised(given):
            raise UserError(
                f'--checkpoint={checkpoint.path}: class {i} is {trained!r} in its classifier and {given!r} in the '
                'data set; expected the data it was trained on (see config.dataset)'
            )


# Fields outside config.network that determine the images an encoder was trained on.
_INPUT_FIELDS = (
    'image_size',
    'eval_crop_fraction',
    *(
        f'dataset.{name}'
        for name in ('name', 'source_size', 'grayscale', 'channels', 'exif_orientation', 'value_range')
    ),
)


def _check_network(run: Run, checkpoint: checkpointing.Checkpoint) -> None:
    """Checks that the config describes the encoder of a checkpoint; other networks may have the same parameters."""
    saved, asked = files.flatten(checkpoint.config), files.flatten(run.plain_config())
    for field, value in {'network.norm': 'batch_norm', **saved}.items():  # Older checkpoints lack the norm.
        is_encoder = field.startswith(('network.encoder_class', 'network.encoder_config.')) or field == 'network.norm'
        if is_encoder and value != asked.get(field, value):
            raise UserError(
                f'config.{field}={asked[field]!r}: --checkpoint={checkpoint.path} was trained with {value!r}; expected '
                'that, or no --config, to use the config of --workdir'
            )


def warn_of_other_images(run: Run, checkpoint: checkpointing.Checkpoint) -> None:
    """Warns about each field of the config that gives an encoder other images than it was trained on."""
    saved, asked = files.flatten(checkpoint.config), files.flatten(run.plain_config())
    for field in _INPUT_FIELDS:
        if saved.get(field, asked[field]) != asked[field]:
            logging.warning('config.%s=%r, but the encoder was trained with %r', field, asked[field], saved[field])


def restore_encoder(run: Run, data: dataset.Examples, checkpoint: checkpointing.Checkpoint):
    """Returns the parameters and moving averages of a checkpoint's encoder, on the run's device.

    Raises:
      UserError: the encoder differs from the one in the config, or the replicas have different checkpoints.
    """
    _check_network(run, checkpoint)
    agreement.same_checkpoint(checkpoint.tensors)
    params, state = inputs.make_backbone(run.config, data).init(torch.Generator())
    prefix = 'online' if checkpoint.mode == 'pretrain' else 'backbone'
    if checkpoint.mode.startswith(nonfinite.PREFIX):
        prefix = f'state/{prefix}'
    params = checkpointing.restore(checkpoint, params, prefix=f'{prefix}_params/')
    state = checkpointing.restore(checkpoint, state, prefix=f'{prefix}_state/')
    return transfer.place((params, state), run.device)
