"""Verification: how far each step moved the numbers on real data, and whether it may.

Two errors that must not be mixed:

- *quantization error*: the captured program against the quantized program. Expected; bounded by
  the recipe.
- *lowering error*: the quantized program against the artifact as it runs. Rounding only, except
  where the runtime itself quantizes (which the audit names).

Both as SQNR = 10 log₁₀(‖reference‖² / ‖reference − got‖²) in dB ("A Survey of Low-bit Large
Language Models", section 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler.errors import RewriteError
from qcompiler.program import Batch, Program, unpadded
from qcompiler.rewrite import place

EPS = torch.finfo(torch.float32).eps
INFINITE_DB = 200.0  # what identical tensors are given


@dataclass
class Sqnr:
    """A signal-to-quantization-noise ratio that is summed over batches."""

    signal: float = 0.0
    noise: float = 0.0
    cosine_sum: float = 0.0
    cosine_low: float = 1.0
    rows: int = 0

    def update(self, reference: Tensor, got: Tensor) -> None:
        """Take in one batch: two tensors of one shape."""
        r, g = reference.detach().double(), got.detach().double()
        self.signal += float(r.square().sum())
        self.noise += float((r - g).square().sum())
        if r.ndim > 1 and r.shape[-1] > 1:
            cosine = torch.nn.functional.cosine_similarity(r, g, dim=-1).flatten().nan_to_num(-1.0)
            self.cosine_sum += float(cosine.sum())
            self.cosine_low = min(self.cosine_low, float(cosine.min()))
            self.rows += len(cosine)

    @property
    def db(self) -> float:
        """In dB; `INFINITE_DB` where nothing differs.

        Its negative where something is NaN or infinite.
        """
        if self.noise == 0.0:
            return INFINITE_DB
        if not math.isfinite(self.noise):
            return -INFINITE_DB
        return min(INFINITE_DB, 10 * math.log10(max(self.signal, 1e-300) / self.noise))

    @property
    def cosine(self) -> float:
        """Mean cosine over the rows (vectors along the last axis); 1 where there are none."""
        return self.cosine_sum / self.rows if self.rows else 1.0


def relative(reference: Sequence[Any], got: Sequence[Any]) -> float:
    """The largest ‖got − reference‖ / ‖reference‖ over the outputs, in float64.

    Infinite where `got` has a NaN or infinity and the reference has none; what the reference has of
    them does not count.
    """
    worst = 0.0
    for r, g in zip(reference, got, strict=True):
        if not isinstance(r, Tensor) or not r.is_floating_point():
            continue
        finite = r.isfinite()
        r, g = r[finite].double(), g[finite].double()
        if not bool(g.isfinite().all()):
            return math.inf
        norm = float(r.norm())
        worst = max(worst, float((g - r).norm()) / norm if norm else float((g - r).norm()))
    return worst


def finite(outputs: Iterable[Any]) -> bool:
    """Whether no output has NaN or infinity."""
    return all(bool(torch.isfinite(torch.as_tensor(value)).all()) for value in outputs)


@dataclass(frozen=True)
class Reference:
    """The captured program's outputs on the batches that exact passes are checked on.

    Attributes:
        batches: the inputs.
        outputs: float64 outputs for each batch.
        rounding: ‖float32 − float64‖ / ‖float64‖, the largest over the batches.
    """

    batches: tuple[Batch, ...]
    outputs: tuple[tuple[Any, ...], ...]
    rounding: float

    @classmethod
    def of(cls, program: Program, batches: Iterable[Batch]) -> Reference:
        """Run `program` in float64 and in float32."""
        kept = tuple(batches)
        outputs = tuple(program.run(batch, double=True) for batch in kept)
        single = [program.run(batch) for batch in kept]
        worst = max((relative(o, s) for o, s in zip(outputs, single, strict=True)), default=0.0)
        return cls(kept, outputs, worst)

    @property
    def bound(self) -> float:
        """What an exact pass may move the outputs by.

        It sums in another order, so a few times the rounding of the model itself: 16 times the
        measured float32 rounding error, and at least 64 machine epsilons for tiny models.
        """
        return max(16 * self.rounding, 64 * EPS)


def check_exact(before: Program, after: Program, reference: Reference) -> Program:
    """Measure the last pass on the batches.

    Raises when it claims exactness and moved more than rounding explains.

    Returns:
        `after`, its last history entry completed with residual and bound.

    Raises:
        RewriteError: naming the first node that differs.
    """
    entry = after.history[-1]
    residual = 0.0
    for batch, expected in zip(reference.batches, reference.outputs, strict=True):
        residual = max(residual, relative(expected, after.run(batch)))
    if not residual <= reference.bound:
        where = _first_difference(before, after, reference)
        raise RewriteError(
            f"{entry.name} claims to keep the function, but the outputs moved by {residual:.2e} "
            f"(rounding explains {reference.bound:.2e}){where}; please report this model"
        )
    entry = replace(entry, residual=residual, bound=reference.bound)
    return Program(after.exported, (*after.history[:-1], entry))


def _first_difference(before: Program, after: Program, reference: Reference) -> str:
    """The first node whose value differs beyond the bound, as the end of a sentence.

    Compared are nodes with the same name and shape in both programs.
    """
    batch = reference.batches[0]
    old: dict[str, Tensor] = {}

    def remember(node: Node, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            old[node.name] = value

    found: list[str] = []

    def compare(node: Node, value: Any) -> None:
        known = old.get(node.name)
        if (
            not found
            and known is not None
            and isinstance(value, Tensor)
            and known.shape == value.shape
        ):
            error = relative([known], [value])
            if error > reference.bound:
                found.append(f"; the first node that differs is {place(node)} ({error:.2e})")

    before.run(batch, remember)
    after.run(batch, compare)
    return found[0] if found else ""


@dataclass(frozen=True)
class Comparison:
    """One output's error on one set of batches."""

    output: str
    data: str
    sqnr_db: float
    cosine: float
    lowest_cosine: float


