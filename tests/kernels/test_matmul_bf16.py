"""The bfloat16 product against float64, and bfloat16 numbers in expressions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompiler.kernels import isa as isas
from qcompiler.kernels.bfloat16 import pack
from qcompiler.kernels.code import Kernel
from qcompiler.kernels.elementwise import elementwise
from qcompiler.kernels.isa import Isa
from qcompiler.kernels.matmul_bf16 import matmul_bf16, reference
from qcompiler.kernels.tiles import Product

Run = Callable[..., Any]
BF16 = torch.bfloat16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def made(writer: Any, isa: Isa, x: Tensor, w: Tensor, name: str = "g") -> tuple[Kernel, Any]:
    """Rows are as long as the instruction's steps make them; what is beyond k must not count."""
    (m, k), n = x.shape, w.shape[0]
    deep = -(-k // isa.narrow_depth) * isa.narrow_depth
    rows = torch.full((m, deep), 3.0, dtype=BF16)
    rows[:, :k] = x
    e = writer((m, n), rows, pack(w.float(), isa))
    e.store(e.step("anchor", "float32"))
    return matmul_bf16(name, e.arguments, Product(m, n, deep, deep), e.expression, isa), e


def close(found: Tensor, x: Tensor, w: Tensor) -> None:
    """Products are exact; at most one rounding of float32 for each of k sums (Higham 2002, 3.5).

    VDPBF16PS takes what is below the smallest normal float for zero.
    """
    bound = x.shape[1] * 2**-23 * (x.double().abs() @ w.double().abs().T) + 1e-30
    off = (found.reshape(bound.shape).double() - reference(x, w)).abs()
    assert bool((off <= bound).all())


@settings(deadline=None, max_examples=10, derandomize=True)
@given(m=st.integers(1, 40), n=st.integers(1, 70), k=st.integers(1, 67))
@example(m=1, n=96, k=64)
@example(m=17, n=49, k=1)
def test_products(writer: Any, run: Run, m: int, n: int, k: int) -> None:
    x, w = normal(m, k), normal(n, k, seed=1)
    kernel, given_ = made(writer, isas.VNNI_BF16, x, w)
    close(run(kernel, given_, isas.VNNI_BF16)[0], x, w)


def test_arm(writer: Any, emulate: Run) -> None:
    """BFMMLA makes two rows at once: odd and even numbers of them, and one alone."""
    sizes = [(1, 33, 8), (2, 16, 4), (7, 50, 37), (13, 16, 12)]
    given_ = [(normal(m, k), normal(n, k, seed=1)) for m, n, k in sizes]
    isa = isas.I8MM_BF16
    cases = [made(writer, isa, x, w, f"g{i}") for i, (x, w) in enumerate(given_)]
    for (found,), (x, w) in zip(emulate("tvm:aarch64:bf16", cases), given_, strict=True):
        close(found, x, w)


def test_a_batch_of_products(writer: Any, run: Run) -> None:
    m, n, k, isa = 4, 18, 6, isas.VNNI_BF16
    x, w = normal(3, m, k), normal(3, n, k, seed=1)
    packed = torch.stack([pack(one.float(), isa) for one in w])
    e = writer((3, m, n), x, packed)
    e.store(e.step("anchor", "float32"))
    product = Product(m, n, k, k, 0, (3,), (m * k,), (packed[0].numel(),))
    (found,) = run(matmul_bf16("g", e.arguments, product, e.expression, isa), e, isa)
    for part, left, right in zip(found.reshape(3, -1), x, w, strict=True):
        close(part, left, right)


@pytest.mark.parametrize("isa", [isas.VNNI_BF16, isas.AVX2, isas.SCALAR], ids=lambda i: i.name)
def test_rounding_is_that_of_torch(writer: Any, run: Run, isa: Isa) -> None:
    """Ties to even, overflow to infinity, subnormal numbers, infinities; NaN stays NaN."""
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0))
    x = bits.to(torch.int32).view(torch.float32)
    ties = torch.arange(0x3F800000, 0x3F800000 + (1 << 20), 1 << 15, dtype=torch.int32)
    edge = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1e-45]
    x = torch.cat([x, ties.view(torch.float32), torch.tensor(edge)])
    e = writer(tuple(x.shape), x)
    rounded = e.step("cast", "bfloat16", e.load(x))
    e.store(rounded, BF16)
    e.store(e.step("cast", "float32", rounded))
    narrow, wide = run(elementwise("e", e.arguments, e.expression), e, isa)
    want = x.to(BF16)
    for found in (narrow, wide):
        assert torch.equal(found.isnan(), want.isnan())
        kept = ~want.isnan()
        assert torch.equal(found[kept].float(), want[kept].float())


def test_bfloat16_is_read(writer: Any, run: Run) -> None:
    x = normal(3, 37)
    e = writer((3, 37), x)
    value = e.step("cast", "float32", e.load(x))
    e.store(e.step("add", "float32", value, value))
    (found,) = run(elementwise("e", e.arguments, e.expression), e, isas.VNNI_BF16)
    assert torch.equal(found.reshape(3, 37), 2 * x.float())
