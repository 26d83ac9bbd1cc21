"""A linear classifier on raw pixels, the baseline below every encoder.

Command:   python benchmarks/pixels.py --config=configs/emnist.py:letters --config.dataset.root=DIR

Multinomial logistic regression of scikit-learn on pixels in 0..1, without augmentation; the same images
as `launch.py` with this config trains and evaluates on.
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
    """Fits on the training set and prints the accuracy on the other one."""
    del argv
    train, test = dataset.load_train_and_test(**_CONFIG.value.dataset)
    print(f'train: {dataset.describe(train)}; test: {dataset.describe(test)}', flush=True)
    flat = [split.images.flatten(1).numpy().astype('float32') / 255 for split in (train, test)]
    start = time.monotonic()
    warnings.simplefilter('ignore')  # scikit-learn's about the limit, which is printed below.
    classifier = LogisticRegression(max_iter=_ITERATIONS.value).fit(flat[0], train.labels.numpy())
    accuracy = classifier.score(flat[1], test.labels.numpy())
    print(
        f'logistic regression on raw pixels: {100 * accuracy:.2f} % top-1, '
        f'{classifier.n_iter_.max()} of at most {_ITERATIONS.value} iterations, {time.monotonic() - start:.0f} s'
    )


if __name__ == '__main__':
    app.run(main)
