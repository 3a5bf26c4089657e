"""Matrix products whose operands were rounded to bfloat16, by bfloat16 kernels.

The program says `linear(float(x₁₆), float(W₁₆))`; what is read is x₁₆ and a packed W₁₆.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch

from qcompiler.backends.edge_float import float_product
from qcompiler.backends.edge_group import PRODUCTS, Group, whole
from qcompiler.backends.edge_ops import Op, Ref, Trace
from qcompiler.kernels import bfloat16
from qcompiler.kernels.isa import Isa
from qcompiler.kernels.matmul_bf16 import matmul_bf16
from qcompiler.kernels.tiles import Product
from qcompiler.op_families import LINEAR

if TYPE_CHECKING:
    from qcompiler.backends.edge_calls import Calls

aten = torch.ops.aten
NARROW = torch.bfloat16


def narrow_products(trace: Trace, isa: Isa) -> dict[Op, tuple[int, ...]]:
    """The products that a bfloat16 kernel computes → their operands that are converted for them."""
    found: dict[Op, tuple[int, ...]] = {}
    for op in trace.ops if isa.narrow else ():
        if op.target is LINEAR and _widened(op.args[0]) is not None and _is_narrow(op.args[1]):
            found[op] = (0,)
        elif op.target in PRODUCTS:
            both = all(_widened(op.args[i]) is not None for i in (0, 1))
            if both and op.args[0].shape[-1] % isa.narrow_depth == 0:
                found[op] = (0, 1)
    return found


def _widened(ref: Ref) -> Ref | None:
    """What a float32 operand was in bfloat16."""
    maker = ref.storage.maker
    if maker is None or maker.target is not aten._to_copy.default or not whole(ref, maker.out):
        return None
    source: Ref = maker.args[0]
    return source if source.dtype == NARROW else None


def _is_narrow(weight: Ref) -> bool:
    """Whether a constant holds bfloat16 numbers alone."""
    held = weight.storage.constant
    return held is not None and torch.equal(held.to(NARROW).to(held.dtype), held)


def linear(calls: Calls, g: Group, op: Op) -> None:
    """A linear with a constant weight."""
    isa, weight = calls.isa, op.args[1]
    bias = op.args[2] if len(op.args) > 2 else None
    source = _widened(op.args[0])
    assert source is not None
    x, (n, k) = calls.contiguous(source, op.label), weight.shape
    count, deep = prod(x.shape[:-1]), -(-k // isa.narrow_depth) * isa.narrow_depth
    if deep != k:
        x = calls.lengthened(x, count, k, deep, op.label)
    held = weight.storage.constant
    matrix = held.reshape(-1).as_strided(weight.shape, weight.strides, weight.offset)
    key = (held, weight.offset, weight.strides, "narrow", isa.panel)
    packed = calls.constant(key, lambda: bfloat16.pack(matrix, isa))
    product = Product(count, n, deep, deep, x.offset)
    float_product(calls, g, op, x.storage, packed.storage, product, bias, matmul_bf16)


def product(calls: Calls, g: Group, op: Op) -> None:
    """(…, M, K) × (…, K, N), both computed at run time; B is packed by a copy."""
    isa = calls.isa
    a, b = _widened(op.args[0]), _widened(op.args[1])
    assert a is not None
    assert b is not None
    depth, m, k, n = isa.narrow_depth, a.shape[-2], a.shape[-1], b.shape[-1]
    if a.strides[-1] != 1:
        a = calls.contiguous(a, op.label)
    own, panels = tuple(b.shape[:-2]), -(-n // isa.panel)
    packed = calls.temporary(NARROW, (*own, panels, k // depth, isa.panel, depth))
    if n % isa.panel:
        calls.fill(packed, 0.0, op.label)
    step_k, step_n = b.strides[-2:]
    for first, count, width in (
        (0, n // isa.panel, isa.panel), (n // isa.panel, int(n % isa.panel > 0), n % isa.panel),
    ):  # fmt: skip
        if not count:
            continue
        shape = (*own, count, k // depth, width, depth)
        steps = (*b.strides[:-2], isa.panel * step_n, depth * step_k, step_n, step_k)
        source = Ref(b.storage, NARROW, b.offset + first * isa.panel * step_n, shape, steps)
        to = Ref(packed.storage, NARROW, first * isa.panel * k, shape, packed.strides)
        calls.copy(source, to, op.label)
    batch = tuple(op.out.shape[:-2])

    def strides(ref: Ref, sizes: tuple[int, ...]) -> tuple[int, ...]:
        kept = tuple(0 if s == 1 else t for s, t in zip(sizes, ref.strides, strict=False))
        return (0,) * (len(batch) - len(sizes)) + kept

    sizes = Product(m, n, k, a.strides[-2], a.offset, batch, strides(a, a.shape[:-2]),
                    strides(packed, own))  # fmt: skip
    if prod(batch) == 1:
        sizes = Product(m, n, k, a.strides[-2], a.offset)
    float_product(calls, g, op, a.storage, packed.storage, sizes, None, matmul_bf16)
