"""Sizes that must be met as they are, found by trying: neither run in pieces nor padded.

Code for fixed sizes takes a larger batch piece by piece, and pads sequences whose padding a mask
hides. That a size leads the inputs does not make it a batch: tokens that attend to each other may
lead too, or the mean over the batch be subtracted. Nor does a mask that is given have to be used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompiler.program import Batch, Program
from qcompiler.verify import relative

ROWS = 2  # of each piece
PADDED = 3  # positions of padding
ROUNDING = 1e-5  # of a model in float64 with constants in float32

Shapes = Sequence[Sequence[int | str]]


def exact_sizes(program: Program, batch: Batch, shapes: Shapes, mask: int | None) -> dict[str, str]:
    """The sizes that must be met as they are, and why.

    Args:
        program: the float model.
        batch: inputs for it.
        shapes: of the inputs, with the names of dynamic sizes.
        mask: number of the input that is 0 at padding along its last dimension; None: no padding.
    """
    found: dict[str, str] = {}
    padded = shapes[mask][-1] if mask is not None else 0
    for size in dict.fromkeys(shape[0] for shape in shapes if shape):
        inside = any(size in shape[1:] for shape in shapes)
        if not isinstance(size, str) or size == padded or inside:
            continue
        if rows_meet(program, batch, shapes, size):
            found[size] = (
                f"outputs for a larger '{size}' are not those of its parts: it is not run in "
                "pieces; --bucket names the sizes that there is code for"
            )
    if mask is not None and isinstance(padded, str) and padding_shows(program, batch, shapes, mask):
        found[padded] = (
            f"padding changes the outputs elsewhere, as the mask does not hide all of it: "
            f"'{padded}' is not padded; --bucket names the sizes that there is code for"
        )
    return found


def rows_meet(program: Program, batch: Batch, shapes: Shapes, size: str) -> bool:
    """Whether the outputs of a batch are others than those of its rows one after another.

    `size` is the first of each input that has it; the rest as for `exact_sizes`.
    """
    leading = [size in shape for shape in shapes]
    first = tuple(x[:ROWS] if lead else x for x, lead in zip(batch, leading, strict=True))
    second = tuple(_others(x)[:ROWS] if lead else x for x, lead in zip(batch, leading, strict=True))
    both = tuple(
        torch.cat([x, y]) if lead else x for x, y, lead in zip(first, second, leading, strict=True)
    )
    ran = _run(program, first, second, both)
    if ran is None:
        return True
    apart = [torch.cat([x, y]) if x.ndim else x for x, y in zip(*ran[:2], strict=True)]
    return _differ(apart, ran[2])


def padding_shows(program: Program, batch: Batch, shapes: Shapes, mask: int) -> bool:
    """Whether outputs where the mask is not 0 change with the padding behind them.

    Args: as for `exact_sizes`.
    """
    lead, size = shapes[mask][0], shapes[mask][-1]
    batched = isinstance(lead, str) and lead != size
    whole = batch[mask].shape[-1]
    count = whole - min(PADDED, whole - 1)
    short, padded = [], []
    for x, shape in zip(batch, shapes, strict=True):
        x = x[:ROWS] if batched and shape and shape[0] == lead else x
        inside = tuple(slice(count if name == size else None) for name in shape)
        long = torch.zeros_like(x)
        long[inside] = x[inside]
        short.append(x[inside])
        padded.append(long)
    present = short[mask] != 0
    ran = _run(program, tuple(short), tuple(padded))
    if ran is None:
        return True
    expected, found = [], []
    for x, y in zip(*ran, strict=True):
        for dim in range(min(x.ndim, y.ndim)):
            if (x.shape[dim], y.shape[dim]) == (count, whole):
                y = y.narrow(dim, 0, count)
        masked = x.shape == y.shape and x.shape[: present.ndim] == present.shape
        expected.append(x[present] if masked else x)
        found.append(y[present] if masked else y)
    return _differ(expected, found)


def _others(x: Tensor) -> Tensor:
    """Other rows like those of the input: integers that are rows of a table stay within it."""
    if x.is_floating_point():
        return 0.75 * x.roll(1, 0).roll(1, -1)
    return x.roll(1, 0) if len(x) > 1 or x.ndim == 1 else torch.minimum(x, x.roll(1, -1))


def _run(program: Program, *batches: Batch) -> list[list[Tensor]] | None:
    """The outputs; None where the model cannot have such inputs, as graphs whose nodes are cut."""
    try:
        return [
            [x for x in program.run(batch, double=True) if isinstance(x, Tensor)]
            for batch in batches
        ]
    except Exception:  # torch's are of many kinds
        return None


def _differ(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    pairs = list(zip(expected, found, strict=True))
    if any(x.shape != y.shape for x, y in pairs):
        return True
    whole = all(torch.equal(x, y) for x, y in pairs if not x.is_floating_point())
    return not whole or relative(expected, found) > ROUNDING
