"""Describes the environment of a run: versions and hardware."""

import functools
import importlib.metadata
import os
import pathlib
import platform
import subprocess

import torch

from byol_func.errors import counted

_PACKAGES = ('torch', 'torchvision', 'optree', 'numpy', 'scikit-learn')


@functools.cache
def describe() -> dict[str, str]:
    """Returns human-readable names and values of versions and hardware; omits those that cannot be determined."""
    found = {'byol_func': _commit(), 'Python': platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found['system'] = platform.platform()
    found['CPU'] = f'{_cpu()}, {counted(os.cpu_count() or 1, "core")}'
    if hasattr(os, 'sysconf') and 'SC_PHYS_PAGES' in os.sysconf_names:
        found['memory'] = f'{os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30:.1f} GiB'
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found['GPU'] = ', '.join(names) + f' (CUDA {torch.version.cuda})'
    return {name: value for name, value in found.items() if value}


def _cpu() -> str:
    try:
        lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
        return next(line.split(':', 1)[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):  # Not Linux, or not x86.
        return platform.processor() or platform.machine()


def _commit() -> str:
    """Returns the commit of the code and whether files differ from it; empty outside a repository."""
    folder = pathlib.Path(__file__).resolve().parent.parent
    if not (folder / '.git').exists():  # An installed package, perhaps inside another repository.
        return ''
    try:
        git = ['git', '-C', str(folder)]
        run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=5, check=True)
        commit = run([*git, 'rev-parse', '--short=12', 'HEAD']).stdout.strip()
        changed = run([*git, 'status', '--porcelain', '--untracked-files=no']).stdout.strip()
        return f'commit {commit}{" with changes" if changed else ""}'
    except (OSError, subprocess.SubprocessError):
        return ''
