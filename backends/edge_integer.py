"""Layers that multiply integers: which they are, and int8 products with what follows them.

On GPUs 8-bit floats count as integers: products of both operands as they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qcompiler import ops
from qcompiler.backends.edge_group import CONV, Group, Writer, quantized_operand, whole
from qcompiler.backends.edge_ops import Op, Ref, Storage, Trace, Weight
from qcompiler.backends.edge_packed import packing
from qcompiler.kernels import matmul_int8
from qcompiler.kernels.isa import Isa, zero_shift
from qcompiler.kernels.packing import Packing
from qcompiler.kernels.tiles import Product
from qcompiler.op_families import LINEAR
from qcompiler.qtype import QType

if TYPE_CHECKING:
    from qcompiler.backends.edge_calls import Calls

aten = torch.ops.aten


@dataclass(frozen=True)
class Source:
    """A layer's quantized input.

    Attributes:
        op: the `qc::dequantize` before the layer.
        pads: zero padding between the two: (top, left, bottom, right).
        ref: the integers, in the shape in which the layer sees them.
    """

    op: Op
    pads: tuple[int, int, int, int]
    ref: Ref

    @property
    def scale(self) -> Ref:
        """One, or one for each row."""
        found: Ref = self.op.args[1]
        return found

    @property
    def zero(self) -> Ref:
        """The zero points, as many as scales."""
        found: Ref = self.op.args[2]
        return found


def layers(trace: Trace, isa: Isa) -> tuple[dict[Op, Source], dict[Op, Packing]]:
    """Linears and convolutions that read a quantized input as integers; how weights are packed.

    Layers with a weight per channel of 8 bits and a quantized input are of the first kind alone.
    """
    integer: dict[Op, Source] = {}
    packings: dict[Op, Packing] = {}
    for op in trace.ops:
        if op.target not in (LINEAR, CONV):
            continue
        source = _source(op)
        plain = source is not None and _integer_weight(op, source)
        by_token = source is not None and _by_token(source)
        form = packing(op, True, isa) if by_token else None
        if form is not None and form.bits == 8 and plain:
            form = None
        if form is None and not plain:
            source, form = None, packing(op, False, isa)
        if source is not None:
            integer[op] = source
        if form is not None:
            packings[op] = form
    return integer, packings


def _integer_weight(op: Op, source: Source) -> bool:
    weight = op.args[1].storage.weight
    floats = source.ref.dtype.is_floating_point
    return (
        weight is not None
        and weight.q.dtype == (source.ref.dtype if floats else torch.int8)
        and weight.group == 0
        and (weight.axis == 0 or weight.scale.numel() == 1)
        and not bool(weight.zero_point.any())
    )


def _by_token(source: Source) -> bool:
    """Whether the input is symmetric int8 with a scale for each row."""
    maker = source.op.args[0].storage.maker
    if maker is None or maker.target is not ops.dynamic_quantize:
        return False
    kind = QType.parse(maker.args[1])
    return kind.symmetric and kind.granularity == "token" and kind.element == "int8"


def _source(op: Op) -> Source | None:
    """The layer's quantized input, past zero padding."""
    ref, pads = op.args[0], (0, 0, 0, 0)
    while True:
        found = quantized_operand(ref, rows=op.target is LINEAR)
        if found is not None:
            return Source(found, pads, found.args[0])
        maker = ref.storage.maker
        if maker is not None and maker.target is ops.dequantize:
            return _seen_otherwise(ref, maker, pads)
        if op.target is not CONV or maker is None:
            return None
        if len(maker.out.storage.readers) > 1 or not whole(ref, _image(maker.out)):
            return None  # a part of what was padded, or another arrangement of it
        if maker.target is aten.clone.default and maker.out.shape == maker.args[0].shape:
            ref = _image(maker.args[0])
            continue
        if maker.target is aten.constant_pad_nd.default:
            sides, most = maker.args[1], 2 * len(maker.out.shape) - 4
            left, right, top, bottom = [*sides, 0, 0, 0, 0][:4]
            value = maker.args[2] if len(maker.args) > 2 else 0
            if value != 0 or any(sides[most:]) or min(sides) < 0:
                return None
            pads = (pads[0] + top, pads[1] + left, pads[2] + bottom, pads[3] + right)
            ref = _image(maker.args[0])
            continue
        return None


def _image(x: Ref) -> Ref:
    """A sequence of vectors as an image of one row, as convolutions read it."""
    if len(x.shape) != 3:
        return x
    (n, c, length), (step, channel, position) = x.shape, x.strides
    return Ref(x.storage, x.dtype, x.offset, (n, c, 1, length), (step, channel, 0, position))


def _seen_otherwise(ref: Ref, maker: Op, pads: tuple[int, int, int, int]) -> Source | None:
    """The integers behind a view of a dequantized tensor: an image of one row, or a flat one."""
    q, out = maker.args[0], maker.out
    if quantized_operand(out) is None or (q.shape, q.strides) != (out.shape, out.strides):
        return None
    offset = q.offset + ref.offset - out.offset
    return Source(maker, pads, Ref(q.storage, q.dtype, offset, ref.shape, ref.strides))


