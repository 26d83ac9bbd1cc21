"""Computes crop windows in pixels from relative crops, with the arithmetic of the official code."""

import torch


def crop_windows(crops: torch.Tensor, source_size: tuple[int, int] | torch.Tensor) -> torch.Tensor:
    """Returns windows in whole pixels for relative crops; a window that is too large is clamped, not redrawn.

    Args:
      crops: `[B, 4]` from `sample_relative_crops`: share of the area, width over height, and relative y and x.
      source_size: height and width, either of all images or as a tensor `[B, 2]` of each.

    Returns:
      float32 `[B, 4]`: top, left, height, width.
    """
    area, aspect, y, x = crops.unbind(dim=1)
    image_height, image_width = torch.as_tensor(source_size, dtype=torch.float32).unbind(dim=-1)
    area = area * (image_height * image_width)
    width = torch.minimum((area * aspect).sqrt().round().clamp_min(1.0), image_width)
    height = torch.minimum((area / aspect).sqrt().round().clamp_min(1.0), image_height)
    top = (y * (image_height - height + 1)).floor()
    left = (x * (image_width - width + 1)).floor()
    return torch.stack([top, left, height, width], dim=1)


def center_window(height: int, width: int, fraction: float) -> tuple[int, int, int, int]:
    """Returns top, left, height and width of the central square of side int(fraction * min(height, width))."""
    side = max(1, int(fraction * min(height, width)))
    return (height - side + 1) // 2, (width - side + 1) // 2, side, side
