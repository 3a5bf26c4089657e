"""Memory of this process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from pathlib import Path

STATM = Path("/proc/self/statm")
INTERVAL = 0.05  # seconds between looks


def release() -> None:
    """Give the system back what the C library keeps of freed memory, where it can (glibc).

    Tensors of a few megabytes come from its heaps, one for each thread, and what is freed in their
    middle stays: hundreds of megabytes after a search over many formats.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory() -> int:
    """Bytes of memory that this process has held at most; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Sampler:
    """Looks 20 times a second at how much memory this process holds, mapped files included.

    The system's own high-water mark is of the process's whole life, and setting it back (Linux)
    would spoil it for whoever measures from outside. Peaks shorter than the interval are missed.
    Where the system does not say (Linux does), everything is 0.
    """

    def __init__(self) -> None:
        self._most, self._lock = 0, threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)

    def __enter__(self) -> Sampler:
        if STATM.is_file():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def take(self) -> int:
        """Bytes that were held at most since this was asked last."""
        self._look()
        with self._lock:
            most, self._most = self._most, 0
        return most

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        with contextlib.suppress(OSError), self._lock:
            pages = int(STATM.read_text().split()[1])
            self._most = max(self._most, pages * os.sysconf("SC_PAGE_SIZE"))
