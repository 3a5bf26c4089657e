"""The Hessian of a layer's squared output error: H = 2 X Xᵀ (Frantar 2022, "GPTQ", section 3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompiler.errors import InputError
from qcompiler.program import unpadded

STRIP = 512  # columns of a Hessian that are computed at a time
TOGETHER = 4096  # rows of inputs that are multiplied at a time
LOST = 0.25  # share of a layer's rows that may be left out


@dataclass(frozen=True)
class Hessian:
    """H = 2 Σ x xᵀ over the rows x of a layer's inputs that are finite.

    Attributes:
        matrix: (features, features) float64.
        rows: how many there were, padding not counted.
        left_out: those of them with a NaN or infinity.
    """

    matrix: Tensor
    rows: int
    left_out: int

    @classmethod
    def of(cls, inputs: Iterable[Tensor], masks: Sequence[Tensor | None]) -> Hessian:
        """Raises an `InputError` where more than `LOST` of the rows are not finite, or H is not."""
        total: Tensor | None = None
        waiting: list[Tensor] = []
        count = left_out = 0
        largest = 0.0
        for value, mask in zip(inputs, masks, strict=True):
            rows = unpadded(value, mask).reshape(-1, value.shape[-1])  # a vector is one row
            reach = rows.abs().amax(1)  # NaN where a row has one
            finite = reach.isfinite()
            lost = len(rows) - int(finite.sum())
            count, left_out = count + len(rows), left_out + lost
            waiting.append(rows[finite] if lost else rows)
            if lost < len(rows):
                largest = max(largest, float(reach[finite].max()))
            if sum(map(len, waiting)) >= TOGETHER:
                total = _add_gram(total, torch.cat(waiting))
                waiting = []
        if waiting:
            total = _add_gram(total, torch.cat(waiting))
        assert total is not None
        if left_out > LOST * count:
            raise InputError(
                f"calibration: {left_out} of {count} tokens have NaN or Inf here; check the data "
                "and the model"
            )
        if not bool(total.isfinite().all()):
            raise InputError(
                f"calibration: the squares of values up to {largest:.2g} overflow here; check the "
                "data and the model"
            )
        for start in range(0, len(total), STRIP):
            stop = start + STRIP
            total[stop:, start:stop] = total[start:stop, stop:].T
        return cls(total.mul_(2), count, left_out)


def _add_gram(total: Tensor | None, rows: Tensor) -> Tensor:
    """Add Xᵀ X, in strips: each is multiplied with the columns from its own on."""
    size = rows.shape[1]
    total = torch.zeros(size, size, dtype=torch.float64) if total is None else total
    for start in range(0, size, STRIP):
        total[start : start + STRIP, start:] += rows[:, start : start + STRIP].T @ rows[:, start:]
    return total
