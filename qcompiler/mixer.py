"""Mixer: the study of one program, and plans measured on it.

The additive model only proposes; every plan that is kept ran end to end, with all of its layers
quantized together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import Node

from qcompiler import allocation, costs
from qcompiler.allocation import Choice, Limit
from qcompiler.data import Data
from qcompiler.divergence import Divergence, counting
from qcompiler.errors import InputError, UnsupportedError
from qcompiler.format import Format
from qcompiler.journal import fingerprint
from qcompiler.passes.measure_gradients import measure_gradients
from qcompiler.passes.measure_sensitivity import find_units, measure_sensitivity, simulated
from qcompiler.plan import Plan
from qcompiler.program import Batch, Program
from qcompiler.recipe import Recipe
from qcompiler.rewrite import module_path, operand
from qcompiler.stages import Function, Stages
from qcompiler.study import Findings, Settings, Study
from qcompiler.target import Target
from qcompiler.workers import Task, measure_in_processes

TOKENS, SAMPLES = 256, 16  # of the data that each option of each unit is tried on
JUDGED = 4  # times as much for whole plans: on little data the best of many is a matter of luck

Say = Callable[[str], None]


@dataclass(frozen=True)
class Point:
    """A plan that was run end to end.

    Attributes:
        label: what proposed it.
        choice: option of each unit.
        bits: mean over the weights, scales not counted.
        bytes: of the weights, scales included.
        loss: measured divergence, all units together.
        additive: what the additive model expects.
        latency: milliseconds that the units take by phase; empty where not measured.
        time: what the whole model should take, as a share of the float model's; None where nothing
            was timed (of language models: the units' share at decode; where instructions were
            counted for another machine: the units' share).
    """

    label: str
    choice: Choice
    bits: float
    bytes: int
    loss: float
    additive: float
    latency: Mapping[str, float] = field(default_factory=dict)
    time: float | None = None


class Mixer:
    """The study of one program, and plans measured on it."""

    def __init__(
        self,
        program: Program,
        data: Data,
        recipe: Recipe,
        target: Target,
        folder: Path,
        say: Say,
        jobs: int = 1,
        ray: str | None = None,
        buckets: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Read the data; nothing is measured yet.

        Args:
            program: as it is when formats are allocated.
            data: calibration data.
            recipe: from `prepared`.
            target: what will run the model.
            folder: where the study is kept.
            say: told of each step.
            jobs: processes that measure.
            ray: address of a cluster that measures; "local" starts one.
            buckets: sizes that code will be generated for, on `tvm:` targets.
        """
        if not data.real:
            raise InputError("mixed precision studies the model on real data: give --calibration")
        self.program, self.recipe, self.target, self.spec = program, recipe, target, data.spec
        self.folder, self.say, self.jobs, self.ray = folder, say, jobs, ray
        self.buckets = buckets
        self.timed: dict[str, float] | None = None
        self._losses: dict[tuple[str, ...], float] = {}  # of plans that ran, by their formats
        self.formats = [Format.parse(text) for text in recipe.candidates]
        batches = list(data.calibration())
        trials = _trials(batches)
        self.judged = _trials(batches, JUDGED)
        self.batches = batches + trials
        self.settings = Settings(
            recipe.rounding == "gptq",
            recipe.clip,
            recipe.calibration,
            recipe.p if recipe.calibration == "pnorm" else recipe.percentile,
            data.spec.generation is not None or data.spec.logits,
            data.mask,
            len(trials),
        )
        constants = program.constants()
        readers: dict[str, int] = {}
        for node in program.exported.graph.nodes:
            for source in node.all_input_nodes:
                readers[source.name] = readers.get(source.name, 0) + 1

        def fixed(node: Node) -> bool:
            weight = operand(node, 1).name
            named = recipe.format_of(module_path(node), node.name) != recipe.format
            kept = any(
                recipe.keep_float and _matches(pattern, node) for pattern in recipe.keep_float
            )
            return named or kept or readers[weight] > 1 or weight not in constants

        self.units = find_units(program, fixed)
        if not self.units:
            raise UnsupportedError("mixed precision: the model has no linear that could choose")
        self.fingerprint = fingerprint(
            program,
            Plan(),
            {"formats": recipe.candidates, "settings": self.settings, "target": str(target)},
            self.batches,
        )
        self.findings = Findings(folder, self.fingerprint)

    def study(self) -> Study:
        """Measure what is not on disk yet, and keep it there."""
        began = time.perf_counter()
        stale = self._stale()
        self.say("sensitivity")
        count = len(self.units)
        told = iter(range(1, count + 1))
        if self.jobs == 1 and self.ray is None:
            measured = measure_sensitivity(
                self.program, self.units, self.formats, self.batches, self.settings, self.findings,
                self.target.stored_bits,
                say=lambda name: self.say(f"sensitivity {next(told)}/{count}"),
                outlier_bytes=self.target.outlier_bytes,
            )  # fmt: skip
        else:
            task = Task(
                self.units, [*map(str, self.formats)], self.settings, str(self.target),
                self.fingerprint,
            )  # fmt: skip
            measured = measure_in_processes(
                self.program, self.batches, task, self.folder, self.jobs, self.say, self.ray
            )
        self.say("gradients")
        measured = measure_gradients(
            self.program, measured, self.batches, self.settings, self.findings
        )
        units = tuple(measured[i] for i in sorted(measured))
        notes = list(stale)
        notes.append(
            f"{len(units)} units with {sum(u.weights for u in units) / 1e6:.1f} M weights; "
            f"divergence on {self.settings.trials} calibration batches"
        )
        spoiled = [u for u in units if u.left_out]
        if spoiled:
            worst = max(spoiled, key=lambda u: u.left_out)
            notes.append(
                f"NaN or Inf in the inputs of {len(spoiled)} units; these tokens were left out, "
                f"most in {worst.name} ({worst.left_out})"
            )
        self.units = list(units)
        found = Study(
            units, self.fingerprint, str(self.target), {}, tuple(notes),
            time.perf_counter() - began,
        )  # fmt: skip
        found.save(self.folder)
        return found

    def _stale(self) -> list[str]:
        try:
            before = Study.read(self.folder)
        except InputError:
            return []
        if before.fingerprint == self.fingerprint:
            return []
        return [f"a study of another model, data or version lay in {self.folder}: measured again"]

    def time(self) -> dict[str, Any]:
        """Put latencies on the units' options; those without a kernel are dropped.

        They are measured here, or millions of cycles counted for another machine.

        Returns:
            What was timed, for the report: milliseconds of the whole model by format.
        """
        spec = self.spec
        batch = max(self.batches[-self.settings.trials :], key=lambda b: b[0].numel())
        phases = {"prefill": self._rows(batch)}
        if spec.generation is not None:
            phases["decode"] = 1
        texts = [*map(str, self.formats)]
        shapes = sorted({shape for unit in self.units for shape in unit.shapes})
        times = costs.micro(self.target, shapes, texts, phases, self.folder, self.say)
        whole: dict[str, float] = {}
        if spec.generation is None and not costs.counted(self.target):
            programs = {"float": self.program}
            for text in texts:
                made = self._simulated(text)
                if made is not None:
                    programs[text] = made
            whole = costs.anchors(
                programs, self.target, batch, spec.dynamic_shapes, self.settings.mask, self.say,
                self.buckets,
            )  # fmt: skip
        self.units = costs.with_latency(self.units, times, whole)
        self.timed = whole
        return whole

    def _rows(self, batch: Batch) -> int:
        """Rows that a linear multiplies for a batch, padding included: tokens, or samples."""
        first = batch[0]
        if first.is_floating_point():
            return int(first.shape[0])
        if self.spec.generation is not None:
            return first.numel()
        shapes = self.spec.dynamic_shapes
        sizes = costs.sizes_run(
            self.target, self.program, batch, shapes, self.settings.mask, self.buckets
        )
        named = shapes.get(self.program.inputs[0], {})
        return math.prod(sizes.get(named.get(i, ""), n) for i, n in enumerate(first.shape))

    def _simulated(self, text: str) -> Program | None:
        """The model with one format for all units, rounded to nearest, for timing."""
        formats = {n: text for unit in self.units for n in unit.nodes}
        recipe = self.recipe.updated({"formats": {**self.recipe.formats, **formats}})
        return costs.quantized_program(self.program, recipe, self.target)

    def latency_limit(self, share: float) -> Limit:
        """Milliseconds of the units, so that the model takes that share of the float one's time.

        Of language models, where the whole is not timed, the share is that of the units at decode;
        where instructions are counted, it is that of the units as well.
        """
        phase = "decode" if self.spec.generation is not None else "prefill"
        cost = allocation.latency(phase)
        what = "layers' cycles, an estimate" if costs.counted(self.target) else "time"
        base = sum(cost(u, u.option("float")) for u in self.units)
        total = (self.timed or {}).get("float", base)
        return Limit(
            f"share of the float model's {what} ({phase})",
            lambda u, o: (cost(u, o) + (total - base) * u.weights / self.weights) / total,
            share,
        )

    @property
    def weights(self) -> int:
        """Number of weights of all units."""
        return sum(unit.weights for unit in self.units)

    def measure(self, choices: Mapping[str, Choice]) -> list[Point]:
        """Run plans end to end, all units quantized together, on more data than the study's."""
        logits = self.settings.logits
        masks = [dict(zip(self.program.inputs, b, strict=True)).get(self.settings.mask)
                 for b in self.judged]  # fmt: skip
        objective = allocation.measure("kl")
        points = []
        with Stages(self.program, self.judged, outputs=counting(logits)) as stages:
            reference: Divergence | None = None
            for label, choice in choices.items():
                plan = tuple(u.options[i].format for u, i in zip(self.units, choice, strict=True))
                if plan not in self._losses:
                    reference = reference or Divergence(stages.outputs(), masks, logits)
                    self._losses[plan] = reference(stages.outputs(self._functions(plan)))
                points.append(self.point(label, choice, self._losses[plan], objective))
        return points

    def _functions(self, plan: Sequence[str]) -> dict[Node, Function]:
        """What is computed in place of the layers, each unit in its format."""
        nodes = {n.name: n for n in self.program.exported.graph.nodes}
        functions: dict[Node, Function] = {}
        for index, (unit, text) in enumerate(zip(self.units, plan, strict=True)):
            if text == "float":
                continue
            wanted = Format.parse(text)
            fixed = wanted.activation is not None and not wanted.activation.dynamic
            ranges = self.findings.ranges(index) if fixed else {}
            weights = self.findings.weights(index)[text]
            for name, weight in zip(unit.nodes, weights, strict=True):
                functions[nodes[name]] = _late(weight, wanted, ranges.get(str(wanted.activation)))
        return functions

    def point(self, label: str, choice: Choice, loss: float, objective: allocation.Cost) -> Point:
        """A measured plan with its costs."""
        phases = set.intersection(
            *(set(u.options[i].latency) for u, i in zip(self.units, choice, strict=True))
        )
        return Point(
            label, choice,
            allocation.total(self.units, choice, allocation.bits) / self.weights,
            int(allocation.total(self.units, choice, allocation.size)),
            loss,
            allocation.total(self.units, choice, objective),
            {
                name: allocation.total(self.units, choice, allocation.latency(name))
                for name in sorted(phases)
            },
            None if self.timed is None
            else allocation.total(self.units, choice, self.latency_limit(1.0).cost),
        )  # fmt: skip

    def bits_limit(self, wanted: float) -> Limit:
        """Mean bits of a weight."""
        return Limit("bits a weight", lambda u, o: o.bits * u.weights / self.weights, wanted)

    def size_limit(self, megabytes: float) -> Limit:
        """Bytes of the units' weights, scales included."""
        return Limit("MB of weights", lambda u, o: o.bytes / 1e6, megabytes)


def _late(
    weight: Callable[[], Tensor], wanted: Format, reach: tuple[float, float] | None
) -> Function:
    """A linear whose weight is there only while it runs: a plan's are as large as the model."""

    def run(x: Tensor, own: Tensor, bias: Tensor | None = None) -> Any:
        return simulated(weight(), wanted, reach)(x, own, bias)

    return run


def _matches(pattern: str, node: Node) -> bool:
    return fnmatch(module_path(node), pattern)


def _trials(batches: Sequence[Batch], times: int = 1) -> list[Batch]:
    """Single samples from the calibration data on which divergences are measured."""
    found: list[Batch] = []
    size = 0
    for batch in reversed(batches):
        tokens = not batch[0].is_floating_point()
        for sample in _samples(batch):
            found.append(sample)
            size += sample[0].numel() if tokens else 1
            if size >= times * (TOKENS if tokens else SAMPLES):
                return found
    return found


def _samples(batch: Batch) -> list[Batch]:
    """The samples of a batch, where all of its tensors have one leading size."""
    counts = {t.shape[0] for t in batch if t.ndim}
    if len(counts) != 1 or counts == {1}:
        return [batch]
    return [tuple(t[i : i + 1] for t in batch) for i in range(counts.pop())]
