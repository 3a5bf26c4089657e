"""Kernels around expressions on a GPU: elementwise, norms, softmax, reductions, float products.

They compute what `elementwise`, `rows` and `matmul_float` compute on a CPU, one element a thread,
one row or one result a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.errors import UnsupportedError
from qcompiler.kernels import code
from qcompiler.kernels.code import Argument
from qcompiler.kernels.cuda_code import (
    WARP,
    CudaKernel,
    address,
    call,
    cuda_kernel,
    registers,
    value,
)
from qcompiler.kernels.depthwise import Window
from qcompiler.kernels.elementwise import collapsed
from qcompiler.kernels.expression import Emitter, Expression
from qcompiler.kernels.tiles import Product

THREADS = 256
KEPT = 16  # numbers of a row that a thread holds at most; longer rows are read again
SCRATCH = 128  # bytes: a float for each warp of a block


def elementwise(name: str, arguments: Sequence[Argument], expression: Expression) -> CudaKernel:
    """The kernel; arguments are what the expression reads and writes."""
    expression = collapsed(expression)
    width, count = expression.width, expression.rows * expression.width
    with cuda_kernel(name, arguments, (-(-count // THREADS),), THREADS) as (
        made, buffers, (block,), thread, _,
    ):  # fmt: skip
        emitter = Emitter(expression, buffers)
        call("qc_after_previous")
        call("qc_let_next")
        index = T.Bind(block * THREADS + thread)
        with T.If(index < count), T.Then():
            emitter.vector(emitter.coordinates(T.Bind(index // width)), index % width, 1)
    return made


def _fold(
    count: int, thread: Any, threads: int, start: float, step: Callable[[Any, Any], Any]
) -> Any:
    """step(total, i) over i = thread, thread + threads, … below count: a thread's own part."""
    total = registers(1, "float32")
    T.buffer_store(total, T.float32(start), [0])
    with T.serial(0, -(-count // threads)) as turn:
        index = T.Bind(turn * threads + thread)
        with T.If(index < count), T.Then():
            T.buffer_store(total, step(total[0], index), [0])
    return total[0]


def rows(
    name: str, arguments: Sequence[Argument], kind: str, source: Expression,
    expression: Expression, epsilon: float = 0.0,
) -> CudaKernel:  # fmt: skip
    """A kernel that normalizes rows; see `rows.rows`."""
    width = source.width
    threads = min(1024, -(-width // WARP) * WARP)
    warps = threads // WARP
    with cuda_kernel(name, arguments, (source.rows,), threads, SCRATCH) as (
        made, buffers, (row,), thread, memory,
    ):  # fmt: skip
        read, write = Emitter(source, buffers), Emitter(expression, buffers)
        call("qc_after_previous")
        call("qc_let_next")
        place = read.coordinates(row)
        each = -(-width // threads)
        kept = registers(each, "float32") if each <= KEPT else None

        def along(body: Callable[[Any, Any], None]) -> None:
            """body(turn, index) for this thread's part of the row."""
            if kept is None:
                with T.serial(0, each) as turn:
                    index = T.Bind(turn * threads + thread)
                    with T.If(index < width), T.Then():
                        body(turn, index)
                return
            for i in range(each):
                index = T.Bind(i * threads + thread)
                with T.If(index < width), T.Then():
                    body(i, index)

        def number(turn: Any, index: Any) -> Any:
            return read.value(place, index, 1) if kept is None else kept[turn]

        if kept is not None:
            along(lambda i, index: T.buffer_store(kept, read.value(place, index, 1), [i]))

        def over(start: float, step: Callable[[Any, Any], Any], kind: str) -> Any:
            total = registers(1, "float32")
            T.buffer_store(total, T.float32(start), [0])
            along(lambda i, at: T.buffer_store(total, step(total[0], number(i, at)), [0]))
            return T.Bind(value(f"qc_block_{kind}", total[0], address(memory), warps))

        if kind == "softmax":
            top = over(-3.4e38, code.maximum, "max")
            total = over(0.0, lambda t, x: t + code.exp(x - top, 1), "sum")
            factor = T.Bind(T.float32(1) / total)

            def normal(x: Any) -> Any:
                return code.exp(x - top, 1) * factor
        elif kind in ("layer_norm", "rms_norm"):
            mean: Any = T.float32(0)
            if kind == "layer_norm":
                mean = T.Bind(over(0.0, lambda t, x: t + x, "sum") * code.number(1 / width, 1))
            power = over(0.0, lambda t, x: code.fma(x - mean, x - mean, t, 1), "sum")
            power = code.fma(power, code.number(1 / width, 1), code.number(epsilon, 1), 1)
            factor = T.Bind(T.float32(1) / code.intrinsic("llvm.sqrt", "float32", power))

            def normal(x: Any) -> Any:
                return (x - mean) * factor
        else:
            raise UnsupportedError(f"no row kernel '{kind}'")

        def finish(turn: Any, index: Any) -> None:
            result = code.bind(normal(number(turn, index)))
            write.vector(write.coordinates(row), index, 1, result)

        along(finish)
    return made


def reduction(
    name: str, arguments: Sequence[Argument], kind: str, source: Expression, outer: int,
    expression: Expression,
) -> CudaKernel:  # fmt: skip
    """A kernel that reduces the last dimensions of a tensor; see `rows.reduction`."""
    kept, gone = source.shape[:outer], source.shape[outer:]
    count, results = prod(gone), prod(kept)
    threads = min(THREADS, -(-count // WARP) * WARP)
    largest = kind in ("max", "min")
    sign = -1.0 if kind == "min" else 1.0
    with cuda_kernel(name, arguments, (results,), threads, SCRATCH) as (
        made, buffers, (block,), thread, memory,
    ):  # fmt: skip
        read, write = Emitter(source, buffers), Emitter(expression, buffers)
        call("qc_after_previous")
        call("qc_let_next")

        def spots(flat: Any, sizes: tuple[int, ...]) -> list[Any]:
            found: list[Any] = []
            for size in reversed(sizes):
                found.insert(0, flat % size if size > 1 else 0)
                flat = flat // size if size > 1 else flat
            return found

        def step(total: Any, index: Any) -> Any:
            where = [*spots(block, kept), *spots(index, gone)]
            x = read.value(where[:-1], where[-1], 1) * code.number(sign, 1)
            return code.maximum(total, x) if largest else total + x

        part = _fold(count, thread, threads, -3.4e38 if largest else 0.0, step)
        over = "max" if largest else "sum"
        result = value(f"qc_block_{over}", part, address(memory), threads // WARP)
        result = result * code.number(sign / (count if kind == "mean" else 1), 1)
        result = T.Bind(result)
        with T.If(thread == 0), T.Then():
            place = spots(block, kept)
            write.vector(place[:-1], place[-1] if kept else 0, 1, result)
    return made


def matmul_float(
    name: str, arguments: Sequence[Argument], product: Product, expression: Expression, panel: int
) -> CudaKernel:
    """A float32 product, one result a thread; see `matmul_float.matmul_float`.

    Panels of `panel` columns lie side by side, so that a warp reads whole lines of the weight.
    """
    members, groups = prod(product.batch), product.groups
    columns, depth = product.columns, product.depth
    across = -(-columns // THREADS)
    # Along x alone: the pixels of images are more than the 65535 that y and z may have.
    with cuda_kernel(name, arguments, (across * product.rows * members * groups,), THREADS) as (
        made, buffers, (block,), thread, _,
    ):  # fmt: skip
        emitter = Emitter(expression, buffers)
        call("qc_after_previous")
        call("qc_let_next")
        column = T.Bind(block % across * THREADS + thread)
        row = T.Bind(block // across % product.rows)
        layer = T.Bind(block // (across * product.rows))
        member, group = (T.Bind(layer // groups), T.Bind(layer % groups)) if groups > 1 else (
            layer, 0
        )  # fmt: skip
        left: Any = product.offset + row * product.row_stride + group * product.left_group
        right: Any = group * product.right_group
        rest: Any = member
        for size, a, b in reversed([*zip(product.batch, product.left, product.right, strict=True)]):
            left, right = left + rest % size * a, right + rest % size * b
            rest = rest // size
        left = T.Bind(left)
        right = T.Bind(right + column // panel * (depth * panel) + column % panel)
        with T.If(column < columns), T.Then():
            total = registers(1, "float32")
            T.buffer_store(total, T.float32(0), [0])
            with product.steps(1) as (place, k):
                a, b = buffers[0][left + place], buffers[1][right + k * panel]
                T.buffer_store(total, code.fma(a, b, total[0], 1), [0])
            spot = emitter.coordinates(member * product.rows + row)
            emitter.vector(spot, group * columns + column, 1, total[0])
    return made


def depthwise(
    name: str, arguments: Sequence[Argument], window: Window, expression: Expression
) -> CudaKernel:
    """A depthwise convolution of floats, one result a thread; see `depthwise.depthwise`."""
    w, taps = window, window.taps
    count = w.batch * w.height * w.width * w.channels
    with cuda_kernel(name, arguments, (-(-count // THREADS),), THREADS) as (
        made, buffers, (block,), thread, _,
    ):  # fmt: skip
        emitter = Emitter(expression, buffers)
        call("qc_after_previous")
        call("qc_let_next")
        index = T.Bind(block * THREADS + thread)
        with T.If(index < count), T.Then():
            c, rest = T.Bind(index % w.channels), index // w.channels
            x, y = T.Bind(rest % w.width), T.Bind(rest // w.width % w.height)
            n = T.Bind(rest // (w.width * w.height))
            start = w.offset + n * w.batch_stride + y * w.row_stride + x * w.column_stride + c
            start = T.Bind(start)
            total = registers(1, "float32")
            T.buffer_store(total, T.float32(0), [0])
            with T.serial(0, taps[0]) as i, T.serial(0, taps[1]) as j:
                a = buffers[0][start + i * w.row_step + j * w.column_step]
                b = buffers[1][(i * taps[1] + j) * w.channels + c]
                T.buffer_store(total, code.fma(a, b, total[0], 1), [0])
            emitter.vector([n, y, x], c, 1, total[0])
    return made
