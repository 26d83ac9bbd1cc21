"""Scales values of more than 8 bits to the 256 levels that images are kept with."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from byol_func.errors import UserError, counted

ValueRange = tuple[Any, ...]  # (), (low, high), or such a pair for each channel.


def to_uint8(values: np.ndarray, value_range: ValueRange, what: str) -> np.ndarray:
    """Scales values linearly and rounds them, so that the ends of the range become 0 and 255; clips the others.

    Args:
      values: `[H, W]` or `[H, W, C]`, integers or floats.
      value_range: the smallest and the largest value, or such a pair for each channel; () for 0 and 65535.
      what: the type of the values, for the error message.

    Raises:
      ValueError: there is no range for float values or for values outside 0..65535, or one for another number of
        channels.
    """
    if value_range:
        low, high = np.array(value_range, dtype=np.float64).T  # Numbers, or `[C]` each.
        if low.size > 1 and (values.ndim < 3 or values.shape[2] != low.size):
            found = counted(values.shape[2] if values.ndim == 3 else 1, 'channel')
            raise ValueError(f'{found}, but config.dataset.value_range has {counted(low.size, "pair")}')
        scaled = np.clip((values.astype(np.float64) - low) * (255 / (high - low)), 0, 255) + 0.5
    elif values.dtype.kind == 'f' or values.min() < 0 or values.max() > 65535:
        expected = 'need a' if values.dtype.kind == 'f' else 'outside 0..65535; expected a'
        raise ValueError(f'{what} {expected} config.dataset.value_range')
    else:
        scaled = (values.astype(np.uint32) + 128) // 257
    return scaled.astype(np.uint8)


def as_range(value_range: Sequence[Any], channels: int) -> ValueRange:
    """Returns `config.dataset.value_range` as tuples.

    Raises:
      UserError: it is neither empty nor a pair, nor a pair for each of `config.dataset.channels`; or a pair is not in
        ascending order.
    """
    pairs = tuple(tuple(part) if isinstance(part, Sequence) else part for part in value_range)
    each = [pair for pair in pairs if isinstance(pair, tuple)]
    found = [pairs] if pairs and not each else each
    if len(each) not in (0, len(pairs)) or not all(len(pair) == 2 and pair[0] < pair[1] for pair in found):
        expected = 'expected the smallest and the largest value, such as (0, 4095), or ()'
        raise UserError(f'config.dataset.value_range={pairs}: {expected}')
    if each and len(each) != channels:
        raise UserError(
            f'config.dataset.value_range={pairs}: {counted(len(each), "pair")}; expected one for each of '
            f'config.dataset.channels={channels}, or a single one such as (0, 4095)'
        )
    return pairs


def excess(largest: Sequence[float], value_range: ValueRange) -> tuple[float, int]:
    """Returns how far the largest values of the channels exceed the range at most, and the channel that does."""
    highs = np.array(value_range, dtype=np.float64).T[1]
    above = np.asarray(largest, dtype=np.float64) - highs
    return float(above.max()), int(above.argmax())


def largest_of(values: np.ndarray) -> list[int]:
    """Returns the largest value of every channel of `[H, W]` or `[H, W, C]`, rounded up."""
    return [math.ceil(value) for value in values.reshape(*values.shape[:2], -1).max(axis=(0, 1)).tolist()]
