"""Image augmentations of BYOL. Namesake of the official `byol/utils/augmentations.py`.

All randomness is drawn in advance, one value per image (`sampling.sample`). The transformations are pure,
batched functions of images and draws, so they can be traced. This module also holds the random crop and the
centre crop of the official `byol/utils/dataset.py`, because they separate draws from images in the same way.

Images are `[B, C, H, W]`, float32 in [0, 1]. With C=3 the semantics are the official ones. With any other
number of channels, such as C=1, saturation, hue and grayscale are the identity; brightness, contrast, blur and
solarize act on every channel.
"""

from collections.abc import Mapping

import torch

from byol_func.runtime import resampling
from byol_func.runtime.transfer import constants
from byol_func.runtime.windows import center_window
from byol_func.utils import torchvision_jitter
from byol_func.utils.color_space import gray, hsv_to_rgb, rgb_to_hsv
from byol_func.utils.sampling import Presets, ViewDraws

# --- Both views --------------------------------------------------------------------------------


def postprocess(
    inputs: Mapping[str, torch.Tensor],
    draws: Mapping[str, ViewDraws],
    presets: Presets,
    image_size: int | None = None,
) -> dict[str, torch.Tensor]:
    """Crops and augments two or more views of the images, or only augments views that are already cropped.

    Port of `augmentations.postprocess`; differences: the randomness is passed in as `draws`, and whole images
    are cropped here, while the official code crops in the input pipeline.

    Args:
      inputs: `{'images', 'labels'}` with images `[B, C, H, W]`, uint8 or float in [0, 1]; or
        `{'view1', 'view2', 'labels'}` with views, which are not cropped again.
      draws: `{'view1', 'view2'}` of ViewDraws on the device of the images.
      presets: `{'view1', 'view2'}`, plain Python values as in `AUGMENT_CONFIG`. An `image_size` in the presets
        of a view overrides the argument.
      image_size: S, the side of the cropped views; unused without `images`.

    Returns:
      `{'view1', 'view2'}` float32 `[B, C, S, S]` in [0, 1] without gradient, and the unchanged `labels`.
    """
    views = {}
    for name, preset in presets.items():
        if 'images' in inputs:
            view = random_crop(inputs['images'], draws[name].crop, preset.get('image_size', image_size))
        else:
            view = _in_zero_to_one(inputs[name])
        views[name] = postprocess_view(view, draws[name], preset)
    return dict(views, labels=inputs['labels'])


def postprocess_view(images: torch.Tensor, draws: ViewDraws, presets: Presets) -> torch.Tensor:
    """Applies all augmentations after the crop: flip, colour, blur, solarize, clip to [0, 1].

    Operations of probability 0 are left out of the graph. Port of `_postprocess_image` in
    `augmentations.postprocess`; differences: none (images `[B, C, H, W]`, any C).
    """
    blur = presets['gaussian_blur']
    out = images
    if presets['random_flip']:
        out = random_flip(out, draws.flip)
    if presets['color_transform']['apply_prob'] > 0:
        out = color_transform(out, draws, presets['color_transform'])
    if blur['apply_prob'] > 0:
        blurred = gaussian_blur(out, draws.sigma, images.shape[2] / blur['blur_divider'])
        out = torch.where(_per_image(draws.blur, out), blurred, out)
    if presets['solarize']['apply_prob'] > 0:
        solarized = solarize(out, presets['solarize']['threshold'])
        out = torch.where(_per_image(draws.solarize, out), solarized, out)
    return out.clamp(0.0, 1.0).detach()


def random_crop(images: torch.Tensor, crop: torch.Tensor, image_size: int) -> torch.Tensor:
    """Crops one window from each image and resizes it with bicubic interpolation, without antialiasing.

    Port of `dataset._preprocess_image` after `_decode_and_random_crop`; differences: the window is
    drawn by `sample`, and TensorFlow rounds the fractional position of a pixel to 1/1024.

    Args:
      images: `[B, C, H, W]`, uint8 or float in [0, 1].
      crop: `[B, 4]`, or `[1, 4]` for all images: top, left, height and width in pixels, inside the image.
      image_size: S.

    Returns:
      float32 `[B, C, S, S]` in [0, 1]; the overshoot of the bicubic kernel is clipped.
    """
    out = resampling.crop_and_resize(images.float(), crop, image_size)
    if images.dtype == torch.uint8:
        out = out / 255.0
    return out.clamp(0.0, 1.0)


