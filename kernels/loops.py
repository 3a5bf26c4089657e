"""Plain loops along one dimension of a contiguous (outer, count, inner) tensor.

Running sums and products, positions of extremes, sorting. Sorting is by rank: how many elements
come before each, counted over all of them, which needs no branches, keeps equal elements in order,
and lets every element be placed on its own. NaN comes after all numbers, as in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.kernels import code
from qcompiler.kernels.code import LANES, Argument
from qcompiler.kernels.expression import Access, Emitter, Expression

SHARED = 4096  # elements below which threads cost more than they save


def fold(
    name: str,
    arguments: Sequence[Argument],
    kind: str,
    sizes: tuple[int, int, int],
    start: int,
    dtype: str,
) -> Any:
    """A kernel that folds along the middle dimension, one element after the other.

    Args:
        name: of the function.
        arguments: the outputs, then the input. "max" and "min" give values and int64 positions,
            "argmax" and "argmin" positions, of the first where several are equal; "amax" and
            "amin" values.
        kind: also "cumsum", "cumprod" (as long as the input), "sum", "prod".
        sizes: (outer, count, inner).
        start: of the input in its buffer.
        dtype: of the input.
    """
    outer, count, inner = sizes
    many = code.parallel if outer * count * inner >= SHARED else code.loop
    running = kind.startswith("cum")
    product = kind.endswith("prod")
    with code.kernel(name, arguments) as (made, buffers):
        source = buffers[-1]
        with many(outer * inner) as line:
            row, column = line // inner, line % inner
            first = row * (count * inner) + column
            best = code.scratch(1, dtype)
            if kind in ("cumsum", "cumprod", "sum", "prod"):
                code.store(best, 0, T.Cast(dtype, T.int32(int(product))), 1)
                with code.loop(count) as i:
                    value = code.load(source, start + first + i * inner, 1)
                    had = code.load(best, 0, 1)
                    had = code.bind(had * value if product else had + value)
                    code.store(best, 0, had, 1)
                    if running:
                        code.store(buffers[0], first + i * inner, had, 1)
                if not running:
                    code.store(buffers[0], line, code.load(best, 0, 1), 1)
            else:
                place = code.scratch(1, "int64")
                code.store(best, 0, code.load(source, start + first, 1), 1)
                code.store(place, 0, T.int64(0), 1)
                with code.loop(count) as i:
                    value = code.bind(code.load(source, start + first + i * inner, 1))
                    had = code.bind(code.load(best, 0, 1))
                    better = value > had if kind.endswith("max") else value < had
                    if dtype == "float32":  # the first NaN is the extreme
                        nan = T.And(code.is_nan(value, 1), T.Not(code.is_nan(had, 1)))
                        better = T.Or(better, nan)
                    at = code.bind(code.load(place, 0, 1))
                    code.store(place, 0, T.Select(better, T.Cast("int64", i), at), 1)
                    code.store(best, 0, T.Select(better, value, had), 1)
                if not kind.startswith("arg"):
                    code.store(buffers[0], line, code.load(best, 0, 1), 1)
                if kind not in ("amax", "amin"):
                    code.store(buffers[-2], line, code.load(place, 0, 1), 1)
    return made


def rank(
    name: str,
    arguments: Sequence[Argument],
    sizes: tuple[int, int, int],
    start: int,
    dtype: str,
    top: int,
    descending: bool,
) -> Any:
    """A kernel that sorts along the middle dimension, equal elements in their order.

    Args:
        name: of the function.
        arguments: values and int64 positions, both (outer, top, inner), then the input.
        sizes: (outer, count, inner).
        start: of the input in its buffer.
        dtype: of the input: float32 or an integer type.
        top: how many to keep.
        descending: largest first.
    """
    outer, count, inner = sizes
    many = code.parallel if outer * count * inner >= SHARED else code.loop
    padded = -(-count // LANES) * LANES
    whole = "int64" if dtype == "int64" else "int32"
    with code.kernel(name, arguments) as (made, buffers):
        values, places, source = buffers
        with many(outer * inner) as line:
            row, column = line // inner, line % inner
            first = row * (count * inner) + column
            keys = code.scratch(padded, whole)
            with code.loop(count) as i:
                value = code.load(source, start + first + i * inner, 1)
                code.store(keys, i, ordered(code.bind(value), dtype, whole), 1)
            with code.loop(count) as i:
                mine = code.bind(code.load(keys, i, 1))
                before = code.scratch(LANES, "int32")
                code.store(before, 0, code.integer(0))
                with code.loop(padded // LANES) as part:
                    theirs = code.load(keys, part * LANES)
                    spot = T.ramp(part * LANES, 1, LANES)
                    other = code.spread(mine)
                    ahead = theirs > other if descending else theirs < other
                    same = T.Select(theirs == other, code.integer(1), code.integer(0))
                    same = T.Select(spot < code.spread(i), same, code.integer(0))
                    counted = T.Select(ahead, code.integer(1), same)
                    counted = T.Select(spot < code.integer(count), counted, code.integer(0))
                    code.store(before, 0, code.load(before, 0) + counted)
                width = LANES // 2
                while width >= 1:
                    both = code.load(before, 0, width) + code.load(before, width, width)
                    code.store(before, 0, both, width)
                    width //= 2
                at = code.bind(code.load(before, 0, 1))
                with T.If(at < top), T.Then():
                    to = row * (top * inner) + at * inner + column
                    value = code.load(source, start + first + i * inner, 1)
                    code.store(values, to, value, 1)
                    code.store(places, to, T.Cast("int64", i), 1)
    return made


def ordered(value: Any, dtype: str, whole: str) -> Any:
    """An integer that is ordered as the value is; −0 and 0 are equal, NaN is the largest."""
    if dtype != "float32":
        return T.Cast(whole, value)
    bits = code.bind(code.bits(value, "int32", 1))
    below = T.bitwise_xor(bits, T.int32(0x7FFFFFFF)) + T.int32(1)  # −0: −1 + 1
    turned = T.Select(bits < 0, code.bind(below), bits)
    return T.Select(code.is_nan(value, 1), T.int32(0x7FFFFFFF), turned)


def scatter(
    name: str,
    arguments: Sequence[Argument],
    source: Expression,
    place: Access,
    indices: Sequence[Access],
    numbers: Sequence[float],
    add: bool,
) -> Any:
    """A kernel that writes values to places found at run time, one after the other.

    Args:
        name: of the function.
        arguments: what is read, and what is written.
        source: gives the values.
        place: of the first element that is written, over the source's shape.
        indices: row numbers in one or more dimensions; negative ones count from the end.
        numbers: for each of them the elements from row to row, and the rows.
        add: to what is there; the last value stays otherwise.
    """
    with code.kernel(name, arguments) as (made, buffers):
        read = Emitter(source, buffers)
        with code.loop(source.rows) as row, code.loop(source.width) as column:
            at = read.coordinates(row)
            start = read.start(place, at, column)
            for index, distance, rows in zip(indices, numbers[::2], numbers[1::2], strict=True):
                start = start + read.found(index, at, column, int(rows)) * int(distance)
            start = code.bind(start)
            value = read.value(at, column, 1)
            if place.dtype == "bool":
                value = T.Cast("uint8", value)
            buffer = buffers[place.argument]
            code.store(buffer, start, code.load(buffer, start, 1) + value if add else value, 1)
    return made
