"""How much memory there is, and an allocator that keeps the large buffers a step needs over and over."""

import contextlib
import ctypes
import pathlib

# Of glibc's malloc.h; -1 of the first means never.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Lets the process keep the memory it frees, as PyTorch does on a GPU.

    By default glibc gives large blocks back to the kernel and takes them anew, page by page and filled
    with zeros: in every step, for every activation. Now nothing is given back before the process ends,
    and fragments may add to its peak. Where the C library is another one, nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # No mallopt; no way to ask for it.
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_MMAP_MAX, 0)


def available_gib() -> float | None:
    """GiB of memory that this process can still take, in its container too; None where the system does not tell.

    Linux only: `MemAvailable`, and what the limits of the control group leave.
    """
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = pathlib.Path('/proc/meminfo').read_text().splitlines()
        found.append(next(int(line.split()[1]) for line in lines if line.startswith('MemAvailable:')) * 1024)
    for limit, used in _CGROUP_FILES:  # A limit of 'max' is no number.
        with contextlib.suppress(OSError, ValueError):
            group = pathlib.Path('/sys/fs/cgroup')
            found.append(int((group / limit).read_text()) - int((group / used).read_text()))
    return max(min(found), 0) / 2**30 if found else None


# Of versions 2 and 1.
_CGROUP_FILES = (
    ('memory.max', 'memory.current'),
    ('memory/memory.limit_in_bytes', 'memory/memory.usage_in_bytes'),
)
