"""Crop windows in pixels from relative crops, by the arithmetic of the official code."""

import torch


def crop_windows(crops: torch.Tensor, source_size: tuple[int, int] | torch.Tensor) -> torch.Tensor:
    """Windows in whole pixels from relative crops; clamped, not redrawn, if too large.

    Args:
      crops: `[B, 4]` of `sample_crops`.
      source_size: height and width of all images, or `[B, 2]` of each.

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
    """Top, left, height and width of the central square of side int(fraction * min(height, width))."""
    side = max(1, int(fraction * min(height, width)))
    return (height - side + 1) // 2, (width - side + 1) // 2, side, side
