"""Presets of the augmentations: official, cifar, glyphs and none.

A config takes one with `use(config, NAME)`; on the command line `--config.augmentations_preset=NAME`
puts another in its place, and single fields given there as well still count:

  python launch.py --config=configs/folder.py --config.dataset.root=DIR --mode=preview \\
    --config.augmentations_preset=cifar --config.augmentations.view2.solarize.apply_prob=0

An operation is switched off by a probability or range of 0 (`random_flip`: False).
"""

import copy
from typing import Any

import ml_collections

from byol_func.errors import one_of
from byol_func.utils import sampling


def official() -> dict[str, Any]:
    """The views of the paper (appendix B) and the official code, which differ in blur and solarize."""
    return copy.deepcopy(sampling.AUGMENT_CONFIG)


def cifar() -> dict[str, Any]:
    """The official views without blur.

    As in SimCLR on CIFAR-10: three taps on 32 pixels take away what little detail there is.
    """
    presets = official()
    for view in presets.values():
        view['gaussian_blur']['apply_prob'] = 0.0
    return presets


def glyphs() -> dict[str, Any]:
    """For letters and digits, bright on dark, one channel: only what leaves a glyph the same glyph.

    No flip: a mirrored b is a d, and a mirrored s is nothing. No saturation, hue or grayscale, for
    there is no colour. No solarize: it hollows the strokes out, and an outlined l is an o. Crops keep
    at least 40 % of the area, with the official aspect: a letter fills most of its image, and of a
    smaller piece nobody could tell whose it is; what remains is shifted, scaled and stretched as
    handwriting is. Brightness and contrast stay, for the amount of ink would otherwise tell which
    views belong together; so does the blur, which on strokes three pixels wide softens the pen and
    leaves the shape.
    """
    presets = official()
    for view in presets.values():
        view['random_crop']['min_area'] = 0.4
        view['random_flip'] = False
        view['color_transform'] |= dict(saturation=0.0, hue=0.0, to_grayscale_prob=0.0)
        view['solarize']['apply_prob'] = 0.0
    return presets


def none() -> dict[str, Any]:
    """Nothing at all: both views are the whole image, resized. To see what augmentations are for."""
    presets = official()
    for view in presets.values():
        view['random_flip'] = False
        for name in ('random_crop', 'color_transform', 'gaussian_blur', 'solarize'):
            view[name]['apply_prob'] = 0.0
    return presets


PRESETS = {'official': official, 'cifar': cifar, 'glyphs': glyphs, 'none': none}


def crop_and_flip(presets: dict[str, Any]) -> dict[str, Any]:
    """What the evaluation protocols train with: crop and flip of view 1, nothing else."""
    view = copy.deepcopy(presets['view1'])
    for name in ('color_transform', 'gaussian_blur', 'solarize'):
        view[name]['apply_prob'] = 0.0
    return view


def use(config: ml_collections.ConfigDict, name: str) -> None:
    """Puts a preset in the place of a config's augmentations, also those of its evaluation protocols.

    Raises:
      UserError: there is no preset of that name.
    """
    presets = one_of('config.augmentations_preset', name, PRESETS)()
    config.augmentations_preset = name
    config.augmentations = ml_collections.ConfigDict(presets)
    for protocol in ('linear_eval', 'fine_tune'):
        config[protocol].augmentations = ml_collections.ConfigDict(crop_and_flip(presets))
