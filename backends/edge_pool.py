"""Pooling of images: a reduction over windows that overlap in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qcompiler.backends.edge_group import Group
from qcompiler.backends.edge_ops import Op, Ref
from qcompiler.errors import UnsupportedError
from qcompiler.kernels.rows import reduction

if TYPE_CHECKING:
    from qcompiler.backends.edge_calls import Calls

LAST = (0, 2, 3, 1)  # channels last
AVERAGE = torch.ops.aten.avg_pool2d.default
LOWEST = -3.4e38  # what pads an input whose largest values are looked for


def pool(calls: Calls, g: Group, op: Op) -> None:
    """The calls for a max or average pool and what follows it.

    Raises:
        UnsupportedError: where an average leaves padding out, or the largest values' places are
            asked for.
    """
    schema = op.target._schema.arguments
    given: dict[str, Any] = {a.name: a.default_value for a in schema} | dict(op.kwargs)
    given |= {a.name: v for a, v in zip(schema, op.args, strict=False)}
    kernel = _pair(given["kernel_size"])
    stride = _pair(given["stride"] or kernel)
    padding, dilation = _pair(given["padding"]), _pair(given.get("dilation", 1))
    average = op.target is AVERAGE
    x: Ref = given["self"] if len(op.out.shape) == 4 else _refuse(op, "of other than 4 dimensions")
    if average and (given["ceil_mode"] or (any(padding) and not given["count_include_pad"])):
        _refuse(op, "whose windows count different numbers of elements")
    if average and given["divisor_override"] is not None:
        _refuse(op, "with a divisor of its own")
    places = [ref.storage for ref in op.outputs[1:]]
    final = [ref.storage for ref in calls.trace.outputs]
    if any(s.readers or any(s is f for f in final) for s in places):
        _refuse(op, "whose indices are read")

    n, c, *size = x.shape
    out = op.out.shape[2:]
    need = [  # rows and columns that the windows reach over
        (out[d] - 1) * stride[d] + (kernel[d] - 1) * dilation[d] + 1 for d in range(2)
    ]
    if any(padding) or any(need[d] > size[d] for d in range(2)):
        wide = [max(need[d], padding[d] + size[d]) for d in range(2)]
        padded = calls.temporary(x.dtype, (n, *wide, c))
        calls.fill(padded, 0.0 if average else LOWEST, op.label)
        a, b, s, _ = padded.strides
        steps = (a, 1, b, s)
        start = padding[0] * b + padding[1] * s
        calls.copy(x, Ref(padded.storage, x.dtype, start, x.shape, steps), op.label)
        x = Ref(padded.storage, x.dtype, 0, (n, c, *wide), steps)
    a, b, s, t = x.strides
    seen = Ref(
        x.storage, x.dtype, x.offset, (n, *out, c, *kernel),
        (a, stride[0] * s, stride[1] * t, b, dilation[0] * s, dilation[1] * t),
    )  # fmt: skip
    arguments: list[Any] = []
    read = calls.writer(seen.shape, arguments)
    read.value(seen, "float32")
    source, kind = read.expression(), "mean" if average else "max"
    writer = calls.writer(op.out.shape, arguments, LAST)
    writer.keep(op.out, writer.step("anchor", "float32"))
    writer.members(g, calls.stored)
    expression = writer.expression()
    calls.add(
        "pool", op.label, (kind, source, expression),
        lambda name: reduction(name, writer.kernel_arguments(), kind, source, 4, expression),
        writer,
    )  # fmt: skip


def _pair(value: Any) -> tuple[int, int]:
    values = [value] if isinstance(value, int) else [*value]
    return values[0], values[-1]


def _refuse(op: Op, what: str) -> Any:
    raise UnsupportedError(f"a pool {what} ({op.label})")