def compare(
    reference: Iterable[Sequence[Any]],
    got: Iterable[Sequence[Any]],
    names: Sequence[str],
    data: str,
    masks: Sequence[Tensor] | None = None,
) -> list[Comparison]:
    """SQNR and cosine of each floating-point output over the batches.

    There is one sequence of outputs for each batch. `masks` are 0 where a batch is padding: what a
    model says there means nothing.
    """
    sums: dict[str, Sqnr] = {}
    for index, (expected, actual) in enumerate(zip(reference, got, strict=True)):
        mask = masks[index] if masks else None
        for name, r, g in zip(names, expected, actual, strict=True):
            if isinstance(r, Tensor) and r.is_floating_point():
                sums.setdefault(name, Sqnr()).update(unpadded(r, mask), unpadded(g, mask))
    return [Comparison(name, data, s.db, s.cosine, s.cosine_low) for name, s in sums.items()]


def compare_sites(
    before: Program, after: Program, names: Iterable[str], batches: Iterable[Batch], mask: str = ""
) -> dict[str, float]:
    """SQNR in dB of the named nodes' values: quantized program against the one before quantization.

    The error of a node includes what it inherits from the nodes before it.
    """
    sums = {name: Sqnr() for name in names}
    for batch in batches:
        kept: dict[str, Tensor] = {}
        present = dict(zip(before.inputs, batch, strict=True)).get(mask)

        def remember(node: Node, value: Any, kept: dict[str, Tensor] = kept) -> None:
            if node.name in sums and isinstance(value, Tensor):
                kept[node.name] = value

        def compare(
            node: Node, value: Any, kept: dict[str, Tensor] = kept, present: Tensor | None = present
        ) -> None:
            known = kept.get(node.name)
            if known is not None and isinstance(value, Tensor) and value.shape == known.shape:
                sums[node.name].update(unpadded(known, present), unpadded(value, present))

        before.run(batch, remember)
        after.run(batch, compare)
    return {name: total.db for name, total in sums.items() if total.signal > 0}
