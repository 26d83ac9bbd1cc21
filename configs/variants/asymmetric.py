"""One direction of the loss alone: view 1 predicts view 2.

Equation:  |q(z1)/|q(z1)| - z2'/|z2'||^2 (0..4), where BYOL adds the same with the views exchanged.
Paper:     BYOL (arXiv 2006.07733), section 3.2 symmetrises; SimSiam (arXiv 2011.10566), table 3 of that paper's kind
           of loss: 64.8 % asymmetric, 68.1 % symmetric after 100 epochs on ImageNet.
Command:   python launch.py --config=configs/variants/asymmetric.py
"""

from byol_func.utils import helpers
from configs import variants


def variant(parts):
    """The first of the two directions."""

    def repr_loss_fn(online_out, target_out):
        target = target_out['projection_view2'].detach()
        return helpers.regression_loss(online_out['prediction_view1'], target).mean()

    return parts._replace(repr_loss_fn=repr_loss_fn)


def get_config(base: str = 'digits'):
    """The config BASE under this update rule."""
    return variants.config_of(variant, base)
