"""Bias correction: take the mean of each linear's quantization error out of its bias.

    b' = b + E[x Wᵀ] − E[x̂ Ŵᵀ]

with x̂, Ŵ what the quantized layer really multiplies, over the rows sampled in calibration (Nagel
2019, "Data-Free Quantization through Weight Equalization and Bias Correction", section 4.2; here
with data). Layers without a bias are left alone: a new addition would cost time.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor
from torch.fx import Node

from qcompiler import ops
from qcompiler.observe import Observations
from qcompiler.qtype import QType
from qcompiler.regions import LINEAR
from qcompiler.rewrite import Draft, operand, rewrite


@rewrite(exact=False)
def correct_bias(draft: Draft, observations: Observations) -> None:
    """Correct the biases of the quantized linears whose input was observed.

    Runs after `insert_qdq`.
    """
    count = 0
    for node in draft.calls(LINEAR):
        data, weight, bias = (operand(node, i) for i in range(3))
        if not isinstance(bias, Node) or not draft.is_constant(bias):
            continue
        if not isinstance(weight, Node) or weight.target is not ops.dequantize:
            continue
        source = data
        while isinstance(source, Node) and source.target in (
            ops.dequantize, ops.quantize, ops.dynamic_quantize, operator.getitem,
        ):  # fmt: skip
            source = source.args[0]
        stats = observations.get(source.name) if isinstance(source, Node) else None
        if stats is None:
            continue
        float_weight, quantized = _weights(draft, weight)
        rows = stats.rows.float()
        noisy = _simulate(draft, data, rows)
        error = (rows.double() @ float_weight.double().T).mean(0) - (
            noisy.double() @ quantized.double().T
        ).mean(0)
        fresh = draft.add_constant(
            f"{node.name}_bias", (draft.constant(bias).double() + error).float()
        )
        draft.set_input(node, 2, fresh)
        count += 1
    if count:
        draft.note(f"{count} biases corrected")


def _weights(draft: Draft, dequantize: Node) -> tuple[Tensor, Tensor]:
    """The float weight and what dequantization gives back."""
    quantize = dequantize.args[0]
    assert isinstance(quantize, Node)
    weight = draft.constant(quantize.args[0])
    constants: list[Any] = [
        draft.constant(a) if isinstance(a, Node) else a for a in quantize.args[1:]
    ]
    q = ops.quantize(weight, *constants)
    return weight, ops.dequantize(q, *constants[:2], *constants[2:4])


def _simulate(draft: Draft, data: Node, rows: Tensor) -> Tensor:
    """The rows after the layer's activation quantizer; float where it has none."""
    if data.target is not ops.dequantize:
        return rows
    q = data.args[0]
    assert isinstance(q, Node)
    if q.target is ops.quantize:
        scale, zero = (draft.constant(a) for a in q.args[1:3])
        integers = ops.quantize(rows, scale, zero, *q.args[3:])
        noisy: Tensor = ops.dequantize(integers, scale, zero, 0, 0)
        return noisy
    kind = QType.parse(operand(operand(q, 0), 1))
    return kind.round_trip(rows)
