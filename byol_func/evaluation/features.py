"""Computes the embeddings of whole data sets once, and calibrates the norms of untrained encoders."""

from collections.abc import Callable, Iterable, Sequence

import optree
import torch

from byol_func.runtime import collectives
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
    shared: bool = False,
) -> dataset.Features:
    """Computes the embeddings of a data set with a frozen encoder.

    Args:
      backbone: a network from images in 0..1 to embeddings `[B, D]`.
      params: its parameters.
      state: its moving averages, used in evaluation mode.
      data: N images.
      preprocess: maps a batch to the network's inputs.
      batch_size: number of images per batch.
      shared: splits the work: with n replicas, each embeds every n-th batch and all of them receive the complete
        set, with the same values as from a single replica. All replicas have to call this function. If False,
        every caller embeds the whole set.

    Returns:
      Features `[N, D]` in the order of the data set, without those images of a stream that cannot be read.
    """
    device = next((leaf.device for leaf in optree.tree_leaves(params)), data.labels.device)
    # Empty arrays, for a replica that gets no batch.
    embeddings = [torch.zeros(0, backbone.output_size, device=device)]
    labels, rows = [data.labels[:0].to(device)], [torch.zeros(0, dtype=torch.int64)]
    parts = collectives.num_replicas() if shared else 1
    rank = collectives.replica_index() if shared else 0
    with torch.no_grad():
        for batch in dataset.eval_batches(data, batch_size, 'Embedding', rank=rank, num_replicas=parts):
            found = backbone.apply(params, state, preprocess(batch), is_training=False)[0].float()
            embeddings.append(found)
            labels.append(batch['labels'])
            rows.append(batch['rows'].cpu())
        arrays = [torch.cat(part) for part in (embeddings[len(rows) > 1 :], labels[len(rows) > 1 :], rows)]
        if parts > 1:  # The first replica has the most batches.
            arrays = _gather(arrays, longest=-(-data.num_examples // (batch_size * parts)) * batch_size)
    read = dataset.part_read(data, arrays[2])
    return dataset.Features(arrays[0], arrays[1], data.class_names, read.files, read.part)


def _gather(arrays: Sequence[torch.Tensor], longest: int) -> list[torch.Tensor]:
    """Gathers embeddings, labels and rows of all replicas, sorted by row; no replica has more than `longest` rows."""
    embeddings, labels, rows = arrays
    device = embeddings.device
    missing = longest - len(rows)
    rows = torch.nn.functional.pad(rows.to(device), (0, missing), value=-1)
    whole = [
        collectives.all_gather(torch.nn.functional.pad(embeddings, (0, 0, 0, missing))),
        collectives.all_gather(torch.nn.functional.pad(labels.to(device), (0, missing))),
        collectives.all_gather(rows),
    ]
    order = whole[2].argsort(stable=True)[int((whole[2] < 0).sum()) :]
    embeddings, gathered_labels, rows = (part[order] for part in whole)
    return [embeddings, gathered_labels.to(labels.device), rows.cpu()]


def calibrate(
    backbone: Network,
    params: networks.Params,
    state: networks.NetState,
    batches: Iterable[torch.Tensor],
) -> networks.NetState:
    """Returns the moving averages of an encoder after a forward pass over every batch, preprocessed as in training.

    An untrained encoder has no moving averages yet, so its activations would not be normalised in evaluation mode. A
    baseline has to see some data before the comparison is fair.
    """
    with torch.no_grad():
        for images in batches:
            _, state = backbone.apply(params, state, images, is_training=True)
    return state
