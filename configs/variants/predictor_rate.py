"""A predictor with a higher learning rate than the other parameters, or with a constant one.

Equation:  theta_q <- theta_q + factor * update, or with the rate `fixed_rate` at every step.
Paper:     BYOL (arXiv 2006.07733), appendix I.1: without a target network (tau = 0), 10 times the learning rate for the
           predictor prevents the collapse; table 21: 66.6 % on ImageNet, and 5.5 % with the same rate. SimSiam (arXiv
           2011.10566), table 1: 68.1 % with a constant rate for the predictor, and 67.7 % with the common schedule.
Command:   python launch.py --config=configs/variants/predictor_rate.py --config.variant_config.target=False
Here:      digits, 8 epochs, one seed: 90.1 % linear, 87.0 % k-NN, spread 0.82 (BYOL: 89.9 %, 87.3 % k-NN, spread 0.85).
"""

import torch

from byol_func.utils import optimizers
from configs import variants
from configs.variants import simsiam


def variant(parts, *, factor=10.0, fixed_rate=0.0, target=True):
    """Trains the predictor at `factor` times the learning rate, or at `fixed_rate` if that is not 0.

    Both groups of parameters use the config's optimiser. A fixed rate has no warm-up: it is not 0 at step 0. Without
    `target`, the online network is its own target, as in both papers.
    """

    def optimizer(learning_rate):
        own = torch.full_like(torch.as_tensor(learning_rate), fixed_rate) if fixed_rate else factor * learning_rate
        return optimizers.partition(
            {'predictor': parts.optimizer(own), 'rest': parts.optimizer(learning_rate)},
            lambda path, param: 'predictor' if path[0] == 'predictor' else 'rest',
        )

    parts = parts if target else simsiam.variant(parts)
    return parts._replace(optimizer=optimizer)


def get_config(base: str = 'digits'):
    """Returns the config BASE with this update rule."""
    return variants.config_of(variant, base)