def random_view(inputs: Mapping[str, torch.Tensor], draws: ViewDraws, image_size: int) -> torch.Tensor:
    """Returns the `random_crop` of a batch's images, or its 'view' `[B, C, S, S]` if a stream has cropped it."""
    if 'view' in inputs:
        return _in_zero_to_one(inputs['view'])
    return random_crop(inputs['images'], draws.crop, image_size)


def center_view(inputs: Mapping[str, torch.Tensor], image_size: int, crop_fraction: float = 0.875) -> torch.Tensor:
    """Returns the `center_crop` of a batch's images, or its 'view' `[B, C, S, S]` if a stream has cropped it."""
    if 'view' in inputs:
        return _in_zero_to_one(inputs['view'])
    return center_crop(inputs['images'], image_size, crop_fraction)


def _in_zero_to_one(images: torch.Tensor) -> torch.Tensor:
    return images / 255.0 if images.dtype == torch.uint8 else images


def center_crop(images: torch.Tensor, image_size: int, crop_fraction: float = 0.875) -> torch.Tensor:
    """Crops the central square of side int(crop_fraction * min(H, W)) and resizes it to `[B, C, S, S]`.

    Port of `dataset._preprocess_image` after `_decode_and_center_crop`, where the fraction is
    224/256. The images, the result and the differences are those of `random_crop`.
    """
    height, width = images.shape[-2:]
    window = center_window(height, width, crop_fraction)
    crop = constants(window, like=torch.empty((), device=images.device))
    return random_crop(images, crop[None], image_size)


# --- Operations --------------------------------------------------------------------------------


