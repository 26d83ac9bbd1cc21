"""Golden values of the official code: reading the files, and Haiku's names and layouts in ours.

The files are those of `tests/golden`, described in the README there, or another set of the same
form in the directory named by BYOL_GOLDEN_DIR. A file that is missing is an error, never a skip.
"""

import functools
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch

DIRECTORY = pathlib.Path(os.environ.get('BYOL_GOLDEN_DIR') or pathlib.Path(__file__).parents[1] / 'golden')
DTYPES = (torch.float32, torch.float64)

Path = tuple[str, ...]


@functools.cache
def load(name: str) -> Mapping[str, np.ndarray]:
    """All arrays of one golden file, by key."""
    with np.load(DIRECTORY / name, allow_pickle=False) as arrays:
        return dict(arrays)


# --- Keys -------------------------------------------------------------------------------------


def below(data: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays under `<prefix>/`, by the rest of their key."""
    return {k[len(prefix) + 1 :]: v for k, v in data.items() if k.startswith(prefix + '/')}


def children(data: Iterable[str], prefix: str = '', pattern: str = '.*') -> list[str]:
    """Names that match `pattern` directly below a prefix, in the order of the file."""
    start = prefix + '/' if prefix else ''
    names = (k[len(start) :].split('/')[0] for k in data if k.startswith(start))
    return [name for name in dict.fromkeys(names) if re.fullmatch(pattern, name)]


def numbered(data: Iterable[str], prefix: str, word: str) -> list[int]:
    """The numbers n of all `<prefix>/<word><n>/...`, ascending."""
    names = children(data, prefix, rf'{word}\d+')
    return sorted(int(name.removeprefix(word)) for name in names)


# --- Names ------------------------------------------------------------------------------------


def unchanged(key: str) -> Path:
    """`a/b/w` -> ('a', 'b', 'w')."""
    return tuple(part for part in key.split('/') if part != '~')


def in_experiment(key: str) -> Path:
    """Inside BYOL the encoder is 'encoder', which Haiku names after its class."""
    root, *rest = unchanged(key)
    return (root if root in ('projector', 'predictor', 'classifier') else 'encoder', *rest)


def alone(key: str) -> Path:
    """A network on its own has its modules at the top level."""
    return unchanged(key)[1:]


def as_classifier(key: str) -> Path:
    """The evaluation's `linear` is our 'classifier'."""
    return ('classifier', *alone(key))


# --- Layouts ----------------------------------------------------------------------------------


def scalar(array: np.ndarray) -> float | int | bool:
    """A 0-d array as the number a config holds: float32 0.9 is 0.9, not 0.8999999761581421."""
    return float(str(array)) if array.dtype.kind == 'f' else array.item()


def tensor(array: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A fresh tensor: floats in `dtype`, integers and bools as they are."""
    values = torch.tensor(np.array(array, order='C'))  # Keeps 0-d arrays 0-d.
    return values.to(dtype) if values.is_floating_point() else values


def images(array: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`[..., H, W, C]` -> `[..., C, H, W]`."""
    return tensor(np.moveaxis(array, -1, -3), dtype)


def leaf(name: str, array: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A parameter or a moving average: HWIO -> OIHW; normalisation `[1, .., C]` -> `[C]`."""
    if name == 'w' and array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    elif name in ('scale', 'offset', 'hidden', 'average'):
        array = array.reshape(-1)
    return tensor(array, dtype)


def tree(
    data: Mapping[str, np.ndarray],
    prefix: str,
    dtype: torch.dtype = torch.float32,
    rename: Callable[[str], Path] = in_experiment,
) -> dict:
    """Everything under a prefix as our nested dict, in our layouts."""
    arrays = below(data, prefix).items()
    return nest({rename(key): leaf(key.split('/')[-1], value, dtype) for key, value in arrays})


def nest(leaves: Mapping[Path, torch.Tensor]) -> dict:
    """{('a', 'b'): x} -> {'a': {'b': x}}."""
    root: dict = {}
    for path, value in leaves.items():
        node = root
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return root


def flatten(nested: Mapping, path: Path = ()) -> dict[Path, torch.Tensor]:
    """{'a': {'b': x}} -> {('a', 'b'): x}."""
    leaves = {}
    for key, value in nested.items():
        is_node = isinstance(value, Mapping)
        leaves |= flatten(value, (*path, key)) if is_node else {(*path, key): value}
    return leaves


# --- The recipe of parameters that are too large to store --------------------------------------


def _recipe_normal(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    state = np.random.RandomState((zlib.crc32(key.encode()) ^ seed) & 0xFFFFFFFF)
    return state.standard_normal(shape)


def recipe_param(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The parameter `<module>/<name>` in Haiku's layout."""
    z = _recipe_normal(key, shape, seed)
    value = {
        'w': lambda: z * np.sqrt(2 / np.prod(shape[:-1])),
        'b': lambda: 0.1 * z,
        'scale': lambda: 1 + 0.2 * z,
        'offset': lambda: 0.2 * z,
    }[key.split('/')[-1]]()
    return value.astype(np.float32)


def recipe_average(module: str, shape: tuple[int, ...], seed: int, decay: float, counter: int) -> dict[str, np.ndarray]:
    """A moving average `<module>/{hidden,average,counter}` of a mean_ema or a var_ema."""
    z = _recipe_normal(f'{module}/ema', shape, seed)
    average = 0.3 * z if module.endswith('mean_ema') else np.exp(0.3 * z)
    return {
        f'{module}/hidden': (average * (1 - decay**counter)).astype(np.float32),
        f'{module}/average': average.astype(np.float32),
        f'{module}/counter': np.int32(counter),
    }


# --- Comparisons ------------------------------------------------------------------------------

# The golden README gives, group by group, how far the official code in float32 (what is stored) is
# from the official code in float64, relative to the largest element of the tensor. These figures:
LAYERS = 1e-6  # outputs of one layer, and of the losses
LARS = 4e-6  # after ten steps; what has decayed to little carries the rounding of what it was
OUTPUTS = 6e-6  # of networks; also their states
GRADIENTS = 2e-5  # of networks
LARGE_OUTPUTS = 1e-5  # of networks_large, and its gradients
LARGE_DEEP_TRAINING = 1e-4  # of ResNet50 with batch statistics, and these
BYOL_GRADIENTS = 3e-5
BYOL_LOGS = 3e-6
BYOL_STATES = 4e-5  # parameters, momentum and averages after several updates
EVAL_FIRST = 1e-5  # after the first update of the evaluation's training
EVAL_LATER = 1.2e-4
# Over several updates in float32 the state drifts by 1e-4 of itself, which carries some unit across
# the kink of its ReLU: a float64 update from such a state is off by 3e-3 too. So a chain of float32
# updates is only held to this; the same chain in float64 is held to the figures above.
FLOAT32_CHAIN = 1e-2
# A bias in front of a BatchNorm has no gradient but rounding; it and what it moves are compared
# absolutely.
NO_GRADIENT = (('projector', 'linear', 'b'), ('predictor', 'linear', 'b'))
NO_GRADIENT_ATOL = 1e-6


def limit(float32_error: float, dtype: torch.dtype, step: int = 1) -> float:
    """The largest difference allowed, from the official code's own error in float32.

    A float32 port rounds too, in another order: five to ten times the error, as the README
    suggests. A float64 port has no error of its own: the figure itself, twice, because the README
    rounds its figures. `step` counts the updates from 1.
    """
    if dtype == torch.float32 and step > 1:
        return FLOAT32_CHAIN
    return float32_error * (2 if dtype == torch.float64 else 8)


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    rtol_of_max: float,
    path: str = '',
    atol: float = 0.0,
) -> None:
    """Compares with a difference relative to the largest element of the expected tensor.

    Integers and bools must be equal. `path` is what the message calls the tensor.
    """
    assert isinstance(actual, torch.Tensor), f'{path}: {type(actual).__name__} is not a tensor'
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    assert actual.shape == expected.shape, f'{path}: shape {actual.shape}, not {expected.shape}'
    if not expected.is_floating_point():
        assert actual.dtype == expected.dtype, f'{path}: {actual.dtype}, not {expected.dtype}'
        assert torch.equal(actual, expected), f'{path}: {actual}, not {expected}'
        return
    assert actual.is_floating_point(), f'{path}: {actual.dtype} is not floating-point'
    assert actual.isfinite().all(), f'{path}: not finite'
    difference = (actual.double() - expected.double()).abs().max().item()
    largest = expected.abs().max().item()
    allowed = rtol_of_max * largest + atol
    assert difference <= allowed, (
        f'{path}: differs by {difference:.3g}, which is {difference / max(largest, 1e-30):.3g} of'
        f' the largest element {largest:.3g}; allowed {rtol_of_max:.3g} of it, plus {atol:.3g}'
    )


def _atol(path: Path) -> float:
    return NO_GRADIENT_ATOL if path[-3:] in NO_GRADIENT else 0.0


def assert_trees_close(actual: Mapping, expected: Mapping, rtol_of_max: float, path: str = '') -> None:
    """Compares two nested dicts: the same paths, then tensor by tensor."""
    actual_leaves, expected_leaves = flatten(actual), flatten(expected)
    missing = expected_leaves.keys() - actual_leaves.keys()
    extra = actual_leaves.keys() - expected_leaves.keys()
    assert not missing and not extra, f'{path}: missing {sorted(missing)}, extra {sorted(extra)}'
    for where, value in expected_leaves.items():
        name = '/'.join((path, *where))
        assert_close(actual_leaves[where], value, rtol_of_max, name, _atol(where))


def assert_norms_close(
    trees: Mapping[str, Mapping],
    keys: Iterable[str],
    norms: np.ndarray,
    rtol: float,
    path: str = '',
    rename: Callable[[str], Path] = in_experiment,
) -> None:
    """Compares the L2 norm of every tensor of some named trees with the norms stored for `keys`.

    A key is `<name of the tree>/<Haiku's key>`; the keys must name every leaf of the trees.
    """
    leaves = flatten(trees)
    keys = [str(key) for key in keys]
    paths = [(key.split('/')[0], *rename(key.split('/', 1)[1])) for key in keys]
    assert sorted(paths) == sorted(leaves), f'{path}: {set(paths) ^ set(leaves)} are unpaired'
    for key, where, norm in zip(keys, paths, norms, strict=True):
        actual = torch.linalg.vector_norm(leaves[where].double())
        # The bound on one element, in the norm of all.
        atol = _atol(where) * leaves[where].numel() ** 0.5
        assert_close(actual, torch.tensor(float(norm)), rtol, f'{path}/norm of {key}', atol)
