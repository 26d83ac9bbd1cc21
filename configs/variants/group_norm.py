"""BYOL without batch statistics: group normalisation and weight standardisation.

Equation:  as in BYOL; every BatchNorm becomes a GroupNorm, and every weight in front of one is standardised.
Paper:     "BYOL works even without batch statistics" (arXiv 2010.10241), abstract: 73.9 % on ImageNet, and 74.3 % with
           BatchNorm.
Command:   python launch.py --config=configs/variants/group_norm.py
Here:      digits, 8 epochs, one seed: 79.4 % linear, 87.6 % k-NN, spread 0.01 (BYOL: 89.9 %, 87.3 % k-NN, spread 0.85).

Only the config changes: `network.norm` and `network.head_norm`.

The paper's claim was not reproduced: on the digits the projections collapse within three epochs. The heads are the
reason: with group norm in the encoder alone (`--config.network.head_norm=batch_norm`) there is no collapse. A group
norm treats each example by itself, so only a predictor that keeps up holds the projections apart. A lower learning
rate slows the collapse, ten times that rate for the predictor slows it further, and LARS does not help. The last rows
of the table in benchmarks/results/variants_digits have the numbers. ImageNet and long trainings were not tried.
"""

from configs import variants


def variant(parts):
    """Returns the parts unchanged: the update rule is BYOL's own."""
    return parts


def get_config(base: str = 'digits'):
    """Returns the config BASE with group normalisation."""
    return variants.config_of(variant, base, network__norm='group_norm', network__head_norm='group_norm')
