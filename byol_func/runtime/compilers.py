"""Checks whether this machine has what `torch.compile` needs, before a step is compiled."""

import importlib.util
import os
import pathlib
import shutil
import tempfile

import torch


def missing(device: torch.device) -> str | None:
    """Returns a text that says what this machine lacks to compile for a device; None if it lacks nothing.

    A CPU needs a C++ compiler and a cache folder whose programs may be run; a GPU needs Triton, a C compiler for
    Triton, and a compute capability that Triton supports.
    """
    return _missing_on_gpu(device) if device.type == 'cuda' else _missing_on_cpu()


def _missing_on_cpu() -> str | None:
    names = (os.environ.get('CXX'), 'g++', 'clang++', 'cl')
    if not any(name and shutil.which(name) for name in names):
        return 'a C++ compiler (g++ or clang++)'
    cache = pathlib.Path(os.environ.get('TORCHINDUCTOR_CACHE_DIR') or tempfile.gettempdir())
    place = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    if hasattr(os, 'statvfs') and os.statvfs(place).f_flag & os.ST_NOEXEC:
        return f'a cache folder from which programs may be run ({place} is mounted noexec; set TORCHINDUCTOR_CACHE_DIR)'
    return None


def _missing_on_gpu(device: torch.device) -> str | None:
    if importlib.util.find_spec('triton') is None:
        return 'Triton (pip install triton)'
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < (7, 0):
        return 'a GPU of compute capability 7.0 or more, this one has {}.{}'.format(*capability)
    names = (os.environ['CC'],) if 'CC' in os.environ else ('gcc', 'clang')  # Triton's own search order.
    return None if any(map(shutil.which, names)) else 'a C compiler for Triton (gcc, clang or the one that CC names)'
