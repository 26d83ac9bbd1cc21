"""A predictor that learns faster than the rest, or at a rate that does not decay.

Equation:  theta_q <- theta_q + factor * update, or with the rate `fixed_rate` at every step.
Paper:     BYOL (arXiv 2006.07733), appendix I.2: without a target network a predictor rate of 10 times prevents the
           collapse (66.5 % on ImageNet); SimSiam (arXiv 2011.10566) keeps the predictor's rate fixed.
Command:   python launch.py --config=configs/variants/predictor_rate.py --config.variant_config.factor=10
"""

import torch

from byol_func.utils import optimizers
from configs import variants


def variant(parts, *, factor=10.0, fixed_rate=0.0):
    """The optimiser of the config twice: `factor` times the rate (or `fixed_rate`, if that is not 0) for the predictor.

    At step 0 of a warm-up a fixed rate is not 0.
    """

    def optimizer(learning_rate):
        own = torch.full_like(torch.as_tensor(learning_rate), fixed_rate) if fixed_rate else factor * learning_rate
        return optimizers.partition(
            {'predictor': parts.optimizer(own), 'rest': parts.optimizer(learning_rate)},
            lambda path, param: 'predictor' if path[0] == 'predictor' else 'rest',
        )

    return parts._replace(optimizer=optimizer)


def get_config(base: str = 'digits'):
    """The config BASE under this update rule."""
    return variants.config_of(variant, base)
