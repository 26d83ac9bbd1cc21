"""SimSiam: the online network is its own target, behind a stop-gradient.

Equation:  |q(z1)/|q(z1)| - sg(z2)/|z2||^2 in both directions, which is 4 + 4 times SimSiam's loss; no second network.
Paper:     SimSiam (arXiv 2011.10566), equation 4; table 4: 68.1 % on ImageNet after 100 epochs, and 66.5 % for BYOL.
Command:   python launch.py --config=configs/variants/simsiam.py
Here:      digits, 8 epochs, one seed: 94.4 % linear, 89.3 % k-NN, spread 0.86 (BYOL: 89.9 %, 87.3 % k-NN, spread 0.85).

The heads and their learning rate stay BYOL's, for which table 19 of BYOL (arXiv 2006.07733) reports 5.5 %. SimSiam's
projector has three layers and ends with a norm, and its predictor is a bottleneck with a constant learning rate.
"""

from byol_func.forward import make_nothing
from configs import variants


def variant(parts):
    """Removes the target network; the loss compares the online predictions with the online projections."""
    return parts._replace(
        target_forward=make_nothing(),
        repr_loss_fn=lambda online_out, _: parts.repr_loss_fn(online_out, online_out),
    )


def get_config(base: str = 'digits'):
    """Returns the config BASE with this update rule."""
    return variants.config_of(variant, base)
