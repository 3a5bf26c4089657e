"""Rotations of rows by Kronecker products: y = x · (M₁ ⊗ M₂ ⊗ …), fast where Mᵢ is Walsh–Hadamard.

Along a row, each factor mixes elements that lie `stride` apart. A Walsh–Hadamard factor of order
2ᵏ takes k steps of sums and differences (Fino and Algazi 1976, Unified Matrix Treatment of the Fast
Walsh–Hadamard Transform), two at a time to halve the loads; within a vector, lanes change places.
Any other factor (an order that is no power of two) is multiplied as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tvm.tirx.script.builder import ir as T

from qcompiler.kernels import code
from qcompiler.kernels.code import LANES, Argument
from qcompiler.kernels.expression import Emitter, Expression

ROWS_TO_SHARE = 4  # rows below which threads cost more than they save
HIGH, WIDE = 4, 2  # outputs and vectors of columns that a dense factor makes at once


@dataclass(frozen=True)
class Factor:
    """One factor of the product.

    Attributes:
        size: its order.
        stride: elements from one that it mixes to the next.
        matrix: the argument that holds it, (size, size); −1: Walsh–Hadamard, entries ±1.
    """

    size: int
    stride: int
    matrix: int = -1


def reference(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """(…, n) by the Kronecker product of the matrices, in float64."""
    whole = torch.ones(1, 1, dtype=torch.float64)
    for factor in factors:
        whole = torch.kron(whole, factor.double())
    return x.double() @ whole


def rotate_rows(
    name: str,
    arguments: Sequence[Argument],
    source: Expression,
    factors: Sequence[Factor],
    scale: float,
    expression: Expression,
) -> Any:
    """The kernel.

    Args:
        name: of the function.
        arguments: what both expressions read and write, and the dense factors' matrices.
        source: gives x.
        factors: in any order; those of stride 1 first is fastest.
        scale: of the result.
        expression: goes on from the result, its value 0.
    """
    width = source.width
    many = code.parallel if source.rows >= ROWS_TO_SHARE else code.loop
    rest = list(factors)
    inner = 1  # elements that the first pass mixes in registers
    if rest and rest[0].stride == 1 and rest[0].matrix < 0:
        inner = min(rest[0].size, LANES)
        rest[0] = Factor(rest[0].size // inner, inner)
    with code.kernel(name, arguments) as (made, buffers):
        read, write = Emitter(source, buffers), Emitter(expression, buffers)
        with many(source.rows) as row:
            place = read.coordinates(row)
            line, other = code.scratch(width, "float32"), None

            def begin(first: Any, lanes: int) -> None:
                value = read.value(place, first, lanes)
                code.store(line, first, _within(value, lanes, inner), lanes)

            _along(width, begin, inner)
            for factor in rest:
                if factor.matrix < 0:
                    _butterflies(line, width, factor)
                    continue
                if other is None:
                    other = code.scratch(width, "float32")
                _dense(line, other, width, factor, buffers[factor.matrix])
                line, other = other, line

            def end(first: Any, lanes: int) -> None:
                value = code.load(line, first, lanes) * code.number(scale, lanes)
                write.vector(place, first, lanes, code.bind(value))

            _along(width, end, 1)
    return made


def _along(width: int, body: Any, least: int) -> None:
    """Calls body(start, lanes) over a row; no fewer lanes than `least`, which divides the width."""
    if width // LANES:
        with code.loop(width // LANES) as i:
            body(i * LANES, LANES)
    left = width % LANES
    if left:
        with code.loop(left // least) as i:
            body(width // LANES * LANES + i * least, least)


def _within(value: Any, lanes: int, size: int) -> Any:
    """Sums and differences of neighbours of a vector, in groups of `size` lanes."""
    value = code.bind(value)
    step = 1
    while step < size:
        swapped = T.Shuffle([value], [T.int32(lane ^ step) for lane in range(lanes)])
        signs = T.Shuffle(
            [code.number(1.0, lanes), code.number(-1.0, lanes)],
            [T.int32(lane + lanes * (lane & step > 0)) for lane in range(lanes)],
        )
        value = code.bind(code.fma(value, signs, swapped, lanes))
        step *= 2
    return value


def _butterflies(line: Any, width: int, factor: Factor) -> None:
    """Steps of a Walsh–Hadamard factor, in place."""
    step, end = factor.stride, factor.stride * factor.size
    while step < end:
        both = step * 2 < end
        reach = step * (4 if both else 2)
        lanes = math.gcd(LANES, step)
        with code.loop(width // reach) as block, code.loop(step // lanes) as i:
            starts = [block * reach + i * lanes + part * step for part in range(reach // step)]
            values = [code.bind(code.load(line, start, lanes)) for start in starts]
            values = _pairs(values, 1)
            if both:
                values = _pairs(values, 2)
            for start, value in zip(starts, values, strict=True):
                code.store(line, start, value, lanes)
        step = reach


def _pairs(values: list[Any], apart: int) -> list[Any]:
    found = list(values)
    for i, a in enumerate(values):
        if not i & apart:
            b = values[i | apart]
            found[i], found[i | apart] = code.bind(a + b), code.bind(a - b)
    return found


def _dense(line: Any, to: Any, width: int, factor: Factor, matrix: Any) -> None:
    """to[…, j, …] = Σᵢ line[…, i, …] · matrix[i, j]."""
    size, stride = factor.size, factor.stride
    lanes = math.gcd(LANES, stride)
    wide = WIDE if stride // lanes % WIDE == 0 else 1

    def outputs(start: Any, first: Any, count: int) -> None:
        totals = [code.scratch(lanes, "float32") for _ in range(count * wide)]
        for total in totals:
            code.store(total, 0, code.number(0.0, lanes), lanes)
        with code.loop(size) as i:
            given = [
                code.bind(code.load(line, start + i * stride + c * lanes, lanes))
                for c in range(wide)
            ]
            for j in range(count):
                weight = code.bind(code.load(matrix, i * size + first + j, 1))
                for c in range(wide):
                    total = totals[j * wide + c]
                    had = code.load(total, 0, lanes)
                    summed = code.fma(code.spread(weight, lanes), given[c], had, lanes)
                    code.store(total, 0, summed, lanes)
        for j in range(count):
            for c in range(wide):
                value = code.load(totals[j * wide + c], 0, lanes)
                code.store(to, start + (first + j) * stride + c * lanes, value, lanes)

    reach = size * stride
    with code.loop(width // reach) as block, code.loop(stride // lanes // wide) as i:
        start = block * reach + i * lanes * wide
        if size // HIGH:
            with code.loop(size // HIGH) as j:
                outputs(start, j * HIGH, HIGH)
        if size % HIGH:
            outputs(start, size // HIGH * HIGH, size % HIGH)
