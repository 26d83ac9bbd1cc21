"""BYOL trained by Muon: matrices and kernels move along orthogonal directions, the rest by AdamW.

Equation:  W <- W - rate (0.2 sqrt(max(m, n)) U V^T + decay W), U S V^T the momentum.
Paper:     Jordan et al., "Muon: An optimizer for hidden layers" (2024); the scale of arXiv 2502.16982.
Command:   python launch.py --config=configs/variants/muon.py

`--config.optimizer=muon` does the same to any config; here it is an update rule with options of its own.
"""

from byol_func.utils import optimizers
from configs import variants


def variant(parts, *, momentum=0.95, num_iterations=5, weight_decay=1e-6):
    """Muon in the place of the config's optimiser; biases and norms do not decay."""
    options = dict(
        momentum=momentum,
        num_iterations=num_iterations,
        weight_decay=weight_decay,
        weight_decay_filter=optimizers.exclude_bias_and_norm,
    )
    return parts._replace(optimizer=lambda learning_rate: optimizers.muon(learning_rate, **options))


def get_config(base: str = 'digits'):
    """The config BASE under this update rule."""
    return variants.config_of(variant, base)
