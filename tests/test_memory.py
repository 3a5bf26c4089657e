"""What is freed goes back to the system."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from qcompiler.memory import Sampler, peak_memory, release

STATUS = Path("/proc/self/status")


def resident() -> int:
    """Bytes of this process in memory that are no file's."""
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not STATUS.is_file(), reason="this system does not say what a process holds")
def test_freed_memory_goes_back() -> None:
    kept, size = [], 1 << 16  # small enough for the C library's heap
    tensors = [torch.ones(size // 4) for _ in range(4096)]
    kept = tensors[::64]  # so that the heap's end is in use
    before = resident()
    del tensors
    release()
    freed = before - resident()
    assert freed > 150e6, f"{freed / 1e6:.0f} of 260 MB"
    assert len(kept) == 64


@pytest.mark.skipif(not STATUS.is_file(), reason="this system does not say what a process holds")
def test_a_peak_between_two_looks_of_ours_is_seen() -> None:
    with Sampler() as sampler:
        before = sampler.take()
        held = torch.ones(50_000_000)  # 200 MB
        time.sleep(0.3)
        del held
        during = sampler.take()
        after = sampler.take()
    assert during - before > 180e6
    assert after < during - 180e6
    assert peak_memory() > during - 10e6  # the system's two counts differ by some pages
