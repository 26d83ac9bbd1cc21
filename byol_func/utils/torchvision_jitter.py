"""torchvision's colour jitter, for comparisons with work that used it instead of the official one.

Both jitters use the same random numbers, but here brightness and saturation are also mixtures,
factor * x + (1 - factor) * y.

  operation   | official (`augmentations.py`)         | here
  brightness  | x + delta, delta in -b..b             | factor * x, factor in 1-b..1+b
  contrast    | y: the mean of each channel           | y: the mean of the grey image
  saturation  | saturation of HSV times factor        | y: the grey image
  hue         | hue + delta                           | hue + delta
"""

import torch

from byol_func.utils.color_space import gray, hsv_to_rgb, rgb_to_hsv
from byol_func.utils.sampling import Presets, ViewDraws


def color_jitter(images: torch.Tensor, draws: ViewDraws, presets: Presets) -> torch.Tensor:
    """Applies the four operations in each image's own order, with a clip to [0, 1] after each.

    The result equals `adjust_brightness`, `adjust_contrast`, `adjust_saturation` and `adjust_hue` of
    `torchvision.transforms.v2.functional`, called image by image. Every order is computed as three mixtures,
    then the hue, then three mixtures. Factor 1 fills the positions that an image does not need, so the batch
    makes one HSV round trip instead of four.

    Args:
      images: `[B, C, H, W]` in [0, 1]; unless C=3, saturation and hue are the identity.
        Contrast then takes the mean of each channel.
      draws: the draws of this view, made with `semantics='torchvision'`.
      presets: the `color_transform` presets; operations of range 0 are left out.

    Returns:
      `[B, C, H, W]` in [0, 1].
    """
    colored = images.shape[1] == 3
    wanted = dict.fromkeys(('brightness', 'contrast'), True) | dict(saturation=colored)
    neutral = torch.ones_like(draws.brightness)
    each = [getattr(draws, name) if possible and presets[name] > 0 else neutral for name, possible in wanted.items()]
    factors = torch.stack([*each, neutral], dim=1)  # [B, 4], by operation; the hue has no factor.

    if not (presets['hue'] > 0 and colored):
        for position in range(4):
            images = _mix(images, factors, draws.order[:, position])
        return images
    time = (draws.order == 3).int().argmax(dim=1)  # [B]: the position of the hue.
    for position in range(3):
        factors_here = torch.where((position < time)[:, None], factors, 1.0)
        images = _mix(images, factors_here, draws.order[:, position])
    h, s, v = rgb_to_hsv(*images.unbind(dim=1))
    h = h + draws.hue[:, None, None]
    images = torch.stack(hsv_to_rgb(h, s, v), dim=1).clamp(0.0, 1.0)
    for position in range(1, 4):
        factors_here = torch.where((position > time)[:, None], factors, 1.0)
        images = _mix(images, factors_here, draws.order[:, position])
    return images


def _mix(images: torch.Tensor, factors: torch.Tensor, operation: torch.Tensor) -> torch.Tensor:
    """Applies `operation` `[B]` (0 brightness, 1 contrast, 2 saturation, 3 none) with its factor from `[B, 4]`."""
    factor = factors.gather(1, operation[:, None])[:, :, None, None]
    operation = operation[:, None, None, None]
    gray_images = gray(images)
    mean = gray_images.mean(dim=(2, 3), keepdim=True)
    other = torch.where(operation == 1, mean, torch.where(operation == 0, 0.0, gray_images))
    return (factor * images + (1.0 - factor) * other).clamp(0.0, 1.0)
