"""Convolutions, channels last: as matrix products, or depthwise directly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qcompiler.backends.edge_group import Group
from qcompiler.backends.edge_packed import packed_product
from qcompiler.backends.edge_trace import Op, Ref, dense_order
from qcompiler.errors import UnsupportedError
from qcompiler.kernels.depthwise import EXACT_TAPS, Window, depthwise
from qcompiler.kernels.tiles import Product

if TYPE_CHECKING:
    from qcompiler.backends.edge_calls import Calls

LAST = (0, 2, 3, 1)  # channels last


@dataclass(frozen=True)
class Filter:
    """A convolution's settings: (rows, columns) each, and padding on the four sides."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int, int, int]  # top, left, bottom, right
    out: tuple[int, int]


def convolution(calls: Calls, g: Group, op: Op) -> None:
    """The calls for a convolution and what follows it."""
    x, weight, bias, stride, padding, dilation, groups = op.args
    top, left = padding
    pads = (top, left, top, left)
    source = None
    blank: object = 0.0
    found = calls.integer.get(op)
    if found is not None:
        source, more = found
        pads = (top + more[0], left + more[1], top + more[2], left + more[3])
        x, blank = source.args[0], source.args[2]
    out = (op.out.shape[2], op.out.shape[3])
    filter_ = Filter(tuple(op.kwargs["kernel"]), tuple(stride), tuple(dilation), pads, out)
    if groups == 1:
        rows = _rows(calls, x, filter_, blank, op.label)
        count = op.out.shape[0] * op.out.shape[2] * op.out.shape[3]
        if op in calls.packings:
            packed_product(calls, g, op, rows, count, calls.packings[op], _spread(bias), None)
        elif source is not None:
            calls.integer_product(g, op, rows, count, weight.storage.weight, bias, source)
        else:
            _float_product(calls, g, op, rows, count, weight, bias)
    elif groups == x.shape[1] == op.out.shape[1]:
        _depthwise(calls, g, op, x, filter_, blank, weight, bias, source)
    else:
        raise UnsupportedError(f"a convolution of {groups} groups ({op.label})")


