"""Memory of freed tensors, kept for the next step."""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`, from malloc.h."""

MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed, for the whole process.

    glibc takes large tensors from the system and gives them back one by one, and the system clears every page anew:
    a tenth of the time of a gated training step. Afterwards the process stays as large as its largest step was.

    Returns:
        Whether the C library has the parameters: only glibc's has.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(name, MOST) for name in (MMAP_THRESHOLD, TRIM_THRESHOLD)])
