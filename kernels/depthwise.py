"""Depthwise convolution, channels last: one filter for each channel.

    sum[n, y, x, c] = Σ_(i, j) input[n, y·s + i·d, x·s + j·d, c] · weight[i, j, c]

A few neighbouring outputs of 16 channels are made at a time, so that each input is read and
converted once for all of them. 8-bit inputs are multiplied as floats: each product and each sum is
a whole number below 2²⁴, so the result is exact, and fused multiply-add is the fastest way to it on
every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qcompiler.kernels import code
from qcompiler.kernels.code import LANES, Argument
from qcompiler.kernels.expression import Emitter, Expression
from qcompiler.kernels.isa import Isa
from qcompiler.kernels.tiles import pieces

# Taps of a filter, at most, so that sums of 8-bit products stay exact, whatever they begin with.
EXACT_TAPS = (1 << 24) // (2 * 255 * 128)


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
    name: str,
    arguments: Sequence[Argument],
    window: Window,
    expression: Expression,
    isa: Isa,
    started: bool = False,
) -> Any:
    """The kernel.

    Args:
        name: of the function.
        arguments: input, weights (taps, channels) float32, where `started` what the sums begin with
            (int32, for each channel), then the expression's.
        window: the sizes.
        expression: over (batch, height, width, channels), with the sum as value 0.
        isa: the machine.
        started: sums begin with given numbers, not with 0.
    """
    w = window
    side = max(1, min(4, -(-isa.vectors // 3), w.width))  # outputs side by side
    with code.kernel(name, arguments) as (made, buffers):
        emitter = Emitter(expression, buffers)

        def outputs(
            start: Any, place: list[Any], x: Any, count: int, first: Any, lanes: int
        ) -> None:
            """`count` neighbouring outputs from x on, `lanes` channels of each."""
            begin: Any = code.number(0.0, lanes)
            if started:
                begin = code.bind(code.cast(code.load(buffers[2], first, lanes), "float32", lanes))
            sums = [begin for _ in range(count)]
            for i in range(w.taps[0]):
                weights = [
                    code.bind(
                        code.load(buffers[1], (i * w.taps[1] + j) * w.channels + first, lanes)
                    )
                    for j in range(w.taps[1])
                ]
                # Which outputs read an input, by its distance from the first.
                readers: dict[int, list[tuple[int, int]]] = {}
                for out in range(count):
                    for j in range(w.taps[1]):
                        at = out * w.column_stride + j * w.column_step
                        readers.setdefault(at, []).append((out, j))
                for at in sorted(readers):
                    value = code.load(buffers[0], start + i * w.row_step + at + first, lanes)
                    if w.integer:
                        value = code.cast(code.cast(value, "int32", lanes), "float32", lanes)
                    value = code.bind(value)
                    for out, j in readers[at]:
                        sums[out] = code.bind(code.fma(value, weights[j], sums[out], lanes))
            for out, total in enumerate(sums):
                if w.integer:
                    total = code.bind(code.cast(total, "int32", lanes))
                emitter.vector([*place, x + out], first, lanes, total)

        with code.parallel(w.batch * w.height) as line:
            n, y = line // w.height, line % w.height
            base = code.bind(w.offset + n * w.batch_stride + y * w.row_stride)

            def channels(first: Any, lanes: int) -> None:
                if w.width // side:
                    with code.loop(w.width // side) as block:
                        start = base + block * (side * w.column_stride)
                        outputs(start, [n, y], block * side, side, first, lanes)
                if w.width % side:
                    x = w.width // side * side
                    outputs(base + x * w.column_stride, [n, y], x, w.width % side, first, lanes)

            if w.channels // LANES:
                with code.loop(w.channels // LANES) as c:
                    channels(c * LANES, LANES)
            whole = w.channels // LANES * LANES
            for start, lanes in pieces(w.channels - whole):
                channels(whole + start, lanes)
    return made
