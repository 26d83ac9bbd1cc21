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

from byol_func import console, library
from byol_func.errors import counted
from byol_func.modes import checkpoints, given
from byol_func.runtime import collectives
from byol_func.workdir import files
from byol_func.workdir.run import Run


def predict(run: Run) -> None:
    """Writes the predicted class of every image in --images; the first replica does it alone."""
    if collectives.replica_index() > 0:
        return
    given.check_output(run.output, 'file')
    paths = given.find(run, 'predict', 'classify')
    checkpoint = checkpoints.find_checkpoint(run, library.WITH_CLASSIFIER)
    classifier = library.classifier_of(checkpoint, run.device)
    rows: list[tuple[str, int, float]] = []
    for names, views in given.views(run, classifier.encoder, paths, 'Predicting'):
        probability, index = classifier(views).max(dim=1)
        rows += zip(names, index.tolist(), probability.tolist(), strict=True)
    table = io.StringIO()
    lines = [(given.name(run, path), classifier.class_names[i], f'{p:.4f}') for path, i, p in rows]
    csv.writer(table).writerows([('image', 'class', 'probability'), *lines])
    output = run.output or os.path.join(run.workdir, 'predictions.csv')
    files.write_text(output, table.getvalue())
    most = collections.Counter(name for _, name, _ in lines).most_common(5)
    shown = ', '.join(f'{console.readable(name)} ({count})' for name, count in most)
    print(f'{output}: {counted(len(lines), "image")} by the classifier of --mode={checkpoint.mode}; most often {shown}')
