"""The float32 product against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompiler.kernels import isa as isas
from qcompiler.kernels.code import Kernel
from qcompiler.kernels.isa import Isa
from qcompiler.kernels.matmul_float import matmul_float, pack, reference
from qcompiler.kernels.tiles import Product

NATIVE = [isas.VNNI, isas.AVX2, isas.SSE, isas.NEON, isas.ARMV7, isas.SCALAR]
FOREIGN = {
    "tvm:aarch64": isas.NEON, "tvm:aarch64:dotprod": isas.DOTPROD, "tvm:armv7": isas.ARMV7,
    "tvm:riscv64": isas.SCALAR,
}  # fmt: skip

Run = Callable[..., Any]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bare(writer: Any, isa: Isa, x: Tensor, w: Tensor, name: str = "g") -> tuple[Kernel, Any]:
    (m, k), n = x.shape, w.shape[0]
    e = writer((m, n), x, pack(w, isa))
    e.store(e.step("anchor", "float32"))
    return matmul_float(name, e.arguments, Product(m, n, k, k), e.expression, isa), e


def close(found: Tensor, x: Tensor, w: Tensor) -> None:
    """One rounding of float32 for each of k sums, in units of Σ|x·w| (Higham 2002, eq. 3.5)."""
    bound = x.shape[1] * 2**-24 * (x.abs().double() @ w.abs().double().T) + 1e-30
    off = (found.reshape(bound.shape).double() - reference(x, w)).abs()
    assert bool((off <= bound).all())


@pytest.mark.parametrize("isa", NATIVE, ids=lambda isa: isa.name)
@settings(deadline=None, max_examples=5, derandomize=True)
@given(m=st.integers(1, 40), n=st.integers(1, 70), k=st.integers(1, 67))
@example(m=1, n=96, k=64)
@example(m=17, n=49, k=1)
def test_products(writer: Any, run: Run, isa: Isa, m: int, n: int, k: int) -> None:
    x, w = normal(m, k), normal(n, k, seed=1)
    kernel, given_ = bare(writer, isa, x, w)
    close(run(kernel, given_, isa)[0], x, w)


def test_machines_agree_to_the_bit(writer: Any, run: Run) -> None:
    """One chain of fused multiply-adds for each output: tiles and vectors do not change it."""
    x, w = normal(9, 50), normal(45, 50, seed=1)
    found = []
    for isa in (isas.VNNI, isas.AVX2, isas.SSE):
        kernel, given_ = bare(writer, isa, x, w)
        found.append(run(kernel, given_, isa)[0])
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("isa", [isas.VNNI, isas.AVX2], ids=lambda isa: isa.name)
def test_epilogue(writer: Any, run: Run, isa: Isa) -> None:
    """Bias, GELU, then the residual, which is broadcast over the rows' first dimension."""
    x, w, bias, residual = normal(6, 20), normal(37, 20, seed=1), normal(37), normal(3, 37)
    e = writer((2, 3, 37), x, pack(w, isa))
    value = e.step("add", "float32", e.step("anchor", "float32"), e.load(bias, (0, 0, 1)))
    e.store(value)
    value = e.step("gelu", "float32", value)
    value = e.step("add", "float32", value, e.load(residual, (0, 37, 1)))
    e.store(value, strides=(3 * 40, 40, 1), offset=2, size=2 * 3 * 40 + 2)
    kernel = matmul_float("g", e.arguments, Product(6, 37, 20, 20), e.expression, isa)
    first, second = run(kernel, e, isa)
    want = reference(x, w) + bias
    torch.testing.assert_close(first.reshape(6, 37).double(), want, rtol=0, atol=1e-5)
    want = torch.nn.functional.gelu(want).reshape(2, 3, 37) + residual
    rows = second[2:].reshape(2, 3, 40)
    torch.testing.assert_close(rows[..., :37].double(), want, rtol=0, atol=1e-5)
    assert bool((rows[..., 37:] == 77).all())  # nothing is written beside the rows
    assert bool((second[:2] == 77).all())


def test_a_batch_of_products(writer: Any, run: Run) -> None:
    """Each member of the batch has its own right-hand side."""
    m, n, k = 4, 18, 7
    x, w = normal(3, m, k), normal(3, n, k, seed=1)
    packed = torch.stack([pack(one, isas.VNNI) for one in w])
    e = writer((3, m, n), x, packed)
    e.store(e.step("anchor", "float32"))
    product = Product(m, n, k, k, 0, (3,), (m * k,), (packed[0].numel(),))
    kernel = matmul_float("g", e.arguments, product, e.expression, isas.VNNI)
    (found,) = run(kernel, e, isas.VNNI)
    for part, left, right in zip(found.reshape(3, -1), x, w, strict=True):
        close(part, left, right)


@pytest.mark.parametrize("target", FOREIGN)
def test_other_machines(writer: Any, emulate: Run, target: str) -> None:
    given_ = [(normal(m, k), normal(n, k, seed=1)) for m, n, k in [(1, 33, 8), (7, 50, 37)]]
    isa = FOREIGN[target]
    cases = [bare(writer, isa, x, w, f"g{i}") for i, (x, w) in enumerate(given_)]
    for (found,), (x, w) in zip(emulate(target, cases), given_, strict=True):
        close(found, x, w)
