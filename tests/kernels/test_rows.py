"""Norms, softmax and reductions against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompiler.errors import UnsupportedError
from qcompiler.kernels import isa as isas
from qcompiler.kernels.rows import reduction, rows

Run = Callable[..., Any]
KINDS = ("layer_norm", "rms_norm", "softmax")
REDUCE: dict[str, Callable[..., Tensor]] = {
    "sum": torch.sum, "mean": torch.mean, "max": torch.amax, "min": torch.amin,
}  # fmt: skip


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def normalized(kind: str, x: Tensor, epsilon: float) -> Tensor:
    x, width = x.double(), (x.shape[-1],)
    if kind == "layer_norm":
        return torch.nn.functional.layer_norm(x, width, eps=epsilon)
    if kind == "rms_norm":
        return torch.nn.functional.rms_norm(x, width, eps=epsilon)
    return x.softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=5, derandomize=True)
@given(count=st.integers(1, 9), width=st.integers(1, 70))
@example(count=3, width=384)
@example(count=1, width=16)
def test_rows(writer: Any, run: Run, kind: str, count: int, width: int) -> None:
    x = 3 * normal(count, width) + 0.5
    scale, shift = normal(width, seed=1), normal(width, seed=2)
    e = writer((count, width), x)
    source = writer((count, width), x)
    source.load(x)
    value = e.step("mul", "float32", e.step("anchor", "float32"), e.load(scale, (0, 1)))
    e.store(e.step("add", "float32", value, e.load(shift, (0, 1))))
    kernel = rows("r", e.arguments, kind, source.expression, e.expression, 1e-5)
    (found,) = run(kernel, e, isas.VNNI)
    want = normalized(kind, x, 1e-5) * scale + shift
    # A variance near zero (one column, two close ones) magnifies the rounding of the mean by 1/√ε.
    tight = width > 4 or kind != "layer_norm"
    torch.testing.assert_close(
        found.reshape(count, width).double(), want, rtol=0, atol=5e-6 if tight else 5e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_that_is_computed(writer: Any, run: Run, kind: str) -> None:
    """The row's value is an expression: a product of strided tensors, one of them broadcast."""
    x, factor = normal(4, 5, 80), normal(4, 1, 40, seed=1)
    source = writer((4, 5, 40), x, factor)
    left = source.load(x, (400, 80, 2), offset=1)
    source.step("mul", "float32", left, source.load(factor, (40, 0, 1)))
    e = writer((4, 5, 40), x, factor)
    e.store(e.step("anchor", "float32"))
    kernel = rows("r", e.arguments, kind, source.expression, e.expression, 1e-6)
    (found,) = run(kernel, e, isas.AVX2)
    want = normalized(kind, x[:, :, 1::2] * factor, 1e-6)
    torch.testing.assert_close(found.reshape(4, 5, 40).double(), want, rtol=0, atol=2e-6)


def test_softmax_of_large_scores(writer: Any, run: Run) -> None:
    """The largest is taken off first; shares below e^−87 may come out as that."""
    x = torch.tensor([[1e4, 1e4 - 1.0, 0.0] + [-1e30] * 17])
    source = writer((1, 20), x)
    source.load(x)
    e = writer((1, 20), x)
    e.store(e.step("anchor", "float32"))
    kernel = rows("r", e.arguments, "softmax", source.expression, e.expression)
    (found,) = run(kernel, e, isas.VNNI)
    torch.testing.assert_close(found[None].double(), x.double().softmax(-1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", REDUCE)
@pytest.mark.parametrize(
    ("shape", "dims"),
    [((5, 50), (1,)), ((2, 3, 4, 20), (2, 3)), ((40,), (0,)), ((3, 1, 17), (2,))],
    ids=str,
)
def test_reductions(
    writer: Any, run: Run, kind: str, shape: tuple[int, ...], dims: tuple[int, ...]
) -> None:
    x = normal(*shape) - 2
    outer = len(shape) - len(dims)
    source = writer(shape, x)
    source.load(x)
    e = writer(shape[:outer], x)
    e.store(e.step("anchor", "float32"))
    kernel = reduction("r", e.arguments, kind, source.expression, outer, e.expression)
    (found,) = run(kernel, e, isas.VNNI)
    want = REDUCE[kind](x.double(), dims)
    torch.testing.assert_close(found.reshape(want.shape).double(), want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("channels", [3, 16, 40])
@pytest.mark.parametrize("kind", ["mean", "max"])
def test_channels_last(writer: Any, run: Run, kind: str, channels: int) -> None:
    """Over positions whose channels lie side by side: vectors run along the channels."""
    x = normal(2, 7, 7, channels)
    shape = (2, channels, 7, 7)
    source = writer(shape, x)
    source.load(x, (49 * channels, 1, 7 * channels, channels))
    e = writer((2, channels), x)
    value = e.step("anchor", "float32")
    e.store(e.step("mul", "float32", value, e.number(2.0)))
    kernel = reduction("r", e.arguments, kind, source.expression, 2, e.expression)
    (found,) = run(kernel, e, isas.VNNI)
    want = 2 * REDUCE[kind](x.double(), (1, 2))
    torch.testing.assert_close(found.reshape(2, channels).double(), want, rtol=2e-6, atol=1e-6)


def test_an_unknown_kind(writer: Any) -> None:
    x = normal(2, 16)
    source = writer((2, 16), x)
    source.load(x)
    with pytest.raises(UnsupportedError, match="no row kernel 'median'"):
        rows("r", source.arguments, "median", source.expression, source.expression)


@pytest.mark.parametrize("target", ["tvm:aarch64", "tvm:armv7", "tvm:riscv64"])
def test_other_machines(writer: Any, emulate: Run, target: str) -> None:
    x, cases = 3 * normal(5, 50), []
    for kind in KINDS:
        source, e = writer((5, 50), x), writer((5, 50), x)
        source.load(x)
        e.store(e.step("anchor", "float32"))
        cases.append((rows(kind, e.arguments, kind, source.expression, e.expression, 1e-5), e))
    for kind, (found,) in zip(KINDS, emulate(target, cases), strict=True):
        want = normalized(kind, x, 1e-5)
        torch.testing.assert_close(found.reshape(5, 50).double(), want, rtol=0, atol=2e-6)
