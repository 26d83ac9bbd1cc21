"""Crops single images on the host with the same arithmetic as `runtime/resampling.py`.

Images of different sizes cannot be stacked into a batch for the device. Resampling uses four taps per output
row and column, stored as sparse matrices. On one core this is as fast as Pillow's bicubic resampling, which
computes something else (it antialiases).
"""

import numpy as np
import scipy.sparse


def cut(pixels: np.ndarray, window: tuple[int, int, int, int], image_size: int) -> np.ndarray:
    """Cuts a window out of an image and resizes it with Keys' cubic of a=-0.5, without antialiasing.

    The result differs from `resampling.crop_and_resize` only by the rounding to whole levels (at most half a
    level of 255) and by float32 rounding errors.

    Args:
      pixels: uint8 `[H, W, C]`.
      window: top, left, height and width; it lies inside the image.
      image_size: S, the side of the output.

    Returns:
      uint8 `[C, S, S]`.
    """
    top, left, height, width = window
    channels = pixels.shape[2]
    inside = pixels[top : top + height, left : left + width].astype(np.float32).reshape(height, -1)
    out = _taps(height, image_size) @ inside
    # Transpose columns into rows, so that the second product also reads contiguous rows.
    out = np.ascontiguousarray(out.reshape(image_size, width, channels).transpose(1, 2, 0)).reshape(width, -1)
    out = _taps(width, image_size) @ out
    out = np.clip(out + 0.5, 0.0, 255.0).astype(np.uint8)
    return np.ascontiguousarray(out.reshape(image_size, channels, image_size).transpose(1, 2, 0))


def _taps(in_size: int, out_size: int) -> scipy.sparse.csr_matrix:
    """Returns a sparse `[out_size, in_size]` matrix with four weights per row; weights beyond the border are 0."""
    centres = (np.arange(out_size, dtype=np.float32) + 0.5) * np.float32(in_size / out_size) - 0.5
    pixels = np.floor(centres).astype(np.int32)[:, None] + np.arange(-1, 3, dtype=np.int32)
    d = np.abs(centres[:, None] - pixels).astype(np.float32)
    near = (1.5 * d - 2.5) * d * d + 1.0
    far = ((2.5 - 0.5 * d) * d - 4.0) * d + 2.0
    weights = np.where(d < 1.0, near, np.where(d < 2.0, far, 0.0))
    weights = np.where((pixels >= 0) & (pixels < in_size), weights, 0.0)
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    starts = np.arange(0, 4 * out_size + 1, 4, dtype=np.int32)
    columns = pixels.clip(0, in_size - 1).ravel()
    return scipy.sparse.csr_matrix((weights.ravel(), columns, starts), shape=(out_size, in_size))
