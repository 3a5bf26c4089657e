"""Grids that are searched, damping that is raised, and the correction of second moments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcompiler.qtype import QType
from qcompiler.rounding import (
    DAMPING,
    SHRINKS,
    gptq,
    keep_moment,
    nearest,
    nearest_grid,
    search_grid,
    weight_axis,
)

KINDS = ["int4:channel", "int4:g16", "int3:g16:affine", "int2:g8:affine", "int8:tensor",
         "float8_e4m3:channel"]  # fmt: skip


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight with heavy tails, and the Hessian of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(12, 48, generator=g) ** 3
    x = torch.randn(200, 48, generator=g) @ (torch.randn(48, 48, generator=g) / 7 + 0.2)
    return weight, 2 * (x.double().T @ x.double())


@pytest.mark.parametrize("text", KINDS)
def test_the_searched_grid_is_the_best_of_the_shrunken_ones(text: str) -> None:
    kind = QType.parse(text)
    weight, hessian = problem()
    scale, zero = search_grid(weight, hessian, kind)
    low, high = kind.ranges(weight, weight_axis(kind))
    size = kind.group or 48

    def errors(rounded: Tensor) -> Tensor:
        delta = (weight - rounded).double()
        parts = [
            ((delta[:, i : i + size] @ hessian[i : i + size, i : i + size])
             * delta[:, i : i + size]).sum(1)
            for i in range(0, 48, size)
        ]  # fmt: skip
        stacked = torch.stack(parts, 1)
        return stacked.sum() if kind.granularity == "tensor" else stacked

    trials = torch.stack(
        [errors(nearest(weight, kind.scale_for(low * s, high * s), kind).weight) for s in SHRINKS]
    )
    got = errors(nearest(weight, (scale, zero), kind).weight)
    torch.testing.assert_close(got, trials.amin(0), rtol=1e-4, atol=1e-6)


def test_clipping_helps_few_bits_and_heavy_tails() -> None:
    kind = QType.parse("int3:channel")
    weight, hessian = problem()

    def error(rounded: Tensor) -> float:
        delta = (weight - rounded).double()
        return float(((delta @ hessian) * delta).sum())

    plain = error(nearest(weight, nearest_grid(weight, kind), kind).weight)
    clipped = error(nearest(weight, search_grid(weight, hessian, kind), kind).weight)
    assert clipped < 0.8 * plain


def test_damping_is_reported() -> None:
    kind = QType.parse("int4:channel")
    weight, hessian = problem()
    assert gptq(weight, hessian, kind).damping == DAMPING
    hessian[5] = hessian[:, 5] = 0
    assert gptq(weight, hessian, kind).silent == 1
    # Indefinite, as rounding can make it: the factorization fails until enough is added.
    broken = hessian - 0.5 * hessian.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    rounded = gptq(weight, broken, kind)
    assert rounded.damping > DAMPING
    assert bool(torch.isfinite(rounded.weight).all())


@pytest.mark.parametrize("text", KINDS)
def test_second_moments_are_kept(text: str) -> None:
    kind = QType.parse(text)
    weight, _ = problem()
    rounded = nearest(weight, nearest_grid(weight, kind), kind)
    kept = keep_moment(weight, rounded, kind)
    size = kind.group or 48

    def moments(value: Tensor) -> Tensor:
        squares = value.double().unflatten(1, (-1, size)).square()
        return squares.sum() if kind.granularity == "tensor" else squares.sum(-1)

    silent = moments(rounded.weight) == 0
    expected = torch.where(silent, 0.0, moments(weight))
    torch.testing.assert_close(moments(kept.weight), expected, rtol=1e-5, atol=1e-9)
    q = kind.quantize(rounded.weight, rounded.scale, rounded.zero_point, weight_axis(kind))
    same = kind.quantize(kept.weight, kept.scale, kept.zero_point, weight_axis(kind))
    assert torch.equal(q, same)


@pytest.mark.parametrize("text", ["int4:channel", "int4:g16", "int3:g16:affine", "int4:tensor"])
def test_outputs_in_parts_give_what_they_give_at_once(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(3)
    weight, x = torch.randn(11, 32, generator=g), torch.randn(64, 32, generator=g).double()
    hessian, kind = 2 * x.T @ x, QType.parse(text)
    whole = gptq(weight, hessian, kind, grid=search_grid(weight, hessian, kind))
    monkeypatch.setattr("qcompiler.rounding.ROWS", 4)
    parts = gptq(weight, hessian, kind, grid=search_grid(weight, hessian, kind))
    torch.testing.assert_close(parts.scale, whole.scale, rtol=0, atol=0)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=0, atol=0)


@pytest.mark.parametrize("text", ["int8:channel", "int4:g16", "uint4:g16:affine", "int4:tensor"])
def test_a_rounded_weight_is_held_as_integers(text: str) -> None:
    kind = QType.parse(text)
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(5))
    rounded = nearest(weight, nearest_grid(weight, kind), kind)
    assert rounded.stored.dtype in (torch.int8, torch.uint8)
    assert torch.equal(rounded.weight, kind.round_trip(weight, 1 if kind.group else 0))
    assert rounded.weight is not rounded.weight
