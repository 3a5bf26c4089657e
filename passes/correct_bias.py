"""Bias correction: take the mean of each layer's quantization error out of its bias.

    b' = b + E[y] − E[ŷ]

with y the layer's output in the float program and ŷ in the quantized one, per output channel, over
calibration batches, layer by layer: each is measured with those before it already corrected (Nagel
2019, "Data-Free Quantization through Weight Equalization and Bias Correction", section 4.2, with
data in place of the batch normalization's statistics).

Layers without a bias are left alone: a new addition would cost time. A convolution's int32 bias
moves by the nearest number of its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler import ops
from qcompiler.op_families import CONVS, LINEAR
from qcompiler.program import Batch, Program, unpadded
from qcompiler.rewrite import Draft, operand, rewrite


def measure_bias(
    floating: Program, quantized: Program, batches: Sequence[Batch], mask: str = ""
) -> dict[str, Tensor]:
    """E[y] − E[ŷ] of each linear and convolution with a bias, (channels,) float64 by node name.

    Args:
        floating: the program before `insert_qdq`.
        quantized: after it; layers keep their names.
        batches: calibration data, held at once.
        mask: name of the input that is 0 at padding.
    """
    masks = [dict(zip(floating.inputs, b, strict=True)).get(mask) for b in batches]
    layers = {
        n.name: n
        for n in quantized.exported.graph.nodes
        if n.target in (LINEAR, *CONVS)
        and isinstance(operand(n, 2), Node)
        and any(getattr(a, "target", None) is ops.dequantize for a in n.args[:2])
    }
    if not layers:
        return {}
    expected: dict[str, Tensor] = {}

    def remember(node: Node, values: Any, compute: Callable[[int], Any]) -> list[Any] | None:
        if node.name not in layers:
            return None
        outputs = [compute(i) for i in range(len(batches))]
        expected[node.name] = _mean(node, outputs, masks)
        return outputs

    known = [n for n in floating.exported.graph.nodes if n.name in layers]
    floating.lockstep(batches, remember, known[-1])
    found: dict[str, Tensor] = {}

    def correct(node: Node, values: Any, compute: Callable[[int], Any]) -> list[Any] | None:
        if node.name not in expected:
            return None
        outputs = [compute(i) for i in range(len(batches))]
        shift = expected[node.name] - _mean(node, outputs, masks)
        found[node.name] = shift
        shape = [-1, *[1] * (outputs[0].ndim - 2)] if node.target in CONVS else [-1]
        return [y + shift.to(y.dtype).reshape(shape) for y in outputs]

    quantized.lockstep(batches, correct, [*layers.values()][-1])
    return found


def _mean(node: Node, outputs: list[Tensor], masks: list[Tensor | None]) -> Tensor:
    """Mean of each channel over all batches and positions that are no padding."""
    total, count = torch.zeros(()).double(), 0
    for value, mask in zip(outputs, masks, strict=True):
        rows = value.movedim(1, -1) if node.target in CONVS else unpadded(value, mask)
        rows = rows.flatten(0, -2) if rows.ndim > 1 else rows[None]
        total = total + rows.double().sum(0)
        count += len(rows)
    return total / max(count, 1)


@rewrite(exact=False)
def correct_bias(draft: Draft, shifts: Mapping[str, Tensor]) -> None:
    """Add the shifts of `measure_bias` to the biases."""
    count = 0
    for node in draft.calls(LINEAR, *CONVS):
        if node.name not in shifts:
            continue
        shift, bias = shifts[node.name], operand(node, 2)
        quantize = operand(bias, 0) if bias.target is ops.dequantize else None
        source = bias if quantize is None else operand(quantize, 0)  # before its int32 quantizer
        if not draft.is_constant(source):
            draft.refuse(node, "its bias is computed")
            continue
        fresh = (draft.constant(source).double() + shift).float()
        corrected = draft.add_constant(f"{node.name}_bias", fresh)
        reader, place = (node, 2) if quantize is None else (quantize, 0)
        draft.set_input(reader, place, corrected)
        count += 1
    if count:
        draft.note(f"{count} biases corrected")
