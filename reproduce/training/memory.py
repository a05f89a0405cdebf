"""The CPU allocator: keep freed memory for the next update."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Let glibc reuse large blocks instead of giving each back to the kernel.

    By default every activation of more than 32 MiB is mapped anew in every update and faulted in
    page by page; kept, an update of ``mini`` took 0.47 s instead of 0.59 s (median of 8, 2 cores).
    Numbers don't change; the process keeps its peak memory.

    Returns:
        Whether the C library took it (glibc); nothing happens elsewhere.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
