"""Interpolates between BYOL (beta = 0) and a contrastive loss with negatives (beta = 1).

Equation:  2 - 2 S(v1_i, v2_i) + 2 beta alpha ln(sum_{j != i} exp(S(v1_i, v1_j) / alpha) + sum_j exp(S(v1_i, v2_j) /
           alpha)) plus the same with the views exchanged; S: cosine of online prediction and target projection.
Paper:     BYOL (arXiv 2006.07733), equation 6 in section 5, and appendix F.4. On ImageNet, BYOL gives 72.5 %; beta 1
           gives 70.9 % at temperature 0.1 (table 5b) and 72.7 % at 0.3 (table 18). SimCLR, which is beta 1 without
           predictor and target network, gives 69.4 % at temperature 0.1 (table 5b).
Command:   python launch.py --config=configs/variants/contrast.py --config.variant_config.beta=1.0
Here:      digits, 8 epochs, one seed: 95.8 % linear, 94.9 % k-NN, spread 0.88 (BYOL: 89.9 %, 87.3 % k-NN, spread 0.85).
"""

import torch

from byol_func.forward import make_nothing
from byol_func.runtime import collectives
from byol_func.utils import helpers
from configs import variants
from configs.variants import no_predictor


def _log_sum(own, other, temperature):
    """Returns the log of the sum over all other examples of the same view and all examples of the other view, `[B]`."""
    prediction, same, crossed = own[0], collectives.all_gather(own[1]), collectives.all_gather(other[1])
    first = collectives.replica_index() * len(prediction)
    index = torch.arange(len(prediction), device=prediction.device)
    itself = (index[:, None] + first) == torch.arange(len(same), device=prediction.device)
    lowest = torch.finfo(prediction.dtype).min  # A replay would report -inf.
    of_same = (prediction @ same.T / temperature).masked_fill(itself, lowest)
    return torch.cat([of_same, prediction @ crossed.T / temperature], dim=1).logsumexp(dim=1)


def variant(parts, *, beta=1.0, temperature=0.3, predictor=True, target=True):
    """Adds `beta` times the contrastive term; predictor and target network can be disabled, as in table 5b.

    Without a target network, gradients flow through both sides of the loss, as in SimCLR (appendix F.4).
    """

    def repr_loss_fn(online_out, target_out):
        online_out = online_out if predictor else no_predictor.with_projections(online_out)
        target_out = target_out if target else online_out
        unit = lambda outputs, name: helpers.l2_normalize(outputs[name], axis=-1)
        still = (lambda x: x.detach()) if target else (lambda x: x)
        views = [(unit(online_out, f'prediction_{v}'), still(unit(target_out, f'projection_{v}'))) for v in VIEWS]
        loss = 0.0
        for own, other in (views, views[::-1]):
            loss = loss + 2 - 2 * (own[0] * other[1]).sum(dim=1)
            if beta:
                loss = loss + 2 * beta * temperature * _log_sum(own, other, temperature)
        return loss.mean()

    parts = parts._replace(repr_loss_fn=repr_loss_fn)
    return parts if target else parts._replace(target_forward=make_nothing())


VIEWS = ('view1', 'view2')


def get_config(base: str = 'digits'):
    """Returns the config BASE with this update rule."""
    return variants.config_of(variant, base)
