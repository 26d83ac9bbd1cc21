"""A part of the training set to choose settings on, the same for every protocol and in every run."""

import torch

from byol_func.utils import dataset


def held_out_mask(labels: torch.Tensor, fraction: float, seed: int = 0) -> torch.Tensor:
    """Which examples are held out: of every class that share, drawn as by `dataset.split_train`.

    Args:
      labels: int64 `[N]`.
      fraction: between 0 and 1. Of a class of one example that one is held out.
      seed: of the draw.

    Returns:
      bool `[N]`, on the device of the labels.
    """
    positions = torch.arange(len(labels), device=labels.device)
    held_out, _ = dataset.split_train(dataset.Dataset(positions, labels, ()), fraction, seed)
    mask = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    mask[held_out.images] = True
    return mask
