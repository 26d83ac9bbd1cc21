"""BYOL without batch statistics: group normalisation and weight standardisation.

Equation:  BYOL's; every BatchNorm becomes a GroupNorm and every weight in front of one is standardised.
Paper:     "BYOL works even without batch statistics" (arXiv 2010.10241): 73.9 % on ImageNet, 74.3 % with BatchNorm.
Command:   python launch.py --config=configs/variants/group_norm.py

Everything about it is in the config: `network.norm` and `network.head_norm`.
"""

from configs import variants


def variant(parts):
    """BYOL's own update rule."""
    return parts


def get_config(base: str = 'digits'):
    """The config BASE with other norms."""
    return variants.config_of(variant, base, network__norm='group_norm', network__head_norm='group_norm')