def _rows(calls: Calls, x: Ref, f: Filter, blank: object, label: str) -> Ref:
    """The input's patches as rows of a matrix: the input itself where each is one position."""
    n, c, height, width = x.shape
    plain = f.kernel == (1, 1) and f.stride == (1, 1) and not any(f.pads)
    if plain and dense_order(x) in (LAST, (0, 1, 2, 3)) and (x.strides[1] == 1 or c == 1):
        count = n * height * width
        return Ref(x.storage, x.dtype, x.offset, (count, c), (c, 1))
    depth = f.kernel[0] * f.kernel[1] * c
    step = calls.isa.depth if x.dtype != torch.float32 else 1
    deep = -(-depth // step) * step
    rows = calls.temporary(x.dtype, (n * f.out[0] * f.out[1], deep))
    if any(f.pads) or deep != depth:
        calls.fill(rows, blank, label)
    for i in range(f.kernel[0]):
        for j in range(f.kernel[1]):
            place = (i * f.kernel[1] + j) * c
            _patch(calls, x, rows, f, (i, j), place, deep, label)
    return rows


def _patch(
    calls: Calls, x: Ref, rows: Ref, f: Filter, tap: tuple[int, int], place: int, deep: int,
    label: str,
) -> None:  # fmt: skip
    """Copy what one tap of the filter sees."""
    first, count, offset = [], [], x.offset
    for d in range(2):
        shift = tap[d] * f.dilation[d] - f.pads[d]  # input position at output position 0
        low = max(0, -(shift // f.stride[d]) if shift < 0 else 0)
        high = min(f.out[d], (x.shape[2 + d] - 1 - shift) // f.stride[d] + 1)
        if high <= low:
            return
        first.append(low)
        count.append(high - low)
        offset += (low * f.stride[d] + shift) * x.strides[2 + d]
    n, c = x.shape[:2]
    shape = (n, count[0], count[1], c)
    seen = Ref(
        x.storage, x.dtype, offset, shape,
        (x.strides[0], f.stride[0] * x.strides[2], f.stride[1] * x.strides[3], x.strides[1]),
    )  # fmt: skip
    line = f.out[1] * deep
    target = place + first[0] * line + first[1] * deep
    to = Ref(rows.storage, rows.dtype, target, shape, (f.out[0] * line, line, deep, 1))
    calls.copy(seen, to, label)


def _float_product(
    calls: Calls, g: Group, op: Op, rows: Ref, count: int, weight: Ref, bias: Ref | None
) -> None:
    known = calls.constants.known(weight)
    tensor = known.storage.constant
    if tensor is None:
        raise UnsupportedError(f"a convolution whose weight is computed ({op.label})")
    taps = tensor.reshape(*weight.shape[:2], *op.kwargs["kernel"])
    matrix = taps.permute(LAST).reshape(weight.shape[0], -1)
    flat = calls.constant((id(known.storage), "rows"), lambda: matrix)
    packed = calls.packed(flat)
    depth = matrix.shape[1]
    product = Product(count, matrix.shape[0], depth, depth, rows.offset)
    calls.float_product(g, op, rows.storage, packed.storage, product, _spread(bias))


def _spread(bias: Ref | None) -> Ref | None:
    """One number for each channel, in the shape that broadcasts over images."""
    if bias is None:
        return None
    return Ref(bias.storage, bias.dtype, bias.offset, (*bias.shape, 1, 1), (1, 0, 0))


def _depthwise(
    calls: Calls,
    g: Group,
    op: Op,
    x: Ref,
    f: Filter,
    blank: object,
    weight: Ref,
    bias: Ref | None,
    source: Op | None,
) -> None:
    n, c, height, width = x.shape
    if f.kernel[0] * f.kernel[1] > EXACT_TAPS:
        raise UnsupportedError(f"a depthwise filter of {f.kernel} taps ({op.label})")
    if any(f.pads) or x.strides[1] not in (0, 1) or dense_order(x) is None:
        high, wide = height + f.pads[0] + f.pads[2], width + f.pads[1] + f.pads[3]
        padded = calls.temporary(x.dtype, (n, high, wide, c))
        if any(f.pads):
            calls.fill(padded, blank, op.label)
        a, b, s, _ = padded.strides
        start = f.pads[0] * b + f.pads[1] * s
        inner = Ref(padded.storage, x.dtype, start, x.shape, (a, 1, b, s))
        calls.copy(x, inner, op.label)
        x = Ref(padded.storage, x.dtype, 0, (n, c, high, wide), (a, 1, b, s))
    window = Window(
        n, *f.out, c, f.kernel, x.offset, x.strides[0], f.stride[0] * x.strides[2],
        f.stride[1] * x.strides[3], f.dilation[0] * x.strides[2], f.dilation[1] * x.strides[3],
        source is not None,
    )  # fmt: skip
    stored = weight.storage.weight
    if source is not None and stored is not None:
        matrix = stored.q.flatten(1)
        taps = calls.constant((id(stored.q), "taps"), matrix.T.float)
        calls.constants.held.append(stored)
        writer = calls.writer(op.out.shape, [x.storage, taps.storage], LAST)
        signed = x.dtype == torch.int8
        value = calls.scaled(writer, matrix, stored, bias, source, signed, shifted=False)
    else:
        known = calls.constants.known(weight).storage
        tensor = known.constant
        if tensor is None:
            raise UnsupportedError(f"a convolution whose weight is computed ({op.label})")
        taps = calls.constant((id(known), "taps"), lambda: tensor.reshape(c, -1).T)
        writer = calls.writer(op.out.shape, [x.storage, taps.storage], LAST)
        value = writer.step("anchor", "float32")
        if bias is not None:
            shaped = writer.value(_spread(bias), "float32")
            value = writer.step("add", "float32", value, shaped)
    writer.keep(op.out, value)
    writer.members(g, calls.stored)
    expression = writer.expression()
    calls.add(
        "depthwise", op.label, (window, expression),
        lambda name: depthwise(name, writer.kernel_arguments(), window, expression), writer,
    )  # fmt: skip
