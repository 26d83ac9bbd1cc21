"""VICReg: invariance, variance and covariance of the projections, without predictor and target network.

Equation:  25 mean((z1 - z2)^2) + 25 mean_d(max(0, 1 - std(z_d))) + 1 / D sum_{d != e} cov(z)_{de}^2; the variance term
           is averaged and the covariance term summed over both views.
Paper:     VICReg (arXiv 2105.04906), section 4.1, with the means and factors of the authors' code: 73.2 % on ImageNet.
Command:   python launch.py --config=configs/variants/vicreg.py
Here:      digits, 8 epochs, one seed: 94.1 % linear, 91.0 % k-NN, spread 0.90 (BYOL: 89.9 %, 87.3 % k-NN, spread 0.85).
"""

import torch

from byol_func.forward import make_nothing
from byol_func.runtime import collectives
from configs import variants


def _spread(z, eps=1e-4):
    """Returns the hinge loss of the standard deviations and the off-diagonal covariance loss, both 0-d."""
    z = z - z.mean(dim=0)
    covariance = z.T @ z / (len(z) - 1)
    off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
    return torch.relu(1 - (covariance.diagonal() + eps).sqrt()).mean(), off_diagonal / z.shape[1]


def variant(parts, *, invariance=25.0, variance=25.0, covariance=1.0):
    """Weights the three terms of the loss by `invariance`, `variance` and `covariance`; logs them without weights."""

    def repr_loss_fn(online_out, target_out):
        z1, z2 = (collectives.all_gather(online_out[f'projection_{view}']) for view in ('view1', 'view2'))
        (variance1, covariance1), (variance2, covariance2) = _spread(z1), _spread(z2)
        terms = {
            'invariance': (z1 - z2).square().mean(),
            'variance': (variance1 + variance2) / 2,
            'covariance': covariance1 + covariance2,
        }
        loss = invariance * terms['invariance'] + variance * terms['variance'] + covariance * terms['covariance']
        return loss, terms

    return parts._replace(repr_loss_fn=repr_loss_fn, target_forward=make_nothing())


def get_config(base: str = 'digits'):
    """Returns the config BASE with this update rule, without a predictor."""
    return variants.config_of(variant, base, network__predictor_depth=0)
