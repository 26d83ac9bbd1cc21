"""Wrong values and missing fields of the presets of augmentations are named."""

import math

import pytest
from test_augmentations import _presets

from byol_func.errors import UserError
from byol_func.utils import sampling
from byol_func.utils.sampling import AUGMENT_CONFIG


def test_official_presets_are_valid():
    sampling.validate_presets(AUGMENT_CONFIG)
    sampling.validate_presets(_presets(color_transform__hue=0, random_crop__apply_prob=0))


@pytest.mark.parametrize(
    'field, value, accepted',
    [
        ('random_crop__apply_prob', 1.5, 'from 0 to 1'),
        ('random_crop__min_area', 0.0, 'above 0'),
        ('random_crop__max_area', 1.2, 'from 0 to 1'),
        ('random_crop__min_area', 1.1, 'above 0, at most 1'),
        ('random_crop__min_aspect', 0, 'from 0.01 to 100'),
        ('color_transform__semantics', 'simclr', 'one of official, torchvision'),
        ('random_crop__min_aspect', 2, 'at most max_aspect=1.3'),
        ('random_flip', 0.5, 'True or False'),
        ('color_transform__apply_prob', '1', 'from 0 to 1'),
        ('color_transform__brightness', -0.4, 'from 0 to 1'),
        ('color_transform__saturation', True, 'from 0 to 1'),
        ('color_transform__hue', 0.6, 'from 0 to 0.5'),
        ('color_transform__color_jitter_prob', math.nan, 'from 0 to 1'),
        ('color_transform__to_grayscale_prob', -0.1, 'from 0 to 1'),
        ('color_transform__shuffle', 1, 'True or False'),
        ('gaussian_blur__blur_divider', 0.5, 'from 1 to 1e+06'),
        ('gaussian_blur__sigma_min', 0, 'from 0.01 to 1000'),
        ('gaussian_blur__sigma_min', 3.0, 'at most sigma_max=2.0'),
        ('gaussian_blur__sigma_max', math.inf, 'from 0.01 to 1000'),
        ('solarize__apply_prob', None, 'from 0 to 1'),
        ('solarize__threshold', 128, 'from 0 to 1'),
        ('solarize__treshold', 0.5, 'unknown field, expected apply_prob, threshold'),
        ('cutout', {}, 'unknown field, expected random_crop, random_flip, color_transform'),
        ('gaussian_blur', 0.1, 'expected a dict with the fields apply_prob, blur_divider'),
    ],
)
def test_wrong_presets_are_named(field, value, accepted):
    with pytest.raises(UserError) as error:
        sampling.validate_presets(_presets(**{field: value}))
    message = str(error.value)
    assert message.startswith(f'config.augmentations.view1.{field.replace("__", ".")}={value!r}: ')
    assert accepted in message and '\n' not in message


def test_missing_presets_are_named():
    presets = _presets()
    del presets['view2']['gaussian_blur']['sigma_max']
    with pytest.raises(UserError, match=r'config\.augmentations\.view2\.gaussian_blur\.sigma_max'):
        sampling.validate_presets(presets)
    with pytest.raises(UserError, match=r'config\.augmentations\.view2 is missing'):
        sampling.validate_presets({'view1': AUGMENT_CONFIG['view1']})
