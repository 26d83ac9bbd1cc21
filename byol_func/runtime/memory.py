"""The C library's allocator, set up for steps that need the same large buffers over and over."""

import contextlib
import ctypes

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
