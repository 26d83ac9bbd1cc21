"""The precision policy, which decides the dtype of each computation.

Parameters, moving averages, statistics, norms, losses, the optimiser and the target network's parameters are
float32 under every policy. The policy applies to the matrix products and convolutions of training steps, and to
the activations between them. Evaluation (accuracies, embeddings, pictures) always runs in float32, so that a
checkpoint has the same accuracy on a CPU and on a GPU, and under every policy that trained it, up to the order of
sums. 'tf32' is a setting of the whole process and therefore applies to evaluation too.
"""

import torch

# The dtype of the networks' activations under each policy; 'auto' stands for a policy not yet resolved.
DTYPES = {
    'auto': torch.float32,
    'float32': torch.float32,
    'tf32': torch.float32,
    'bfloat16': torch.bfloat16,
}


def fastest(device: torch.device) -> str:
    """Returns the policy that 'auto' stands for on a device: 'bfloat16' where it has matrix units for it.

    These are a GPU of compute capability 8.0 or more and a CPU with AMX. Elsewhere it is 'float32'. The rule looks at
    what the device is and not at measured times, so that every run on it gets the same answer.
    """
    if device.type == 'cuda':
        has_units = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has_units = torch.cpu.get_capabilities().get('amx_bf16', False)
    return 'bfloat16' if has_units else 'float32'


def set_backend(policy: str) -> None:
    """Lets a GPU round the inputs of float32 products and convolutions to tf32 under 'tf32', and only then.

    PyTorch's default is to round in convolutions but not in matrix products. The setting holds for the whole
    process. `cudnn.benchmark` stays off: it chooses algorithms by measured time, so a repeated or resumed run might
    choose others and sum in another order.
    """
    allowed = policy == 'tf32'
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Converts `x` to float32 unless it is float32 or float64 already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
