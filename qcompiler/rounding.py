"""Rounding one weight: to nearest on a searched grid, or by GPTQ.

For a linear with inputs X the error of the output is tr((W − Ŵ) H (W − Ŵ)ᵀ) with H = 2 X Xᵀ.

GPTQ rounds the columns one after the other, and what a column lost is made up for by the columns
that follow (Frantar 2022, "GPTQ", algorithm 1):

    e = (w_j − ŵ_j) / U_jj,   w_k ← w_k − e U_jk  for k > j,   UᵀU = H⁻¹, U upper triangular

in blocks of 128 columns, the columns with the largest H_jj first ("act-order"), scales fixed
beforehand, so that groups stay what they were.

`search_grid` cuts each scale's range where that lowers the error of the output, as AWQ clips (Lin
2023, section 3; here by the exact quadratic form of each group in place of sampled rows).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompiler.errors import InputError
from qcompiler.plan import Rounded
from qcompiler.qtype import QType, broadcast

BLOCK = 128
ROWS = 2048  # outputs that are rounded at a time: they do not depend on each other
DAMPING = 0.01
SHRINKS = tuple(1.0 - 0.05 * step for step in range(13))  # shares of a range that may be kept

Grid = tuple[Tensor, Tensor]  # scale and zero point, in the shape of `QType.ranges`


def memory_needed(outputs: int, inputs: int) -> int:
    """Bytes that rounding one weight by GPTQ takes at most: five matrices of each shape, float64.

    H, H in its order, damped, its factor and inverse; of as many outputs as are rounded at a time
    the weight, scales, zero points, integers and errors. Twice the weight itself besides.
    """
    return 5 * 8 * (inputs + min(outputs, ROWS)) * inputs + 2 * 4 * outputs * inputs


def weight_axis(kind: QType) -> int:
    """The axis of a linear's weight that scales run along: inputs for groups, else outputs."""
    return 1 if kind.group else 0


def nearest_grid(weight: Tensor, kind: QType) -> Grid:
    """The grid that covers the extremes of the weight."""
    return kind.scale_for(*kind.ranges(weight, weight_axis(kind)))


def search_grid(weight: Tensor, hessian: Tensor | None, kind: QType) -> Grid:
    """The grid whose nearest rounding loses least of the output, range by range.

    Args:
        weight: (outputs, inputs) float32.
        hessian: (inputs, inputs); None: the weight's own squared error counts.
        kind: its format.

    Returns:
        Scale and zero point; each covers one of `SHRINKS` of its range. What groups do to each
        other's error is left out.
    """
    if kind.granularity != "tensor" and len(weight) > ROWS:
        parts = [search_grid(part, hessian, kind) for part in weight.split(ROWS)]
        return torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts])
    low, high = kind.ranges(weight, weight_axis(kind))
    best = torch.full(low.shape, torch.inf)
    scale, zero = kind.scale_for(low, high)
    for shrink in SHRINKS:
        s, z = kind.scale_for(low * shrink, high * shrink)
        error = _error(weight, nearest(weight, (s, z), kind).weight, hessian, kind)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
    return scale, zero


def _error(weight: Tensor, rounded: Tensor, hessian: Tensor | None, kind: QType) -> Tensor:
    """δ H δᵀ of the elements that share a scale, in the shape of the scale."""
    delta = weight - rounded
    if hessian is None:
        hessian = torch.eye(weight.shape[1])
    hessian = hessian.float()
    if kind.group:
        delta = delta.unflatten(1, (-1, kind.group)).transpose(0, 1)  # (groups, outputs, group)
        blocks = hessian.unflatten(0, (-1, kind.group)).unflatten(2, (-1, kind.group))
        diagonal = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        squares: Tensor = ((delta @ diagonal) * delta).sum(-1)
        return squares.T
    rows = ((delta @ hessian) * delta).sum(1)
    return rows if kind.granularity == "channel" else rows.sum()


def outlier_columns(weight: Tensor, power: Tensor, kind: QType, count: int) -> Tensor:
    """The columns whose rounding moves the output most, in ascending order, int64.

        λ_j = E[x_j²] · ‖W_j − Q(W)_j‖²        (OWQ, Lee 2023, section 3)

    Args:
        weight: (outputs, inputs).
        power: E[x_j²] up to a factor, (inputs,): the diagonal of the Hessian.
        kind: the format that the others get.
        count: how many.
    """
    error = kind.round_trip(weight, weight_axis(kind)) - weight
    loss = power.double() * error.double().square().sum(0)
    return loss.topk(min(count, weight.shape[1])).indices.sort().values


