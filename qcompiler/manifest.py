"""What the passes left of a model, and how the manifest describes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from qcompiler import artifact as artifacts
from qcompiler.devices import cpu_feature
from qcompiler.distributions import Distribution, described
from qcompiler.observe import Statistics
from qcompiler.plan import Factor, Plan, Site
from qcompiler.program import Program
from qcompiler.recipe import Recipe
from qcompiler.rewrite import module_path
from qcompiler.spec import ModelSpec
from qcompiler.target import Target


@dataclass
class Compiled:
    """What the passes left, for the report.

    Attributes:
        source: as captured.
        plain: the float model in its fastest form, which the quantized one is compared with.
        floating: smoothed, just before quantization.
        quantized: with packed integers.
        plan, factors: the decisions.
        ranges_before, ranges_after: statistics before and after smoothing.
        recipe: that made it; of a recipe with a budget, with the formats that were chosen.
        sites: SQNR in dB of each layer's output on held-out batches.
        distributions: histograms of the plan's sites before and after quantization.
        choice: how the formats were chosen, for the report; empty without a budget.
        seconds: wall time of the steps.
        memory: bytes that the process held at most in each step, its mapped files included.
    """

    source: Program
    plain: Program
    floating: Program
    quantized: Program
    plan: Plan
    factors: Mapping[str, Factor]
    ranges_before: Mapping[str, Statistics]
    ranges_after: Mapping[str, Statistics]
    recipe: Recipe
    sites: Mapping[str, float] = field(default_factory=dict)
    distributions: Mapping[Site, Distribution] = field(default_factory=dict)
    choice: Mapping[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)


def manifest_of(
    spec: ModelSpec,
    compiled: Compiled,
    recipe: Recipe,
    target: Target,
    command: str,
    names: Sequence[str],
) -> dict[str, Any]:
    """What is known before anything was lowered; the rest is measured and added.

    Args:
        spec: what was compiled.
        compiled: what the passes left.
        recipe: as it was given, before a budget became formats.
        target: what it was compiled for.
        command: that makes it again.
        names: of the outputs.
    """
    program = compiled.quantized
    nodes = {n.name: n for n in compiled.floating.exported.graph.nodes}
    values = {n.name: n.meta.get("val") for n in program.exported.graph.nodes}
    outputs = [values.get(str(o)) for o in program.exported.graph_signature.user_outputs]
    sizes = {
        str(values[name].shape[dim]): size
        for name in program.inputs
        if isinstance(values[name], torch.Tensor)
        for dim, size in spec.dynamic_shapes.get(name, {}).items()
    }

    def path(name: str) -> str:
        return module_path(nodes[name]) if name in nodes else ""

    try:
        structure = pytree.treespec_dumps(program.exported.call_spec.out_spec)
    except Exception:  # torch cannot write the output's type down: the artifact returns a tuple
        structure = ""
    return {
        "format": artifacts.FORMAT,
        "name": spec.name,
        "target": str(target),
        "recipe": recipe.model_dump(mode="json"),
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": artifacts.versions(),
        "machine": machine(),
        "inputs": [
            artifacts.describe_tensor(given, values[n], sizes)
            for given, n in zip(spec.input_names or program.inputs, program.inputs, strict=True)
        ],
        "outputs": [
            artifacts.describe_tensor(n, v, sizes) for n, v in zip(names, outputs, strict=False)
        ],
        "out_spec": structure,
        "padding_mask": spec.padding_mask,
        "logits": spec.logits or spec.generation is not None,
        "generation": asdict(spec.generation) if spec.generation else None,
        "history": [asdict(entry) for entry in program.history],
        "plan": json.loads(compiled.plan.to_json()),
        "refusals": [asdict(r) for r in compiled.plan.refusals],
        "smoothing": [
            {
                "tensor": n, "path": path(n), "method": f.method, "gain_db": f.gain,
                "merged": f.merged,
            }
            for n, f in compiled.factors.items()
        ],
        "ranges": _ranges(compiled, path),
        "unobserved": sum(a.qtype.dynamic for a in compiled.plan.values()),
        "sites": [{"node": n, "path": path(n), "sqnr_db": db} for n, db in compiled.sites.items()],
        "distributions": described(compiled.distributions, compiled.floating, compiled.plan),
        "mixed": dict(compiled.choice),
        "seconds": compiled.seconds,
        "memory": compiled.memory,
    }  # fmt: skip


def _ranges(compiled: Compiled, path: Callable[[str], str]) -> list[dict[str, Any]]:
    """Ranges of the tensors that were observed.

    Where a smoothed tensor's range is taken at run time, so that it was observed before smoothing
    alone, what follows is computed: the extremes of (x - shift) / scale.
    """

    def describe(low: torch.Tensor, high: torch.Tensor) -> dict[str, Any]:
        reach = torch.maximum(high, -low)
        spread = torch.quantile(reach, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).double())
        return {
            "low": float(low.min()),
            "high": float(high.max()),
            "channel_absmax": [float(v) for v in spread],
        }

    def described(stats: Statistics | None) -> dict[str, Any] | None:
        return describe(stats.low, stats.high) if stats is not None else None

    rows = []
    known = set()
    for name, stats in compiled.ranges_after.items():
        earlier = name if name in compiled.ranges_before else _origin(compiled, name)
        known.add(earlier)
        before = described(compiled.ranges_before.get(earlier))
        after = described(stats)
        rows.append({"tensor": name, "path": path(name), "before": before, "after": after})
    for name, factor in compiled.factors.items():
        seen = compiled.ranges_before.get(name)
        if seen is not None and name not in known:
            low, high = ((edge - factor.shift) / factor.scale for edge in (seen.low, seen.high))
            rows.append(
                {
                    "tensor": name, "path": path(name),
                    "before": described(seen), "after": describe(low, high),
                }
            )  # fmt: skip
    return rows


def _origin(compiled: Compiled, name: str) -> str:
    """The tensor that an inserted smoothing multiplication reads.

    Where it was fused away: the one that its successor replaced.
    """
    node = next(n for n in compiled.floating.exported.graph.nodes if n.name == name)
    first = node.args[0] if node.args else None
    return (
        first.name
        if str(node.target) == "aten.mul.Tensor" and isinstance(first, torch.fx.Node)
        else name
    )


def machine() -> dict[str, Any]:
    """The machine that measured."""
    import os
    import platform

    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name"))
        cpu = name.partition(":")[2].strip()
    except (OSError, StopIteration):
        pass
    return {"cpu": cpu, "cores": os.cpu_count() or 1, "feature": cpu_feature()}
