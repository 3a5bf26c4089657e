"""Rows on a GPU as matrix products read them: units of float16, or of 8-bit numbers by token.

    float16: y = x
    integers: scale = (high − low) / (qmax − qmin), zero = round(qmin − low / scale),
              q = clamp(round(x / scale) + zero)      low = min(x, 0), high = max(x, 0) of the token
              symmetric: scale = max |x| / (qmax − middle), zero = 0; scale is 1 where it would be 0
    e4m3:     symmetric, with qmax = 448 and q the nearest such number

Integers are stored as such, or as float16 in the order that `Widened` weights are multiplied in, or
both. x is an expression, or the norm of one (RMSNorm, LayerNorm) or its rotation, which then needs
no kernel of its own. The arithmetic is that of `qc::dynamic_quantize`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from qcompiler.kernels.cuda_expressions import SCRATCH, THREADS
from qcompiler.kernels.cuda_hadamard import Line, Rotation
from qcompiler.kernels.cuda_round import place_in_units, range_of, store_quantized
from qcompiler.kernels.cuda_units import UNIT_BYTES
from qcompiler.kernels.expression import Emitter, Expression
from qcompiler.qtype import QType

PIECE = 4  # integers that a thread stores at once
HELD = 32  # numbers of a row that a thread holds at most
MANY = 256  # rows from which on a block need not be fast, but several of them together


@dataclass(frozen=True)
class Norm:
    """A norm before the quantization.

    Attributes:
        centered: LayerNorm, not RMSNorm.
        epsilon: added to the mean square.
        expression: with the normalized number as value 0; its last step is what is quantized.
    """

    centered: bool
    epsilon: float
    expression: Expression


def half_units(name: str, arguments: Sequence[Argument], source: Expression) -> CudaKernel:
    """A kernel that stores rows as units of float16.

    Args:
        name: of the function.
        arguments: the units (uint8), then what the source reads.
        source: gives x, a multiple of 8 wide; what fills up the last unit is zero.
    """
    across = -(-source.width * 2 // UNIT_BYTES)
    pieces = across * 8  # of 8 numbers
    count = source.rows * pieces
    with cuda_kernel(name, arguments, (-(-count // THREADS),), THREADS) as (
        made, buffers, (block,), thread, _,
    ):  # fmt: skip
        read = Emitter(source, buffers)
        call("qc_after_previous")
        call("qc_let_next")
        index = T.Bind(block * THREADS + thread)
        with T.If(index < count), T.Then():
            row, column = T.Bind(index // pieces), T.Bind(index % pieces * 8)
            held = registers(8, "float32")
            for i in range(8):
                T.buffer_store(held, T.float32(0), [i])
            with T.If(column < source.width), T.Then():
                for i in range(8):
                    T.buffer_store(held, read.value(read.coordinates(row), column + i, 1), [i])
            at = place_in_units(row, column * 2, across)
            call("qc_store8", address(buffers[0], at), address(held, 0, 8))
    return made


def quantize_units(
    name: str, arguments: Sequence[Argument], source: Expression, kind: QType,
    before: Norm | Rotation | None, kinds: Sequence[bool] = (False,),
) -> CudaKernel:  # fmt: skip
    """A kernel that quantizes rows, each with a range of its own.

    Args:
        name: of the function.
        arguments: the integers as units (uint8) of each of the kinds, the scales (float32), for
            affine formats the zero points, then what the expressions read.
        source: gives x, a multiple of 4 wide.
        kind: int8, uint8 or float8_e4m3.
        before: a norm of x, or a rotation, before that.
        kinds: False: 8-bit integers; True: float16.

    Raises:
        UnsupportedError: if a row is too long for a block's registers.
    """
    width = source.width
    across = -(-width // UNIT_BYTES)
    quads = across * UNIT_BYTES // PIECE
    each = max(1, min(HELD // PIECE, quads // (4 * WARP))) if source.rows >= MANY else 1
    threads, held_at_most, shared = min(1024, -(-quads // (each * WARP)) * WARP), HELD, SCRATCH
    if isinstance(before, Rotation):
        threads, held_at_most = before.threads, 2 * HELD  # it leaves no number in registers
        shared += before.shared
    each, warps = -(-quads // threads), threads // WARP
    if each * PIECE > held_at_most or width % PIECE:
        raise UnsupportedError(f"GPU targets quantize no rows of {width} numbers by token")
    with cuda_kernel(name, arguments, (source.rows,), threads, shared) as (
        made, buffers, (row,), thread, memory,
    ):  # fmt: skip
        read = Emitter(source, buffers)
        call("qc_after_previous")
        call("qc_let_next")
        place = read.coordinates(row)
        held = registers(each * PIECE, "float32")
        columns = [T.Bind((i * threads + thread) * PIECE) for i in range(each)]

        def fold(start: float, step: Any, over: str) -> Any:
            """step(total, x) over the row."""
            total = registers(1, "float32")
            T.buffer_store(total, T.float32(start), [0])
            for i, column in enumerate(columns):
                with T.If(column < width), T.Then():
                    for j in range(PIECE):
                        T.buffer_store(total, step(total[0], held[i * PIECE + j]), [0])
            return T.Bind(value(f"qc_block_{over}", total[0], address(memory), warps))

        def number(column: Any) -> Any:
            return read.value(place, column, 1)

        line, factor = None, 1.0
        if isinstance(before, Rotation):
            line, factor = Line(memory, SCRATCH, thread, before, buffers), before.scale
            line.rotate(number)

        def given(column: Any) -> Any:
            return number(column) if line is None else line.get(column) * code.number(factor, 1)

        for i, column in enumerate(columns):
            for j in range(PIECE):
                T.buffer_store(held, T.float32(0), [i * PIECE + j])
            with T.If(column < width), T.Then():
                for j in range(PIECE):
                    T.buffer_store(held, given(column + j), [i * PIECE + j])
        if isinstance(before, Norm):
            _normalize(before, buffers, row, held, columns, width, fold)
        found = range_of(kind, lambda step: fold(0.0, step, "max"))
        with T.If(thread == 0), T.Then():
            T.buffer_store(buffers[len(kinds)], found.scale, [row])
            if not kind.symmetric:
                last = len(kinds) + 1
                T.buffer_store(buffers[last], T.Cast(arguments[last].dtype, found.zero), [row])
        for units, wide in zip(buffers, kinds, strict=False):
            across = -(-width * (1 + wide) // UNIT_BYTES)
            for i, column in enumerate(columns):
                with T.If(column * (1 + wide) < across * UNIT_BYTES), T.Then():
                    quad = address(held, i * PIECE, PIECE)
                    store_quantized(units, row, column, across, wide, quad, PIECE, kind, found)
    return made


def _normalize(
    norm: Norm, buffers: Sequence[Any], row: Any, held: Any, columns: Sequence[Any], width: int,
    fold: Any,
) -> None:  # fmt: skip
    """Replace the row that a block's threads hold by its norm; as `cuda_expressions.rows`."""
    write = Emitter(norm.expression, buffers)
    place = write.coordinates(row)
    part = code.number(1 / width, 1)
    mean: Any = T.float32(0)
    if norm.centered:
        mean = T.Bind(fold(0.0, lambda t, x: t + x, "sum") * part)
    power = fold(0.0, lambda t, x: code.fma(x - mean, x - mean, t, 1), "sum")
    power = code.fma(power, part, code.number(norm.epsilon, 1), 1)
    factor = T.Bind(T.float32(1) / code.intrinsic("llvm.sqrt", "float32", power))
    for i, column in enumerate(columns):
        with T.If(column < width), T.Then():
            for j in range(PIECE):
                x = T.Bind((held[i * PIECE + j] - mean) * factor)
                found = write.value(place, column + j, 1, x)
                T.buffer_store(held, found, [i * PIECE + j])