def nearest(weight: Tensor, grid: Grid, kind: QType) -> Rounded:
    """Round each element to the nearest point of the grid."""
    scale, zero = grid
    axis = weight_axis(kind)
    q = kind.quantize(weight, scale, zero, axis)
    return Rounded(q, scale, zero, axis, kind.group or 0)


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of a Hessian, for any number of weights and formats.

    Attributes:
        order: of the inputs, those with the largest H_jj first.
        upper: (inputs, inputs) float64 in that order; UᵀU = (H + λI)⁻¹.
        damping: share of the mean diagonal that λ is.
        silent: inputs that never fired.
    """

    order: Tensor
    upper: Tensor
    damping: float
    silent: int

    @classmethod
    def of(cls, hessian: Tensor, damping: float = DAMPING) -> Factor:
        """Raises an `InputError` for NaN or infinity in the Hessian."""
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        upper, damping = upper_factor(hessian[order][:, order], damping)
        return cls(order, upper, damping, int((hessian.diagonal() == 0).sum()))


def gptq(
    weight: Tensor,
    hessian: Tensor,
    kind: QType,
    damping: float = DAMPING,
    block: int = BLOCK,
    grid: Grid | None = None,
    factor: Factor | None = None,
    columns: Tensor | None = None,
) -> Rounded:
    """Round one weight by GPTQ.

    Args:
        weight: (outputs, inputs) float32.
        hessian: (inputs, inputs) float64, symmetric and positive semidefinite.
        kind: the weight's format: per tensor, per channel (output) or group (of inputs).
        damping: share of the mean diagonal that is added to it.
        block: columns whose errors are collected before the rest of the weight is updated.
        grid: scale and zero point; those of nearest rounding when not given.
        factor: of the Hessian, where it is known already.
        columns: (outputs, k), where each row keeps weights beside the grid; the grid given should
            be that of the others. They take up what earlier columns lost, too, as in SpQR
            (Dettmers 2023, algorithm 1).

    Returns:
        The weight on its grid, with the damping that was needed.

    Raises:
        InputError: NaN or infinity in the Hessian.
    """
    axis, group = weight_axis(kind), kind.group or 0
    scale, zero = grid or nearest_grid(weight, kind)
    factor = factor or Factor.of(hessian, damping)
    order, u = factor.order, factor.upper
    integers = torch.empty_like(weight, dtype=kind.dtype)
    updated = torch.empty_like(weight) if columns is not None else None
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        part = weight[rows]
        # One scale and zero point for each element, so that columns may come in any order.
        s, z = (
            broadcast(t[rows] if t.ndim else t, part, axis, group).expand_as(part).double()
            for t in (scale, zero)
        )
        # Inputs first: what is worked on at a time then lies together in memory.
        w, s, z = (t.T.contiguous()[order] for t in (part.double(), s, z))
        kept = None
        if columns is not None:
            kept = torch.zeros_like(part, dtype=torch.bool)
            kept = kept.scatter_(1, columns[rows].long(), True).T.contiguous()[order]
        integers[rows, order] = _columns(w, s, z, u, kind, block, kept).T.to(kind.dtype)
        if updated is not None:
            updated[rows, order] = w.T.float()
    values = None
    if columns is not None and updated is not None:
        values = half(updated.gather(1, columns.long()))
    return Rounded(
        integers, scale, zero, axis, group, factor.damping, factor.silent, columns, values
    )


def half(value: Tensor) -> Tensor:
    """The nearest finite float16."""
    limit = torch.finfo(torch.float16).max
    return value.clamp(-limit, limit).half()


def _columns(
    w: Tensor, s: Tensor, z: Tensor, u: Tensor, kind: QType, block: int, kept: Tensor | None = None
) -> Tensor:
    """The integers of w, (inputs, outputs) float64, column by column.

    Those in `kept` are 0, their weights kept in float16; w is overwritten, column by column with
    what is left to round of it when its turn comes.
    """
    q = torch.empty_like(w)
    columns = len(w)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty(stop - start, w.shape[1], dtype=torch.float64)
        for j in range(start, stop):
            q[j] = (kind.round(w[j] / s[j]) + z[j]).clamp(kind.qmin, kind.qmax)
            value = (q[j] - z[j]) * s[j]
            if kept is not None:
                q[j] = torch.where(kept[j], z[j], q[j])
                value = torch.where(kept[j], half(w[j]).double(), value)
            errors[j - start] = (w[j] - value) / u[j, j]
            w[j + 1 : stop].addr_(u[j, j + 1 : stop], errors[j - start], alpha=-1)
        w[stop:].addmm_(u[start:stop, stop:].T, errors, alpha=-1)
    return q


def upper_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """U with UᵀU = (H + λI)⁻¹; λ grows tenfold until the factorization succeeds.

    Inputs that never fire get the mean diagonal, so that they keep their nearest rounding.

    Returns:
        U, and the share of the mean diagonal that λ became.

    Raises:
        InputError: NaN or infinity in H.
    """
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
                return upper, damping
        damping *= 10


def keep_moment(weight: Tensor, rounded: Rounded, kind: QType) -> Rounded:
    """The same integers with scales times γ, so that the second moment under each scale is kept.

        γ = √(E[w²] / E[Q(w)²])

    arXiv 2411.06084, equation 18, there for activations; 1 where everything rounded to zero.
    """
    group, shape = rounded.group, rounded.scale.shape
    if rounded.columns is not None:  # what is kept beside the grid is no matter of its scales
        weight = weight.scatter(1, rounded.columns.long(), 0.0)

    def moment(value: Tensor) -> Tensor:
        squares = value.double().square()
        if group:
            blocks: Tensor = squares.unflatten(1, (-1, group))
            return blocks.sum(-1)
        return squares.sum(1) if kind.granularity == "channel" else squares.sum()

    before, after = moment(weight).reshape(shape), moment(rounded.weight).reshape(shape)
    gamma = torch.where(after > 0, (before / after.clamp(min=1e-300)).sqrt(), 1.0).float()
    return replace(rounded, scale=rounded.scale * gamma)
