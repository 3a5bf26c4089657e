"""Convolutions, channels last: as products that read their input where it lies, or depthwise.

A row of the product's left side is what the filter sees at one position: for each of its rows, a
run of neighbouring columns and channels. Nothing is copied for it, but where the input needs a
border, it is written into a larger tensor from the start (`bordered`), and the border filled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qcompiler import ops
from qcompiler.backends import edge_steps
from qcompiler.backends.edge_float import float_product
from qcompiler.backends.edge_group import CONV, Group, whole
from qcompiler.backends.edge_integer import Source, integer_product, scaled, start
from qcompiler.backends.edge_ops import Op, Ref, Storage, Trace
from qcompiler.backends.edge_packed import packed_product
from qcompiler.errors import UnsupportedError
from qcompiler.kernels import matmul_float, matmul_int8
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
    groups: int

    @staticmethod
    def of(op: Op, source: Source | None) -> Filter:
        """A convolution's, with the padding before it that it does itself."""
        _, _, _, stride, (top, left), dilation, groups = op.args
        more = source.pads if source is not None else (0, 0, 0, 0)
        pads = (top + more[0], left + more[1], top + more[2], left + more[3])
        out = (op.out.shape[2], op.out.shape[3])
        return Filter(tuple(op.kwargs["kernel"]), tuple(stride), tuple(dilation), pads, out, groups)


def bordered(trace: Trace, integer: Mapping[Op, Source]) -> dict[int, Ref]:
    """Where quantized tensors lie that are written inside a border: by the storage's id.

    They are those that only convolutions and elementwise ops read.
    """
    sides: dict[int, tuple[int, ...]] = {}
    tensors: dict[int, Ref] = {}
    for op, source in integer.items():
        q = source.op.args[0]
        if op.target is CONV and whole(source.ref, q) and any(Filter.of(op, source).pads):
            pads, key = Filter.of(op, source).pads, id(q.storage)
            sides[key] = tuple(map(max, pads, sides.get(key, (0, 0, 0, 0))))
            tensors[key] = q
    final = {id(ref.storage) for ref in trace.outputs}
    moved = {}
    for key, q in tensors.items():
        maker = q.storage.maker
        if maker is None or maker.target is not ops.quantize or key in final:
            continue
        if all(_reads_whole(reader, q, integer) for reader in q.storage.readers):
            moved[key] = _inside(q, sides[key])
    return moved


def _reads_whole(reader: Op, q: Ref, integer: Mapping[Op, Source]) -> bool:
    """Whether a reader is a dequantization for convolutions and elementwise ops alone."""
    if reader.target is not ops.dequantize or not whole(reader.args[0], q):
        return False
    return all(
        (op.target is CONV and op in integer and whole(integer[op].ref, q))
        or (edge_steps.writes(op) and op not in integer)
        for op in reader.out.storage.readers
    )


def _inside(x: Ref, pads: tuple[int, ...]) -> Ref:
    """The tensor in new memory, channels last, with a border."""
    n, c, height, width = x.shape
    top, left, bottom, right = pads
    high, wide = height + top + bottom, width + left + right
    strides = (high * wide * c, 1, wide * c, c)
    storage = Storage(x.dtype, n * high * wide * c)
    return Ref(storage, x.dtype, (top * wide + left) * c, x.shape, strides)


def convolution(calls: Calls, g: Group, op: Op) -> None:
    """The calls for a convolution and what follows it."""
    x, weight, bias = op.args[:3]
    source = calls.integer.get(op)
    f, blank = Filter.of(op, source), source.zero if source is not None else 0.0
    if source is not None:
        x = source.ref
    if f.groups == x.shape[1] == op.out.shape[1] and prod(f.kernel) <= EXACT_TAPS:
        _depthwise(calls, g, op, x, f, blank, weight, bias, source)
    elif op in calls.packings:
        rows = _rows(calls, x, f, op.label)
        count = op.out.shape[0] * prod(f.out)
        packed_product(calls, g, op, rows, count, calls.packings[op], _spread(bias), None)
    else:
        _product(calls, g, op, x, f, blank, weight, bias, source)


