"""Functions shared by the modes: they load the data of a run, build its experiments and compute embeddings."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from absl import logging
from ml_collections import ConfigDict

from byol_func import byol_experiment, eval_experiment, forward
from byol_func.data import label_files, named
from byol_func.errors import UserError, counted, one_of
from byol_func.evaluation import embedding_health, features
from byol_func.experiment import Experiment
from byol_func.modes import update_rules
from byol_func.runtime import collectives
from byol_func.training import agreement
from byol_func.utils import augmentations, dataset, networks
from byol_func.workdir.run import Run

_FEW = 50  # With fewer held-out images, one of them changes the accuracy by more than 2 %.


def encoder_part(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the encoder's part of the parameters or state of a whole network, in the form `make_backbone` uses."""
    return {'encoder': tree['encoder']}


def load_data(run: Run, to_pretrain: bool = False) -> tuple[dataset.Examples, dataset.Examples | None]:
    """Returns the training set and the evaluation set on the run's device; the latter is None without labels.

    Some data sets have images without labels to pre-train on (`named.LABELLED`). They are loaded if `to_pretrain`;
    otherwise it is those with labels.
    """
    name = run.config.dataset.name
    source = {**run.config.dataset, 'name': name if to_pretrain else named.LABELLED.get(name, name)}
    with collectives.first_replica_first():
        train, test = dataset.load_train_and_test(**source)
    agreement.same_data({'training set': train, f'{run.config.dataset.eval_split} set': test})
    center_crop = (run.config.image_size, run.config.eval_crop_fraction)
    if isinstance(train, dataset.Stream):
        train = train._replace(center_crop=center_crop)
    if isinstance(test, dataset.Stream):
        test = test._replace(center_crop=center_crop)
    logging.info('Training set: %s', dataset.describe(train))
    if test is not None:
        logging.info('%s set: %s', run.config.dataset.eval_split.capitalize(), dataset.describe(test))
        test = test.to_device(run.device)
    return train.to_device(run.device), test


def load_beside(
    run: Run, train: dataset.Examples, test: dataset.Examples | None
) -> tuple[dataset.Examples, dataset.Examples | None]:
    """Returns the sets that evaluate the encoder while it is pre-trained on `train`: both, or those with labels."""
    return load_data(run) if run.config.dataset.name in named.LABELLED else (train, test)


def load_labelled_data(run: Run) -> tuple[dataset.Examples, dataset.Examples]:
    """Does the same as `load_data`, for a mode that requires labels.

    Raises:
      UserError: the data has no labels.
    """
    train, test = load_data(run)
    if test is None:
        raise UserError(
            f'config.dataset.root={run.config.dataset.root!r}: this mode measures accuracy, and there are no labels; '
            'expected DIR/train/CLASS/* and DIR/test/CLASS/*, or a mode that needs none: pretrain, embed, preview or '
            'export'
        )
    return train, test


def facts(data: dataset.Examples) -> dict[str, Any]:
    """Returns the arguments of an experiment's `make` that describe its data."""
    return dict(num_examples=data.num_examples, num_classes=data.num_classes, image_shape=data.image_shape)


def make_byol(config: ConfigDict, data: dataset.Examples) -> Experiment:
    """Returns the pre-training experiment of the run, shortened to at most `config.max_images` images in total."""
    share = shrinkage(config, data.num_examples)
    if share < 1.0:
        config = config.copy_and_resolve_references()
        config.num_epochs *= share
        config.lr_schedule.warmup_epochs *= share
    experiment = byol_experiment.make(config, **facts(data))
    _check_steps('config', config.num_epochs, experiment, data.num_examples)
    if config.variant:
        update_rules.check(config.variant, experiment, data.image_shape, make_backbone(config, data))
    return experiment


def shrinkage(config: ConfigDict, num_examples: int) -> float:
    """Returns the factor, at most 1, by which `max_images` shortens `num_epochs` and the other fields in epochs.

    It applies to `num_epochs`, `warmup_epochs` and `eval_every_epochs`.
    """
    if not config.max_images or not config.num_epochs:
        return 1.0
    return min(1.0, config.max_images / (config.num_epochs * num_examples))


def make_protocol(
    config: ConfigDict, mode: str, params, state, data: dataset.Examples, **other_facts: Any
) -> Experiment:
    """Returns the experiment of linear evaluation or fine-tuning on an encoder, for images or embeddings.

    If the batch size exceeds the training set, it is reduced to the whole set (rounded down to a multiple of the number
    of replicas). `other_facts` replace those of `data`.
    """
    about = facts(data) | other_facts
    largest = about['num_examples'] - about['num_examples'] % collectives.num_replicas()
    if 0 < largest < config[mode].batch_size:
        config = config.copy_and_resolve_references()
        config[mode].batch_size = largest
    experiment = eval_experiment.make(config, mode, params, state, **about)
    _check_steps(f'config.{mode}', config[mode].num_epochs, experiment, about['num_examples'])
    return experiment


def _check_steps(section: str, num_epochs: float, experiment: Experiment, num_examples: int) -> None:
    if num_epochs and not experiment.max_steps:
        raise UserError(
            f'{section}.num_epochs={num_epochs:g}: less than one batch of {counted(experiment.batch_size, "image")}; '
            f'expected at least {experiment.batch_size / num_examples:.2g}, or 0 to train nothing'
        )


