"""float32 matrix product with an elementwise expression on its sums.

Weights are packed at compile time, other right-hand sides by a copy at run time, into panels of
`isa.panel` columns: [N/panel][K][panel]. Each output is one chain of fused multiply-adds in the
order of k, whatever the machine and the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompiler.kernels import code
from qcompiler.kernels.code import LANES, Argument
from qcompiler.kernels.expression import Expression
from qcompiler.kernels.isa import Isa
from qcompiler.kernels.tiles import Product, tiled


def pack(weight: Tensor, isa: Isa) -> Tensor:
    """(N, K) float32 → flat panels [N/panel][K][panel], padded with zeros."""
    n, k = weight.shape
    padded = torch.zeros(-(-n // isa.panel) * isa.panel, k)
    padded[:n] = weight
    return padded.reshape(-1, isa.panel, k).transpose(1, 2).contiguous().reshape(-1)


def reference(activation: Tensor, weight: Tensor) -> Tensor:
    """(M, K) and (N, K) → (M, N) in float64."""
    return activation.double() @ weight.double().T


def matmul_float(
    name: str,
    arguments: Sequence[Argument],
    product: Product,
    expression: Expression,
    isa: Isa,
) -> Any:
    """The kernel; arguments: A, packed B, then what the expression reads and writes."""
    vectors = isa.panel // LANES
    size = isa.panel * product.depth

    def fill(buffers: list[Any], tile: list[Any], left: Any, right: Any, panel: Any,
             height: int, across: int) -> None:  # fmt: skip
        for accumulator in tile:
            code.store(accumulator, 0, code.number(0.0))
        count = across * vectors
        with product.steps(1) as (place_of_k, k):
            weights = []
            for c in range(count):
                start = right + (panel + c // vectors) * size + k * isa.panel + c % vectors * LANES
                weights.append(code.bind(code.load(buffers[1], start)))
            for r in range(height):
                value = code.bind(
                    code.load(buffers[0], left + r * product.row_stride + place_of_k, 1)
                )
                for c in range(count):
                    had = tile[r * count + c]
                    code.store(had, 0, code.fma(code.spread(value), weights[c], code.load(had, 0)))

    return tiled(name, arguments, product, expression, isa, "float32", fill)
