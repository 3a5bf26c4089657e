"""Memory of this process."""

from __future__ import annotations

import contextlib
import ctypes


def release() -> None:
    """Give the system back what the C library keeps of freed memory, where it can (glibc).

    Tensors of a few megabytes come from its heaps, one for each thread, and what is freed in their
    middle stays: hundreds of megabytes after a search over many formats.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