def random_flip(images: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Mirrors the images `[B, C, H, W]` left to right where `flip` `[B]` is True.

    Port of `augmentations.random_flip`; differences: none.
    """
    return torch.where(_per_image(flip, images), images.flip(-1), images)


def color_transform(images: torch.Tensor, draws: ViewDraws, presets: Presets) -> torch.Tensor:
    """Applies colour jitter (where `draws.jitter`), grayscale (where `draws.grayscale`) and a clip to [0, 1].

    Port of `augmentations.color_transform`; differences: none with the semantics 'official'.

    Args:
      images: `[B, C, H, W]` in [0, 1].
      draws: the draws of this view.
      presets: the `color_transform` presets; operations of range or probability 0 are left out.
    """
    out = images
    if presets['color_jitter_prob'] > 0:
        jitter = {'official': _color_jitter, 'torchvision': torchvision_jitter.color_jitter}
        jittered = jitter[presets['semantics']](images, draws, presets)
        out = torch.where(_per_image(draws.jitter, images), jittered, images)
    if presets['to_grayscale_prob'] > 0 and images.shape[1] == 3:
        out = torch.where(_per_image(draws.grayscale, out), to_grayscale(out), out)
    return out.clamp(0.0, 1.0)


def _color_jitter(images: torch.Tensor, draws: ViewDraws, presets: Presets) -> torch.Tensor:
    """Applies the four operations in each image's own order, with a clip to [0, 1] after each.

    Every order is a subsequence of one fixed sequence, `B C B | HSV | B C B | HSV | B C B`: B is brightness,
    C is contrast, HSV is saturation or hue. At the steps that an image does not need it gets delta 0 or
    factor 1, which changes nothing. The batch therefore makes only two HSV round trips, the most expensive
    part, instead of one or two at each of the four positions.
    """
    hsv_operations = [k for k, name in ((2, 'saturation'), (3, 'hue')) if presets[name] > 0 and images.shape[1] == 3]
    time = draws.order.argsort(dim=1)  # [B, 4]: the position of operation k.
    # [B, 4]: the number of HSV operations before operation k.
    stretch = torch.zeros_like(time)
    for k in hsv_operations:
        stretch = stretch + (time > time[:, k : k + 1])
    brightness_first = time[:, 0] < time[:, 1]

    out = images
    for i in range(len(hsv_operations) + 1):
        here = stretch == i
        early = torch.where(here[:, 0] & brightness_first, draws.brightness, 0.0)
        late = torch.where(here[:, 0] & ~brightness_first, draws.brightness, 0.0)
        if presets['brightness'] > 0:
            out = adjust_brightness(out, early).clamp(0.0, 1.0)
        if presets['contrast'] > 0:
            factor = torch.where(here[:, 1], draws.contrast, 1.0)
            out = adjust_contrast(out, factor).clamp(0.0, 1.0)
        if presets['brightness'] > 0:
            out = adjust_brightness(out, late).clamp(0.0, 1.0)
        if i < len(hsv_operations):
            h, s, v = rgb_to_hsv(*out.unbind(dim=1))
            if presets['saturation'] > 0:
                factor = torch.where(here[:, 2], draws.saturation, 1.0)
                h, s, v = adjust_saturation(h, s, v, factor)
            if presets['hue'] > 0:
                h, s, v = adjust_hue(h, s, v, torch.where(here[:, 3], draws.hue, 0.0))
            out = torch.stack(hsv_to_rgb(h, s, v), dim=1).clamp(0.0, 1.0)
    return out


def adjust_brightness(images: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Returns images + delta, with `delta` `[B]`. Port of `augmentations.adjust_brightness`; differences: none."""
    return images + _per_image(delta, images)


def adjust_contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Returns factor * (x - mean) + mean, with the mean of each image and channel and `factor` `[B]`.

    Port of `augmentations.adjust_contrast`; differences: none.
    """
    factor = _per_image(factor, images)
    # Multiplied out, so that factor 1 gives x back exactly.
    return factor * images + (1.0 - factor) * images.mean(dim=(2, 3), keepdim=True)


def adjust_saturation(
    h: torch.Tensor, s: torch.Tensor, v: torch.Tensor, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (h, clip(s * factor, 0, 1), v) for planes `[B, H, W]` and `factor` `[B]`.

    Port of `augmentations.adjust_saturation`; differences: none.
    """
    return h, (s * _per_image(factor, s)).clamp(0.0, 1.0), v


def adjust_hue(
    h: torch.Tensor, s: torch.Tensor, v: torch.Tensor, delta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns ((h + delta) mod 1, s, v) for planes `[B, H, W]` and `delta` `[B]` in turns.

    Port of `augmentations.adjust_hue`; differences: none.
    """
    h = h + _per_image(delta, h)
    return h - h.floor(), s, v


def to_grayscale(images: torch.Tensor) -> torch.Tensor:
    """Returns 0.2989 R + 0.5870 G + 0.1140 B in every channel, `[B, 3, H, W]`.

    Port of `augmentations._to_grayscale`; differences: none (images without three channels are unchanged).
    """
    return gray(images).expand_as(images)


def gaussian_blur(images: torch.Tensor, sigma: torch.Tensor, kernel_size: float) -> torch.Tensor:
    """Blurs every image with a Gaussian of 2 * int(kernel_size / 2) + 1 taps, padded with zeros.

    Port of `augmentations._gaussian_blur_single_image`; differences: none (the batch has one `sigma` per
    image, `[B]`, and two banded matrix products replace the depthwise convolutions).
    """
    radius = int(kernel_size / 2)
    if radius == 0:
        return images
    rows = _blur_matrix(sigma, radius, images.shape[2])
    columns = _blur_matrix(sigma, radius, images.shape[3])
    return resampling.separable(images, rows, columns)


def _blur_matrix(sigma: torch.Tensor, radius: int, size: int) -> torch.Tensor:
    """Returns banded matrices `[B, size, size]`. Taps beyond the border count in the sum, so borders darken."""
    precision = (1.0 / (2.0 * sigma**2))[:, None]
    taps = torch.arange(-radius, radius + 1, device=sigma.device)
    total = torch.exp(-(taps**2) * precision).sum(dim=1)[:, None, None]
    pixels = torch.arange(size, device=sigma.device)
    distance = (pixels[:, None] - pixels).abs()
    weights = torch.exp(-(distance**2) * precision[:, None])
    return torch.where(distance <= radius, weights, 0.0) / total


def solarize(images: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
    """Returns x below the threshold, else 1 - x. Port of `_solarize_single_image`; differences: none."""
    return torch.where(images < threshold, images, 1.0 - images)


def _per_image(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshapes `[B]` to `[B, 1, 1, ...]`, to broadcast against `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
