"""Every name of PyTorch's internals that the package uses, each with its reason. No other file may use one.

`tests/contracts/test_public_apis.py` fails when another private name of a dependency appears.
"""

import torch
from torch.distributed import _functional_collectives
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    'TorchDispatchMode',
    'foreach',
    'foreach_copy_',
    'functional_collectives',
    'is_batched',
    'is_look_at_value',
    'trace',
    'version',
]

# `make_fx` records the operations of a whole step, `torch.func.grad` included. The public tracers do not:
# `torch.export` takes no functional transforms, and Dynamo needs ten times as long. `make_fx` is documented in
# PyTorch's tutorials and has kept its signature since 2.0; it merely lives in a module called experimental.
trace = make_fx


def is_look_at_value(error: Exception) -> bool:
    """Whether `trace` raised it because the traced function branched on a value: they have no public base class."""
    from torch._subclasses import fake_tensor
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # Loads sympy: two seconds.

    return isinstance(
        error,
        (
            fake_tensor.DataDependentOutputException,
            fake_tensor.DynamicOutputShapeException,
            GuardOnDataDependentSymNode,
        ),
    )


class foreach:  # noqa: N801  A namespace, spelt as the functions that it holds.
    """PyTorch's operations on lists of tensors, one kernel for all of them.

    `torch.optim` and `torch.nn.utils.clip_grad_norm_` are built on them; there is no public spelling.
    """

    add = staticmethod(torch._foreach_add)
    sub = staticmethod(torch._foreach_sub)
    mul = staticmethod(torch._foreach_mul)
    div = staticmethod(torch._foreach_div)
    pow = staticmethod(torch._foreach_pow)
    sqrt = staticmethod(torch._foreach_sqrt)
    norm = staticmethod(torch._foreach_norm)
    sign = staticmethod(torch._foreach_sign)


# `TorchDispatchMode` sees every operation as it runs. PyTorch's documentation describes it under this path.

# Copies one list of tensors into another with one kernel, for the arguments of a captured step.
foreach_copy_ = torch._foreach_copy_


def is_batched(x: torch.Tensor) -> bool:
    """Whether `torch.func.vmap` batches `x`, perhaps around a gradient: `foreach` has no batching rules."""
    functorch = torch._C._functorch  # No public function tells.
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def version(x: torch.Tensor) -> int:
    """How often `x` was changed in place: autograd's own counter, which has no public reader."""
    return x._version


# All-reduces that return their result, so that a traced step can hold them; the public ones write in place.
functional_collectives = _functional_collectives
