"""Rows of float16 on a GPU: residual sum, RMSNorm and quantization, each element read once.

    s = x + r (where there is a residual; stored too)
    y = weight · s / √(mean s² + ε)                      Zhang and Sennrich 2019, eq. 4
    float16: y;  int8: scale = max |y| / 127 (1 where that is 0), q = round(y / scale)

A block holds a row in registers. int8 rows, and float16 ones where a matrix product reads them so,
are stored as units (`cuda_units`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tvm.tirx.script.builder import ir as T

from qcompiler.kernels.code import Argument, Size
from qcompiler.kernels.cuda_code import (
    WARP,
    CudaKernel,
    address,
    call,
    cuda_kernel,
    registers,
    tokens_of,
    value,
)
from qcompiler.kernels.cuda_units import UNIT, UNIT_BYTES, UNIT_ROWS

Output = Literal["float16", "units", "int8"]
PIECE = 8  # numbers that a thread reads at once


@dataclass(frozen=True)
class Rows:
    """What is done to each row.

    Attributes:
        rows, width: of the matrix; the width is a multiple of 8.
        residual: whether a second matrix is added, and the sum stored.
        epsilon: of RMSNorm; None: no norm.
        output: float16 rows, float16 units, or int8 units with a scale per row.
    """

    rows: int
    width: int
    residual: bool
    epsilon: float | None
    output: Output

    @property
    def padded(self) -> int:
        """Columns that are written: units are filled up with zeros."""
        size = {"float16": PIECE, "units": UNIT_BYTES // 2, "int8": UNIT_BYTES}[self.output]
        return -(-self.width // size) * size


def cuda_rows(name: str, arguments: Sequence[Argument | Size], what: Rows) -> CudaKernel:
    """The kernel.

    Args:
        name: of the function.
        arguments: x (float16); with a residual that one, and where the sum goes; with a norm its
            weight (width float16); out (float16, or uint8 for units); for int8 the scales (rows
            float32). The last may be the number of rows, given by the call.
        what: is computed.
    """
    pieces = what.padded // PIECE
    each = max(1, min(4, pieces // 128))
    threads = -(-pieces // each // WARP) * WARP
    warps = threads // WARP
    scratch = warps * 4 + 16
    grid = (tokens_of(arguments, what.rows),)
    with cuda_kernel(name, arguments, grid, threads, scratch) as (
        made, buffers, (row,), thread, memory,
    ):  # fmt: skip
        left = list(buffers)
        x = left.pop(0)
        residual, total = (left.pop(0), left.pop(0)) if what.residual else (None, None)
        weight = left.pop(0) if what.epsilon is not None else None
        out = left.pop(0)
        held = registers(each * PIECE, "float32")
        other = registers(PIECE, "float32")
        start = T.Bind(T.cast(row, "int64") * what.width)
        call("qc_after_previous")
        call("qc_let_next")
        for i in range(each * PIECE):
            T.buffer_store(held, T.float32(0), [i])

        def column(i: int) -> Any:
            return (i * threads + thread) * PIECE

        def inside(i: int, width: int) -> Any:
            return T.If(column(i) < width)

        for i in range(each):
            mine = address(held, i * PIECE, PIECE)
            with inside(i, what.width), T.Then():
                call("qc_load8", mine, address(x, start + column(i)))
                if residual is not None:
                    call("qc_load8", address(other, 0, PIECE), address(residual, start + column(i)))
                    call("qc_add8", mine, address(other, 0, PIECE))
                    call("qc_store8", address(total, start + column(i)), mine)
        if what.epsilon is not None:
            power = registers(1, "float32")
            T.buffer_store(power, T.float32(0), [0])
            for i in range(each):
                call("qc_squares8", address(power), address(held, i * PIECE, PIECE))
            mean = value("qc_block_sum", power[0], address(memory), warps) * (1.0 / what.width)
            factor = T.Bind(value("qc_rsqrt", mean + what.epsilon))
            for i in range(each):
                with inside(i, what.width), T.Then():
                    call("qc_load8", address(other, 0, PIECE), address(weight, column(i)))
                    call("qc_normal8", address(held, i * PIECE, PIECE), factor,
                         address(other, 0, PIECE))  # fmt: skip
        inverse: Any = None
        if what.output == "int8":
            reach = registers(1, "float32")
            T.buffer_store(reach, T.float32(0), [0])
            for i in range(each):
                call("qc_reach8", address(reach), address(held, i * PIECE, PIECE))
            largest = T.Bind(value("qc_block_max", reach[0], address(memory), warps))
            scale = T.Bind(T.Select(largest > 0, largest * (1 / 127), T.float32(1)))
            inverse = T.Bind(T.float32(1) / scale)
            with T.If(thread == 0), T.Then():
                T.buffer_store(left[0], scale, [row])
        size = 1 if what.output == "int8" else 2
        across = what.padded * size // UNIT_BYTES
        for i in range(each):
            mine = address(held, i * PIECE, PIECE)
            with inside(i, what.padded), T.Then():
                if what.output == "float16":
                    call("qc_store8", address(out, start + column(i)), mine)
                    continue
                byte = T.Bind(column(i) * size)
                unit = T.cast(row // UNIT_ROWS, "int64") * across + byte // UNIT_BYTES
                piece = T.bitwise_xor(byte % UNIT_BYTES // 16, row % 8)
                at = unit * UNIT + row % UNIT_ROWS * UNIT_BYTES + piece * 16 + byte % 16
                if what.output == "int8":
                    call("qc_quantize8", address(out, at), mine, inverse)
                else:
                    call("qc_store8", address(out, at), mine)
    return made
