"""Gradient accumulation: the batch in k micro-batches, one optimiser step and one step of the target network.

Equation:  g = 1/k sum_i grad L(micro-batch i).
Paper:     "Accurate, large minibatch SGD" (arXiv 1706.02677), section 3.
Command:   python launch.py --config=configs/variants/accumulation.py --config.variant_config.num_micro_batches=4

Without batch statistics (configs/variants/group_norm.py) the numbers are those of the whole batch within rounding.
With BatchNorm each micro-batch is normalised by its own statistics, and the moving averages take k steps.
"""

from byol_func.utils import optimizers
from configs import variants


def variant(parts, *, num_micro_batches=2):
    """The gradient as a mean over `num_micro_batches` parts of the batch; the memory is that of one."""
    return parts._replace(grad=optimizers.multi_steps(num_micro_batches))


def get_config(base: str = 'digits'):
    """The config BASE under this update rule."""
    return variants.config_of(variant, base)
