"""BYOL as pure functions on PyTorch: a port of DeepMind's JAX/Haiku implementation.

`get_config`, `pretrain` and `evaluate` run experiments, and `load_encoder` and `load_classifier` load what they have
trained. The algorithm is in `byol_func.byol_experiment`.
"""

import importlib
import os
from typing import Any

__all__ = ['evaluate', 'get_config', 'load_classifier', 'load_encoder', 'pretrain']

# By default the threads of an OpenMP program spin where they wait for each other. Two programs on the same
# cores then take ten times as long each, since the spinning threads of one hold the cores that the other needs.
# OpenMP reads this when PyTorch is loaded, so it has no effect on a program that imported torch before.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    """Imports a public function on first use, so that importing a part of the package stays cheap."""
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module = importlib.import_module(f'{__name__}.{"library" if name.startswith("load_") else "interface"}')
    return getattr(module, name)
