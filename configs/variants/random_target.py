"""A target network that stays at its random initialisation: tau = 1.

Equation:  xi <- xi; the online network predicts fixed random projections.
Paper:     BYOL (arXiv 2006.07733), table 5a: 18.8 % on ImageNet, while the random network itself gives 1.4 %. Section 3
           calls this "the core motivation for BYOL".
Command:   python launch.py --config=configs/variants/random_target.py
Here:      digits, 8 epochs, one seed: 91.8 % linear, 88.7 % k-NN, spread 0.84 (BYOL: 89.9 %, 87.3 % k-NN, spread 0.85).
"""

from configs import variants
from configs.variants import constant_tau


def variant(parts):
    """Keeps the target network at its random initialisation."""
    return constant_tau.variant(parts, tau=1.0)


def get_config(base: str = 'digits'):
    """Returns the config BASE with this update rule."""
    return variants.config_of(variant, base)
