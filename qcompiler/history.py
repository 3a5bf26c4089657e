"""What the passes did to a program: one entry for each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """Something that a pass did not do, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class Entry:
    """What one pass did.

    Attributes:
        name: the pass.
        exact: whether it claims the same function in real arithmetic.
        changed: whether it changed the program at all.
        residual: ‖new − old‖ / ‖old‖ of the outputs on the checked batches; None if not measured.
        bound: what float rounding explains; None for passes that claim nothing.
        notes: what it did, in counts.
        refusals: what it did not do.
        seconds: wall time, checks included.
    """

    name: str
    exact: bool
    changed: bool
    residual: float | None = None
    bound: float | None = None
    notes: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    seconds: float = 0.0
