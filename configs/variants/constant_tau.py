"""A target network with a constant decay rate; in BYOL the rate increases to 1.

Equation:  xi <- tau xi + (1 - tau) theta at every step.
Paper:     BYOL (arXiv 2006.07733), equation 1 without the schedule of section 3.3. The rates in table 5a are those at
           the start of that schedule, `config.base_target_ema`; only 0 and 1 stay constant there.
Command:   python launch.py --config=configs/variants/constant_tau.py --config.variant_config.tau=0.99
Here:      digits, 8 epochs, one seed: 87.3 % linear, 82.8 % k-NN, spread 0.82 (BYOL: 89.9 %, 87.3 % k-NN, spread 0.85).
"""

import torch

from configs import variants


def variant(parts, *, tau=0.99):
    """Uses the decay rate `tau` at every step; 1 keeps the target at its random start, 0 copies the online network."""
    return parts._replace(target_ema=lambda step: torch.full_like(step, tau, dtype=torch.float32))


def get_config(base: str = 'digits'):
    """Returns the config BASE with this update rule."""
    return variants.config_of(variant, base)
