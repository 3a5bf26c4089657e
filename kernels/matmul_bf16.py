"""bfloat16 matrix product with float32 sums, and an elementwise expression on them.

    sum[m, n] = Σ_k activation[m, k] · weight[n, k]        products exact, sums in float32

Activations are bfloat16 in rows; weights are packed at compile time as `bfloat16.pack` does. The
order of a sum, and whether it is rounded between two products of a step, is the instruction's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from qcompiler.kernels import bfloat16
from qcompiler.kernels.code import LANES, Argument, loop
from qcompiler.kernels.expression import Expression
from qcompiler.kernels.isa import Isa
from qcompiler.kernels.tiles import Product, tiled


def reference(activation: Tensor, weight: Tensor) -> Tensor:
    """(M, K) and (N, K), rounded to bfloat16 → (M, N) in float64."""
    return activation.bfloat16().double() @ weight.bfloat16().double().T


def matmul_bf16(
    name: str,
    arguments: Sequence[Argument],
    product: Product,
    expression: Expression,
    isa: Isa,
) -> Any:
    """The kernel.

    Args:
        name: of the function.
        arguments: activations, packed weights, then what the expression reads and writes.
        product: the sizes; its depth is a multiple of `isa.narrow_depth`.
        expression: over (…, N) with the float32 sums as value 0.
        isa: the machine.
    """
    vectors, depth = isa.panel // LANES, isa.narrow_depth
    size = isa.panel * product.depth

    def fill(buffers: list[Any], totals: list[Any], left: Any, right: Any, panel: Any,
             height: int, across: int) -> None:  # fmt: skip
        count = across * vectors
        tile = bfloat16.Tile(isa, totals, height, count)
        with loop(product.depth // depth) as k:
            starts = [left + r * product.row_stride + k * depth for r in range(height)]
            places = [
                right + (panel + c // vectors) * size + k * isa.panel * depth
                + c % vectors * LANES * depth
                for c in range(count)
            ]  # fmt: skip
            tile.add(buffers[0], starts, buffers[1], places)
        tile.finish()

    return tiled(
        name, arguments, product, expression, isa, "float32", fill, bfloat16.available(isa)
    )
