"""An elementwise expression as a kernel of its own; also copies, casts, gathers and packing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qcompiler.kernels import code
from qcompiler.kernels.code import LANES, Argument
from qcompiler.kernels.expression import Access, Emitter, Expression

CHUNK = 4096  # elements of a row that a thread takes at once
SMALL = 8192  # elements below which threads cost more than they save


def elementwise(name: str, arguments: Sequence[Argument], expression: Expression) -> Any:
    """The kernel; arguments are what the expression reads and writes."""
    expression = collapsed(expression)
    rows, width = expression.rows, expression.width
    many = code.parallel if code.at_least(rows * width, SMALL) else code.loop
    with code.kernel(name, arguments) as (made, buffers):
        emitter = Emitter(expression, buffers)

        def run(row: Any, first: Any, width: Any) -> None:
            place = emitter.coordinates(row)
            if expression.wanders:
                with code.loop(width) as i:
                    emitter.vector(place, first + i, 1)
                return
            if code.at_least(width, LANES):
                with code.loop(code.quotient(width, LANES)) as i:
                    emitter.vector(place, first + i * LANES, LANES)
            left = code.remainder_of(width, LANES)
            if code.at_least(left, 1):
                with code.loop(left) as i:
                    emitter.vector(place, first + (width - left) + i, 1)

        if code.same(rows, 1):
            if code.at_least(width, CHUNK):
                with many(code.quotient(width, CHUNK)) as chunk:
                    run(0, chunk * CHUNK, CHUNK)
            left = code.remainder_of(width, CHUNK)
            if code.at_least(left, 1):
                run(0, width - left, left)
        else:
            with many(rows) as row:
                run(row, 0, width)
    return made


def _accesses(expression: Expression) -> list[Access]:
    found = [a for s in expression.steps for a in (s.access, *s.indices) if a is not None]
    return found + [access for _, access in expression.stores]


def collapsed(expression: Expression) -> Expression:
    """The same expression over fewer dimensions: neighbours that every access walks as one."""
    shape = list(expression.shape) or [1]
    strides = {a: list(a.strides) or [0] for a in _accesses(expression)}
    # A lookup's index must stay constant along the last dimension, so its accesses are kept apart.
    for dim in range(len(shape) - 2, -1, -1):
        joined = all(
            code.same(s[dim], s[dim + 1] * shape[dim + 1]) or code.same(shape[dim], 1)
            for s in strides.values()
        )
        if joined:
            shape[dim : dim + 2] = [shape[dim] * shape[dim + 1]]
            for s in strides.values():
                del s[dim]
        elif code.same(shape[dim + 1], 1):
            del shape[dim + 1]
            for s in strides.values():
                del s[dim + 1]
    if len(shape) == len(expression.shape):
        return expression

    def swap(access: Access) -> Access:
        return replace(access, strides=tuple(strides[access]))

    steps = tuple(
        replace(s, access=s.access and swap(s.access), indices=tuple(map(swap, s.indices)))
        for s in expression.steps
    )
    stores = tuple((i, replace(a, strides=tuple(strides[a]))) for i, a in expression.stores)
    return Expression(tuple(shape), steps, stores)
