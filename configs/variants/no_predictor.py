"""BYOL without its predictor: the projections of both networks are compared directly.

Equation:  |z/|z| - z'/|z'||^2 in both directions, z online and z' target projections.
Paper:     BYOL (arXiv 2006.07733), table 5b: 0.2 % on ImageNet, a collapse.
Command:   python launch.py --config=configs/variants/no_predictor.py
"""

from configs import variants


def with_projections(online_out):
    """The outputs of a network with its projections in the place of predictions."""
    return {**online_out, **{f'prediction_{v}': online_out[f'projection_{v}'] for v in ('view1', 'view2')}}


def variant(parts):
    """The loss of projections alone."""
    return parts._replace(repr_loss_fn=lambda online, target: parts.repr_loss_fn(with_projections(online), target))


def get_config(base: str = 'digits'):
    """The config BASE under this update rule, without the weights of a predictor."""
    return variants.config_of(variant, base, network__predictor_depth=0)
