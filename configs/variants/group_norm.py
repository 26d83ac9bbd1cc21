"""BYOL without batch statistics: group normalisation and weight standardisation.

Equation:  as in BYOL; every BatchNorm becomes a GroupNorm, and every weight in front of one is standardised.
Paper:     "BYOL works even without batch statistics" (arXiv 2010.10241), abstract: 73.9 % on ImageNet, and 74.3 % with
           BatchNorm.
Command:   python launch.py --config=configs/variants/group_norm.py

Only the config changes: `network.norm` and `network.head_norm`.
"""

from configs import variants


def variant(parts):
    """Returns the parts unchanged: the update rule is BYOL's own."""
    return parts


def get_config(base: str = 'digits'):
    """Returns the config BASE with group normalisation."""
    return variants.config_of(variant, base, network__norm='group_norm', network__head_norm='group_norm')
