"""Plain loops along one dimension on a GPU, a line or an element a thread; see `loops`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.errors import UnsupportedError
from qcompiler.kernels import code
from qcompiler.kernels.code import Argument
from qcompiler.kernels.cuda_code import WARP, CudaKernel, call, cuda_kernel, registers
from qcompiler.kernels.expression import Access, Emitter, Expression
from qcompiler.kernels.loops import ordered

THREADS = 256
SCATTERED = 1 << 14  # values at most


def fold(
    name: str, arguments: Sequence[Argument], kind: str, sizes: tuple[int, int, int], dtype: str,
    start: int,
) -> CudaKernel:  # fmt: skip
    """A kernel that folds along the middle dimension; see `loops.fold`."""
    outer, count, inner = sizes
    lines = outer * inner
    running, product = kind.startswith("cum"), kind.endswith("prod")
    with cuda_kernel(name, arguments, (-(-lines // THREADS),), THREADS) as (
        made, buffers, (block,), thread, _,
    ):  # fmt: skip
        call("qc_after_previous")
        call("qc_let_next")
        source = buffers[-1]
        line = T.Bind(block * THREADS + thread)
        with T.If(line < lines), T.Then():
            first = T.Bind(start + line // inner * (count * inner) + line % inner)
            best = registers(1, dtype)
            if kind in ("cumsum", "cumprod", "sum", "prod"):
                T.buffer_store(best, T.Cast(dtype, T.int32(int(product))), [0])
                with T.serial(0, count) as i:
                    value, had = source[first + i * inner], best[0]
                    T.buffer_store(best, had * value if product else had + value, [0])
                    if running:
                        T.buffer_store(buffers[0], best[0], [first - start + i * inner])
                if not running:
                    T.buffer_store(buffers[0], best[0], [line])
            else:
                place = registers(1, "int64")
                T.buffer_store(best, source[first], [0])
                T.buffer_store(place, T.int64(0), [0])
                with T.serial(0, count) as i:
                    value, had = T.Bind(source[first + i * inner]), T.Bind(best[0])
                    better = value > had if kind.endswith("max") else value < had
                    if dtype == "float32":  # the first NaN is the extreme
                        nan = T.And(code.is_nan(value, 1), T.Not(code.is_nan(had, 1)))
                        better = T.Or(better, nan)
                    with T.If(better), T.Then():
                        T.buffer_store(place, T.Cast("int64", i), [0])
                        T.buffer_store(best, value, [0])
                if not kind.startswith("arg"):
                    T.buffer_store(buffers[0], best[0], [line])
                if kind not in ("amax", "amin"):
                    T.buffer_store(buffers[-2], place[0], [line])
    return made


def rank(
    name: str, arguments: Sequence[Argument], sizes: tuple[int, int, int], dtype: str, start: int,
    top: int, descending: bool,
) -> CudaKernel:  # fmt: skip
    """A kernel that sorts along the middle dimension; see `loops.rank`."""
    outer, count, inner = sizes
    total = outer * count * inner
    whole = "int64" if dtype == "int64" else "int32"
    with cuda_kernel(name, arguments, (-(-total // THREADS),), THREADS) as (
        made, buffers, (block,), thread, _,
    ):  # fmt: skip
        call("qc_after_previous")
        call("qc_let_next")
        values, places, source = buffers
        index = T.Bind(block * THREADS + thread)
        with T.If(index < total), T.Then():
            row, i, column = index // (count * inner), index // inner % count, index % inner
            first = T.Bind(start + row * (count * inner) + column)
            value = T.Bind(source[start + index])
            mine = T.Bind(ordered(value, dtype, whole))
            before = registers(1, "int32")
            T.buffer_store(before, T.int32(0), [0])
            with T.serial(0, count) as j:
                theirs = T.Bind(ordered(T.Bind(source[first + j * inner]), dtype, whole))
                ahead = theirs > mine if descending else theirs < mine
                earlier: Any = T.And(theirs == mine, j < i)
                with T.If(T.Or(ahead, earlier)), T.Then():
                    T.buffer_store(before, before[0] + 1, [0])
            at = T.Bind(before[0])
            with T.If(at < top), T.Then():
                to = T.Bind(row * (top * inner) + at * inner + column)
                T.buffer_store(values, value, [to])
                T.buffer_store(places, T.Cast("int64", i), [to])
    return made


def scatter(
    name: str, arguments: Sequence[Argument], source: Expression, place: Access,
    indices: Sequence[Access], numbers: Sequence[float], add: bool,
) -> CudaKernel:  # fmt: skip
    """A kernel that writes values to places found at run time; see `loops.scatter`.

    One thread writes them in order, so that the last of several stays and sums are the same in
    every run.

    Raises:
        UnsupportedError: where there are so many that this would take long.
    """
    count = source.rows * source.width
    if count > SCATTERED:
        raise UnsupportedError(
            f"scattering {count} values: a GPU does it one after the other, at most {SCATTERED}"
        )
    with cuda_kernel(name, arguments, (1,), WARP) as (made, buffers, _, thread, _):
        call("qc_after_previous")
        call("qc_let_next")
        read = Emitter(source, buffers)
        with (
            T.If(thread == 0),
            T.Then(),
            T.serial(0, source.rows) as row,
            T.serial(0, source.width) as column,
        ):
            at = read.coordinates(row)
            start = read.start(place, at, column)
            for index, distance, rows in zip(indices, numbers[::2], numbers[1::2], strict=True):
                start = start + read.found(index, at, column, int(rows)) * int(distance)
            start = T.Bind(start)
            value = read.value(at, column, 1)
            if place.dtype == "bool":
                value = T.Cast("uint8", value)
            buffer = buffers[place.argument]
            T.buffer_store(buffer, buffer[start] + value if add else value, [start])
    return made
