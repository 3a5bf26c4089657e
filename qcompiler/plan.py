"""The Plan: which tensor use gets which number format, and over which range.

It is data, never behaviour.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qcompiler.errors import InputError
from qcompiler.history import Refusal
from qcompiler.qtype import QType, dequantize


@dataclass(frozen=True, order=True)
class Site:
    """One tensor use: operand `operand` of node `node`; `path` is its module path, for people."""

    node: str
    operand: int
    path: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.node}[{self.operand}]"


@dataclass(frozen=True)
class Assignment:
    """A format, and for static activations the range [low, high] that its scale covers."""

    qtype: QType
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Plan(Mapping[Site, Assignment]):
    """An immutable mapping from sites to formats, in graph order.

    `refusals` are what was left in float, with the reason. Operand −1 is the node's own value,
    quantized once for all its readers.
    """

    entries: Mapping[Site, Assignment] = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()

    def __getitem__(self, site: Site) -> Assignment:
        return self.entries[site]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def with_entries(self, changes: Mapping[Site, Assignment]) -> Plan:
        """A plan in which `changes` replace or join the entries."""
        return Plan({**self.entries, **changes}, self.refusals)

    def to_json(self) -> str:
        """One line for each site; `from_json` is the inverse."""
        rows = [
            {"site": str(s), "path": s.path, "qtype": str(a.qtype), "low": a.low, "high": a.high}
            for s, a in self.entries.items()
        ]
        return "[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`; raises `InputError` where the text is not a plan."""
        try:
            entries = {}
            for row in json.loads(text):
                node, _, operand = row["site"].rstrip("]").rpartition("[")
                site = Site(node, int(operand), row.get("path", ""))
                entries[site] = Assignment(QType.parse(row["qtype"]), row["low"], row["high"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not a plan: {error!r}") from error
        return cls(entries)

    def diff(self, other: Plan) -> list[str]:
        """Lines that say how `other` differs from this plan, site by site."""
        lines = []
        for site in sorted({*self, *other}):
            old, new = self.entries.get(site), other.entries.get(site)
            if old != new:
                lines.append(f"{site}: {_text(old)} → {_text(new)}")
        return lines


def _text(assignment: Assignment | None) -> str:
    if assignment is None:
        return "float"
    if assignment.low is None:
        return str(assignment.qtype)
    return f"{assignment.qtype} over [{assignment.low:.6g}, {assignment.high:.6g}]"


@dataclass(frozen=True)
class Factor:
    """How one tensor is smoothed: x ↦ (x − shift) / scale.

    Attributes:
        scale, shift: (channels,) float32.
        merged: whether the writers take it; else a multiplication is inserted.
        method: "alpha 0.7", "refined", …
        gain: expected gain in dB of the readers' output.
    """

    scale: Tensor
    shift: Tensor
    merged: bool
    method: str
    gain: float


@dataclass(frozen=True)
class Rounded:
    """A weight that was rounded, as integers: a float copy of it is made where it is needed.

    Attributes:
        stored: integers or 8-bit floats of the weight's shape; or bfloat16 numbers, which have no
            grid.
        scale, zero_point: of the grid, in the shape of `QType.ranges`.
        axis, group: along which scales run, and how many elements share one (0: no groups).
        damping: share of the Hessian's mean diagonal that GPTQ added to it; 0 for other methods.
        silent: inputs that never fired in calibration.
        columns: the inputs at which each output keeps a weight beside the grid, (outputs, k), where
            some are kept; `weight` is 0 there.
        values: these weights, float16.
        rows, left_out: rows (tokens) of its inputs, and those of them with a NaN or infinity, which
            took no part.
    """

    stored: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int = 0
    group: int = 0
    damping: float = 0.0
    silent: int = 0
    columns: Tensor | None = None
    values: Tensor | None = None
    rows: int = 0
    left_out: int = 0

    @property
    def weight(self) -> Tensor:
        """A new float32 tensor: the weight on its grid, as `qc::dequantize` computes it."""
        if self.stored.dtype == torch.bfloat16:
            return self.stored.float()
        return dequantize(self.stored, self.scale, self.zero_point, self.axis, self.group)

    @property
    def whole(self) -> Tensor:
        """The weight with those that are kept beside the grid."""
        if self.columns is None or self.values is None:
            return self.weight
        return self.weight.scatter_add(1, self.columns.long(), self.values.float())
