"""Division by multiplication gives the same integers, or is not offered."""

from __future__ import annotations

import pytest
import torch

from qcompiler.kernels.division import factors


def by_multiplication(x: torch.Tensor, hi: float, lo: float) -> torch.Tensor:
    """fma(x, hi, x · lo) as float32: x · hi is exact in float64."""
    high, low = torch.tensor(hi), torch.tensor(lo)
    return (x.double() * high.double() + (x * low).double()).float()


@pytest.mark.parametrize(("low", "high"), [(0, 255), (-128, 127), (-37, 218)])
def test_integers_are_those_of_the_division(low: int, high: int) -> None:
    generator = torch.Generator().manual_seed(low)
    offered = 0
    for _ in range(60):
        scale = 10 ** (torch.rand((), generator=generator) * 6 - 5)
        found = factors(scale, low, high)
        if found is None:
            continue
        offered += 1
        # All floats around every step, and everything between them at random.
        steps = (torch.arange(low, high, dtype=torch.float64) + 0.5) * scale.double()
        bits = steps.float().contiguous().view(torch.int32)[:, None]
        near = (bits + torch.arange(-40, 41, dtype=torch.int32)).view(torch.float32).flatten()
        wide = (torch.rand(20_000, generator=generator) * (high - low + 20) + low - 10) * scale
        x = torch.cat([near, wide])
        want = torch.round(x / scale).clamp(low, high)
        assert torch.equal(torch.round(by_multiplication(x, *found)).clamp(low, high), want)
    assert offered > 50, "a division that is nearly always left would be of no use"


def test_ends() -> None:
    """Powers of two are exact; infinities stay; scales near the ends of float32 are left."""
    found = factors(torch.tensor(0.25), 0, 255)
    assert found is not None
    ends = torch.tensor([float("inf"), float("-inf")])
    assert torch.equal(by_multiplication(ends, *found), ends)
    assert factors(torch.tensor(1e-38), 0, 255) is None
    assert factors(torch.tensor(1e38), 0, 255) is None
