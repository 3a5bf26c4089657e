"""GPTQ: round each weight so that the errors of a row cancel in the layer's output.

An analysis, Program × Plan × batches → rounded weights. For a linear with inputs X the error of the
output is tr((W − Ŵ) H (W − Ŵ)ᵀ) with H = 2 X Xᵀ. Columns are rounded one after the other, and what
a column lost is made up for by the columns that follow (Frantar 2022, "GPTQ", algorithm 1):

    e = (w_j − ŵ_j) / U_jj,   w_k ← w_k − e U_jk  for k > j,   UᵀU = H⁻¹, U upper triangular

in blocks of 128 columns, the columns with the largest H_jj first ("act-order"), scales fixed
beforehand from the weight's own ranges, so that groups stay what they were.

The program is run on all batches in lockstep, node by node, and a layer's outputs are computed with
its rounded weight: each layer sees what those before it really give. Memory: the values that are
alive at one node, for all batches, and one H (inputs² float64).

Nothing is refused: a singular H is damped more until it can be inverted, and a channel that never
fires keeps its nearest rounding. Activations are not quantized on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler.errors import InputError
from qcompiler.plan import Plan, Rounded, Site
from qcompiler.program import Batch, Program, unpadded
from qcompiler.qtype import QType, broadcast, dequantize
from qcompiler.regions import LINEAR
from qcompiler.rewrite import operand

BLOCK = 128
DAMPING = 0.01


@torch.no_grad()
def round_weights(
    program: Program, plan: Plan, batches: Iterable[Batch], mask: str = ""
) -> dict[Site, Rounded]:
    """Round the weights of the plan's linears by GPTQ.

    Args:
        program: before `insert_qdq`.
        plan: the formats; convolutions and embeddings are left to nearest rounding.
        batches: calibration data, all held at once.
        mask: name of the input that is 0 at padding.

    Returns:
        For each linear's weight site the weight on its grid, with scale and zero point.
    """
    sites = {site.node: site for site in plan if site.operand == 1}
    nodes = list(program.exported.graph.nodes)
    wanted = [n for n in nodes if n.target is LINEAR and n.name in sites]
    found: dict[Site, Rounded] = {}
    if not wanted:
        return found
    data = list(batches)
    masks = [dict(zip(program.inputs, b, strict=True)).get(mask) for b in data]
    shared: dict[Node, Tensor] = {}

    def visit(
        node: Node, values: dict[Node, list[Any]], compute: Callable[[int], Any]
    ) -> list[Any] | None:
        if node not in wanted:
            return None
        x, weight = operand(node, 0), operand(node, 1)
        if x not in shared:  # query, key and value read one tensor
            shared.clear()
            shared[x] = _hessian(values[x], masks)
        kind = plan[sites[node.name]].qtype
        rounded = gptq(values[weight][0], shared[x], kind)
        found[sites[node.name]] = rounded
        bias = operand(node, 2)
        added = None if bias is None else values[bias][0]
        return [torch.nn.functional.linear(v, rounded.weight, added) for v in values[x]]

    program.lockstep(data, visit, wanted[-1])
    return found


def _hessian(inputs: list[Tensor], masks: list[Tensor | None]) -> Tensor:
    """H = 2 Σ x xᵀ over all rows, (features, features) float64."""
    total = torch.zeros(inputs[0].shape[-1], inputs[0].shape[-1], dtype=torch.float64)
    for value, mask in zip(inputs, masks, strict=True):
        rows = unpadded(value, mask).flatten(0, -2)
        total += 2 * (rows.T @ rows).double()
    return total


def gptq(
    weight: Tensor, hessian: Tensor, kind: QType, damping: float = DAMPING, block: int = BLOCK
) -> Rounded:
    """Round one weight.

    Args:
        weight: (outputs, inputs) float32.
        hessian: (inputs, inputs) float64, symmetric and positive semidefinite.
        kind: the weight's format: per tensor, per channel (output) or group (of inputs).
        damping: share of the mean diagonal that is added to it.
        block: columns whose errors are collected before the rest of the weight is updated.

    Returns:
        The weight on its grid; scale and zero point are those of nearest rounding.
    """
    axis, group = (1, kind.group) if kind.group else (0, 0)
    scale, zero = kind.scale_for(*kind.ranges(weight, axis))
    # One scale and zero point for each element, so that columns may come in any order.
    scales = broadcast(scale, weight, axis, group).expand_as(weight).double()
    zeros = broadcast(zero, weight, axis, group).expand_as(weight).double()
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    w, s, z = weight.double()[:, order].clone(), scales[:, order], zeros[:, order]
    u = _upper_factor(hessian[order][:, order], damping)
    q = torch.empty_like(w)
    columns = w.shape[1]
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.zeros(w.shape[0], stop - start, dtype=torch.float64)
        for j in range(start, stop):
            q[:, j] = ((w[:, j] / s[:, j]).round() + z[:, j]).clamp(kind.qmin, kind.qmax)
            error = (w[:, j] - (q[:, j] - z[:, j]) * s[:, j]) / u[j, j]
            w[:, j:stop] -= error[:, None] * u[j, j:stop]
            errors[:, j - start] = error
        w[:, stop:] -= errors @ u[start:stop, stop:]
    integers = torch.empty_like(q)
    integers[:, order] = q
    on_grid = dequantize(integers.to(kind.dtype), scale, zero, axis, group)
    return Rounded(on_grid, scale, zero)


def _upper_factor(hessian: Tensor, damping: float) -> Tensor:
    """U with UᵀU = (H + λI)⁻¹; λ grows tenfold until the factorization succeeds."""
    size = len(hessian)
    mean = hessian.diagonal().mean().clamp(min=1e-12)
    if not bool(torch.isfinite(hessian).all()):
        raise InputError("calibration: NaN or Inf in the Hessian; check the data and the model")
    silent = hessian.diagonal() == 0
    while True:
        damped = hessian + damping * mean * torch.eye(size, dtype=torch.float64)
        damped[silent, silent] = mean
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                factor: Tensor = upper
                return factor
        damping *= 10
