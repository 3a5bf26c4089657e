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
        for c in range(across * vectors):
            first: Any = code.integer(0)
            if started:
                column = panel * isa.panel + c * LANES
                first = code.bind(code.load(buffers[2], column))
            for r in range(height):
                code.store(tile[r * across * vectors + c], 0, first)
        with product.steps(isa.depth) as (place_of_k, k):
            for r in range(height):
                start = left + r * product.row_stride + place_of_k
                word = activation_word(isa, buffers[0], start, signed)
                for c in range(across * vectors):
                    place = (panel + c // vectors) * size + k * isa.panel * isa.depth
                    place = right + place + c % vectors * LANES * isa.depth
                    dot(isa, tile[r * across * vectors + c], 0, buffers[1], place, word)

    return tiled(name, arguments, product, expression, isa, "int32", fill)
