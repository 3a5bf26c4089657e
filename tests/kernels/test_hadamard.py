"""Rotations by Kronecker products against float64."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompiler.hadamard import paley, sylvester
from qcompiler.kernels import isa as isas
from qcompiler.kernels.code import Kernel
from qcompiler.kernels.hadamard import Factor, reference, rotate_rows
from qcompiler.kernels.isa import Isa

Run = Callable[..., Any]
# The orders of the factors, from the left; those that are no power of two are dense.
CASES = {
    "pairs": [2], "less than a vector": [8], "one vector": [16], "two": [32], "long": [1024],
    "12 by 2": [12, 2], "12 by 8": [12, 8], "20 by 16": [20, 16], "36 by 64": [36, 64],
    "12 alone": [12], "random, 9 by 4": [9, 4], "12 in the middle": [4, 12, 8], "one": [1],
}  # fmt: skip


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(size: int) -> Tensor:
    if size & (size - 1) == 0:
        return sylvester(size) * size**0.5
    found = paley(size)
    return found if found is not None else normal(size, size, seed=size).double()


def made(writer: Any, sizes: list[int], rows: int, name: str = "h") -> tuple[Kernel, Any, Tensor]:
    """With an epilogue: the result plus a row."""
    n = prod(sizes)
    x, shift = normal(rows, n), normal(n, seed=1)
    matrices = [matrix(size) for size in sizes]
    dense = {i: m.float() for i, m in enumerate(matrices) if sizes[i] & (sizes[i] - 1)}
    read = writer((rows, n), x, *dense.values())
    factors, stride = [], 1
    for i in reversed(range(len(sizes))):
        number = 1 + [*dense].index(i) if i in dense else -1
        factors.append(Factor(sizes[i], stride, number))
        stride *= sizes[i]
    read.load(x)
    source = read.expression
    e = writer((rows, n), *read.tensors)
    e.store(e.step("add", "float32", e.step("anchor", "float32"), e.load(shift, (0, 1))))
    scale = n**-0.5
    kernel = rotate_rows(name, e.arguments, source, factors, scale, e.expression)
    rounded = [dense.get(i, m) for i, m in enumerate(matrices)]
    return kernel, e, reference(x, rounded) * scale + shift


@pytest.mark.parametrize("isa", [isas.VNNI, isas.AVX2, isas.SCALAR], ids=lambda isa: isa.name)
@pytest.mark.parametrize("case", CASES)
def test_rotations(writer: Any, run: Run, case: str, isa: Isa) -> None:
    kernel, given, want = made(writer, CASES[case], 5)
    (found,) = run(kernel, given, isa)
    torch.testing.assert_close(found.reshape(want.shape).double(), want, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("target", ["tvm:aarch64", "tvm:armv7", "tvm:riscv64"])
def test_other_machines(writer: Any, emulate: Run, target: str) -> None:
    chosen = ["less than a vector", "two", "12 by 8", "random, 9 by 4"]
    built = [made(writer, CASES[name], 2, f"h{i}") for i, name in enumerate(chosen)]
    results = emulate(target, [(kernel, given) for kernel, given, _ in built])
    for (found,), (_, _, want) in zip(results, built, strict=True):
        torch.testing.assert_close(found.reshape(want.shape).double(), want, rtol=1e-6, atol=2e-6)
