"""BYOL as pure functions on PyTorch: a port of DeepMind's JAX/Haiku implementation.

`byol_func.load_encoder(PATH)` loads a trained encoder. The algorithm is in `byol_func.byol_experiment`.
"""

import os
from typing import Any

__all__ = ['load_encoder']

# By default the threads of an OpenMP program spin where they wait for each other. Two programs on the same
# cores then take ten times as long each, since the spinning threads of one hold the cores that the other needs.
# OpenMP reads this when PyTorch is loaded, so it has no effect on a program that imported torch before.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')


def __getattr__(name: str) -> Any:
    """Imports `load_encoder` on first use, so that importing a part of the package stays cheap."""
    if name == 'load_encoder':
        from byol_func.library import load_encoder

        return load_encoder
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
