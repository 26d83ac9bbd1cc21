"""The raw-pixel baseline that every encoder should beat, `config.linear_eval.compare_pixels`.

Both protocols of `modes/on_features.py` run on pixels in 0..1 instead of embeddings and choose their
settings on the same held-out images. The summary lists the results as `SPLIT/pixels_logistic_top1` and
`SPLIT/pixels_knn_top1`.
"""

import torch
from absl import logging
from ml_collections import ConfigDict
from torch.nn import functional as F

from byol_func.modes import on_features
from byol_func.utils import dataset, helpers

_MAX_SIDE = 32  # An image of 224 x 224 pixels has 150,000 values, its thumbnail 3,072.


def baselines(config: ConfigDict, mode: str, train: dataset.Examples, test: dataset.Examples) -> dict[str, float]:
    """Returns the top-1 accuracies, in 0..1, of logistic regression and k-nearest neighbours on raw pixels, by name.

    There are none if the images are streamed. `mode` is the protocol whose training images are used, for error
    messages.

    Raises:
      UserError: a class has too few images to choose settings on.
    """
    if not isinstance(train, dataset.Dataset) or not isinstance(test, dataset.Dataset):
        logging.warning('config.%s.compare_pixels: skipped, because the images are streamed', mode)
        return {}
    flat_train, flat_test = (dataset.Features(_flatten(one.images), *one[1:]) for one in (train, test))
    metrics = {}
    for name, measure in (('logistic', on_features.logistic_scores), ('knn', on_features.knn_scores)):
        scores, _ = measure(config, flat_train, flat_test, mode)
        hits = helpers.topk_accuracy(scores, test.labels, topk=1)
        metrics[f'{config.dataset.eval_split}/pixels_{name}_top1'] = float(hits.double().mean())
    return metrics


def _flatten(images: torch.Tensor) -> torch.Tensor:
    """Converts uint8 `[N, C, H, W]` to float32 `[N, D]` in 0..1; sides above 32 pixels are average-pooled to 32."""
    height, width = images.shape[2:]
    size = (min(height, _MAX_SIDE), min(width, _MAX_SIDE))
    parts = [F.adaptive_avg_pool2d(part.float() / 255, size).flatten(1) for part in images.split(1024)]
    return torch.cat(parts)
