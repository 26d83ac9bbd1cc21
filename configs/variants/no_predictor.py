"""BYOL without its predictor: the projections of both networks are compared directly.

Equation:  |z/|z| - z'/|z'||^2 in both directions, where z is the online and z' the target projection.
Paper:     BYOL (arXiv 2006.07733), row 7 of table 5b: 0.2 % on ImageNet, a collapse.
Command:   python launch.py --config=configs/variants/no_predictor.py
Here:      digits, 8 epochs, one seed: 87.6 % linear, 82.8 % k-NN, spread 0.06 (BYOL: 89.9 %, 87.3 % k-NN, spread 0.85).
"""

from configs import variants


def with_projections(online_out):
    """Returns the outputs of a network with its predictions replaced by its projections."""
    return {**online_out, **{f'prediction_{v}': online_out[f'projection_{v}'] for v in ('view1', 'view2')}}


def variant(parts):
    """Applies the loss to the online projections instead of the predictions."""
    return parts._replace(repr_loss_fn=lambda online, target: parts.repr_loss_fn(with_projections(online), target))


def get_config(base: str = 'digits'):
    """Returns the config BASE with this update rule, without the weights of a predictor."""
    return variants.config_of(variant, base, network__predictor_depth=0)
