"""Embeddings of whole data sets, computed once, and encoders that were never trained."""

from collections.abc import Callable, Iterable

import torch

from byol_func.utils import dataset, networks
from byol_func.utils.networks import Network


def extract(
    backbone: Network,
    params: networks.Params,
    state: networks.NetState,
    data: dataset.Examples,
    *,
    preprocess: Callable[[dataset.Batch], torch.Tensor],
    batch_size: int,
) -> dataset.Features:
    """The embeddings of a data set by a frozen encoder.

    Args:
      backbone: a network from images in 0..1 to embeddings `[B, D]`.
      params: its parameters.
      state: its moving averages, used in evaluation mode.
      data: N images.
      preprocess: from a batch to the network's inputs.
      batch_size: images at a time.

    Returns:
      Features `[N, D]` in the order of the data set; without the images of a stream that cannot be read.
    """
    embeddings, labels, rows = [], [], []
    with torch.no_grad():
        for batch in dataset.eval_batches(data, batch_size, 'Embedding'):
            embeddings.append(backbone.apply(params, state, preprocess(batch), is_training=False)[0])
            labels.append(batch['labels'])
            rows.append(batch['rows'])
    read = dataset.that_came(data, torch.cat(rows))
    return dataset.Features(torch.cat(embeddings).float(), torch.cat(labels), data.class_names, read.files, read.part)


def calibrate(
    backbone: Network,
    params: networks.Params,
    state: networks.NetState,
    batches: Iterable[torch.Tensor],
) -> networks.NetState:
    """Moving averages of an encoder whose parameters stay as they are.

    An encoder that was never trained has none, and would not be normalised at all in evaluation
    mode: a baseline has to see some data before it can be compared.

    Args:
      backbone: a network from images in 0..1 to embeddings.
      params: its parameters.
      state: its moving averages.
      batches: images `[B, C, H, W]`, as in training.

    Returns:
      The state after all batches in training mode.
    """
    with torch.no_grad():
        for images in batches:
            _, state = backbone.apply(params, state, images, is_training=True)
    return state
