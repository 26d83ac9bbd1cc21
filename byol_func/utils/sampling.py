"""The randomness of the augmentations: presets, draws and the sampler.

Sampling is separate from the transformations, which are pure functions of images and draws. Generators cannot be
traced, and separate draws make it possible to replay, compare or change a run draw by draw. Together with
`augmentations.py` this is the namesake of the official `byol/utils/augmentations.py`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from byol_func.errors import UserError, one_of
from byol_func.runtime.windows import crop_windows

Presets = Mapping[str, Any]


def _view_config(blur_prob: float, solarize_prob: float) -> dict[str, Any]:
    return dict(
        random_crop=dict(apply_prob=1.0, min_area=0.08, max_area=1.0, min_aspect=3 / 4, max_aspect=4 / 3),
        random_flip=True,
        color_transform=dict(
            apply_prob=1.0,
            brightness=0.4,
            contrast=0.4,
            saturation=0.2,
            hue=0.1,
            color_jitter_prob=0.8,
            to_grayscale_prob=0.2,
            shuffle=True,
            semantics='official',
        ),
        gaussian_blur=dict(apply_prob=blur_prob, blur_divider=10.0, sigma_min=0.1, sigma_max=2.0),
        solarize=dict(apply_prob=solarize_prob, threshold=0.5),
    )


# The colour jitter: the official one, or the one in `torchvision_jitter.py`.
SEMANTICS = ('official', 'torchvision')

# The official `augment_config`, plus the constants of `dataset._decode_and_random_crop`.
AUGMENT_CONFIG = dict(view1=_view_config(1.0, 0.0), view2=_view_config(0.1, 0.2))


class ViewDraws(NamedTuple):
    """The random draws of one view. Every value is drawn, even if its operation is not applied."""

    crop: torch.Tensor  # [B, 4] float32: top, left, height, width in whole pixels of the source
    flip: torch.Tensor  # [B] bool
    jitter: torch.Tensor  # [B] bool
    order: torch.Tensor  # [B, 4] int64: operation order[j] is applied j-th; 0 brightness .. 3 hue
    brightness: torch.Tensor  # [B] float32, added (a factor with torchvision's semantics)
    contrast: torch.Tensor  # [B] float32, factor
    saturation: torch.Tensor  # [B] float32, factor
    hue: torch.Tensor  # [B] float32, added, in turns
    grayscale: torch.Tensor  # [B] bool
    blur: torch.Tensor  # [B] bool
    sigma: torch.Tensor  # [B] float32, in pixels of the view
    solarize: torch.Tensor  # [B] bool


def sample(rng: torch.Generator, batch_size: int, presets: Presets, source_size: tuple[int | None, ...]) -> ViewDraws:
    """Draws the augmentations of one view for a batch, with a single call to the generator.

    Port of the random calls of `augmentations.postprocess` and `dataset._decode_and_random_crop`;
    differences: none in distribution (a crop of 0 pixels, possible in the official code, becomes 1).

    Args:
      rng: a CPU generator; it is advanced.
      batch_size: B.
      presets: the presets of this view, such as `AUGMENT_CONFIG['view1']`.
      source_size: height and width of the images to crop from; both None if the views are already cropped, with
        `sample_relative_crops` and `crop_windows`.

    Returns:
      ViewDraws of CPU tensors.
    """
    color, blur = presets['color_transform'], presets['gaussian_blur']
    u = _uniform_numbers(rng, batch_size)
    # If the views are already cropped, the windows are unused.
    height, width = source_size
    if height is None or width is None:
        crop = torch.zeros(batch_size, 4)
    else:
        crop = crop_windows(_relative_crops(u, **presets['random_crop']), (height, width))
    color_applies = u[:, 6] < color['apply_prob']
    middle = {'official': 0, 'torchvision': 1}[color['semantics']]  # Added to pixels, or a factor of them.
    order = u[:, 16:].argsort(dim=1) if color['shuffle'] else torch.arange(4).repeat(batch_size, 1)
    return ViewDraws(
        crop=crop,
        flip=u[:, 5] < (0.5 if presets['random_flip'] else 0.0),
        jitter=color_applies & (u[:, 7] < color['color_jitter_prob']),
        order=order,
        brightness=_uniform(u[:, 8], middle - color['brightness'], middle + color['brightness']),
        contrast=_uniform(u[:, 9], 1 - color['contrast'], 1 + color['contrast']),
        saturation=_uniform(u[:, 10], 1 - color['saturation'], 1 + color['saturation']),
        hue=_uniform(u[:, 11], -color['hue'], color['hue']),
        grayscale=color_applies & (u[:, 12] < color['to_grayscale_prob']),
        blur=u[:, 13] < blur['apply_prob'],
        sigma=_uniform(u[:, 14], blur['sigma_min'], blur['sigma_max']),
        solarize=u[:, 15] < presets['solarize']['apply_prob'],
    )


def sample_pair(
    rng1: torch.Generator,
    rng2: torch.Generator,
    batch_size: int,
    presets: Presets,
    source_size: tuple[int | None, ...],
) -> dict[str, ViewDraws]:
    """Draws both views, each from its own generator: `{'view1': ViewDraws, 'view2': ViewDraws}`."""
    return dict(
        view1=sample(rng1, batch_size, presets['view1'], source_size),
        view2=sample(rng2, batch_size, presets['view2'], source_size),
    )


def _uniform(u: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return low + (high - low) * u


def sample_relative_crops(rng: torch.Generator, batch_size: int, presets: Presets) -> torch.Tensor:
    """Draws the crops that `sample` would draw from this generator, without knowing the image sizes.

    Returns:
      float32 `[B, 4]`: fraction of the image's area (infinite for the whole image), aspect ratio (width over
      height), and vertical and horizontal position in [0, 1) as fractions of the remaining space.
    """
    return _relative_crops(_uniform_numbers(rng, batch_size), **presets['random_crop'])


def _uniform_numbers(rng: torch.Generator, batch_size: int) -> torch.Tensor:
    return torch.rand(batch_size, 20, generator=rng)  # One row per image.


def _relative_crops(
    u: torch.Tensor,
    apply_prob: float,
    min_area: float,
    max_area: float,
    min_aspect: float,
    max_aspect: float,
) -> torch.Tensor:
    area = torch.where(u[:, 0] < apply_prob, _uniform(u[:, 1], min_area, max_area), math.inf)
    aspect = _uniform(u[:, 2], math.log(min_aspect), math.log(max_aspect)).exp()
    return torch.stack([area, aspect, u[:, 3], u[:, 4]], dim=1)


# Fields with ranges other than 0 to 1. The blur kernel has at least one pixel and at most the size of the image,
# and float32 can represent the square of its sigma.
_RANGES = dict(
    hue=(0, 0.5),
    min_aspect=(0.01, 100),
    max_aspect=(0.01, 100),
    blur_divider=(1, 1e6),
    sigma_min=(0.01, 1000),
    sigma_max=(0.01, 1000),
)
_ABOVE_ZERO = ('min_area',)
_IN_ORDER = (
    ('random_crop', 'min_area', 'max_area'),
    ('random_crop', 'min_aspect', 'max_aspect'),
    ('gaussian_blur', 'sigma_min', 'sigma_max'),
)


def validate_presets(presets: Presets) -> None:
    """Checks that the presets of both views have the fields of `AUGMENT_CONFIG`, with all values in range.

    Raises:
      UserError: a field is missing, unknown or invalid. The message is one line with the field, such as
        `config.augmentations.view1.random_flip`, its value and the accepted values.
    """
    _validate(presets, AUGMENT_CONFIG, 'config.augmentations')
    for view, fields in presets.items():
        _check_order(fields, f'config.augmentations.{view}')


def validate_view(presets: Presets, path: str) -> None:
    """Checks the presets of one view, as `validate_presets`; `path` is their place in the config."""
    _validate(presets, AUGMENT_CONFIG['view1'], path)
    _check_order(presets, path)


def _check_order(fields: Presets, path: str) -> None:
    for section, low, high in _IN_ORDER:
        minimum, maximum = fields[section][low], fields[section][high]
        if minimum > maximum:
            raise UserError(f'{path}.{section}.{low}={minimum!r}: expected at most {high}={maximum!r}')


def _validate(value: Any, official: Any, path: str) -> None:
    """Checks that `value` has the fields and types of its official counterpart, and that numbers are in range."""
    if isinstance(official, Mapping):
        names = ', '.join(official)
        if not isinstance(value, Mapping):
            raise UserError(f'{path}={value!r}: expected a dict with the fields {names}')
        for name in [*value, *official]:
            if name not in official:
                raise UserError(f'{path}.{name}={value[name]!r}: unknown field, expected {names}')
            if name not in value:
                raise UserError(f'{path}.{name} is missing: expected the fields {names}')
            _validate(value[name], official[name], f'{path}.{name}')
    elif isinstance(official, bool):
        if not isinstance(value, bool):
            raise UserError(f'{path}={value!r}: expected True or False')
    elif isinstance(official, str):
        one_of(path, value, SEMANTICS)
    else:
        field = path.rpartition('.')[2]
        low, high = _RANGES.get(field, (0, 1))
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if field in _ABOVE_ZERO and not (number and 0 < value <= high):
            raise UserError(f'{path}={value!r}: expected a number above 0, at most {high}')
        if not (number and low <= value <= high):
            raise UserError(f'{path}={value!r}: expected a number from {low} to {high:g}')
