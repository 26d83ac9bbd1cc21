"""Makes a pure update step fast, as `jax.jit` does: tracing, compiling, donation and CUDA graph capture."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import optree
import torch

from byol_func.runtime import buckets, collectives, compilers, costs, torch_internals

UpdateFn = Callable[..., tuple[Any, Any]]
# The networks themselves choose channels-last where it helps. Inductor would choose it in the augmentations too,
# where three channels fill only three lanes of a vector that could hold sixteen pixels of one channel.
_CPU_OPTIONS = {'layout_optimization': False}
_OTHER_SHAPES = 'a compiled step was called with other shapes than the first time'


def compile_update(
    update_fn: UpdateFn,
    *,
    compiled: bool | None = True,
    donate: bool = True,
    num_steps: int = 0,
    bucket_mb: float = 0.0,
    backend: str = 'inductor',
    warn: Callable[[str], object] = lambda text: None,
    inform: Callable[[str], object] = lambda text: None,
) -> UpdateFn:
    """Wraps a pure `update_fn(state, ...) -> (state, logs)` without changing what it computes.

    A compiled step is one graph of static shapes. It is traced on the first call, as in `jax.jit`: the function
    runs once on tensors without data while every operation on them is recorded. Any Python is therefore allowed
    as long as it does not look at values; a branch on a value is an error, not a slow fallback. With donation the
    new state is written into the tensors of the old one, which halves the memory of the state; the caller must
    then use only the returned state, as with `donate_argnums` in JAX.

    A compiled step that donates on a GPU is captured in a CUDA graph on its third call: the host then launches one
    graph instead of hundreds of kernels. Steps of several replicas are not captured.

    Args:
      update_fn: a pure function whose arguments are trees of tensors; all other arguments are already bound.
      compiled: True compiles and False runs `update_fn` as it stands. None takes the choice that finishes a run of
        `num_steps` steps soonest (see `costs`). A third choice is then to trace without compiling: the recorded
        operations run one by one, which saves the time that Python and `torch.func` take at every step.
      donate: whether to reuse the old state's memory.
      num_steps: the number of steps of the whole run.
      bucket_mb: the size in MB of the buckets in which several replicas send their gradients while a traced or compiled
        step computes the others (see `buckets`); 0 sends all in one block afterwards, as a step that is not traced
        always does.
      backend: 'inductor', or another backend of `torch.compile`.
      warn: called with a message if compiling would pay but this machine lacks something that it needs.
      inform: called with a message before the step is compiled, which takes long.

    Returns:
      A function of the same signature.

    Raises:
      ValueError: `update_fn` breaks the contract of donation (see `check_donation`), or branches on a value while
        it is traced, or a traced or compiled step is called with other shapes or strides than the first time.
    """
    step = _donating(update_fn) if donate else update_fn
    if compiled is False:
        return step
    fast: UpdateFn = _Compiled(step, backend, bucket_mb, inform)
    if donate and collectives.num_replicas() == 1:
        fast = _Captured(fast)
    return fast if compiled else _choose_on_first_call(update_fn, step, fast, num_steps, bucket_mb, warn)


def _choose_on_first_call(update_fn, plain, fast, num_steps, bucket_mb, warn) -> UpdateFn:
    chosen = None

    def choose(args):
        if costs.worth_compiling(update_fn, args, num_steps):
            missing = compilers.missing(optree.tree_leaves(args)[0].device)
            if missing is None:
                return fast
            warn(f'Steps are not compiled and are therefore slower: compiling needs {missing}')
        return _Compiled(plain, None, bucket_mb) if costs.worth_tracing(num_steps) else plain

    def step(*args):
        nonlocal chosen
        chosen = chosen or choose(args)
        return chosen(*args)

    return step


@contextlib.contextmanager
def _no_look_at_values() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not torch_internals.is_look_at_value(error):
            raise
        raise ValueError(
            'update_fn looks at the value of a tensor, which has none while the step is traced; '
            'config.compile=False runs it as plain Python'
        ) from error


def _donating(update_fn: UpdateFn) -> UpdateFn:
    """Returns a step that writes the new state into the old one, and checks on its first call that it may."""
    checked = False

    def step(state, *args):
        nonlocal checked
        versions = None if checked else _versions((state, *args))
        new_state, logs = update_fn(state, *args)
        if versions:
            check_donation(state, new_state, changed=_changed((state, *args), versions))
            checked = True
        # Every new leaf is computed before the first old one is overwritten.
        for old, new in zip(optree.tree_leaves(state), optree.tree_leaves(new_state), strict=True):
            if new is not old:
                old.copy_(new)
        return state, logs

    return step


class _Compiled:
    """A step that is traced on its first call and compiled by a backend; with backend None it is only traced."""

    def __init__(
        self,
        step: UpdateFn,
        backend: str | None,
        bucket_mb: float = 0.0,
        inform: Callable[[str], object] = lambda text: None,
    ):
        self._step, self._backend, self._bucket_mb, self._inform = step, backend, bucket_mb, inform
        self._compiled = None

    def __call__(self, state, *args):
        leaves, spec = optree.tree_flatten((state, *args))
        if self._compiled is None:
            self._signature, self._strides = _signature(leaves, spec), _strides(leaves)
            self._compiled = self._trace_and_compile(leaves, spec)
        elif _signature(leaves, spec) != self._signature:
            raise ValueError(_OTHER_SHAPES)
        elif _strides(leaves) != self._strides:
            raise ValueError(_OTHER_SHAPES.replace('shapes', 'strides'))
        out = self._compiled(*leaves)
        if self._donates:
            return state, optree.tree_unflatten(self._out_spec, out)
        return optree.tree_unflatten(self._out_spec, out)

    def _trace_and_compile(self, leaves, spec):
        def flat_step(*leaves):
            state, *args = optree.tree_unflatten(spec, leaves)
            new_state, logs = self._step(state, *args)
            self._donates = new_state is state
            out, self._out_spec = optree.tree_flatten(logs if self._donates else (new_state, logs))
            return out

        with _no_look_at_values():
            self.graph = torch_internals.trace(flat_step, tracing_mode='fake')(*leaves)
        if self._bucket_mb:
            buckets.split_means(self.graph.graph, int(self._bucket_mb * 1e6))
        self.graph.graph.eliminate_dead_code()
        self.graph.recompile()
        if self._backend is None:
            return self.graph
        self._inform('compiling the step, which usually takes one to two minutes, or less with a warm cache')
        options = _CPU_OPTIONS if self._backend == 'inductor' and not leaves[0].is_cuda else None
        return torch.compile(self.graph, fullgraph=True, dynamic=False, backend=self._backend, options=options)


class _Captured:
    """A compiled, donating step that becomes one CUDA graph on a GPU and stays as it is on other devices.

    A graph reads and writes fixed addresses. Donation keeps the addresses of the state; batch and draws are copied
    into buffers that belong to this step. The copies start with the first call: a step that was compiled for other
    tensors might be recompiled for the buffers, which is impossible during a capture. The logs are written to the
    same memory every time, so a caller that keeps them must copy them.
    """

    _CALLS_BEFORE = 2  # The first call compiles, and libraries choose algorithms and allocate memory.

    def __init__(self, step: UpdateFn):
        self._step, self._calls, self._graph, self._args = step, 0, None, None

    def __call__(self, state, *args):
        if not _is_on_gpu(state):
            return self._step(state, *args)
        self._take(args)
        if self._calls < self._CALLS_BEFORE:
            self._calls += 1
            return self._step(state, *self._args)
        if self._graph is None:
            self._capture(state)
        if [leaf.data_ptr() for leaf in optree.tree_leaves(state)] != self._addresses:
            raise ValueError('a captured step was called with another state than the one it returned')
        self._graph.replay()
        return state, self._logs

    def _take(self, args):
        """Copies the arguments into the buffers of this step."""
        leaves, spec = optree.tree_flatten(args)
        if self._args is None:
            self._signature = _signature(leaves, spec)
            self._args = optree.tree_map(torch.clone, args)
        elif _signature(leaves, spec) != self._signature:  # Copying would broadcast a smaller tensor.
            raise ValueError(_OTHER_SHAPES)
        else:
            torch_internals.foreach_copy_(optree.tree_leaves(self._args), leaves, non_blocking=True)

    def _capture(self, state):
        """Records the kernels of a step; none of them runs before the replay."""
        self._addresses = [leaf.data_ptr() for leaf in optree.tree_leaves(state)]
        self._graph = torch.cuda.CUDAGraph()
        # 'thread_local' lets other threads pin memory and query events during the capture.
        with torch.cuda.graph(self._graph, capture_error_mode='thread_local'):
            _, self._logs = self._step(state, *self._args)


def _is_on_gpu(state: Any) -> bool:
    return optree.tree_leaves(state)[0].is_cuda


def _signature(leaves: list[torch.Tensor], spec: Any) -> tuple:
    return spec, tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves)


def _strides(leaves: list[torch.Tensor]) -> list[tuple[int, ...]]:
    return [leaf.stride() for leaf in leaves]


def check_donation(state: Any, new_state: Any, changed: tuple | None = None) -> None:
    """Checks that a step's old state may be overwritten with its new one.

    The new state must have the same tree, shapes and dtypes, the step must have left its inputs unchanged, and no
    new leaf may share memory with an old one, unless it *is* the old leaf in its old place (a part of the state
    that the step does not touch).

    Args:
      state: the state passed to the step.
      new_state: the state that the step returned.
      changed: the path of an argument that the step changed in place, None if there is none.

    Raises:
      ValueError: the contract is broken; the message names the leaf.
    """
    if changed is not None:
        raise ValueError(f'update_fn changed its argument {_name(changed)} in place')
    paths, old_leaves, spec = optree.tree_flatten_with_path(state)
    new_leaves, new_spec = optree.tree_flatten(new_state)
    if spec != new_spec:
        raise ValueError(f'update_fn returned a state of another structure: {new_spec}, expected {spec}')
    owners = {_memory(leaf): path for path, leaf in zip(paths, old_leaves, strict=True)}
    for path, old, new in zip(paths, old_leaves, new_leaves, strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ValueError(
                f'update_fn changed state{_name(path)} from {old.dtype} {list(old.shape)} '
                f'to {new.dtype} {list(new.shape)}'
            )
        owner = owners.get(_memory(new))
        if owner is not None and not (owner == path and new.stride() == old.stride()):
            raise ValueError(
                f'update_fn returned memory of the old state{_name(owner)} as the new '
                f'state{_name(path)}: donation would corrupt it; return a copy'
            )


def _versions(tree: Any) -> list[int]:
    return [torch_internals.version(leaf) for leaf in optree.tree_leaves(tree)]


def _changed(tree: Any, versions: list[int]) -> tuple | None:
    paths, leaves, _ = optree.tree_flatten_with_path(tree)
    for path, leaf, version in zip(paths, leaves, versions, strict=True):
        if torch_internals.version(leaf) != version:
            return path
    return None


def _memory(x: torch.Tensor) -> int:
    return id(x.untyped_storage())  # PyTorch keeps one object per storage, and a traced tensor has no address.


def _name(path: tuple) -> str:
    return ''.join(f'[{key!r}]' for key in path)
