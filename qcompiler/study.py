"""Study: what each layer's formats cost the model, as data; and where it is kept on disk.

A *unit* is a set of layers whose formats must agree. An *option* is one format of a unit with what
it costs: the bytes of its weights, and four measures of how much it disturbs the model:

    error    noise ÷ signal of the unit's own output on real inputs, ‖ŷ − y‖² / ‖y‖²
    kl       divergence of the model's outputs with this unit alone quantized
    first    |gᵀ(Ŵ − W)|, gradient times error (LLM-MQ, Li 2023)
    second   ½ tr(F)/n · ‖Ŵ − W‖², trace of the Fisher information by random probes
             (HAWQ, Dong 2019; APTQ, Guan 2024)

`first` and `second` see weights alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qcompiler.errors import InputError
from qcompiler.format import Format
from qcompiler.plan import Rounded
from qcompiler.qtype import QType, dequantize
from qcompiler.rounding import weight_axis

MEASURES = ("kl", "error", "first", "second")
FILE = "study.json"
VERSION = 1  # of the file

# Indices and the float columns of a weight; or (outputs, k) both, for single weights of each row.
Columns = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Option:
    """One format of a unit.

    Attributes:
        format: as `Format` prints it.
        bits: of one weight on average, what stays in float counted, scales not.
        bytes: of the unit's weights as the target stores them, scales included.
        measures: see the module; 0 for float.
        latency: milliseconds of the unit on the target by phase ("prefill", "decode"), or millions
            of cycles that were counted; empty where neither was done.
    """

    format: str
    bits: float
    bytes: int
    measures: Mapping[str, float] = field(default_factory=dict)
    latency: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Unit:
    """Layers whose formats must agree.

    Attributes:
        nodes: of the program, in graph order.
        paths: their module paths.
        weights: number of weights.
        shapes: (outputs, inputs) of each.
        variance: of the weights.
        options: cheapest first.
        left_out: rows of its inputs with a NaN or infinity, which its Hessian leaves out.
    """

    nodes: tuple[str, ...]
    paths: tuple[str, ...]
    weights: int
    shapes: tuple[tuple[int, int], ...]
    variance: float
    options: tuple[Option, ...] = ()
    left_out: int = 0

    @property
    def name(self) -> str:
        """For people: the common part of its layers' paths."""
        first = self.paths[0] or self.nodes[0]
        if len(self.paths) == 1:
            return first
        parent, _, _ = first.rpartition(".")
        leaves = ", ".join(path.rpartition(".")[2] for path in self.paths)
        return f"{parent}.({leaves})" if parent else f"({leaves})"

    def option(self, text: str) -> Option:
        """The option with that format."""
        return next(option for option in self.options if option.format == text)


@dataclass(frozen=True)
class Settings:
    """How a study measures.

    Attributes:
        gptq: rounding by GPTQ rather than to nearest.
        clip: search each scale's range.
        calibration: how static ranges of activations are drawn; see `observe.choose_range`.
        parameter: its percentile or p.
        logits: whether the first output is logits.
        mask: name of the input that is 0 at padding.
        trials: batches at the end of the data on which divergences are measured.
    """

    gptq: bool
    clip: bool
    calibration: str
    parameter: float
    logits: bool
    mask: str
    trials: int


@dataclass(frozen=True)
class Study:
    """Units and their options, and what they were measured on.

    Attributes:
        units: in graph order.
        fingerprint: of the program with its weights, the formats, the settings and the data.
        target: as text.
        machine: where latencies were measured; empty where bytes stand for them.
        notes: for people.
        seconds: of wall time.
    """

    units: tuple[Unit, ...]
    fingerprint: str
    target: str
    machine: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def weights(self) -> int:
        """Number of weights of all units."""
        return sum(unit.weights for unit in self.units)

    def save(self, folder: Path) -> None:
        """Write `study.json`, under another name first."""
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=1)
        unfinished = folder / f"{FILE}.unfinished"
        unfinished.write_text(text + "\n")
        unfinished.replace(folder / FILE)

    @classmethod
    def read(cls, folder: Path) -> Study:
        """The inverse of `save`.

        Raises:
            InputError: there is none, or it is damaged or of another version.
        """
        path = folder / FILE
        try:
            found = json.loads(path.read_text())
            version = found.pop("version")
            if version != VERSION:
                raise InputError(f"{path}: version {version}, this qcompiler reads {VERSION}")
            units = tuple(_unit(row) for row in found.pop("units"))
            return cls(units, **{**found, "notes": tuple(found["notes"])})
        except OSError as error:
            raise InputError(
                f"{folder}: no study there ({error.strerror}); make one with 'qcompiler "
                f"sensitivity MODEL --target T --out {folder}'"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error!r}); delete it and study again") from error


