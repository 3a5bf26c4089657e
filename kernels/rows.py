"""Kernels that go over rows: LayerNorm, RMSNorm, softmax, reductions, quantization of tokens.

Sums are made lane by lane over 16 lanes, then over the lanes in a fixed order.

Sources: LayerNorm, Ba et al. 2016, eq. 4; RMSNorm, Zhang and Sennrich 2019, eq. 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.errors import UnsupportedError
from qcompiler.kernels import code
from qcompiler.kernels.code import LANES, Argument
from qcompiler.kernels.expression import Emitter, Expression

ROWS_TO_SHARE = 4  # rows below which threads cost more than they save


def _along(width: Any, body: Callable[[Any, int], None]) -> None:
    """Calls body(start, lanes) over a row."""
    if code.at_least(width, LANES):
        with code.loop(code.quotient(width, LANES)) as i:
            body(i * LANES, LANES)
    left = code.remainder_of(width, LANES)
    if code.at_least(left, 1):
        with code.loop(left) as i:
            body(width - left + i, 1)


class _Row:
    """Reductions over one row of the input expression."""

    def __init__(self, source: Emitter, place: list[Any]) -> None:
        self.source, self.place = source, place
        self.width = source.expression.width

    def reduce(self, start: float, step: Callable[[Any, Any, int], Any], kind: str) -> Any:
        """Fold step(total, value, lanes) over the row; kind is "sum" or "max"."""
        vector = code.scratch(LANES, "float32")
        single = code.scratch(1, "float32")
        code.store(vector, 0, code.number(start))
        code.store(single, 0, code.number(start, 1), 1)

        def body(first: Any, lanes: int) -> None:
            buffer = vector if lanes > 1 else single
            value = self.source.value(self.place, first, lanes)
            code.store(buffer, 0, step(code.load(buffer, 0, lanes), value, lanes), lanes)

        _along(self.width, body)
        held = code.scratch(LANES, "float32")
        total = (code.sum_lanes if kind == "sum" else code.max_lanes)(code.load(vector, 0), held)
        other = code.load(single, 0, 1)
        return code.bind(total + other if kind == "sum" else code.maximum(total, other))


def rows(
    name: str,
    arguments: Sequence[Argument],
    kind: str,
    source: Expression,
    expression: Expression,
    epsilon: float = 0.0,
) -> Any:
    """A kernel that normalizes rows.

    Args:
        name: of the function.
        arguments: what both expressions read and write.
        kind: "layer_norm" ((x − mean) / √(var + ε)), "rms_norm" (x / √(mean x² + ε)), "softmax".
        source: gives x.
        expression: goes on from the normalized value, its value 0.
        epsilon: ε.
    """
    width = source.width
    many = code.parallel if code.at_least(source.rows, ROWS_TO_SHARE) else code.loop
    with code.kernel(name, arguments) as (made, buffers):
        read, write = Emitter(source, buffers), Emitter(expression, buffers)
        with many(source.rows) as row:
            place = read.coordinates(row)
            line = _Row(read, place)
            if kind == "softmax":
                top = line.reduce(-3.4e38, lambda t, x, n: code.maximum(t, x), "max")

                def shifted(x: Any, lanes: int) -> Any:
                    return code.exp(x - code.spread(top, lanes), lanes)

                total = line.reduce(0.0, lambda t, x, n: t + shifted(x, n), "sum")
                factor = code.bind(code.number(1.0, 1) / total)

                def normal(x: Any, lanes: int) -> Any:
                    return shifted(x, lanes) * code.spread(factor, lanes)
            elif kind in ("layer_norm", "rms_norm"):
                mean: Any = code.number(0.0, 1)
                if kind == "layer_norm":
                    mean = line.reduce(0.0, lambda t, x, n: t + x, "sum")
                    mean = code.bind(mean * code.number(1 / width, 1))

                def centred(x: Any, lanes: int) -> Any:
                    return code.bind(x - code.spread(mean, lanes))

                def square(total: Any, x: Any, lanes: int) -> Any:
                    x = centred(x, lanes)
                    return code.fma(x, x, total, lanes)

                power = line.reduce(0.0, square, "sum")
                power = code.fma(power, code.number(1 / width, 1), code.number(epsilon, 1), 1)
                root = code.intrinsic("llvm.sqrt", "float32", power)
                factor = code.bind(code.number(1.0, 1) / root)

                def normal(x: Any, lanes: int) -> Any:
                    return centred(x, lanes) * code.spread(factor, lanes)
            else:
                raise UnsupportedError(f"no row kernel '{kind}'")

            def body(first: Any, lanes: int) -> None:
                value = code.bind(normal(read.value(place, first, lanes), lanes))
                write.vector(place, first, lanes, value)

            _along(width, body)
    return made


def quantize_rows(
    name: str, arguments: Sequence[Argument], source: Expression, bounds: tuple[int, int],
    group: int,
) -> Any:  # fmt: skip
    """A kernel that quantizes rows symmetrically, each with a scale of its own.

        scale = max |x| / high (1 where that is 0),  q = clamp(round(x / scale), low, high)

    Args:
        name: of the function.
        arguments: the integers (int8), the scales, where `group` is not 0 the sums, then what the
            source reads.
        source: gives x.
        bounds: low and high.
        group: also store the sum of each group of that many integers, as products in groups read
            them; a multiple of 16, or 0.
    """
    width = source.width
    low, high = (float(b) for b in bounds)
    many = code.parallel if code.at_least(source.rows, ROWS_TO_SHARE) else code.loop
    with code.kernel(name, arguments) as (made, buffers):
        read = Emitter(source, buffers)
        with many(source.rows) as row:
            place = read.coordinates(row)
            line = _Row(read, place)

            def largest(total: Any, x: Any, lanes: int) -> Any:
                return code.maximum(total, code.maximum(x, code.number(0.0, lanes) - x))

            scale = line.reduce(0.0, largest, "max") / code.number(high, 1)
            scale = code.bind(
                T.Select(scale == code.number(0.0, 1), code.number(1.0, 1), code.bind(scale))
            )
            code.store(buffers[1], row, scale, 1)

            def integers(first: Any, lanes: int) -> Any:
                x = read.value(place, first, lanes) / code.spread(scale, lanes)
                x = code.minimum(code.maximum(x, code.number(low, lanes)), code.number(high, lanes))
                whole = code.bind(code.round_to_int(code.bind(x), lanes))
                code.store(buffers[0], row * width + first, code.cast(whole, "int8", lanes), lanes)
                return whole

            if not group:
                _along(width, integers)
            else:
                with code.loop(width // group) as g:
                    total = code.scratch(LANES, "int32")
                    code.store(total, 0, code.integer(0))
                    for part in range(0, group, LANES):
                        had = code.load(total, 0)
                        code.store(total, 0, had + integers(g * group + part, LANES))
                    step = LANES // 2
                    while step >= 1:
                        both = code.load(total, 0, step) + code.load(total, step, step)
                        code.store(total, 0, both, step)
                        step //= 2
                    value = code.load(total, 0, 1)
                    code.store(buffers[2], row * (width // group) + g, value, 1)
    return made


def reduction(
    name: str,
    arguments: Sequence[Argument],
    kind: str,
    source: Expression,
    outer: int,
    expression: Expression,
) -> Any:
    """A kernel that reduces the last dimensions of a tensor.

    Args:
        name: of the function.
        arguments: what both expressions read and write.
        kind: "sum", "mean", "max" or "min".
        source: gives x, over `outer` kept dimensions and then the reduced ones.
        outer: how many dimensions are kept.
        expression: over the kept dimensions, from the result on, its value 0.
    """
    kept, gone = source.shape[:outer], source.shape[outer:]
    count = 1
    for size in gone:
        count *= size
    sign = -1.0 if kind == "min" else 1.0
    largest = kind in ("max", "min")
    across = _vector_across(source, outer)
    with code.kernel(name, arguments) as (made, buffers):
        read, write = Emitter(source, buffers), Emitter(expression, buffers)

        def spots(flat: Any) -> list[Any]:
            found: list[Any] = []
            for size in reversed(gone):
                if not code.known(size):
                    found.insert(0, code.remainder_of(flat, size))
                    flat = code.quotient(flat, size)
                    continue
                found.insert(0, flat % size if size > 1 else 0)
                flat = flat // size if size > 1 else flat
            return found

        def finish(value: Any, place: list[Any], column: Any, lanes: int) -> None:
            if kind == "mean":
                whole = code.known(count)
                share = code.number(1 / count, 1) if whole else code.reciprocal(count)
                value = value * code.spread(share, lanes)
            write.vector(place, column, lanes, code.bind(value * code.number(sign, lanes)))

        def fold(total: Any, value: Any, lanes: int) -> Any:
            value = value * code.number(sign, lanes)
            return code.maximum(total, value) if largest else total + value

        start = -math.inf if largest else 0.0

        def one(place: list[Any], column: Any, lanes: int) -> None:
            """Reduce at `lanes` neighbouring outputs at once (or at one, lanes being 1)."""
            total = code.scratch(LANES, "float32")
            code.store(total, 0, code.number(start, lanes), lanes)
            with code.loop(count) as flat:
                where = [*place, column, *spots(flat)] if kept else spots(flat)
                value = _gather(read, where, outer, lanes)
                code.store(total, 0, fold(code.load(total, 0, lanes), value, lanes), lanes)
            finish(code.load(total, 0, lanes), place, column, lanes)

        if across:
            outer_rows = 1
            for size in kept[:-1]:
                outer_rows *= size
            with code.parallel(outer_rows) as row:
                place = write.coordinates(row)
                _along(kept[-1], lambda first, lanes: one(place, first, lanes))
        else:
            total_outputs = 1
            for size in kept:
                total_outputs *= size
            with code.parallel(total_outputs) as flat:
                width = kept[-1] if kept else 1
                place = write.coordinates(flat // width) if kept else []
                column = flat % width if kept else 0
                leading = [*place, column] if kept else []
                line = _Row(read, [*leading, *([0] * (len(gone) - 1))])
                if len(gone) == 1:
                    value = line.reduce(start, fold, "max" if largest else "sum")
                    finish(value, place, column, 1)
                else:
                    one(place, column, 1)
    return made


def _vector_across(source: Expression, outer: int) -> bool:
    """Whether neighbouring outputs lie side by side in the input (channels last)."""
    accesses = [s.access for s in source.steps if s.access is not None]
    return (
        outer > 0
        and code.at_least(source.shape[outer - 1], LANES)
        and all(
            code.known(a.strides[outer - 1])
            and a.strides[outer - 1] in (0, 1)
            and not code.same(a.strides[-1], 1)
            for a in accesses
        )
    )


def _gather(read: Emitter, where: list[Any], outer: int, lanes: int) -> Any:
    """The source's value where the vector runs along dimension `outer` − 1."""
    if lanes == 1:
        return read.value(where[:-1], where[-1], 1)
    turned = read.turned(outer - 1)
    order = [w for i, w in enumerate(where) if i != outer - 1]
    return turned.value(order, where[outer - 1], lanes)
