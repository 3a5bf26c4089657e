"""Float matrix products: linears with float weights, and products of two tensors."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from qcompiler.backends.edge_group import Group
from qcompiler.backends.edge_ops import Op, Ref, Storage
from qcompiler.kernels.matmul_float import matmul_float, pack
from qcompiler.kernels.tiles import Product

if TYPE_CHECKING:
    from qcompiler.backends.edge_calls import Calls


def float_linear(calls: Calls, g: Group, op: Op) -> None:
    """A linear without integers; its weight may be computed."""
    x, weight, bias = op.args[0], op.args[1], op.args[2] if len(op.args) > 2 else None
    if weight.storage.constant is None and weight.storage.weight is None:
        product(calls, g, op, x, _turned(weight), bias)
        return
    x = calls.contiguous(x, op.label)
    n, k = weight.shape
    sizes = Product(prod(x.shape[:-1]), n, k, k, x.offset)
    float_product(calls, g, op, x.storage, _panels(calls, weight).storage, sizes, bias)


def float_product(
    calls: Calls, g: Group, op: Op, left: Storage, right: Storage, product: Product,
    bias: Ref | None, kernel: Callable[..., Any] = matmul_float,
) -> None:  # fmt: skip
    """A kernel with float32 sums, and what follows it; `right` lies in its panels."""
    writer = calls.writer(op.out.shape, [left, right], calls.order(op))
    value = writer.step("anchor", "float32")
    if bias is not None:
        value = writer.step("add", "float32", value, writer.value(bias, "float32"))
    writer.keep(op.out, value)
    writer.members(g, calls.stored)
    expression, isa = writer.expression(), calls.isa
    calls.add(
        kernel.__name__, op.label, (product, expression, isa),
        lambda name: kernel(name, writer.kernel_arguments(), product, expression, isa), writer,
    )  # fmt: skip


def product(calls: Calls, g: Group, op: Op, a: Ref, b: Ref, bias: Ref | None = None) -> None:
    """(…, M, K) × (…, K, N), both computed at run time or constant."""
    isa = calls.isa
    m, k, n = a.shape[-2] if len(a.shape) > 1 else 1, a.shape[-1], b.shape[-1]
    batch = tuple(op.out.shape[:-2])
    if len(b.shape) == 2 and b.storage.constant is not None and not batch:
        a, packed = calls.contiguous(a, op.label), _panels(calls, _turned(b))
        sizes = Product(m, n, k, k, a.offset)
        float_product(calls, g, op, a.storage, packed.storage, sizes, bias)
        return
    if a.strides[-1] not in (1, 0) or (k > 1 and a.strides[-1] != 1):
        a = calls.contiguous(a, op.label)
    panels, own = -(-n // isa.panel), tuple(b.shape[:-2])
    packed = calls.temporary(torch.float32, (*own, panels, k, isa.panel))
    if n % isa.panel:
        calls.fill(packed, 0.0, op.label)
    size = isa.panel * k
    for first, count, width in (
        (0, n // isa.panel, isa.panel),
        (n // isa.panel, 1 if n % isa.panel else 0, n % isa.panel),
    ):
        if not count:
            continue
        step_n, step_k = b.strides[-1], b.strides[-2]
        shape = (*own, count, k, width)
        offset = b.offset + first * isa.panel * step_n
        source = Ref(b.storage, b.dtype, offset, shape,
                     (*b.strides[:-2], isa.panel * step_n, step_k, step_n))  # fmt: skip
        inner = packed.strides[: len(own)]
        target = Ref(packed.storage, packed.dtype, first * size, shape,
                     (*inner, size, isa.panel, 1))  # fmt: skip
        calls.copy(source, target, op.label)

    def strides(ref: Ref, sizes: tuple[int, ...]) -> tuple[int, ...]:
        kept = tuple(0 if s == 1 else t for s, t in zip(sizes, ref.strides, strict=False))
        return (0,) * (len(batch) - len(sizes)) + kept

    row = a.strides[-2] if len(a.shape) > 1 else 0
    sizes = Product(
        m, n, k, row, a.offset, batch, strides(a, a.shape[:-2]), strides(packed, own)
    )  # fmt: skip
    if prod(batch) == 1:
        sizes = Product(m, n, k, row, a.offset)
    float_product(calls, g, op, a.storage, packed.storage, sizes, bias)


def _panels(calls: Calls, weight: Ref) -> Ref:
    """A constant weight as the float product reads it."""
    known = calls.constants.known(weight)
    tensor = known.storage.constant
    assert tensor is not None
    matrix = tensor.reshape(-1).as_strided(weight.shape, weight.strides, weight.offset)
    key = (tensor, weight.offset, weight.strides, "panels", calls.isa.panel)
    return calls.constant(key, lambda: pack(matrix.float(), calls.isa))


def _turned(ref: Ref) -> Ref:
    """The transposed matrix."""
    return Ref(ref.storage, ref.dtype, ref.offset, ref.shape[::-1], ref.strides[::-1])
