"""Products with 4-bit weights in groups, and the rows that are quantized for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompiler import ops
from qcompiler.kernels import isa as isas
from qcompiler.kernels.code import Kernel
from qcompiler.kernels.isa import Isa
from qcompiler.kernels.matmul_int4 import matmul_int4, needs_sums, pack, pack_scales, reference
from qcompiler.kernels.rows import quantize_rows
from qcompiler.kernels.tiles import Product

NATIVE = [isas.VNNI, isas.AVX2, isas.NEON, isas.SCALAR]
FOREIGN = {"tvm:aarch64:dotprod": isas.DOTPROD, "tvm:armv7": isas.ARMV7}
SHAPES = [(1, 40, 64, 32), (1, 150, 32, 8), (7, 33, 128, 64), (19, 16, 96, 32)]  # M, N, K, group

Run = Callable[..., Any]


def operands(m: int, n: int, k: int, group: int, integer: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m + n + k)
    x = torch.randn(m, k, generator=generator)
    if integer:
        x = (x * 60).round().clamp(-127, 127).to(torch.int8)
    w = torch.randint(-8, 8, (n, k), generator=generator).to(torch.int8)
    return x, w, torch.rand(n, k // group, generator=generator) + 0.1


def made(
    writer: Any, isa: Isa, shape: tuple[int, int, int, int], integer: bool, name: str = "g"
) -> tuple[Kernel, Any, Tensor]:
    m, n, k, group = shape
    x, w, scale = operands(*shape, integer)
    given = [x, pack(w, group), pack_scales(scale)]
    if integer and needs_sums(isa):
        given.append((-8 * x.reshape(m, -1, group).int().sum(-1)).int())
    e = writer((m, n), *given)
    e.store(e.step("anchor", "float32"))
    product = Product(m, n, k, k)
    kernel = matmul_int4(name, e.arguments, product, group, integer, e.expression, isa)
    return kernel, e, reference(x, w, scale)


def close(found: Tensor, want: Tensor, k: int) -> None:
    """Each group's sum is exact or a chain of k roundings; the groups are added in float32."""
    bound = k * 2.0**-24 * float(want.abs().max()) + 1e-6
    torch.testing.assert_close(found.reshape(want.shape).double(), want, rtol=0, atol=4 * bound)


@pytest.mark.parametrize("isa", NATIVE, ids=lambda isa: isa.name)
@pytest.mark.parametrize("integer", [True, False], ids=["int8", "float"])
def test_products(writer: Any, run: Run, isa: Isa, integer: bool) -> None:
    for shape in SHAPES:
        kernel, e, want = made(writer, isa, shape, integer)
        close(run(kernel, e, isa)[0], want, shape[2])


def test_one_group_is_exact(writer: Any, run: Run) -> None:
    """A single group with a scale of 1 is the integer sum itself, extremes included."""
    x = torch.full((3, 64), -127, dtype=torch.int8)
    w = torch.full((17, 64), -8, dtype=torch.int8)
    w[::2] = 7
    for isa in (isas.VNNI, isas.AVX2, isas.NEON):
        given = [x, pack(w, 64), pack_scales(torch.ones(17, 1))]
        if needs_sums(isa):
            given.append((-8 * x.int().sum(-1)).int())
        e = writer((3, 17), *given)
        e.store(e.step("anchor", "float32"))
        kernel = matmul_int4("g", e.arguments, Product(3, 17, 64, 64), 64, True, e.expression, isa)
        want = (x.double() @ w.double().T).float()
        assert torch.equal(run(kernel, e, isa)[0].reshape(3, 17), want)


@pytest.mark.parametrize(("target", "isa"), FOREIGN.items(), ids=str)
def test_other_machines(writer: Any, emulate: Run, target: str, isa: Isa) -> None:
    built = [
        made(writer, isa, shape, integer, f"g{i}_{integer}")
        for i, shape in enumerate(SHAPES)
        for integer in (True, False)
    ]
    found = emulate(target, [(kernel, e) for kernel, e, _ in built])
    for (_, _, want), (got,) in zip(built, found, strict=True):
        close(got, want, 128)


@pytest.mark.parametrize("group", [0, 16, 32])
@pytest.mark.parametrize("width", [64, 96])
def test_rows_are_quantized_as_the_program_says(
    writer: Any, run: Run, group: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(5, width, generator=generator) * torch.tensor([[1], [9], [0.01], [0], [3]])
    outputs = [torch.zeros(5, width, dtype=torch.int8), torch.zeros(5)]
    if group:
        outputs.append(torch.zeros(5 * width // group, dtype=torch.int32))
    e = writer((5, width), *outputs)
    e.load(x)
    kernel = quantize_rows("q", e.arguments, e.expression, (-127, 127), group)
    e.outputs = [*range(len(outputs))]
    q, scale, *sums = run(kernel, e, isas.VNNI)
    want, steps, _ = ops.dynamic_quantize(x, "int8:token")
    assert torch.equal(q.reshape(5, width), want)
    assert torch.equal(scale, steps.reshape(-1))
    if group:
        expected = -8 * want.reshape(5, -1, group).int().sum(-1)
        assert torch.equal(sums[0], expected.reshape(-1).int())
