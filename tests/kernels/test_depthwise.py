"""Depthwise convolution against torch, its integer sums bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from qcompiler.kernels import isa as isas
from qcompiler.kernels.code import Kernel
from qcompiler.kernels.depthwise import EXACT_TAPS, Window, depthwise
from qcompiler.kernels.isa import Isa

Run = Callable[..., Any]
CASES = [  # channels, size, filter, stride, dilation
    (16, 7, 3, 1, 1), (19, 9, 3, 2, 1), (40, 8, 5, 1, 1), (3, 9, 3, 1, 2), (1, 5, 1, 3, 1),
]  # fmt: skip


def built(
    writer: Any, x: Tensor, w: Tensor, stride: int, dilation: int, isa: Isa, name: str = "d"
) -> tuple[Kernel, Any, Tensor]:
    """The kernel, its tensors, torch's answer (N, y, x, C); x is (N, H, W, C), w (C, 1, i, j)."""
    integer = not x.is_floating_point()
    n, h, wide, c = x.shape
    taps = (w.shape[2], w.shape[3])
    want = conv2d(x.permute(0, 3, 1, 2).double(), w.double(), None, stride, 0, dilation, c)
    want = want.permute(0, 2, 3, 1).contiguous()
    e = writer(tuple(want.shape), x, w.flatten(1).T.contiguous().float())
    kind = "int32" if integer else "float32"
    e.store(e.step("anchor", kind), getattr(torch, kind))
    window = Window(
        n, want.shape[1], want.shape[2], c, taps, 0, h * wide * c, stride * wide * c, stride * c,
        dilation * wide * c, dilation * c, integer,
    )  # fmt: skip
    return depthwise(name, e.arguments, window, e.expression, isa), e, want


def images(c: int, size: int, dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(c)
    if dtype == torch.float32:
        return torch.randn(2, size, size, c, generator=g)
    low, high = (0, 256) if dtype == torch.uint8 else (-128, 128)
    return torch.randint(low, high, (2, size, size, c), generator=g).to(dtype)


def filters(c: int, size: int, integer: bool) -> Tensor:
    g = torch.Generator().manual_seed(1)
    if integer:
        return torch.randint(-128, 128, (c, 1, size, size), generator=g)
    return torch.randn(c, 1, size, size, generator=g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int8], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_filters(
    writer: Any, run: Run, case: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    c, size, taps, stride, dilation = case
    x, w = images(c, size, dtype), filters(c, taps, dtype != torch.float32)
    isa = isas.VNNI if c % 2 else isas.AVX2
    kernel, given, want = built(writer, x, w, stride, dilation, isa)
    (found,) = run(kernel, given, isa)
    found = found.reshape(want.shape).double()
    if dtype == torch.float32:
        torch.testing.assert_close(found, want, rtol=0, atol=1e-5)
    else:
        assert torch.equal(found, want)


def test_the_largest_filter_is_exact(writer: Any, run: Run) -> None:
    """All of one sign and as large as can be: float32 still holds every whole number."""
    size = int(EXACT_TAPS**0.5)
    x = torch.full((1, size, size, 16), 255, dtype=torch.uint8)
    w = torch.full((16, 1, size, size), -128)
    w[::2, :, 0, 0] = -127  # odd sums
    kernel, given, want = built(writer, x, w, 1, 1, isas.VNNI)
    (found,) = run(kernel, given, isas.VNNI)
    assert torch.equal(found.double(), want.flatten())


@pytest.mark.parametrize(
    ("target", "isa"),
    [("tvm:aarch64", isas.NEON), ("tvm:armv7", isas.ARMV7), ("tvm:riscv64", isas.SCALAR)],
    ids=str,
)
def test_other_machines(writer: Any, emulate: Run, target: str, isa: Isa) -> None:
    x, w = images(19, 7, torch.uint8), filters(19, 3, True)
    kernel, given, want = built(writer, x, w, 2, 1, isa)
    ((found,),) = emulate(target, [(kernel, given)])
    assert torch.equal(found.double(), want.flatten())
