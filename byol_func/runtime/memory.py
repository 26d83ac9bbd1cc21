"""Measures the available memory, and makes the allocator keep the large buffers that every step needs again."""

import contextlib
import ctypes
import pathlib

# Parameters of glibc's malloc.h; a trim threshold of -1 means that memory is never returned.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Makes the process keep the memory that it frees, as PyTorch does on a GPU.

    By default glibc returns large blocks to the kernel and gets them again, page by page and filled with zeros, for
    every activation of every step. After this call nothing is returned before the process ends, so fragmentation
    may raise its peak. With another C library the call has no effect.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # Other C libraries have no mallopt.
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_MMAP_MAX, 0)


def available_gib() -> float | None:
    """Returns the GiB of memory that this process can still allocate; None if the system does not report it.

    Only Linux reports it. The number is the smaller of `MemAvailable` and the rest of the container's limit (its
    control group).
    """
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = pathlib.Path('/proc/meminfo').read_text().splitlines()
        found.append(next(int(line.split()[1]) for line in lines if line.startswith('MemAvailable:')) * 1024)
    for limit, used in _CGROUP_FILES:  # 'max' stands for no limit and raises ValueError.
        with contextlib.suppress(OSError, ValueError):
            group = pathlib.Path('/sys/fs/cgroup')
            found.append(int((group / limit).read_text()) - int((group / used).read_text()))
    return max(min(found), 0) / 2**30 if found else None


# The limit and the usage in cgroups version 2, then version 1.
_CGROUP_FILES = (
    ('memory.max', 'memory.current'),
    ('memory/memory.limit_in_bytes', 'memory/memory.usage_in_bytes'),
)
