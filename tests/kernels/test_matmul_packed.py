"""Products with weights of 2, 3, 4 and 8 bits, and the rows that are quantized for them."""

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
from qcompiler.kernels.matmul_packed import matmul_packed, reference
from qcompiler.kernels.packing import pack, pack_groups, packing
from qcompiler.kernels.rows import quantize_rows
from qcompiler.kernels.tiles import Product

NATIVE = [isas.VNNI, isas.AVX2, isas.NEON]
FOREIGN = {"tvm:aarch64:dotprod": isas.DOTPROD, "tvm:armv7": isas.ARMV7}
SHAPES = {  # M, N, K, group
    2: [(1, 150, 48, 16), (19, 33, 128, 64)],
    3: [(1, 40, 96, 96), (19, 33, 128, 32)],
    4: [(1, 150, 32, 8), (9, 40, 56, 56), (19, 33, 128, 32)],
    8: [(1, 40, 64, 32), (19, 33, 60, 60)],
}
FORMS = [(bits, affine) for bits in SHAPES for affine in (False, True)]

Run = Callable[..., Any]


def made(
    writer: Any, isa: Isa, shape: tuple[int, int, int, int], bits: int, affine: bool, integer: bool,
    name: str = "g", group_scales: Tensor | None = None, extreme: bool = False,
) -> tuple[Kernel, Any, Tensor]:  # fmt: skip
    m, n, k, group = shape
    generator = torch.Generator().manual_seed(m + n + k + bits)
    x = torch.randn(m, k, generator=generator)
    if integer:
        x = (x * 60).round().clamp(-127, 127).to(torch.int8)
    w = torch.randint(0, 1 << bits, (n, k), generator=generator)
    if extreme:
        x = torch.full((m, k), -128, dtype=torch.int8)
        w = torch.where(torch.arange(n)[:, None] % 2 == 0, (1 << bits) - 1, torch.zeros_like(w))
    middle = 1 << (bits - 1)
    zero = torch.full((n, k // group), middle)
    if affine:
        zero = torch.randint(0, 1 << bits, (n, k // group), generator=generator)
    scale = torch.rand(n, k // group, generator=generator) + 0.1
    scale = scale if group_scales is None else group_scales
    form = packing(bits, group, None if affine else middle, integer, isa)
    given = [x, pack(w, form), pack_groups(scale)]
    if affine:
        given.append(pack_groups((zero + form.low).to(torch.int8 if form.signed else torch.uint8)))
    if form.needs_sums:
        given.append(x.reshape(m, -1, group).int().sum(-1).int())
    e = writer((m, n), *given)
    e.store(e.step("anchor", "float32"))
    kernel = matmul_packed(name, e.arguments, Product(m, n, k, k), form, e.expression, isa)
    return kernel, e, reference(x, w, scale, zero)


def close(found: Tensor, want: Tensor, k: int) -> None:
    """Each group's sum is exact or a chain of k roundings; the groups are added in float32."""
    bound = k * 2.0**-24 * float(want.abs().max()) + 1e-6
    torch.testing.assert_close(found.reshape(want.shape).double(), want, rtol=0, atol=4 * bound)


@pytest.mark.parametrize("isa", NATIVE, ids=lambda isa: isa.name)
@pytest.mark.parametrize("integer", [True, False], ids=["int8", "float"])
@pytest.mark.parametrize(("bits", "affine"), FORMS)
def test_products(writer: Any, run: Run, isa: Isa, integer: bool, bits: int, affine: bool) -> None:
    for shape in SHAPES[bits]:
        kernel, e, want = made(writer, isa, shape, bits, affine, integer)
        close(run(kernel, e, isa)[0], want, shape[2])


@pytest.mark.parametrize("isa", NATIVE, ids=lambda isa: isa.name)
@pytest.mark.parametrize("bits", SHAPES)
def test_one_group_is_exact(writer: Any, run: Run, isa: Isa, bits: int) -> None:
    """A single group with a scale of 1 is the integer sum itself, at the extremes."""
    one, affine = torch.ones(17, 1), bits % 2 == 1
    kernel, e, want = made(writer, isa, (3, 17, 64, 64), bits, affine, True, "g", one, True)
    assert torch.equal(run(kernel, e, isa)[0].reshape(3, 17), want.float())


def test_storage_is_as_small_as_its_bits() -> None:
    for bits in SHAPES:
        for integer in (True, False):
            form = packing(bits, 32, None, integer, isas.VNNI)
            held = pack(torch.zeros(32, 64, dtype=torch.int64), form)
            assert held.numel() * held.element_size() * 8 == 32 * 64 * bits


@pytest.mark.parametrize(("target", "isa"), FOREIGN.items(), ids=str)
def test_other_machines(writer: Any, emulate: Run, target: str, isa: Isa) -> None:
    built = [
        made(writer, isa, shape, bits, affine, integer, f"g{bits}_{i}_{affine}_{integer}")
        for bits, shapes in SHAPES.items()
        for i, shape in enumerate(shapes[-2:])
        for affine, integer in ((i > 0, True), (i == 0, False))
    ]
    found = emulate(target, [(kernel, e) for kernel, e, _ in built])
    for (_, _, want), (got,) in zip(built, found, strict=True):
        close(got, want, 128)


def test_matrix_instructions_give_the_same_bits(writer: Any, run: Run, emulate: Run) -> None:
    """SMMLA's tiles, with odd rows and columns, against the plain kernel on this machine."""
    cases = [
        (bits, affine, shape)
        for bits, affine in FORMS
        for shape in (SHAPES[bits][0], (7, 33, 64, 32 if affine else 64))
    ]
    tiled = [
        made(writer, isas.I8MM, shape, bits, affine, True, f"g{i}")
        for i, (bits, affine, shape) in enumerate(cases)
    ]
    found = emulate("tvm:aarch64:i8mm", [(kernel, e) for kernel, e, _ in tiled])
    for (bits, affine, shape), (got,) in zip(cases, found, strict=True):
        kernel, e, _ = made(writer, isas.NEON, shape, bits, affine, True)
        assert torch.equal(run(kernel, e, isas.NEON)[0], got), (bits, affine, shape)


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
        expected = want.reshape(5, -1, group).int().sum(-1)
        assert torch.equal(sums[0], expected.reshape(-1).int())
