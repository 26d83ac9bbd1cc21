"""Evaluates a linear classifier on raw pixels, the baseline that every encoder should beat.

Command:   python benchmarks/pixels.py --config=configs/emnist.py:letters --config.dataset.root=DIR

The classifier is scikit-learn's multinomial logistic regression on pixels in 0..1, without augmentation. It
uses the same training and evaluation images as `launch.py` with this config.
"""

import pathlib
import sys
import time
import warnings

from absl import app, flags
from ml_collections import config_flags
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from byol_func.utils import dataset  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file('config', None, 'The experiment, a file of configs/.')
_ITERATIONS = flags.DEFINE_integer('iterations', 60, 'The most iterations of L-BFGS.')


def main(argv) -> None:
    """Fits the classifier on the training set and prints its accuracy on the evaluation set."""
    del argv
    train, test = dataset.load_train_and_test(**_CONFIG.value.dataset)
    print(f'train: {dataset.describe(train)}; test: {dataset.describe(test)}', flush=True)
    flat = [split.images.flatten(1).numpy().astype('float32') / 255 for split in (train, test)]
    start = time.monotonic()
    warnings.simplefilter('ignore')  # scikit-learn warns about the iteration limit, which is printed below.
    classifier = LogisticRegression(max_iter=_ITERATIONS.value).fit(flat[0], train.labels.numpy())
    accuracy = classifier.score(flat[1], test.labels.numpy())
    print(
        f'logistic regression on raw pixels: {100 * accuracy:.2f} % top-1, '
        f'{classifier.n_iter_.max()} of at most {_ITERATIONS.value} iterations, {time.monotonic() - start:.0f} s'
    )


if __name__ == '__main__':
    app.run(main)
