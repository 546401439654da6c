"""Spares a process on a CPU the page faults of large tensors."""

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# parameters of glibc's mallopt(3)
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_PAD_BYTES = 64 * 2**20


def keep_freed_memory() -> bool:
    """Let the C library keep freed blocks for the next tensor rather than return each to the system.

    A network in 3D allocates and frees tensors of hundreds of megabytes in every layer; faulting their pages in again takes
    a good part of the inference's processor time. ``tests/workflow/test_allocation.py`` counts the faults.

    Returns:
        Whether it is done: on Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all(
        mallopt(key, value)
        for key, value in (
            (_M_MMAP_MAX, 0),
            (_M_TRIM_THRESHOLD, 2**31 - 1),
            (_M_TOP_PAD, _PAD_BYTES),
        )
    )
