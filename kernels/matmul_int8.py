"""int8 matrix product with an elementwise expression on its int32 accumulators.

    accumulator[m, n] = Σ_k activation[m, k] · weight[n, k]        exact in int32

Activations are uint8 or int8 in rows; weights are packed at compile time into panels of `isa.panel`
columns, `isa.depth` values of k together, as the dot-product instruction reads them. The expression
corrects for the zero point, scales, adds the bias and goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompiler.kernels import code
from qcompiler.kernels.code import LANES, Argument
from qcompiler.kernels.expression import Expression
from qcompiler.kernels.isa import Isa, activation_word, dot
from qcompiler.kernels.square import Square, from_memory
from qcompiler.kernels.tiles import Product, tiled


def pack(weight: Tensor, isa: Isa) -> Tensor:
    """(N, K) int8 → flat int8 of panels [N/panel][K/depth][panel][depth], padded with zeros."""
    n, k = weight.shape
    panel, depth = isa.panel, isa.depth
    padded = torch.zeros(-(-n // panel) * panel, -(-k // depth) * depth, dtype=torch.int8)
    padded[:n, :k] = weight
    blocks = padded.reshape(-1, panel, padded.shape[1] // depth, depth)
    return blocks.transpose(1, 2).contiguous().reshape(-1)


def reference(activation: Tensor, weight: Tensor) -> Tensor:
    """The accumulators: (M, K) and (N, K) integers → (M, N) int32."""
    return (activation.double() @ weight.double().T).to(torch.int32)


def matmul_int8(
    name: str,
    arguments: Sequence[Argument],
    product: Product,
    signed: bool,
    expression: Expression,
    isa: Isa,
    started: bool = False,
) -> Any:
    """The kernel.

    Args:
        name: of the function.
        arguments: activations, packed weights, where `started` what the accumulators of each column
            begin with (int32, a panel more than N), then what the expression reads and writes.
        product: the sizes; its depth (each run's) is a multiple of `isa.depth`.
        signed: int8 activations, not uint8.
        expression: over (…, N) with the accumulators as value 0.
        isa: the machine.
        started: accumulators begin with given numbers, not with 0.
    """
    vectors = isa.panel // LANES
    size = isa.panel * product.depth

    def fill(buffers: list[Any], tile: list[Any], left: Any, right: Any, panel: Any,
             height: int, across: int) -> None:  # fmt: skip
        count = across * vectors
        begin = [code.integer(0)] * count
        if started:
            columns = [panel * isa.panel + c * LANES for c in range(count)]
            begin = [code.bind(code.load(buffers[2], column)) for column in columns]
        square = Square(tile, height, count, "int32") if isa.dot == "smmla" else None
        if square is not None:
            square.start(begin)
        else:
            for number, total in enumerate(tile):
                code.store(total, 0, begin[number % count])
        with product.steps(isa.depth) as (place_of_k, k):
            starts = [left + r * product.row_stride + place_of_k for r in range(height)]
            places = [
                right + (panel + c // vectors) * size + k * isa.panel * isa.depth
                + c % vectors * LANES * isa.depth
                for c in range(count)
            ]  # fmt: skip
            if square is not None:
                square.add(buffers[0], starts, from_memory(buffers[1], places), _smmla)
            else:
                for r, start in enumerate(starts):
                    word = activation_word(isa, buffers[0], start, signed)
                    for c, place in enumerate(places):
                        dot(isa, tile[r * count + c], 0, buffers[1], place, word)
        if square is not None:
            square.finish()

    def _smmla(had: Any, rows: Any, columns: Any) -> Any:
        """Two rows by two columns; `usmmla` where the rows are unsigned."""
        name = f"llvm.aarch64.neon.{'smmla' if signed else 'usmmla'}.v4i32.v16i8"
        rows = code.bits(rows, "int8", 16)
        return code.intrinsic(name, "int32x4", had, rows, columns)

    return tiled(name, arguments, product, expression, isa, "int32", fill)
