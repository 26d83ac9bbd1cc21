"""The precision policy: what is computed in which dtype.

Parameters, moving averages, statistics, norms, losses, the optimiser and the target's average are
float32 whatever the policy. It decides about the matrix products and convolutions, and about the
activations between them, in the steps that train. What only looks at a network (accuracies, embeddings,
pictures) is computed in float32 throughout: one checkpoint has one accuracy, on a CPU, on a GPU and
however it was trained, up to the order of sums. 'tf32' is a setting of the process and holds there too.
"""

import torch

# Policy -> dtype of the activations that pass through the networks; 'auto' before it is resolved.
DTYPES = {
    'auto': torch.float32,
    'float32': torch.float32,
    'tf32': torch.float32,
    'bfloat16': torch.bfloat16,
}


def resolve(policy: str, device: torch.device) -> str:
    """'auto' becomes bfloat16 on a GPU that has it and float32 elsewhere; the others stay.

    Args:
      policy: one of `DTYPES`.
      device: where the run will be.
    """
    if policy != 'auto':
        return policy
    has_bfloat16 = device.type == 'cuda' and torch.cuda.get_device_capability(device) >= (8, 0)
    return 'bfloat16' if has_bfloat16 else 'float32'


def set_backend(policy: str) -> None:
    """Lets a GPU round the inputs of float32 products to tf32 under 'tf32', and only there.

    PyTorch alone would do so in convolutions and not in matrix products. It is a setting of the
    process. `cudnn.benchmark` stays off: it chooses algorithms by the clock, so that a run that is
    repeated or resumed might take others, and with them other sums.
    """
    allowed = policy == 'tf32'
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """The same numbers as float32, or as they are if they are wider."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