def _unit(row: Mapping[str, Any]) -> Unit:
    options = tuple(Option(**option) for option in row["options"])
    return Unit(
        tuple(row["nodes"]), tuple(row["paths"]), row["weights"],
        tuple((n, k) for n, k in row["shapes"]), row["variance"], options, row.get("left_out", 0),
    )  # fmt: skip


class Findings:
    """Results of single units in a folder, so that an interrupted study can go on.

    One file for each unit's measures and one for each of its rounded weights, written under another
    name first; files with another fingerprint are not used.

    Attributes:
        stale: files of another model, data or version that were found.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Make the folder where it is missing.

        Raises:
            InputError: it cannot be made.
        """
        self.folder = folder
        self.fingerprint = fingerprint
        self.stale = 0
        try:
            (folder / "units").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: the study's folder cannot be made ({error})") from error

    def get(self, index: int) -> Unit | None:
        """The measures of a unit, or None."""
        try:
            found = json.loads(self._path(index, "json").read_text())
            if found.pop("fingerprint") != self.fingerprint:
                self.stale += 1
                return None
            return _unit(found)
        except (OSError, ValueError, KeyError, TypeError):
            return None  # missing or damaged: it is measured again

    def put(
        self,
        index: int,
        unit: Unit,
        weights: Mapping[str, Sequence[Rounded]],
        ranges: Mapping[str, tuple[float, float]],
        columns: Mapping[str, Sequence[Columns]] | None = None,
    ) -> None:
        """Keep a unit's measures, its rounded weights by format, and its inputs' static ranges.

        Of formats that keep columns or single weights in float, also these.
        """
        packed = {
            "weights": {
                text: [(r.stored, r.scale, r.zero_point) for r in rows]
                for text, rows in weights.items()
            },
            "columns": dict(columns or {}),
            "ranges": dict(ranges),
        }
        path = self._path(index, "pt")
        torch.save(packed, path.with_suffix(".unfinished"))
        path.with_suffix(".unfinished").replace(path)
        path = self._path(index, "json")
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"fingerprint": self.fingerprint, **asdict(unit)}))
        unfinished.replace(path)

    def weights(self, index: int) -> dict[str, list[Callable[[], torch.Tensor]]]:
        """What gives the rounded weights of a unit's layers, float32, by format.

        The file is mapped into memory: of the integers only those are read that are asked for.
        """
        loaded = self._load(index)
        found: dict[str, list[Callable[[], torch.Tensor]]] = {}
        for text, rows in loaded["weights"].items():
            beside = loaded["columns"].get(text) or [None] * len(rows)
            found[text] = [
                partial(_dequantized, text, q, s, z, columns)
                for (q, s, z), columns in zip(rows, beside, strict=True)
            ]
        return found

    def ranges(self, index: int) -> dict[str, tuple[float, float]]:
        """The range of a unit's inputs for each static format."""
        found: dict[str, tuple[float, float]] = self._load(index)["ranges"]
        return found

    def _load(self, index: int) -> dict[str, Any]:
        path = self._path(index, "pt")
        found: dict[str, Any] = torch.load(path, weights_only=True, mmap=True)
        return found

    def _path(self, index: int, suffix: str) -> Path:
        return self.folder / "units" / f"{index:04d}.{suffix}"


def added(weight: torch.Tensor, kept: Columns) -> torch.Tensor:
    """A weight with the columns, or the single weights, that were kept beside it."""
    index, values = kept
    if index.ndim == 1:
        return weight.index_add(1, index, values)
    return weight.scatter_add(1, index.long(), values.float())


def _dequantized(
    text: str, q: torch.Tensor, s: torch.Tensor, z: torch.Tensor, columns: Columns | None
) -> torch.Tensor:
    """A weight that was rounded in a format, with what stayed in float, float32."""
    if Format.parse(text).narrow:
        weight = q.float()
    else:
        kind = _fitted(text, q.shape[1])
        weight = dequantize(q, s, z, weight_axis(kind), kind.group or 0)
    return weight if columns is None else added(weight, columns)


def _fitted(text: str, inputs: int) -> QType:
    """What a weight with so many inputs has where its unit's format is `text`."""
    kind = Format.parse(text).weight
    fits = kind.fitted(inputs) if kind is not None else None
    assert fits is not None
    return fits


def with_options(unit: Unit, options: Sequence[Option]) -> Unit:
    """The unit with these options, the one with the fewest bits first."""
    return replace(unit, options=tuple(sorted(options, key=lambda o: (o.bits, o.bytes))))
