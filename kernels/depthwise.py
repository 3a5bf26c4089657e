"""Depthwise convolution, channels last: one filter for each channel.

    sum[n, y, x, c] = Σ_(i, j) input[n, y·s + i·d, x·s + j·d, c] · weight[i, j, c]

8-bit inputs are multiplied as floats: each product and each sum is a whole number below 2²⁴, so the
result is exact, and fused multiply-add is the fastest way to it on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qcompiler.kernels import code
from qcompiler.kernels.code import LANES, Argument
from qcompiler.kernels.expression import Emitter, Expression

EXACT_TAPS = (1 << 24) // (255 * 128)  # of a filter, so that sums of 8-bit products stay exact


@dataclass(frozen=True)
class Window:
    """How a filter walks over its input.

    Attributes:
        batch, height, width, channels: of the output.
        taps: (rows, columns) of the filter.
        offset: of the first element.
        batch_stride, row_stride, column_stride: elements of the input from one output position to
            the next; channels lie side by side.
        row_step, column_step: elements of the input from tap to tap.
        integer: the input is 8-bit, and the sum is handed on as int32.
    """

    batch: int
    height: int
    width: int
    channels: int
    taps: tuple[int, int]
    offset: int
    batch_stride: int
    row_stride: int
    column_stride: int
    row_step: int
    column_step: int
    integer: bool


def depthwise(
    name: str, arguments: Sequence[Argument], window: Window, expression: Expression
) -> Any:
    """The kernel; arguments: input, weights (taps, channels) float32, then the expression's.

    The expression runs over (batch, height, width, channels), the sum being its value 0.
    """
    w = window
    with code.kernel(name, arguments) as (made, buffers):
        emitter = Emitter(expression, buffers)

        def channels(start: Any, place: list[Any], first: Any, lanes: int) -> None:
            total = code.number(0.0, lanes)
            for i in range(w.taps[0]):
                for j in range(w.taps[1]):
                    at = start + i * w.row_step + j * w.column_step + first
                    value = code.load(buffers[0], at, lanes)
                    if w.integer:
                        value = code.cast(code.cast(value, "int32", lanes), "float32", lanes)
                    tap = (i * w.taps[1] + j) * w.channels
                    weight = code.load(buffers[1], tap + first, lanes)
                    total = code.bind(code.fma(value, weight, total, lanes))
            if w.integer:
                total = code.bind(code.cast(total, "int32", lanes))
            emitter.vector(place, first, lanes, total)

        with code.parallel(w.batch * w.height) as line:
            n, y = line // w.height, line % w.height
            base = w.offset + n * w.batch_stride + y * w.row_stride
            with code.loop(w.width) as x:
                place = [n, y, x]
                start = code.bind(base + x * w.column_stride)
                if w.channels // LANES:
                    with code.loop(w.channels // LANES) as c:
                        channels(start, place, c * LANES, LANES)
                if w.channels % LANES:
                    with code.loop(w.channels % LANES) as c:
                        channels(start, place, w.channels // LANES * LANES + c, 1)
    return made
