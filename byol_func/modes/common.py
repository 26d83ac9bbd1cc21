"""What the modes share: the data of a run, its networks and its checkpoint."""

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from absl import logging

from byol_func import byol_experiment, divergence, eval_experiment, resuming, runs
from byol_func.evaluation import features
from byol_func.evaluation import held_out as parts
from byol_func.experiment import Experiment
from byol_func.runs import Run
from byol_func.runtime import collectives, transfer
from byol_func.utils import augmentations, checkpointing, dataset, networks
from byol_func.utils.helpers import UserError, one_of


def encoder_part(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder's part of params or state of the whole network, as `make_backbone` has it."""
    return {'encoder': tree['encoder']}


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
    return dict(num_examples=data.num_examples, num_classes=data.num_classes, image_shape=tuple(image_shape))


def make_byol(run: Run, data: dataset.Dataset) -> Experiment:
    """The pre-training experiment of the run."""
    return byol_experiment.make(run.config, **facts(data, data.image_shape))


def length_of(checkpoint: checkpointing.Checkpoint) -> runs.Length:
    """How long a checkpoint was trained, by what it says itself."""
    config = checkpoint.config if checkpoint.mode == 'pretrain' else checkpoint.config.get(checkpoint.mode, {})
    return runs.Length(checkpoint.step + 1, checkpoint.scalars.get('epoch'), config.get('batch_size'))


def make_backbone(run: Run, data: dataset.Dataset) -> networks.Network:
    """The run's encoder alone, from images in 0..1 to embeddings, in float32 however it was trained."""
    network = run.config.network.to_dict()
    names = ('encoder_class', 'encoder_config', 'bn_config')
    return eval_experiment.make_backbone(
        **{name: network[name] for name in names},
        in_channels=data.image_shape[0],
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
                logging.info('The newest checkpoint of %s: %s', mode, checkpoint.path)
                return checkpoint
        seeds = seed_folders(
            run, lambda folder: any(checkpointing.list_checkpoints(folder / 'checkpoints', mode) for mode in modes)
        )
        raise UserError(
            f'--workdir={run.workdir}: no checkpoint of {" or ".join(modes)} in {directory}; '
            + (seeds or 'run --mode=pretrain first or give --checkpoint=FILE')
        )
    checkpoint = checkpointing.load(path)
    if checkpoint.mode not in modes:
        raise UserError(f'--checkpoint={path}: written by --mode={checkpoint.mode}, expected one of {", ".join(modes)}')
    return checkpoint


def seed_folders(run: Run, has_it: Callable[[pathlib.Path], Any]) -> str:
    """For an error: the folders of the seeds in the workdir that have what is sought; '' if none has."""
    found = {
        int(path.name[5:]): path
        for path in pathlib.Path(run.workdir).glob('seed_*')
        if path.name[5:].isdecimal() and has_it(path)
    }
    flags = [
        f'--workdir={found[i]}' + (f' --config.random_seed={run.config.random_seed + i}' if i else '')
        for i in sorted(found)
    ]
    more = f' (or one of {len(flags) - 1} more seeds)' if len(flags) > 1 else ''
    return f'its seeds have folders of their own: give {flags[0]}{more}' if flags else ''


# What a checkpoint's classifier is called, by the mode that trained it.
CLASSIFIERS = {'pretrain': 'online', 'linear_eval': 'linear', 'fine_tune': 'fine_tuned'}
# The modes whose checkpoints hold an encoder, in the order in which a workdir is searched.
WITH_ENCODER = ('pretrain', 'fine_tune', 'linear_eval')
SPLITS = ('train', 'val', 'test')


def split_of(run: Run) -> str:
    """The split of --split, or that of `config.dataset.eval_split`.

    Raises:
      UserError: there is no such split.
    """
    return one_of('--split', run.split or run.config.dataset.eval_split, SPLITS)


def load_split(run: Run, split: str, labelled: bool = True) -> tuple[dataset.Dataset, dataset.Dataset | None]:
    """The training set as the run sees it, and the split asked for.

    Raises:
      UserError: there is no such split, or it has no labels and needs them.
    """
    one_of('--split', split, SPLITS)
    config = run.config.copy_and_resolve_references()
    if split != 'train':  # Of which the run's own setting tells what is held out.
        config.dataset.eval_split = split
    train, held = (load_labelled_data if labelled else load_data)(run._replace(config=config))
    data = train if split == 'train' else held
    if data is None:
        raise UserError(f'--split={split}: a folder without labels has no such split; expected train')
    return train, data


def seen_in_training(run: Run, checkpoint: checkpointing.Checkpoint) -> bool | None:
    """Whether a checkpoint was trained on what `load_split` takes for 'val'; None if nothing tells.

    A larger part holds a smaller one. An imported checkpoint has no record of its data.
    """
    asked, trained = run.config.dataset, checkpoint.config.get('dataset')
    if not trained or checkpoint.config.get('imported') or trained.get('name') != asked.name:
        return None
    if trained.get('eval_split') == 'val' and trained.get('val_fraction', 0.0) >= asked.val_fraction:
        return False
    roots = [os.path.realpath(os.path.expanduser(root)) for root in (trained.get('root', ''), asked.root)]
    return True if asked.name != 'folder' or roots[0] == roots[1] else None


def check_held_out(run: Run, checkpoint: checkpointing.Checkpoint) -> bool | None:
    """`seen_in_training`, with a warning where it is None.

    Raises:
      UserError: it is True: what would be called validation accuracy is one of training.
    """
    seen, fraction = seen_in_training(run, checkpoint), run.config.dataset.val_fraction
    if seen:
        trained = checkpoint.config['dataset']
        raise UserError(
            f'--checkpoint={checkpoint.path}: trained on images of this validation set (its config.dataset.eval_split='
            f'{trained.get("eval_split")!r}, val_fraction={trained.get("val_fraction")}); expected one trained with '
            f'--config.dataset.eval_split=val --config.dataset.val_fraction={fraction}, or --split=test'
        )
    if seen is None:
        logging.warning('%s does not tell whether it was trained on this validation set', checkpoint.path)
    return seen


def check_classes(checkpoint: checkpointing.Checkpoint, data: dataset.Dataset) -> None:
    """Raises a UserError if a checkpoint has no classifier, or one of other classes than the data."""
    names = ('online_params/classifier/b', 'classif_params/classifier/b')
    found = next((len(checkpoint.tensors[n]) for n in names if n in checkpoint.tensors), None)
    if found is None:
        raise UserError(
            f'--checkpoint={checkpoint.path}: trained without labels, so it has no classifier; '
            'expected --mode=linear_eval, knn or logistic, which measure its encoder'
        )
    if found != data.num_classes:
        raise UserError(
            f'--checkpoint={checkpoint.path}: its classifier has {found} classes, the data set has '
            f'{data.num_classes}; expected the data it was trained on (look at config.dataset)'
        )
    for i, (trained, given) in enumerate(zip(checkpoint.class_names, data.class_names)):
        if trained != given:
            raise UserError(
                f'--checkpoint={checkpoint.path}: the class {i} of its classifier is {trained!r}, that of the data set '
                f'{given!r}; expected the data it was trained on (look at config.dataset)'
            )


def restore_encoder(run: Run, data: dataset.Dataset, checkpoint: checkpointing.Checkpoint):
    """Parameters and moving averages of a checkpoint's encoder, on the run's device.

    Raises:
      UserError: it is another encoder than the config's.
    """
    params, state = make_backbone(run, data).init(torch.Generator())
    prefix = 'online' if checkpoint.mode == 'pretrain' else 'backbone'
    if checkpoint.mode.startswith(divergence.PREFIX):
        prefix = f'state/{prefix}'
    params = checkpointing.restore(checkpoint, params, prefix=f'{prefix}_params/')
    state = checkpointing.restore(checkpoint, state, prefix=f'{prefix}_state/')
    return transfer.place((params, state), run.device)


def embed(run: Run, data: dataset.Dataset, params, state) -> dataset.Dataset:
    """The data set with embeddings of its centre crops in place of the images."""
    return features.extract(
        make_backbone(run, data),
        params,
        state,
        data,
        preprocess=lambda batch: augmentations.center_view(batch, run.config.image_size, run.config.eval_crop_fraction),
        batch_size=run.config.evaluation.batch_size,
    )


def where_from(data: dataset.Dataset | dataset.Stream) -> dict[str, np.ndarray]:
    """For a file of arrays: `index`, the place of every example in its split, and `path` if it has files."""
    path = {'path': np.array(data.paths, dtype=np.str_)} if data.files else {}
    return {'index': data.positions.numpy(), **path}


def held_out(run: Run, train: dataset.Dataset, mode: str = '') -> torch.Tensor:
    """Which training examples settings are chosen on, bool `[N]`: `config.dataset.val_fraction` of each class.

    Args:
      run: the run.
      train: what is divided.
      mode: of which it is the labelled part, for messages; '' where it is the whole set.

    Raises:
      UserError: a class is missing from one of the two parts.
    """
    mask = parts.held_out_mask(train.labels, run.config.dataset.val_fraction)
    for labels in (train.labels[~mask], train.labels[mask]):
        counts = torch.bincount(labels, minlength=train.num_classes)
        if not counts.all():
            name = train.class_names[int(counts.argmin())]
            section, field = 'dataset', 'val_fraction'
            if mode and (run.config[mode].label_files or run.config[mode].label_fraction < 1.0):
                section, field = mode, 'label_files' if run.config[mode].label_files else 'label_fraction'
            raise UserError(
                f'config.{section}.{field}={run.config[section][field]!r}: the class {name!r} has '
                f'{int((train.labels == train.class_names.index(name)).sum())} training images; expected at '
                'least two of each class, one to train on and one to choose on'
            )
    return mask
