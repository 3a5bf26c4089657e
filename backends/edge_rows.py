"""Norms, softmax and reductions: which kernel, with which arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qcompiler.backends.edge_group import ROWS, Group
from qcompiler.backends.edge_ops import Op, Ref, Storage
from qcompiler.backends.edge_steps import REDUCE
from qcompiler.errors import UnsupportedError
from qcompiler.kernels.expression import Access
from qcompiler.kernels.rows import reduction, rows

if TYPE_CHECKING:
    from qcompiler.backends.edge_calls import Calls


def norm_operands(op: Op) -> tuple[Ref | None, Ref | None, float]:
    """Scale, shift and epsilon of a norm over the last dimension."""
    schema = op.target._schema.arguments
    given = {a.name: a.default_value for a in schema} | dict(op.kwargs)
    given |= {a.name: v for a, v in zip(schema, op.args, strict=False)}
    if len(given["normalized_shape"]) != 1:
        raise UnsupportedError("a norm over more than one dimension")
    epsilon = given["eps"] if given["eps"] is not None else 1.1920928955078125e-07
    return given["weight"], given.get("bias"), epsilon


def row_kernel(calls: Calls, g: Group, op: Op) -> None:
    """A norm or softmax over the last dimension, and what follows it."""
    x, kind = op.args[0], ROWS[op.target]
    scale = shift = None
    epsilon = 0.0
    if kind == "softmax":
        if op.args[1] % len(x.shape) != len(x.shape) - 1:
            raise UnsupportedError("softmax over other than the last dimension")
    else:
        scale, shift, epsilon = norm_operands(op)
    arguments: list[Storage] = []
    read = calls.writer(x.shape, arguments)
    read.value(x, "float32")
    source = read.expression()
    writer = calls.writer(op.out.shape, arguments)
    value = writer.step("anchor", "float32")
    if scale is not None:
        value = writer.step("mul", "float32", value, writer.value(scale, "float32"))
    if shift is not None:
        value = writer.step("add", "float32", value, writer.value(shift, "float32"))
    writer.keep(op.out, value)
    writer.members(g, calls.stored)
    expression = writer.expression()
    calls.add(
        kind, op.label, (source, expression, epsilon),
        lambda name: rows(
            name, writer.kernel_arguments(), kind, source, expression, epsilon
        ), writer,
    )  # fmt: skip


def reduce(calls: Calls, g: Group, op: Op) -> None:
    """A sum, mean or extreme over some dimensions, and what follows it."""
    x, kind = op.args[0], REDUCE[op.target]
    given = op.args[1] if len(op.args) > 1 and op.args[1] is not None else []
    dims = [d % len(x.shape) for d in (given if isinstance(given, list | tuple) else [given])]
    dims = dims or list(range(len(x.shape)))
    kept = [d for d in range(len(x.shape)) if d not in dims]
    order = (*kept, *sorted(dims))
    arguments: list[Storage] = []
    read = calls.writer(x.shape, arguments, order)
    read.value(x, "float32")
    source = read.expression()
    writer = calls.writer(op.out.shape, arguments)
    writer.keep(op.out, writer.step("anchor", "float32"))
    writer.members(g, calls.stored)
    full = writer.expression()
    # Kept dimensions of size 1 stand in the output only: drop them for the kernel.
    names = list(range(len(op.out.shape)))
    if len(op.out.shape) == len(x.shape):
        names = [d for d in names if d not in dims]
    expression = _narrowed(full, names)
    outer = len(kept)
    calls.add(
        "reduce", op.label, (kind, source, outer, expression),
        lambda name: reduction(
            name, writer.kernel_arguments(), kind, source, outer, expression
        ), writer,
    )  # fmt: skip


def _narrowed(expression: Any, dims: list[int]) -> Any:
    """The expression over some of its dimensions; the others have size 1."""

    def cut(access: Access) -> Access:
        return replace(access, strides=tuple(access.strides[d] for d in dims))

    steps = tuple(
        replace(s, access=s.access and cut(s.access), indices=tuple(map(cut, s.indices)))
        for s in expression.steps
    )
    stores = tuple((i, replace(a, strides=tuple(a.strides[d] for d in dims)))
                   for i, a in expression.stores)  # fmt: skip
    return replace(
        expression, shape=tuple(expression.shape[d] for d in dims), steps=steps, stores=stores
    )