def _bordered_input(calls: Calls, x: Ref, f: Filter, blank: object, label: str) -> Ref:
    """The input with the filter's border around it, channel beside channel."""
    n, c, height, width = x.shape
    top, left, bottom, right = f.pads
    home = calls.moved.get(id(x.storage))
    if home is None and not any(f.pads) and (x.strides[1] == 1 or c == 1) and not x.storage.port:
        return x
    if home is None:
        home = _inside(x, f.pads)
        calls.copy(x, home, label)
        x = home
    if id(home.storage) not in calls.filled:
        calls.filled.add(id(home.storage))
        _fill_border(calls, home, blank, label)
    offset = home.offset - top * home.strides[2] - left * home.strides[3]
    shape = (n, c, height + top + bottom, width + left + right)
    return Ref(home.storage, home.dtype, offset, shape, home.strides)


def _fill_border(calls: Calls, inside: Ref, blank: object, label: str) -> None:
    """The border of a tensor that `_inside` made: what lies before, between and after its rows."""
    n, c, height, width = inside.shape
    image, _, line, _ = inside.strides

    def fill(first: int, count: int, elements: int) -> None:
        if count and elements:
            shape, strides = (n, count, elements), (image, line, 1)
            calls.fill(Ref(inside.storage, inside.dtype, first, shape, strides), blank, label)

    end = inside.offset + (height - 1) * line + width * c
    fill(0, 1, inside.offset)
    fill(inside.offset + width * c, height - 1, line - width * c)
    fill(end, 1, image - end)


