"""What compiling a step takes on a machine, found out before it is tried."""

import importlib.util
import os
import pathlib
import shutil
import tempfile

import torch


def missing(device: torch.device) -> str | None:
    """What a machine lacks to compile for a device, in words; None if nothing.

    On a CPU that is a C++ compiler; on a GPU it is Triton, a C compiler for it, and a GPU that it knows.
    """
    return _missing_on_gpu(device) if device.type == 'cuda' else _missing_on_cpu()


def _missing_on_cpu() -> str | None:
    names = (os.environ.get('CXX'), 'g++', 'clang++', 'cl')
    if not any(name and shutil.which(name) for name in names):
        return 'a C++ compiler (g++ or clang++)'
    cache = pathlib.Path(os.environ.get('TORCHINDUCTOR_CACHE_DIR') or tempfile.gettempdir())
    place = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    if hasattr(os, 'statvfs') and os.statvfs(place).f_flag & os.ST_NOEXEC:
        return f'a cache whose programs may be run ({place} is mounted noexec; set TORCHINDUCTOR_CACHE_DIR)'
    return None


def _missing_on_gpu(device: torch.device) -> str | None:
    if importlib.util.find_spec('triton') is None:
        return 'Triton (pip install triton)'
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < (7, 0):
        return 'a GPU of compute capability 7.0 or more, this one has {}.{}'.format(*capability)
    names = (os.environ['CC'],) if 'CC' in os.environ else ('gcc', 'clang')  # As Triton itself looks for it.
    return None if any(map(shutil.which, names)) else 'a C compiler for Triton (gcc, clang or what CC names)'
