"""BYOL without batch statistics: group normalisation and weight standardisation.

Equation:  as in BYOL; every BatchNorm becomes a GroupNorm, and every weight in front of one is standardised.
Paper:     "BYOL works even without batch statistics" (arXiv 2010.10241), abstract: 73.9 % on ImageNet, and 74.3 % with
           BatchNorm.
Command:   python launch.py --config=configs/variants/group_norm.py
Here:      digits, 8 epochs, one seed: 79.4 % linear, 87.6 % k-NN, spread 0.01 (BYOL: 89.9 %, 87.3 % k-NN, spread 0.85).
           CIFAR-10 (20,000 images, views of 16 pixels, 6,240 steps, one seed): 39.1 % linear,
           43.9 % with batch norm, 25.2 % untrained.

Only the config changes: `network.norm` and `network.head_norm`.

It works on CIFAR-10, but a short run does not show it. First the projections collapse: their spread falls to 0.06
within 350 steps. It rises again by itself, to 0.14 after 650 steps and 0.43 after 1,550, where it stays
(benchmarks/results/ablations_norms). A larger learning rate (8e-3 for 256 images, with Adam) brings it back sooner;
with 1e-3 it had not come back after 1,560 steps. LARS at a base rate of 2 left dead features.

On the digits of 8 x 8 pixels it did not come back within 1,450 steps. The heads are the reason: with group norm in the
encoder alone (`--config.network.head_norm=batch_norm`) nothing collapses. A group norm treats each example by itself,
so only a predictor that keeps up holds the projections apart (last rows of benchmarks/results/variants_digits).
"""

from configs import variants


def variant(parts):
    """Returns the parts unchanged: the update rule is BYOL's own."""
    return parts


def get_config(base: str = 'digits'):
    """Returns the config BASE with group normalisation."""
    return variants.config_of(variant, base, network__norm='group_norm', network__head_norm='group_norm')
