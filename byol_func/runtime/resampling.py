"""TensorFlow's bicubic resizing as two batched matrix products; PyTorch's bicubic resizing differs from it.

`F.interpolate` uses a=-0.75 and repeats border pixels; `tf.image.resize` uses a=-0.5 and gives no weight to
positions outside the image. Neither antialiases by default.
"""

import torch


def crop_and_resize(images: torch.Tensor, windows: torch.Tensor, image_size: int) -> torch.Tensor:
    """Crops one window out of each image and resizes it with Keys' cubic kernel, a=-0.5.

    Port of `tf.image.resize(image[window], [S, S], BICUBIC)`; differences: TensorFlow rounds the fractional part of
    a position to 1/1024 to look up the weights, here it is exact.

    Args:
      images: `[B, C, H, W]` float.
      windows: `[B, 4]`, or `[1, 4]` for all images: top, left, height and width in whole pixels, inside the image.
      image_size: S.

    Returns:
      `[B, C, S, S]`; overshoots are not clipped.
    """
    top, left, height, width = windows.unbind(dim=1)
    rows = _bicubic_matrix(top, height, images.shape[2], image_size)
    columns = _bicubic_matrix(left, width, images.shape[3], image_size)
    return separable(images, rows, columns)


def separable(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Computes rows @ image @ columns^T for every channel of every image.

    Args:
      images: `[B, C, H, W]`.
      rows: `[B, S, H]`, or `[1, S, H]` for all images.
      columns: `[B, T, W]`, or `[1, T, W]` for all images.

    Returns:
      `[B, C, S, T]`.
    """
    out = torch.matmul(images.flatten(1, 2), columns.transpose(1, 2))
    return torch.matmul(rows[:, None], out.unflatten(1, images.shape[1:3]))


def _bicubic_matrix(start: torch.Tensor, length: torch.Tensor, in_size: int, out_size: int) -> torch.Tensor:
    """Returns the weights `[B, out_size, in_size]` for windows of start and length `[B]` along one axis.

    Positions are half-pixel centres. Pixels outside the window get weight 0 and the weights of the others are
    renormalised, as if the window had been cropped first.
    """
    pixels = torch.arange(in_size, dtype=torch.float32, device=start.device)
    centres = torch.arange(out_size, dtype=torch.float32, device=start.device) + 0.5
    start, length = start[:, None, None], length[:, None, None]
    offsets = pixels - start
    d = (centres[:, None] * (length / out_size) - 0.5 - offsets).abs()
    near = (1.5 * d - 2.5) * d * d + 1.0
    far = ((2.5 - 0.5 * d) * d - 4.0) * d + 2.0
    weights = torch.where(d < 1.0, near, far)
    weights = torch.where((d < 2.0) & (offsets >= 0.0) & (offsets < length), weights, 0.0)
    return weights / weights.sum(dim=2, keepdim=True)