def int8_panels(q: Tensor, isa: Isa) -> tuple[object, ...]:
    """The key among `Constants` of `matmul_int8.pack(q, isa)`."""
    return q, "int8", isa.panel, isa.depth


def integer_linear(calls: Calls, g: Group, op: Op, source: Source) -> None:
    """A linear with an int8 weight for each channel."""
    isa, weight = calls.isa, op.args[1].storage.weight
    bias = op.args[2] if len(op.args) > 2 else None
    q, (n, k) = calls.contiguous(source.ref, op.label), weight.q.shape
    count, deep = prod(op.out.shape[:-1]), -(-k // isa.depth) * isa.depth
    if deep != k:
        q = calls.lengthened(q, count, k, deep, op.label)
    packed = calls.constant(int8_panels(weight.q, isa), lambda: matmul_int8.pack(weight.q, isa))
    product = Product(count, n, deep, deep, q.offset)
    integer_product(calls, g, op, q.storage, packed.storage, product, bias, source)


def integer_product(
    calls: Calls, g: Group, op: Op, left: Storage, right: Storage, product: Product,
    bias: Ref | None, source: Source,
) -> None:  # fmt: skip
    """An int8 product with a packed weight, and what follows it."""
    isa, weight = calls.isa, op.args[1].storage.weight
    signed = source.ref.dtype == torch.int8
    shift = zero_shift(isa, signed)
    first = start(calls, weight, source, shift) if product.groups == 1 else None
    held = [left, right, *([first.storage] if first is not None else [])]
    writer = calls.writer(op.out.shape, held, calls.order(op))
    started = first is not None
    writer.keep(op.out, scaled(calls, writer, weight, bias, source, shift, started))
    writer.members(g, calls.stored)
    expression = writer.expression()
    calls.add(
        "matmul_int8", op.label, (product, expression, isa, signed, started),
        lambda name: matmul_int8.matmul_int8(
            name, writer.kernel_arguments(), product, signed, expression, isa, started
        ), writer,
    )  # fmt: skip


def weight_sums(weight: Weight) -> Tensor:
    """Σ_k weight, (N,) int32."""
    return weight.q.flatten(1).to(torch.int32).sum(1, dtype=torch.int32)


def start(calls: Calls, weight: Weight, source: Source, shift: int) -> Ref | None:
    """What accumulators begin with where the zero point is known: −(zero + shift) · Σ_k weight.

    `shift` is what was added to the activations. The constant is longer than N, by a panel.
    """
    point = source.zero.storage.constant
    if point is None or point.unique().numel() != 1:
        return None
    off = int(point.reshape(-1)[0]) + shift

    def made() -> Tensor:
        return torch.nn.functional.pad(-off * weight_sums(weight), (0, calls.isa.panel))

    return calls.constant((weight.q, "start", off), made)


def scaled(
    calls: Calls, writer: Writer, weight: Weight, bias: Ref | None, source: Source, shift: int,
    started: bool,
) -> int:  # fmt: skip
    """Steps from int32 accumulators, of 8-bit floats float32, to the layer's float output.

    (accumulator − zero_point · Σ_k weight) · (activation scale · weight scale) + bias, with the
    channels along the output's dimension 1 (convolutions) or last.

    Args:
        calls: for the constants.
        writer: over the output.
        weight, bias: the layer's.
        source: its input.
        shift: what was added to the activations.
        started: whether the accumulators began with what the zero point asks for.
    """
    n = weight.q.shape[0]
    shape = (n, 1, 1) if len(writer.shape) == 4 else (n,)
    scale, zero = source.scale, source.zero
    held = "float32" if weight.q.is_floating_point() else "int32"
    value = writer.step("anchor", held)
    steps = weight.scale.reshape(-1).float().expand(n)
    first = scale.storage.constant
    if not started:
        totals = calls.constant(
            (weight.q, "sums", shape), lambda: weight_sums(weight).reshape(shape)
        )
        moved = writer.value(zero, "int32")
        if shift:
            moved = writer.step("add", "int32", moved, writer.value(shift, "int32"))
        product = writer.step("mul", "int32", writer.value(totals, "int32"), moved)
        value = writer.step("sub", "int32", value, product)
    if first is not None:
        both = calls.constant(
            (weight.q, "scales", float(first.reshape(-1)[0]), shape),
            lambda: (steps * first.reshape(-1)).reshape(shape),
        )
        factor = writer.value(both, "float32")
    else:
        own = calls.constant((weight.q, "scale", shape), lambda: steps.reshape(shape))
        factor = writer.step(
            "mul", "float32", writer.value(scale, "float32"), writer.value(own, "float32")
        )
    value = writer.step("cast", "float32", value) if held == "int32" else value
    value = writer.step("mul", "float32", value, factor)
    if bias is not None:
        shaped = Ref(bias.storage, bias.dtype, bias.offset, shape,
                     bias.strides + (0,) * (len(shape) - 1))  # fmt: skip
        value = writer.step("add", "float32", value, writer.value(shaped, "float32"))
    return value
