"""A target network that equals the online network: tau = 0.

Equation:  xi <- theta after every step, still with a stop-gradient; from the second step on, this is SimSiam's loss.
Paper:     BYOL (arXiv 2006.07733), table 5a: 0.3 % on ImageNet, a collapse.
Command:   python launch.py --config=configs/variants/tau_zero.py
Here:      digits, 8 epochs, one seed: 95.2 % linear, 90.4 % k-NN, spread 0.87 (BYOL: 89.9 %, 87.3 % k-NN, spread 0.85).
"""

from configs import variants
from configs.variants import constant_tau


def variant(parts):
    """Copies the online network to the target network at every step."""
    return constant_tau.variant(parts, tau=0.0)


def get_config(base: str = 'digits'):
    """Returns the config BASE with this update rule."""
    return variants.config_of(variant, base)
