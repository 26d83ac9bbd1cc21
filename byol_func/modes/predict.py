"""`--mode=predict`: classifies the images in --images, which need no labels, and writes a table.

The classifier is that of fine-tuning, of the linear evaluation, of logistic regression or of the pre-training, the
first that the workdir has.
The table, by default `predictions.csv`, has a row for each image: `image`, its path below --images; `class`, the class
with the largest probability; `probability`, in 0..1. Images that cannot be read are left out.
"""

import collections
import csv
import io
import os

import torch
from absl import logging

from byol_func import console, library
from byol_func.data import listing
from byol_func.errors import UserError, counted
from byol_func.modes import checkpoints
from byol_func.runtime import collectives
from byol_func.workdir import files
from byol_func.workdir.run import Run


def predict(run: Run) -> None:
    """Writes the predicted class of every image in --images; the first replica does it alone."""
    if not run.images:
        raise UserError('--mode=predict: no images to classify; expected --images=FOLDER or --images=FILE')
    if collectives.replica_index() > 0:
        return
    paths = listing.images_below(os.path.expanduser(run.images), run.config.dataset.channels)
    checkpoint = checkpoints.find_checkpoint(run, library.WITH_CLASSIFIER)
    classifier = library.classifier_of(checkpoint, run.device)
    rows: list[tuple[str, int, float]] = []
    unreadable: list[str] = []
    size = run.config.evaluation.batch_size
    chunks = [paths[i : i + size] for i in range(0, len(paths), size)]
    for chunk in console.watch(chunks, 'Predicting', len(chunks), unit='batch'):
        views, names = [], []
        for path in chunk:
            try:
                views.append(classifier.encoder.views([path]))
                names.append(path)
            except UserError as error:
                unreadable.append(str(error))
        if views:
            probability, index = classifier(torch.cat(views)).max(dim=1)
            rows += zip(names, index.tolist(), probability.tolist(), strict=True)
    if not rows:
        raise UserError(f'--images={run.images}: no image can be read: {unreadable[0]}')
    if unreadable:
        logging.warning('%s left out: %s', counted(len(unreadable), 'image'), '; '.join(unreadable[:3]))
    top = run.images if os.path.isdir(run.images) else os.path.dirname(run.images)
    table = io.StringIO()
    lines = [(os.path.relpath(path, top or '.'), classifier.class_names[i], f'{p:.4f}') for path, i, p in rows]
    csv.writer(table).writerows([('image', 'class', 'probability'), *lines])
    output = run.output or os.path.join(run.workdir, 'predictions.csv')
    files.write_text(output, table.getvalue())
    most = collections.Counter(name for _, name, _ in lines).most_common(5)
    shown = ', '.join(f'{count} {console.readable(name)}' for name, count in most)
    print(f'{output}: {counted(len(lines), "image")} by the classifier of --mode={checkpoint.mode}; most often {shown}')
