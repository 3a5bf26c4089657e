"""Which single weights stay beside the grid: the few of each row without which it loses least.

SpQR (Dettmers 2023, sections 3.2 and 4.1) calls a weight an outlier where the layer's output loses
much when it is rounded as the others are,

    s_ij = (w_ij − ŵ_ij)² / (2 [H⁻¹]_jj)

or where the others of its group lose less without it, because their scale need not reach that far.
Both are one quantity here, the loss Σ s of the group with and without the weight. SpQR keeps what
exceeds a threshold; here each row keeps the same number (the ELLPACK layout of sparse matrices), so
that shapes are fixed. The layer's output then is

    y = Ŵ x + Σ_k values[n, k] · x[columns[n, k]]          Ŵ = 0 there
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qcompiler.errors import InputError
from qcompiler.plan import Rounded
from qcompiler.qtype import QType
from qcompiler.rounding import Factor, gptq, half, nearest, nearest_grid, search_grid

NARROWEST = 1 << 15  # inputs from which on column numbers take 32 bits


def importance(inputs: int, hessian: Tensor | None, factor: Factor | None) -> Tensor:
    """1 / (2 [H⁻¹]_jj) of each input, (inputs,) float64.

    Without GPTQ's factor the other inputs cannot make up for an error, and it is H_jj; without data
    all count alike.
    """
    if factor is not None:
        diagonal = torch.empty(inputs, dtype=torch.float64)
        diagonal[factor.order] = factor.upper.square().sum(0)  # H⁻¹ = UᵀU
        return 1 / (2 * diagonal)
    if hessian is not None:
        return hessian.diagonal().double()
    return torch.ones(inputs, dtype=torch.float64)


def bytes_beside(columns: Tensor, values: Tensor, each: int) -> int:
    """Of weights beside a grid, as a target stores them.

    Args:
        columns: (outputs, count) int16 or int32, stored as they are.
        values: of the same shape.
        each: bytes of a value.
    """
    return columns.nbytes + values.numel() * each


def outlier_weights(weight: Tensor, power: Tensor, kind: QType, count: int) -> Tensor:
    """The columns at which each row keeps a weight, (outputs, count), ascending in each row.

    One after the other, each the weight whose group gains most without it; looked at are in each
    group the one that loses most itself and the one that the scale reaches for.

    Args:
        weight: (outputs, inputs) float32.
        power: from `importance`.
        kind: the format of the others.
        count: how many of each row.

    Returns:
        int16, or int32 where that does not reach.

    Raises:
        InputError: a row has not so many.
    """
    inputs = weight.shape[1]
    if count >= inputs:
        raise InputError(
            f"{count} single weights of each row in float: its rows have {inputs} weights; keep "
            "fewer"
        )
    size = kind.group or inputs
    scaling = power.float()
    rest = weight.clone()
    found = torch.empty(len(weight), count, dtype=torch.int64)
    base = torch.arange(0, inputs, size)

    def loss(value: Tensor) -> Tensor:
        rounded = nearest(value, nearest_grid(value, kind), kind).weight
        groups: Tensor = ((value - rounded).square() * scaling).unflatten(1, (-1, size))
        return groups

    taken = torch.zeros_like(weight, dtype=torch.bool)
    for step in range(count):
        losses = loss(rest)
        before = losses.sum(-1)  # (outputs, groups)
        reach = rest.abs().masked_fill(taken, -1).unflatten(1, (-1, size))
        own = losses.masked_fill(taken.unflatten(1, (-1, size)), -1)
        best, place = torch.full_like(before, -torch.inf), torch.zeros_like(before).long()
        for candidate in (own.argmax(-1), reach.argmax(-1)):
            at = candidate + base
            gain = before - loss(rest.scatter(1, at, 0.0)).sum(-1)
            gain = gain.masked_fill(taken.gather(1, at), -torch.inf)  # the whole group is
            better = gain > best
            best, place = torch.where(better, gain, best), torch.where(better, at, place)
        chosen = place.gather(1, best.argmax(1, keepdim=True))
        rest.scatter_(1, chosen, 0.0)
        taken.scatter_(1, chosen, True)
        found[:, step : step + 1] = chosen
    narrow = torch.int16 if inputs <= NARROWEST else torch.int32
    return found.sort(1).values.to(narrow)


def round_weight(
    weight: Tensor,
    kind: QType,
    hessian: Tensor | None,
    factor: Factor | None = None,
    clip: bool = False,
    outliers: int = 0,
) -> Rounded:
    """Round a weight by GPTQ where the Hessian's factor is given, else to nearest.

    Args:
        weight: (outputs, inputs) float32.
        kind: its format.
        hessian: (inputs, inputs) float64; None where there is no data.
        factor: of the Hessian.
        clip: search how far each scale's range may be cut.
        outliers: weights of each row that stay beside the grid, which is drawn without them.

    Raises:
        InputError: more outliers than a row has weights.
    """
    columns, rest = None, weight
    if outliers:
        power = importance(weight.shape[1], hessian, factor)
        columns = outlier_weights(weight, power, kind, outliers)
        rest = weight.scatter(1, columns.long(), 0.0)
    grid = search_grid(rest, hessian, kind) if clip else nearest_grid(rest, kind)
    if factor is not None and hessian is not None:
        return gptq(weight, hessian, kind, grid=grid, factor=factor, columns=columns)
    made = nearest(rest, grid, kind)
    if columns is None:
        return made
    return replace(made, columns=columns, values=half(weight.gather(1, columns.long())))