def make_backbone(config: ConfigDict, data: dataset.Examples) -> networks.Network:
    """Returns the run's encoder, which maps images in 0..1 to embeddings, always in float32."""
    network, channels = config.network.to_dict(), data.image_shape[0]
    assert channels is not None  # Only the height and width can be unknown.
    return forward.make_backbone(**{name: network[name] for name in forward.ENCODER_FIELDS}, in_channels=channels)


SPLITS = ('train', 'val', 'test')


def split_of(run: Run) -> str:
    """Returns the split in --split, or `config.dataset.eval_split` if the flag is not given.

    Raises:
      UserError: there is no such split.
    """
    return one_of('--split', run.split or run.config.dataset.eval_split, SPLITS)


def load_split(run: Run, split: str, labelled: bool = True) -> tuple[dataset.Examples, dataset.Examples | None]:
    """Returns the training set as the run uses it, and the given split.

    Raises:
      UserError: there is no such split, or `labelled` is True and it has no labels.
    """
    one_of('--split', split, SPLITS)
    config = run.config.copy_and_resolve_references()
    if split != 'train':  # 'train' keeps the run's own eval_split, which determines the held-out images.
        config.dataset.eval_split = split
    train, held = (load_labelled_data if labelled else load_data)(run._replace(config=config))
    data = train if split == 'train' else held
    if data is None:
        raise UserError(f'--split={split}: a folder without labels has no such split; expected train')
    return train, data


def labelled_part(config: ConfigDict, mode: str, train: dataset.Examples) -> dataset.Examples:
    """Returns the labelled training images: those in `config.MODE.label_files`, or `label_fraction` of each class.

    `mode` is 'linear_eval', 'fine_tune' or, for knn and logistic, 'evaluation'. The selection is the same in every run.
    """
    path, fraction = config[mode].label_files, config[mode].label_fraction
    if path:
        part = train.take(label_files.listed(train, path, f'config.{mode}.label_files'))
        missing = [name for name, count in zip(part.class_names, dataset.class_counts(part), strict=True) if not count]
        if missing and collectives.replica_index() == 0:
            what = counted(len(missing), 'class')
            logging.warning('config.%s.label_files: %s without a label, such as %r', mode, what, missing[0])
        return part
    if fraction == 1.0:
        return train
    return dataset.split_train(train, fraction)[0]


def embed(config: ConfigDict, data: dataset.Examples, params, state) -> dataset.Features:
    """Returns the embeddings of a data set's centre crops; all replicas must call this, since they share the work."""
    return features.extract(
        make_backbone(config, data),
        params,
        state,
        data,
        preprocess=lambda batch: augmentations.center_view(batch, config.image_size, config.eval_crop_fraction),
        batch_size=config.evaluation.batch_size,
        shared=True,
    )


def look_at_embeddings(
    config: ConfigDict, data: dataset.Examples, params, state, embedded: dataset.Features | None = None
) -> dict[str, Any]:
    """Measures the health of an encoder's embeddings for the summary, and logs a warning if it is poor.

    At most 2000 images are embedded; `embedded` are the embeddings of all of `data`, if they are known already.

    Returns:
      `{'embeddings': {...}}` with the fields of `EmbeddingHealth`, `in_words`, a description of them in words,
      and `warnings`.
    """
    if embedded is None:
        step = -(-data.num_examples // embedding_health.MOST_IMAGES)
        sample = data if step == 1 else data.take(torch.arange(0, data.num_examples, step))
        embedded = embed(config, sample, params, state)
    found = embedding_health.measure(embedded.embeddings)
    warnings = embedding_health.warnings(found)
    words = embedding_health.in_words(found)
    if found.images < data.num_examples:
        words += f' (looked at {found.images} of {counted(data.num_examples, "image")})'
    if warnings and collectives.replica_index() == 0:
        logging.warning('%s', ' '.join(warnings))
    return {'embeddings': {**found._asdict(), 'in_words': words, 'warnings': warnings}}


def where_from(data: dataset.Examples) -> dict[str, np.ndarray]:
    """Returns arrays that identify the examples: `index`, the position in the split, and `path` if there are files."""
    path = {'path': np.array(data.paths, dtype=np.str_)} if data.files else {}
    return {'index': data.positions.numpy(), **path}


def held_out(config: ConfigDict, train: dataset.Examples, mode: str = '') -> torch.Tensor:
    """Returns the mask, bool `[N]`, of the held-out training examples on which settings are chosen.

    They are `config.dataset.val_fraction` of each class. `mode` is the mode whose labelled part `train` is, for error
    messages; '' if `train` is the whole training set.

    Raises:
      UserError: a class is missing from one of the two parts.
    """
    mask = dataset.split_mask(train.labels, config.dataset.val_fraction)
    for labels in (train.labels[~mask], train.labels[mask]):
        counts = torch.bincount(labels, minlength=train.num_classes)
        if not counts.all():
            name = train.class_names[int(counts.argmin())]
            section, field = 'dataset', 'val_fraction'
            if mode and (config[mode].label_files or config[mode].label_fraction < 1.0):
                section, field = mode, 'label_files' if config[mode].label_files else 'label_fraction'
            raise UserError(
                f'config.{section}.{field}={config[section][field]!r}: the class {name!r} has '
                f'{counted(int((train.labels == train.class_names.index(name)).sum()), "training image")}; expected '
                'at least two of each class, one to train on and one to choose on'
            )
    if (count := int(mask.sum())) < _FEW and collectives.replica_index() == 0:
        logging.warning(
            'Settings are chosen on only %s, held out of the labelled ones, so the choice is unreliable; a larger '
            'config.dataset.val_fraction holds out more',
            counted(count, 'image'),
        )
    return mask
