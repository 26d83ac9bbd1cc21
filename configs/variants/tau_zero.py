"""A target network that is the online network of the step before: tau = 0.

Equation:  xi <- theta at every step, still with a stop-gradient.
Paper:     BYOL (arXiv 2006.07733), table 5a: 0.3 % on ImageNet, a collapse.
Command:   python launch.py --config=configs/variants/tau_zero.py
"""

from configs import variants
from configs.variants import constant_tau


def variant(parts):
    """A target without memory."""
    return constant_tau.variant(parts, tau=0.0)


def get_config(base: str = 'digits'):
    """The config BASE under this update rule."""
    return variants.config_of(variant, base)
