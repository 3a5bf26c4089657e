"""What a layer's formats cost in time: measured on this machine, counted for another.

Micro-benchmarks: for each shape of the model's layers a small program of equal linears with weights
of their own (together larger than a core's cache, as in a model), in every format, interleaved with
the float one. Kept on disk, because they belong to the machine and the runtime, not to the model.

Anchors: the whole model in each format, and in float, end to end. Kernels alone do not see what is
fused or converted between layers, so the micro-benchmarks' differences are scaled, format by
format, until they sum up to what the whole model gains.

Counted: for a machine that is not this one, the instructions of the code that would be generated
(`qcompiler.backends.edge_count`), for the layers alone. That is an estimate, and is called one.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompiler import artifact as artifacts
from qcompiler.bench import interleave
from qcompiler.devices import cpu_feature
from qcompiler.format import Format
from qcompiler.lowering import generator
from qcompiler.manifest import machine
from qcompiler.outliers import NARROWEST
from qcompiler.passes.allocate import allocate
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.passes.normalize import normalize
from qcompiler.passes.pack_weights import pack_weights
from qcompiler.passes.round_products import round_as_told
from qcompiler.passes.split_columns import split_columns, split_layers
from qcompiler.passes.split_outliers import outlier_layers, split_outliers
from qcompiler.plan import Assignment, Plan
from qcompiler.program import Batch, Program, capture
from qcompiler.recipe import Recipe
from qcompiler.rewrite import operand
from qcompiler.rounding import half
from qcompiler.study import Option, Unit
from qcompiler.target import Target

BYTES = 32 << 20  # of float weights in a micro-benchmark, about
COPIES = (2, 12)  # linears in one, at least and at most
SECONDS = 0.6  # for all formats of one shape
RANGE = 4.0  # of static activations: time does not depend on it
WHOLE = 4.0  # seconds for the anchors
ESTIMATE = (
    "instructions counted, not timed: cycles that a {} would need at least for the layers alone, "
    "weights read at {:g} bytes a cycle"
)

COUNTING = 2  # raised when the same code is counted otherwise: estimates kept before are not read

Say = Callable[[str], None]
Run = Callable[..., Any]


def here(target: Target) -> bool:
    """Whether this machine can time code for the target."""
    if target.runtime == "ort":
        return target.device == "cpu" and target.feature in ("", cpu_feature())
    if target.runtime != "tvm" or target.device == "cuda":
        return False
    from qcompiler.backends import edge_target

    return edge_target.machine(target).here


def counted(target: Target) -> bool:
    """Whether time stands for instructions counted: code for another machine that can be."""
    if here(target) or target.runtime != "tvm":
        return False
    from qcompiler.backends import edge_count

    return edge_count.countable(target)


def estimate_of(target: Target) -> str:
    """What the time of a target that is `counted` means."""
    from qcompiler.backends import edge_count

    core = edge_count.core(target)
    return ESTIMATE.format(core.name, core.stream)


class _Layers(nn.Module):
    """Linears side by side, each with its own input and weight."""

    def __init__(self, outputs: int, inputs: int, count: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs) for _ in range(count))
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            with torch.no_grad():
                layer.weight.copy_(torch.randn(outputs, inputs, generator=generator) / inputs**0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x[i]) for i, layer in enumerate(self.layers))


def micro(
    target: Target,
    shapes: Sequence[tuple[int, int]],
    formats: Sequence[str],
    rows: Mapping[str, int],
    folder: Path,
    say: Say,
) -> dict[tuple[int, int], dict[str, dict[str, float]]]:
    """Milliseconds of one linear, one thread: shape → format → phase.

    Millions of cycles where they are `counted`.

    Args:
        target: this machine's, or one that is `counted`.
        shapes: (outputs, inputs).
        formats: as `Format` prints them; "float" is measured in any case.
        rows: phase → rows of the input.
        folder: where results are kept.
        say: told of each shape.
    """
    estimate = counted(target)
    path = folder / ("estimates.json" if estimate else "costs.json")
    key = _key(target, estimate)
    verb, cost = ("count", _counted) if estimate else ("time", _timed)
    known: dict[str, Any] = {}
    try:
        found = json.loads(path.read_text())
        known = found["times"] if found["key"] == key else {}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # missing, damaged or of another machine or version: measured again
    result: dict[tuple[int, int], dict[str, dict[str, float]]] = {}
    for number, (outputs, inputs) in enumerate(shapes, 1):
        for phase, count in rows.items():
            name = f"{outputs}x{inputs}x{count}"
            row = known.setdefault(name, {})
            lacking = [text for text in formats if text != "float" and text not in row]
            if lacking or "float" not in row:
                say(f"{verb} shape {number}/{len(shapes)}: {outputs} × {inputs}, {count} rows")
                row |= cost(target, outputs, inputs, count, lacking)
                folder.mkdir(parents=True, exist_ok=True)
                unfinished = path.with_suffix(".unfinished")
                unfinished.write_text(json.dumps({"key": key, "times": known}, indent=1))
                unfinished.replace(path)
            times = result.setdefault((outputs, inputs), {})
            for text in ["float", *formats]:
                if row.get(text) is not None:
                    times.setdefault(text, {})[phase] = row[text]
    return result


def _key(target: Target, estimate: bool) -> str:
    about = {"versions": artifacts.versions(), "target": str(target)}
    if estimate:
        about |= {"estimate": estimate_of(target), "counting": str(COUNTING)}
    else:
        about |= {"machine": machine()}
    return hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=8).hexdigest()


def _timed(
    target: Target, outputs: int, inputs: int, rows: int, formats: Sequence[str]
) -> dict[str, float | None]:
    low, high = COPIES
    count = max(low, min(high, BYTES // (4 * outputs * inputs)))
    x = torch.randn(count, rows, inputs, generator=torch.Generator().manual_seed(1))
    program = normalize(capture(_Layers(outputs, inputs, count), (x,)))
    runs: dict[str, Callable[[], object]] = {}
    found: dict[str, float | None] = dict.fromkeys(formats)
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as scratch:
        for index, text in enumerate(["float", *formats]):
            made = in_format(program, text, target)
            if made is None:
                continue
            run = _lowered(made, target, Path(scratch) / str(index), {}, "")
            runs[text] = lambda run=run: run(x)  # type: ignore[misc]  # a lambda with a default
        timings = interleave(runs, SECONDS)  # the first is the float program
    for timing in timings:
        found[timing.name] = timing.ratio * timings[0].ms / count
    return found


def _counted(
    target: Target, outputs: int, inputs: int, rows: int, formats: Sequence[str]
) -> dict[str, float | None]:
    """Millions of cycles of one linear, at least."""
    from qcompiler.backends import edge_count

    x = torch.zeros(1, rows, inputs)
    program = normalize(capture(_Layers(outputs, inputs, 1), (x,)))
    found: dict[str, float | None] = {}
    for text in ["float", *formats]:
        made = in_format(program, text, target)
        sizes = {program.inputs[0]: [*x.shape]}
        found[text] = edge_count.cycles(made, target, sizes) / 1e6 if made is not None else None
    return found


def in_format(program: Program, text: str, target: Target) -> Program | None:
    """The program with all of its linears in one format; None where the target has no kernel."""
    if text == "float":
        return program
    wanted = Format.parse(text)
    kinds = [None if kind is None else str(kind) for kind in (wanted.weight, wanted.activation)]
    fields = {"weights": kinds[0], "activations": kinds[1], "formats": {"*": text}}
    return quantized_program(program, Recipe().updated(fields), target)


def quantized_program(program: Program, recipe: Recipe, target: Target) -> Program | None:
    """A program as a recipe says, rounded to nearest: the kernels are the same, the wait is not."""
    columns = {name: torch.arange(count) for name, count in split_layers(program, recipe).items()}
    program = split_columns(program, columns)
    program = split_outliers(program, _any_outliers(program, recipe))
    plan = allocate(program, recipe, target)
    if not any(site.operand == 1 for site in plan):
        narrow = round_as_told(program, recipe)
        return narrow if narrow is not program else None
    entries = {
        site: Assignment(a.qtype, -RANGE, RANGE)
        if site.operand != 1 and not a.qtype.dynamic and _is_activation(program, site)
        else a
        for site, a in plan.items()
    }
    return round_as_told(pack_weights(insert_qdq(program, Plan(entries))), recipe)


def _any_outliers(program: Program, recipe: Recipe) -> dict[str, tuple[Tensor, Tensor]]:
    """As many weights of each row as the recipe keeps, spread over it: time asks not which."""
    nodes = {n.name: n for n in program.exported.graph.nodes}
    constants = program.constants()
    found = {}
    for name, count in outlier_layers(program, recipe).items():
        weight = constants[operand(nodes[name], 1).name]
        generator = torch.Generator().manual_seed(0)
        places = torch.rand(weight.shape, generator=generator).topk(count).indices.sort().values
        narrow = torch.int16 if weight.shape[1] <= NARROWEST else torch.int32
        found[name] = places.to(narrow), half(weight.gather(1, places))
    return found


def _is_activation(program: Program, site: Any) -> bool:
    nodes = program.exported.graph.nodes
    node = next(n for n in nodes if n.name == site.node)
    source = node if site.operand == -1 else node.args[site.operand]
    return site.operand == -1 or source.name not in program.constants()


def _lowered(
    program: Program,
    target: Target,
    folder: Path,
    shapes: Mapping[str, Mapping[int, str]],
    mask: str,
    buckets: Mapping[str, Sequence[int]] | None = None,
) -> Run:
    folder.mkdir()
    if target.runtime == "ort":
        from qcompiler.backends import ort

        ort.lower(program, folder, dynamic_shapes=shapes, generate=generator(target))
        return ort.load(folder, 1)
    from qcompiler.backends import edge

    edge.lower(program, target, folder, dynamic_shapes=shapes, buckets=buckets, padding_mask=mask)
    return edge.load(folder, 1)


def sizes_run(
    target: Target,
    program: Program,
    batch: Batch,
    shapes: Mapping[str, Mapping[int, str]],
    mask: str,
    buckets: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, int]:
    """Sizes that a batch runs at on a target: its own, but where generated code pads it."""
    if target.runtime == "tvm" and not target.any_size:
        from qcompiler.backends import edge

        return edge.sizes_run(
            program, batch, dynamic_shapes=shapes, buckets=buckets, padding_mask=mask
        )
    return {
        size: int(value.shape[dimension])
        for name, value in zip(program.inputs, batch, strict=True)
        for dimension, size in shapes.get(name, {}).items()
    }


def anchors(
    programs: Mapping[str, Program],
    target: Target,
    batch: Batch,
    shapes: Mapping[str, Mapping[int, str]],
    mask: str,
    say: Say,
    buckets: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, float]:
    """Milliseconds of whole programs on one batch, one thread, interleaved.

    Args:
        programs: the first is the reference of the ratios.
        target: this machine's.
        batch: inputs.
        shapes: names of dynamic sizes by input and dimension.
        mask: name of the input that is 0 at padding.
        say: told of each.
        buckets: sizes that code is generated for, on `tvm:` targets.
    """
    first = next(iter(programs.values()))
    sizes = {n: [s] for n, s in sizes_run(target, first, batch, shapes, mask, buckets).items()}
    runs: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as scratch:
        for index, (text, program) in enumerate(programs.items()):
            say(f"time the model: {text}")
            run = _lowered(
                program, target, Path(scratch) / str(index), shapes, mask,
                sizes if target.runtime == "tvm" else None,
            )  # fmt: skip
            runs[text] = lambda run=run: run(*batch)  # type: ignore[misc]  # as above
        timings = interleave(runs, WHOLE)
    return {t.name: t.ratio * timings[0].ms for t in timings}


def with_latency(
    units: Sequence[Unit],
    times: Mapping[tuple[int, int], Mapping[str, Mapping[str, float]]],
    whole: Mapping[str, float] | None = None,
    phase: str = "prefill",
) -> list[Unit]:
    """The units with `latency` on their options; options without a measurement are dropped.

    Args:
        units: of the study.
        times: from `micro`.
        whole: from `anchors`, "float" and formats: the differences to float are scaled to them.
        phase: which the anchors are of.
    """

    def layers(unit: Unit, text: str, name: str) -> float | None:
        parts = [times[shape].get(text, {}).get(name) for shape in unit.shapes]
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None

    scale: dict[str, float] = {}
    for text, total in (whole or {}).items():
        gained = [
            (layers(u, text, phase) or 0.0) - (layers(u, "float", phase) or 0.0) for u in units
        ]
        if text != "float" and abs(sum(gained)) > 0 and whole is not None:
            scale[text] = (total - whole["float"]) / sum(gained)
    found = []
    for unit in units:
        options: list[Option] = []
        for option in unit.options:
            latency = {}
            for name in {n for t in times.values() for row in t.values() for n in row}:
                value, base = layers(unit, option.format, name), layers(unit, "float", name)
                if value is None or base is None:
                    continue
                factor = scale.get(option.format, 1.0) if name == phase else 1.0
                latency[name] = base + factor * (value - base)
            if latency:
                options.append(replace(option, latency=latency))
        found.append(replace(unit, options=tuple(options)))
    return found
