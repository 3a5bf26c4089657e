"""Quantization with ranges taken at run time: the range, then the scale, then the integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcompiler import ops
from qcompiler.backends.edge_ops import Op, Ref, dense_order
from qcompiler.errors import UnsupportedError
from qcompiler.kernels.rows import quantize_rows, reduction
from qcompiler.qtype import QType

if TYPE_CHECKING:
    from qcompiler.backends.edge_calls import Calls

FLOAT = "float32"


def dynamic_quantize(calls: Calls, op: Op) -> None:
    """The calls for `qc::dynamic_quantize`, for the tensor or for each token (last dimension)."""
    x, kind = calls.contiguous(op.args[0], op.label), QType.parse(op.args[1])
    q, scale, zero = op.outputs
    token = kind.granularity == "token"
    if token and kind.symmetric and kind.element == "int8" and q.contiguous:
        _rows(calls, op, kind)
        return
    if kind.granularity not in ("tensor", "token"):
        raise UnsupportedError(f"dynamic ranges of {kind}")
    width = x.shape[-1] if token else x.numel
    count = x.numel // width
    flat = Ref(x.storage, x.dtype, x.offset, (count, width), (width, 1))
    low, high = (_range(calls, flat, name, op.label) for name in ("min", "max"))

    writer = calls.writer((count, 1), [])
    zeroes = writer.value(0.0, FLOAT)
    bottom = writer.step("minimum", FLOAT, writer.value(low, FLOAT), zeroes)
    top = writer.step("maximum", FLOAT, writer.value(high, FLOAT), zeroes)
    if kind.symmetric:
        reach = writer.step("maximum", FLOAT, top, writer.step("neg", FLOAT, bottom))
        steps = kind.qmax - kind.middle
    else:
        reach, steps = writer.step("sub", FLOAT, top, bottom), kind.qmax - kind.qmin
    size = writer.step("div", FLOAT, reach, writer.value(float(steps), FLOAT))
    none = writer.step("eq", "bool", size, zeroes)
    size = writer.step("where", FLOAT, none, writer.value(1.0, FLOAT), size)
    writer.store(_column(scale, count), size)
    if kind.symmetric:
        point = writer.value(kind.middle, _name(zero.dtype))
    else:
        ratio = writer.step("div", FLOAT, bottom, size)
        point = writer.step("sub", FLOAT, writer.value(float(kind.qmin), FLOAT), ratio)
        point = writer.step("round", FLOAT, point)
        bounds = (float(kind.qmin), float(kind.qmax))
        point = writer.step("clamp", FLOAT, point, numbers=bounds)
        point = writer.step("cast", _name(zero.dtype), point)
    writer.store(_column(zero, count), point)
    calls.pointwise(writer, op.label)

    # Over the tensor's own shape: the integers lie in memory as it does, perhaps transposed.
    writer = calls.writer(q.shape, [], dense_order(q))
    value = writer.step(
        "quantize", _name(q.dtype), writer.value(op.args[0], FLOAT), writer.value(scale, FLOAT),
        writer.value(zero, _name(zero.dtype)), numbers=(float(kind.qmin), float(kind.qmax)),
    )  # fmt: skip
    writer.store(q, value)
    calls.pointwise(writer, op.label)


def _rows(calls: Calls, op: Op, kind: QType) -> None:
    """Rows with a scale each, in one kernel; with the sums that products in groups read."""
    x, (q, scale, zero) = op.args[0], op.outputs
    zero.storage.constant = torch.zeros(zero.storage.size, dtype=zero.dtype)
    forms = [
        calls.packings[layer]
        for reader in q.storage.readers
        if reader.target is ops.dequantize
        for layer in reader.out.storage.readers
        if layer in calls.integer and layer in calls.packings
    ]
    groups = {form.group for form in forms if form.needs_sums}
    group = groups.pop() if groups else 0
    arguments = [q.storage, scale.storage]
    if group:
        if groups:
            raise UnsupportedError("layers that share an input have groups of different sizes")
        count = q.numel // group
        sums = calls.temporary(torch.int32, (count,))
        calls.sums[id(q.storage)] = sums.storage
        arguments.append(sums.storage)
    written = len(arguments)  # the writer adds what is read
    writer = calls.writer(x.shape, arguments)
    writer.value(x, FLOAT)
    source, bounds = writer.expression(), (kind.qmin, kind.qmax)
    calls.add(
        "quantize_rows", op.label, (source, bounds, group),
        lambda name: quantize_rows(name, writer.kernel_arguments(), source, bounds, group),
        writer, written=written,
    )  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _column(ref: Ref, count: int) -> Ref:
    return Ref(ref.storage, ref.dtype, ref.offset, (count, 1), (1 if count > 1 else 0, 0))


def _range(calls: Calls, x: Ref, kind: str, label: str) -> Ref:
    """The smallest or largest value of each row."""
    count = x.shape[0]
    found = calls.temporary(torch.float32, (count, 1))
    writer = calls.writer(x.shape, [])
    writer.value(x, FLOAT)
    source = writer.expression()
    end = calls.writer((count,), writer.arguments)
    end.store(Ref(found.storage, found.dtype, 0, (count,), (1,)), end.step("anchor", FLOAT))
    expression = end.expression()
    calls.add(
        "range", label, (kind, source, expression),
        lambda name: reduction(name, end.kernel_arguments(), kind, source, 1, expression), end,
    )  # fmt: skip
    return found
