"""`--mode=embed`: writes the embeddings of a checkpoint's encoder for use in other tools.

By default the mode writes `embeddings.SPLIT.npz` for the training set and the evaluation set. Each file contains:

- `features` float32 `[N, D]`, the embeddings of the centre crops, in the order of the data set;
- `labels` int64 `[N]` and `class_names` `[K]`, both of length 0 if there are no labels;
- `index` int64 `[N]`, the position of each image in its split (for val: in the training set);
- for folders `path` `[N]`, the file of each image relative to `config.dataset.root`; for shards, shard and member.

Unless `config.pictures` is False, `odd_images.SPLIT.png` shows the nearest pairs, which may be duplicates, and the
outliers, and `odd_images.SPLIT.csv` lists them.

Unreadable files are left out, and the other images keep their `index`. Nothing is pickled: `numpy.load(FILE)` reads it.
With `--format=parquet` the same is one table, with a row for each image and its class by name in a column.
"""

from typing import Any

import numpy as np
from absl import logging

from byol_func.errors import UserError, one_of
from byol_func.library import WITH_ENCODER
from byol_func.modes import checkpoints, drawing, inputs, sizes
from byol_func.runtime import atomic, collectives
from byol_func.tracking import tensorboard_tracker
from byol_func.utils import dataset
from byol_func.workdir import files
from byol_func.workdir.run import Run


def embed(run: Run) -> None:
    """Writes the embeddings of the split in --split, or of the training set and the evaluation set.

    Raises:
      UserError: --format is unknown, or a library that it or --tensorboard needs is not installed.
    """
    ending = run.format or 'npz'
    write = one_of('--format', ending, {'npz': _write_npz, 'parquet': _write_parquet})
    if ending == 'parquet':
        _pyarrow()
    if run.tensorboard:
        tensorboard_tracker.library()
    checkpoint = checkpoints.find_checkpoint(run, WITH_ENCODER)
    if run.split:
        if run.split == 'val' and checkpoints.seen_in_training(run.config, checkpoint):
            logging.warning('%s was trained on images of this validation set, without their labels', checkpoint.path)
        splits = {run.split: inputs.load_split(run, run.split, labelled=False)[1]}
    else:
        train, test = inputs.load_data(run)
        splits = {'train': train, run.config.dataset.eval_split: test}
    for split, data in splits.items():
        if data is None:  # A folder without labels has no test set.
            continue
        params, state = checkpoints.restore_encoder(run, data, checkpoint)
        sizes.check_encoder_memory(run, data, params, state)
        features = inputs.embed(run.config, data, params, state)
        looked = inputs.look_at_embeddings(run.config, data, params, state, features)['embeddings']
        path = f'{run.workdir}/embeddings.{split}.{ending}'
        if collectives.replica_index() == 0:
            write(path, features)
            if run.tensorboard:
                embedded = features.embeddings.cpu().numpy()
                tensorboard_tracker.write_embeddings(run.workdir, split, embedded, _columns(features))
            print(f'{path}: {looked["in_words"]}')
        odd = drawing.draw_odd_images(run, data, features, split)
        if odd and collectives.replica_index() == 0:
            print(f'{odd}: nearest pairs, which may be duplicates, and outliers; beside it, a list in .csv')


def _write_npz(path: str, features: dataset.Features) -> None:
    labels = features.labels if features.class_names else features.labels[:0]
    files.write_npz(
        path,
        features=features.embeddings.cpu().numpy(),
        labels=labels.cpu().numpy(),
        class_names=np.array(features.class_names, dtype=np.str_),
        **inputs.where_from(features),
    )


def _write_parquet(path: str, features: dataset.Features) -> None:
    pyarrow, parquet = _pyarrow()
    embeddings = features.embeddings.cpu().numpy()
    rows = pyarrow.FixedSizeListArray.from_arrays(embeddings.ravel(), embeddings.shape[1])
    table = pyarrow.table({**_columns(features), 'features': rows})
    with files.reporting_errors(path), atomic.replacing(path) as temporary:
        parquet.write_table(table, temporary)


def _columns(features: dataset.Features) -> dict[str, list]:
    """Returns what identifies each image, `index` and for folders `path`; and with labels `label` and `class`."""
    columns = {name: values.tolist() for name, values in inputs.where_from(features).items()}
    if features.class_names:
        labels = features.labels.tolist()
        columns |= {'label': labels, 'class': [features.class_names[label] for label in labels]}
    return columns


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"--format=parquet: {error}; pip install pyarrow, or 'byol_func[parquet]'") from error
    return pyarrow, parquet
