"""The int8 product: int32 accumulators and requantized outputs, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompiler import ops
from qcompiler.kernels import isa as isas
from qcompiler.kernels.code import Kernel
from qcompiler.kernels.isa import Isa, zero_shift
from qcompiler.kernels.matmul_int8 import matmul_int8, pack, reference
from qcompiler.kernels.tiles import ROWS, Product

NATIVE = [isas.VNNI, isas.AVX2, isas.SSE, isas.NEON, isas.ARMV7, isas.SCALAR]
FOREIGN = {
    "tvm:aarch64": isas.NEON, "tvm:aarch64:dotprod": isas.DOTPROD, "tvm:armv7": isas.ARMV7,
    "tvm:aarch64:i8mm": isas.I8MM, "tvm:riscv64": isas.SCALAR,
}  # fmt: skip

Run = Callable[..., Any]


def integers(seed: int, low: int, high: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator)


def activations(signed: bool, *shape: int, seed: int = 0) -> Tensor:
    """All values, the extremes above all: they are what saturates where it should not."""
    low, high = (-128, 128) if signed else (0, 256)
    x = integers(seed, low, high, *shape)
    extreme = integers(seed + 1, 0, 3, *shape)
    x = torch.where(extreme == 0, torch.full_like(x, low), x)
    x = torch.where(extreme == 1, torch.full_like(x, high - 1), x)
    return x.to(torch.int8 if signed else torch.uint8)


def weights(n: int, k: int, seed: int = 7) -> Tensor:
    w = integers(seed, -128, 128, n, k)
    return torch.where(integers(seed + 1, 0, 4, n, k) == 0, torch.full_like(w, 127), w).to(
        torch.int8
    )


def bare(
    writer: Any, isa: Isa, x: Tensor, w: Tensor, name: str = "g", started: bool = False
) -> tuple[Kernel, Any]:
    """The product alone, corrected for the sign that the instruction wants: int32 (M, N).

    Where `started`, the accumulators begin with numbers that are taken off again.
    """
    (m, k), n = x.shape, w.shape[0]
    deep = -(-k // isa.depth) * isa.depth
    padded = torch.zeros(m, deep, dtype=x.dtype)
    padded[:, :k] = x
    signed = x.dtype == torch.int8
    sums = (-zero_shift(isa, signed) * w.int().sum(1)).int()
    begin = torch.arange(n + isa.panel, dtype=torch.int32) * 1000
    e = writer((m, n), padded, pack(w, isa), *([begin] if started else []))
    sums = sums - begin[:n] if started else sums
    total = e.step("add", "int32", e.step("anchor", "int32"), e.load(sums, (0, 1)))
    e.store(total, torch.int32)
    product = Product(m, n, deep, deep)
    return matmul_int8(name, e.arguments, product, signed, e.expression, isa, started), e


@pytest.mark.parametrize("isa", NATIVE, ids=lambda isa: isa.name)
@settings(deadline=None, max_examples=6, derandomize=True)
@given(m=st.integers(1, 40), n=st.integers(1, 70), k=st.integers(1, 67), signed=st.booleans())
@example(m=1, n=96, k=64, signed=False)
@example(m=1, n=33, k=5, signed=True)
@example(m=17, n=49, k=66, signed=True)
def test_accumulators(
    writer: Any, run: Run, isa: Isa, m: int, n: int, k: int, signed: bool
) -> None:
    x, w = activations(signed, m, k), weights(n, k)
    kernel, given_ = bare(writer, isa, x, w)
    (found,) = run(kernel, given_, isa)
    assert torch.equal(found.reshape(m, n), reference(x, w))


@pytest.mark.parametrize("rows", [ROWS, ROWS + 3, 2 * ROWS + 1])
def test_rows_in_blocks(writer: Any, run: Run, rows: int) -> None:
    x, w = activations(False, rows, 8), weights(40, 8)
    kernel, given_ = bare(writer, isas.VNNI, x, w)
    assert torch.equal(run(kernel, given_, isas.VNNI)[0].reshape(rows, 40), reference(x, w))


@pytest.mark.parametrize("isa", [isas.VNNI, isas.AVX2, isas.SSE], ids=lambda isa: isa.name)
def test_nothing_saturates(writer: Any, run: Run, isa: Isa) -> None:
    """255 · 127 twice is past int16: vpmaddubsw would clip what must be added up."""
    x = torch.full((3, 256), 255, dtype=torch.uint8)
    w = torch.full((17, 256), 127, dtype=torch.int8)
    w[1::2] = -128
    kernel, given_ = bare(writer, isa, x, w)
    assert torch.equal(run(kernel, given_, isa)[0].reshape(3, 17), reference(x, w))


@pytest.mark.parametrize("isa", NATIVE, ids=lambda isa: isa.name)
@pytest.mark.parametrize("signed", [False, True])
def test_requantized(writer: Any, run: Run, isa: Isa, signed: bool) -> None:
    """Zero point, scales per channel, bias, ReLU and requantization, as `qc::quantize` has them."""
    m, n, k, point = 13, 50, 36, 7
    x, w = activations(signed, m, k), weights(n, k)
    generator = torch.Generator().manual_seed(3)
    scales = torch.rand(n, generator=generator) * 1e-4 + 1e-5
    bias = torch.randn(n, generator=generator)
    scale, zero = torch.tensor([0.02]), torch.tensor([9], dtype=torch.uint8)
    sums = (-(point + zero_shift(isa, signed)) * w.int().sum(1)).int()
    e = writer((m, n), x, pack(w, isa))
    whole = e.step("add", "int32", e.step("anchor", "int32"), e.load(sums, (0, 1)))
    value = e.step("mul", "float32", e.step("cast", "float32", whole), e.load(scales, (0, 1)))
    value = e.step("relu", "float32", e.step("add", "float32", value, e.load(bias, (0, 1))))
    e.store(value)
    level = e.step(
        "quantize", "uint8", value, e.load(scale, (0, 0)), e.load(zero, (0, 0)), numbers=(0, 255)
    )
    e.store(level, torch.uint8)
    product = Product(m, n, k, k)
    kernel = matmul_int8("g", e.arguments, product, signed, e.expression, isa)
    real, quantized = run(kernel, e, isa)

    # Each float step is rounded, or fused with the next: one unit in the last place of a summand.
    want = reference(x, w).double() - point * w.double().sum(1)
    want = (want * scales.double() + bias.double()).relu()
    torch.testing.assert_close(real.reshape(m, n).double(), want, rtol=0, atol=2e-6)
    # The quantization itself is exact, given the floats that were stored.
    again = ops.quantize(real, scale, zero, 0, 0, 0, 255)
    assert torch.equal(quantized, again)
    assert len(quantized.unique()) > 50


@pytest.mark.parametrize("isa", [isas.VNNI, isas.AVX2, isas.NEON], ids=lambda isa: isa.name)
def test_a_batch_with_strides_and_offsets(writer: Any, run: Run, isa: Isa) -> None:
    """Rows inside a wider matrix, the weights shared by the second dimension of the batch."""
    m, n, k, wide, offset = 5, 20, 8, 24, 12
    held = activations(False, 2, 3, m, wide)
    ws = [weights(n, k, seed=20 + i) for i in range(2)]
    packed = torch.cat([pack(w, isa) for w in ws])
    e = writer((2, 3, m, n), held.reshape(-1), packed)
    e.store(e.step("anchor", "int32"), torch.int32)
    product = Product(
        m, n, k, wide, offset, (2, 3), (3 * m * wide, m * wide), (packed.numel() // 2, 0)
    )
    kernel = matmul_int8("g", e.arguments, product, False, e.expression, isa)
    (found,) = run(kernel, e, isa)
    want = torch.stack(
        [torch.stack([reference(held[i, j, :, 12:20], ws[i]) for j in range(3)]) for i in range(2)]
    )
    assert torch.equal(found.reshape(2, 3, m, n), want)


@pytest.mark.parametrize("target", FOREIGN)
def test_other_machines(writer: Any, emulate: Run, target: str) -> None:
    isa = FOREIGN[target]
    shapes = [(1, 33, 8), (7, 50, 37), (20, 16, 4)]
    cases, wants = [], []
    for number, (m, n, k) in enumerate(shapes):
        for signed in (False, True):
            x, w = activations(signed, m, k), weights(n, k)
            cases.append(bare(writer, isa, x, w, f"g{number}{int(signed)}", number == 1))
            wants.append(reference(x, w).reshape(-1))
    for (found,), want in zip(emulate(target, cases), wants, strict=True):
        assert torch.equal(found, want)