def _product(
    calls: Calls, g: Group, op: Op, x: Ref, f: Filter, blank: object, weight: Ref,
    bias: Ref | None, source: Source | None,
) -> None:  # fmt: skip
    """A convolution as a product, or as one for each group of channels."""
    isa, step = calls.isa, calls.isa.depth if source is not None else 1
    x = _bordered_input(calls, x, f, blank, op.label)
    n, c = x.shape[0], x.shape[1] // f.groups
    columns = op.out.shape[1] // f.groups
    joined = f.groups == 1 and f.dilation[1] == 1 and x.strides[3] in (c, 0)
    loops = [(f.kernel[0], f.dilation[0] * x.strides[2])]
    if not joined:
        loops.append((f.kernel[1], f.dilation[1] * x.strides[3]))
    run = c * f.kernel[1] if joined else c
    deep = -(-run // step) * step
    if deep != run:  # the last run is read beyond its end, by weights of 0
        x.storage.size += step
    runs = tuple((count, stride) for count, stride in loops if count > 1)
    pieces = prod(count for count, _ in runs)
    held = weight.storage.weight if source is not None else None
    known = weight if held is not None else calls.constants.known(weight)
    filters = held.q if held is not None else known.storage.constant
    if filters is None:
        raise UnsupportedError(f"a convolution whose weight is computed ({op.label})")
    filters = filters.reshape(op.out.shape[1], c, *f.kernel)
    right = -(-columns // isa.panel) * isa.panel * deep * pieces
    flat = f.kernel == (1, 1) and f.stride == (1, 1) and _without_gaps(x)
    product = Product(
        rows=n * prod(f.out) if flat else f.out[1], columns=columns, depth=deep * pieces,
        row_stride=x.shape[1] if flat else f.stride[1] * x.strides[3], offset=x.offset,
        batch=() if flat else (n, f.out[0]),
        left=() if flat else (x.strides[0], f.stride[0] * x.strides[2]),
        right=() if flat else (0, 0),
        runs=runs, groups=f.groups, left_group=c, right_group=right,
    )  # fmt: skip

    def packed(pack: Callable[[Tensor], Tensor]) -> Tensor:
        taps = filters.permute(LAST).reshape(op.out.shape[1], pieces, run)
        matrix = torch.nn.functional.pad(taps, (0, deep - run)).flatten(1)
        return torch.cat([pack(part) for part in matrix.split(columns)])

    key = (pieces, run, deep, f.groups, isa.panel)
    if source is None or held is None:
        panels = calls.constant(
            (known.storage.constant, *key),
            lambda: packed(lambda part: matmul_float.pack(part.float(), isa)),
        )
        float_product(calls, g, op, x.storage, panels.storage, product, _spread(bias))
        return
    panels = calls.constant(
        (held.q, *key), lambda: packed(lambda part: matmul_int8.pack(part, isa))
    )
    integer_product(calls, g, op, x.storage, panels.storage, product, bias, source)


def _without_gaps(x: Ref) -> bool:
    """Whether positions follow each other in memory, all images as one, channel beside channel."""
    steps = (x.shape[1] * x.shape[2] * x.shape[3], 1, x.shape[1] * x.shape[3], x.shape[1])
    return all(n == 1 or s == t for n, s, t in zip(x.shape, x.strides, steps, strict=True))


def _rows(calls: Calls, x: Ref, f: Filter, label: str) -> Ref:
    """A float input's patches as rows of a matrix; the input itself where each is one position."""
    n, c = x.shape[:2]
    if f.kernel == (1, 1) and f.stride == (1, 1) and not any(f.pads) and _without_gaps(x):
        return Ref(x.storage, x.dtype, x.offset, (n * prod(f.out), c), (c, 1))
    x = _bordered_input(calls, x, f, 0.0, label)
    a, b, s, t = x.strides
    shape = (n, *f.out, *f.kernel, c)
    strides = (a, f.stride[0] * s, f.stride[1] * t, f.dilation[0] * s, f.dilation[1] * t, b)
    rows = calls.temporary(x.dtype, shape)
    calls.copy(Ref(x.storage, x.dtype, x.offset, shape, strides), rows, label)
    depth = prod(f.kernel) * c
    return Ref(rows.storage, x.dtype, 0, (n * prod(f.out), depth), (depth, 1))


def _spread(bias: Ref | None) -> Ref | None:
    """One number for each channel, in the shape that broadcasts over images."""
    if bias is None:
        return None
    return Ref(bias.storage, bias.dtype, bias.offset, (*bias.shape, 1, 1), (1, 0, 0))


def _depthwise(
    calls: Calls, g: Group, op: Op, x: Ref, f: Filter, blank: object, weight: Ref,
    bias: Ref | None, source: Source | None,
) -> None:  # fmt: skip
    n, c = x.shape[:2]
    x = _bordered_input(calls, x, f, blank, op.label)
    window = Window(
        n, *f.out, c, f.kernel, x.offset, x.strides[0], f.stride[0] * x.strides[2],
        f.stride[1] * x.strides[3], f.dilation[0] * x.strides[2], f.dilation[1] * x.strides[3],
        source is not None,
    )  # fmt: skip
    stored, first = weight.storage.weight, None
    if source is not None and stored is not None:
        matrix = stored.q.flatten(1)
        taps = calls.constant((stored.q, "taps"), matrix.T.float)
        first = start(calls, stored, source, 0)
        held = [x.storage, taps.storage, *([first.storage] if first is not None else [])]
        writer = calls.writer(op.out.shape, held, LAST)
        value = scaled(calls, writer, stored, bias, source, 0, first is not None)
    else:
        known = calls.constants.known(weight).storage
        tensor = known.constant
        if tensor is None:
            raise UnsupportedError(f"a convolution whose weight is computed ({op.label})")
        taps = calls.constant((tensor, "taps"), lambda: tensor.reshape(c, -1).T)
        writer = calls.writer(op.out.shape, [x.storage, taps.storage], LAST)
        value = writer.step("anchor", "float32")
        if bias is not None:
            shaped = writer.value(_spread(bias), "float32")
            value = writer.step("add", "float32", value, shaped)
    writer.keep(op.out, value)
    writer.members(g, calls.stored)
    expression, isa = writer.expression(), calls.isa
    started = first is not None
    calls.add(
        "depthwise", op.label, (window, expression, isa, started),
        lambda name: depthwise(
            name, writer.kernel_arguments(), window, expression, isa, started
        ), writer,
    )  # fmt: skip
