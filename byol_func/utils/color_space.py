"""Conversions between RGB and HSV and to grey, shared by both colour jitters."""

import torch


def gray(images: torch.Tensor) -> torch.Tensor:
    """Returns 0.2989 R + 0.5870 G + 0.1140 B of `[B, 3, H, W]` as `[B, 1, H, W]`; leaves other images unchanged."""
    if images.shape[1] != 3:
        return images
    r, g, b = images.unbind(dim=1)
    return (0.2989 * r + 0.5870 * g + 0.1140 * b)[:, None]


def rgb_to_hsv(r: torch.Tensor, g: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns hue in turns, saturation and value of planes in [0, 1] of any shape; the hue of grey is 0.

    Port of `augmentations.rgb_to_hsv`; differences: none.
    """
    v = torch.maximum(torch.maximum(r, g), b)
    chroma = v - torch.minimum(torch.minimum(r, g), b)
    s = torch.where(v > 0.0, chroma / v, 0.0)
    norm = 1.0 / (6.0 * torch.where(chroma > 0.0, chroma, 1.0))
    from_green_or_blue = torch.where(g == v, norm * (b - r) + 2.0 / 6.0, norm * (r - g) + 4.0 / 6.0)
    h = torch.where(r == v, norm * (g - b), from_green_or_blue)
    return torch.where(h < 0.0, h + 1.0, h), s, v


def hsv_to_rgb(h: torch.Tensor, s: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the inverse of `rgb_to_hsv`; the hue is taken modulo 1.

    With c = s v, each colour is v - c plus c times a trapezoidal function of the hue. This equals the official
    selection among six sectors. Port of `augmentations.hsv_to_rgb`; differences: none.
    """
    c = s * v
    h = 6.0 * (h - h.floor())
    r = ((h - 3.0).abs() - 1.0).clamp(0.0, 1.0)
    g = (2.0 - (h - 2.0).abs()).clamp(0.0, 1.0)
    b = (2.0 - (h - 4.0).abs()).clamp(0.0, 1.0)
    return c * r + (v - c), c * g + (v - c), c * b + (v - c)
