"""Collects every internal name of PyTorch that the package uses, each with its reason. No other file may use one.

`tests/contracts/test_public_apis.py` fails when another private name of a dependency appears.
"""

import torch
from torch.distributed import _functional_collectives
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    'TorchDispatchMode',
    'all_reduce_op',
    'foreach',
    'foreach_copy_',
    'functional_collectives',
    'is_batched',
    'is_look_at_value',
    'trace',
    'unsafe_view_op',
    'version',
    'wait_op',
]

# `make_fx` records the operations of a whole step, `torch.func.grad` included. The public tracers are no
# replacement: `torch.export` does not support functional transforms, and Dynamo takes ten times as long. `make_fx`
# is documented in PyTorch's tutorials and has kept its signature since 2.0, though its module is called experimental.
trace = make_fx


def is_look_at_value(error: Exception) -> bool:
    """Returns whether `trace` raised `error` because the traced function branched on a value.

    These errors have no public base class.
    """
    from torch._subclasses import fake_tensor
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # Imports sympy: two seconds.

    return isinstance(
        error,
        (
            fake_tensor.DataDependentOutputException,
            fake_tensor.DynamicOutputShapeException,
            GuardOnDataDependentSymNode,
        ),
    )


class foreach:  # noqa: N801  A namespace, in lower case like its functions.
    """PyTorch's operations on lists of tensors, each with one kernel for the whole list.

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


# `TorchDispatchMode` intercepts every operation as it runs. PyTorch's documentation describes it under this path.

# Copies one list of tensors into another with one kernel, for the arguments of a captured step.
foreach_copy_ = torch._foreach_copy_


def is_batched(x: torch.Tensor) -> bool:
    """Returns whether `torch.func.vmap` batches `x`, perhaps around a gradient: `foreach` has no batching rules."""
    functorch = torch._C._functorch  # There is no public function for this.
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def version(x: torch.Tensor) -> int:
    """Returns how often `x` was changed in place: autograd's own counter, which has no public accessor."""
    return x._version


# Collectives that return their result, so that a traced step can contain them; the public ones write in place.
functional_collectives = _functional_collectives

# These operations as they stand in a traced step, and the view that a trace leaves of a copy.
all_reduce_op = torch.ops._c10d_functional.all_reduce.default
wait_op = torch.ops._c10d_functional.wait_tensor.default
unsafe_view_op = torch.ops.aten._unsafe_view.default
