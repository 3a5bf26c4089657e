"""Layers whose weights stay in few bits: products that unpack them in registers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qcompiler.backends.edge_group import CONV, Group
from qcompiler.backends.edge_ops import Op, Ref, Weight
from qcompiler.kernels import matmul_packed
from qcompiler.kernels import packing as forms
from qcompiler.kernels.code import LANES
from qcompiler.kernels.isa import Isa
from qcompiler.kernels.packing import Packing
from qcompiler.kernels.tiles import Product
from qcompiler.op_families import LINEAR

if TYPE_CHECKING:
    from qcompiler.backends.edge_calls import Calls
    from qcompiler.backends.edge_integer import Source


def packing(op: Op, integer: bool, isa: Isa) -> Packing | None:
    """How the layer's weight is stored for a product with int8 or float activations.

    None where no such product reads it: its groups do not run along the input channels, or do not
    hold whole blocks of the packing.
    """
    ref, weight = op.args[1], op.args[1].storage.weight
    if weight is None or weight.q.dtype not in (torch.int8, torch.uint8):
        return None
    if op.target is CONV and (integer or op.args[6] != 1):
        return None
    if op.target not in (LINEAR, CONV) or not ref.contiguous or ref.offset != 0:
        return None
    if op.target is LINEAR and weight.q.ndim != 2:
        return None
    rows = weight.group == 0 and (weight.axis == 0 or weight.scale.numel() == 1)
    depth = weight.q.numel() // weight.q.shape[0]
    groups = weight.group > 0 and op.target is LINEAR and weight.axis % 2 == 1
    if not rows and not (groups and depth % weight.group == 0):
        return None
    low, high = int(weight.q.min()), int(weight.q.max())
    zero = weight.zero_point.unique()
    zero_bounds = (int(zero.min()), int(zero.max()))
    for bits in (2, 3, 4, 8):
        start = -(1 << (bits - 1)) if weight.q.dtype == torch.int8 else 0
        end = start + (1 << bits)
        if start <= min(low, zero_bounds[0]) and max(high, zero_bounds[1]) < end:
            shared = zero_bounds[0] - start if zero.numel() == 1 else None
            found = forms.packing(bits, weight.group or depth, shared, integer, isa)
            odd = found.needs_sums and found.group % LANES  # the sums are made by whole vectors
            if found.group % found.block == 0 and not odd:
                return found
    return None


def packed_product(
    calls: Calls, g: Group, op: Op, rows: Ref, count: int, form: Packing, bias: Ref | None,
    source: Source | None,
) -> None:  # fmt: skip
    """The calls for a layer and what follows it.

    Args:
        calls: to add to.
        g: the layer's group.
        op: the layer.
        rows: its input as rows, (count, K), contiguous; int8 where `source` is given.
        count: how many rows.
        form: what `packing` gave.
        bias: one number for each output channel, in the shape that broadcasts.
        source: the quantized input, symmetric with a scale for each row.
    """
    isa, weight = calls.isa, op.args[1].storage.weight
    n = weight.q.shape[0]
    depth = weight.q.numel() // n
    key = (weight.q, form)
    packed = calls.constant(key, lambda: forms.pack(_stored(weight, form), form))
    scales = calls.constant(
        (key, "scales"), lambda: forms.pack_groups(_by_group(weight.scale, weight, form))
    )
    arguments = [rows.storage, packed.storage, scales.storage]
    if form.zero is None:
        arguments.append(calls.constant((key, "zeros"), lambda: _zeros(weight, form)).storage)
    if form.needs_sums:
        arguments.append(calls.sums[id(rows.storage)])
    writer = calls.writer(op.out.shape, arguments, calls.order(op))
    value = writer.step("anchor", "float32")
    if source is not None:
        value = writer.step("mul", "float32", value, writer.value(source.scale, "float32"))
    if bias is not None:
        value = writer.step("add", "float32", value, writer.value(bias, "float32"))
    writer.keep(op.out, value)
    writer.members(g, calls.stored)
    product = Product(count, n, depth, depth, rows.offset)
    expression = writer.expression()
    calls.add(
        "matmul_packed", op.label, (product, form, expression, isa),
        lambda name: matmul_packed.matmul_packed(
            name, writer.kernel_arguments(), product, form, expression, isa
        ), writer,
    )  # fmt: skip


def _start(weight: Weight, form: Packing) -> int:
    """What the weight's integer is when 0 is stored."""
    return -(1 << (form.bits - 1)) if weight.q.dtype == torch.int8 else 0


def _stored(weight: Weight, form: Packing) -> Tensor:
    """(N, K), counted from the smallest number; filters with their channels last."""
    q = weight.q if weight.q.ndim == 2 else weight.q.movedim(1, -1)
    return q.reshape(q.shape[0], -1).to(torch.int16) - _start(weight, form)


def _by_group(values: Tensor, weight: Weight, form: Packing) -> Tensor:
    """Scales or zero points as (N, groups)."""
    n = weight.q.shape[0]
    groups = weight.q.numel() // n // form.group
    if weight.group:
        return values.reshape(n, groups).float()
    return values.reshape(-1, 1).expand(n, 1).float()


def _zeros(weight: Weight, form: Packing) -> Tensor:
    zeros = _by_group(weight.zero_point, weight, form) - _start(weight, form) + form.low
    return forms.pack_groups(zeros.to(torch.int8 if form.signed else torch.uint8))
