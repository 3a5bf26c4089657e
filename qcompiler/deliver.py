"""What follows the passes: lower, audit, verify, time, report.

And doing so again with an artifact on disk.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils import _pytree as pytree

from qcompiler import artifact as artifacts
from qcompiler import explaining, integer
from qcompiler.artifact import REFERENCE, Artifact
from qcompiler.bench import interleave
from qcompiler.data import Data
from qcompiler.distributions import Distribution, described
from qcompiler.errors import VerifyError
from qcompiler.findings import INNER
from qcompiler.lowering import Job, Run, integer_layers, lower
from qcompiler.observe import Statistics
from qcompiler.op_families import LINEAR
from qcompiler.plan import Factor, Plan, Site
from qcompiler.program import Program
from qcompiler.recipe import Recipe
from qcompiler.rewrite import module_path
from qcompiler.spec import ModelSpec
from qcompiler.target import Target, cpu_feature
from qcompiler.verify import compare, finite

KEPT = 2  # batches of each kind kept with the artifact

Progress = Callable[[str], None]


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
        seconds: wall time of the phases.
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


def _output_names(program: Program, spec: ModelSpec) -> tuple[str, ...]:
    count = len(program.exported.graph_signature.user_outputs)
    return tuple(
        [*spec.output_names, *(f"output_{i}" for i in range(len(spec.output_names), count))][:count]
    )


def deliver(
    folder: Path,
    spec: ModelSpec,
    compiled: Compiled,
    data: Data,
    recipe: Recipe,
    target: Target,
    buckets: Mapping[str, Sequence[int]],
    say: Progress,
    command: str,
) -> None:
    """Lower, audit, verify, time, and write everything that an artifact holds."""
    from qcompiler import report

    names = _output_names(compiled.quantized, spec)
    inputs = list(spec.input_names or compiled.quantized.inputs)
    calibration = data.excerpts(KEPT)
    held_out = list(itertools.islice(data.held_out(), KEPT))
    planned = _planned(compiled)
    lowered = lower(
        Job(
            folder, spec, compiled.quantized, compiled.plain, names, planned, recipe, target,
            buckets, held_out[0], say,
        )
    )  # fmt: skip
    run, names = lowered.run, names[: lowered.outputs]
    calibration, held_out = lowered.fit(calibration), lowered.fit(held_out)
    say("verify")
    errors: dict[str, list[dict[str, Any]]] = {"quantization": [], "lowering": []}
    known: dict[torch.fx.Node, Any] = {}
    sound = True
    for kind, batches in (("calibration", calibration), ("held-out", held_out)):
        quantized = [lowered.view(integer.run(compiled.quantized, b, known)) for b in batches]
        captured = [lowered.view(compiled.source.run(b)) for b in batches]
        sound &= all(map(finite, captured))
        actual = [run(*b) for b in batches] if lowered.ran else quantized
        masks = [b[inputs.index(spec.padding_mask)] for b in batches] if spec.padding_mask else None
        errors["quantization"] += [asdict(c) for c in compare(captured, actual, names, kind, masks)]
        if lowered.ran:
            found = compare(quantized, actual, names, kind, masks)
            errors["lowering"] += [asdict(c) for c in found]
        artifacts.save_batches(folder, kind, batches, inputs)
        artifacts.save_batches(folder, f"{kind}-captured", captured, list(names))
        artifacts.save_batches(folder, f"{kind}-quantized", quantized, list(names))
    known.clear()
    latency = []
    if lowered.run_float is not None:
        say("time")
        latency.append(_timed(lowered.run_float, run, held_out[0]))
    metric = None
    if spec.metric is not None and lowered.run_float is not None:
        say(f"metric: {spec.metric_name}")
        spec_of = compiled.source.exported.call_spec.out_spec
        metric = {
            "name": spec.metric_name,
            "float": spec.metric(_as_module(lowered.run_float, inputs, spec_of)),
            "quantized": spec.metric(_as_module(run, inputs, spec_of)),
        }
    for name, source in spec.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            (folder / name).write_bytes(source)
        else:
            shutil.copyfile(source, folder / name)
    (folder / "program.txt").write_text(str(compiled.quantized) + "\n")
    manifest = _manifest(spec, compiled, recipe, target, command, names)
    if spec.generation is not None and (target.runtime, target.device) == ("ort", "cpu"):
        from qcompiler.backends import ort_genai

        ort_genai.write(folder, manifest["generation"], manifest["inputs"])
    manifest |= {
        "errors": errors,
        "metric": metric,
        "size": {"float_bytes": lowered.float_bytes, "model_bytes": lowered.model_bytes},
        "latency": latency,
        "audit": lowered.audit,
        "bounds": {"min_sqnr": recipe.min_sqnr, "min_lowering_sqnr": _lowering_bound(errors)},
        **lowered.extra,
    }  # fmt: skip
    if lowered.outputs is not None:  # the artifact returns less than the module did
        manifest["out_spec"] = ""
    if recipe.keep_reference:
        explaining.keep(folder, compiled.floating, compiled.quantized)
    else:
        shutil.rmtree(folder / REFERENCE)
    if recipe.explain:
        say("explain")
        manifest["explanation"] = explaining.account(
            compiled.floating, compiled.quantized, data.excerpts(KEPT),
            manifest,
        )  # fmt: skip
    manifest["warnings"] = _warnings(manifest) + lowered.notes
    if data.note:
        manifest["warnings"].append(f"calibrated and verified on {data.note}")
    manifest["peak_memory_bytes"] = peak_memory()
    _judge(manifest, recipe, sound)
    (folder / artifacts.REPORT).write_text(report.render(manifest))
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    manifest["files"] = {p.relative_to(folder).as_posix(): artifacts.sha256(p) for p in files}
    (folder / artifacts.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _timed(run_float: Run, run: Run, batch: Sequence[torch.Tensor]) -> dict[str, Any]:
    timings = interleave(
        {"float": lambda: run_float(*batch), "quantized": lambda: run(*batch)}, 2.0
    )
    return {
        "shape": " ".join("×".join(map(str, t.shape)) for t in batch[:1]), "threads": 1,
        "float_ms": timings[0].ms, "quantized_ms": timings[1].ms, "ratio": timings[1].ratio,
        "low": timings[1].low, "high": timings[1].high,
    }  # fmt: skip


def _planned(compiled: Compiled) -> dict[str, str]:
    """Layers that have kernels for their quantized weights, node → module path.

    With float activations only linears have such kernels.
    """
    nodes = {n.name: n for n in compiled.floating.exported.graph.nodes}
    layers = {site.node: site.path for site in compiled.plan if site.operand == 1}
    whole = set(integer_layers(compiled.quantized, layers))
    return {n: path for n, path in layers.items() if n in whole or nodes[n].target is LINEAR}


def _as_module(run: Callable[..., Any], inputs: Sequence[str], spec: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        flat = [*pytree.tree_leaves(args), *(kwargs[name] for name in inputs if name in kwargs)]
        return pytree.tree_unflatten(list(run(*flat)), spec)

    return call


def _lowering_bound(errors: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
    """What `verify` demands of the artifact against the program, in dB.

    It is what was measured here, less 6 dB for another CPU's kernels.
    """
    measured = [row["sqnr_db"] for row in errors["lowering"]]
    return round(max(0.0, min(measured, default=0.0) - 6.0), 1)


def _manifest(
    spec: ModelSpec,
    compiled: Compiled,
    recipe: Recipe,
    target: Target,
    command: str,
    names: Sequence[str],
) -> dict[str, Any]:
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


def peak_memory() -> int:
    """Bytes of memory that this process has held at most; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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


def _warnings(manifest: Mapping[str, Any]) -> list[str]:
    found = [*manifest["audit"]["broken"], *manifest["mixed"].get("warnings", ())]
    slow = [row for row in manifest["latency"] if row["ratio"] > 1]
    found += [
        f"slower than the float model: {row['ratio']:.2f} times its time at {row['shape']}; "
        "the audit lists the kernels"
        for row in slow
    ]
    if "MatMulNBits" in manifest["audit"]["kernels"] and "cuda" not in manifest["target"]:
        found.append(
            "ONNX Runtime quantizes activations to 8 bits inside MatMulNBits (its accuracy level "
            "4): a lowering error beyond rounding, shown above"
        )
    return found


def _judge(manifest: Mapping[str, Any], recipe: Recipe, sound: bool) -> None:
    """Fail where the recipe's bounds or promises are broken.

    Args:
        manifest: with what was measured.
        recipe: says what is demanded.
        sound: whether the float model's outputs have no NaN or infinity.
    """
    worst = min(
        (
            r["sqnr_db"]
            for r in manifest["errors"]["quantization"]
            if r["data"] == "held-out" and not r["output"].startswith(INNER)
        ),
        default=200.0,
    )
    if worst < recipe.min_sqnr and not sound:
        raise VerifyError(
            "the float model itself gives NaN or Inf on the data that the result is judged on, so "
            "there is nothing to compare with: check the model, or remove these samples"
        )
    if worst < recipe.min_sqnr:
        raise VerifyError(
            f"SQNR on held-out data is {worst:.1f} dB, recipe '{recipe.name}' demands "
            f"{recipe.min_sqnr:.1f}: try another calibration, keep layers in float "
            "(--set keep_float=…), or accept it with --set min_sqnr=0"
        )
    broken = manifest["audit"]["broken"]
    if broken and recipe.promise == "error":
        raise VerifyError(f"{broken[0]}; --set promise=warn accepts it")


def verify(folder: str | Path) -> dict[str, Any]:
    """Check an artifact again, on the data kept with it: files, lowering error, quantization error.

    Returns:
        `{"ok": bool, "checks": [{"what", "value", "bound", "ok"}]}`; values in dB, for the files
        their number.

    Raises:
        VerifyError: if a file is missing or changed.
        InputError: if the folder is no artifact.
    """
    artifact = Artifact.open(folder)
    artifact.check_files()
    checks: list[dict[str, Any]] = [
        {
            "what": "files",
            "value": len(artifact.manifest["files"]),
            "bound": "checksums",
            "ok": True,
        }
    ]
    run = artifact.runner(1)
    names = [o["name"] for o in artifact.manifest["outputs"]]
    bounds = artifact.manifest["bounds"]
    for kind in ("calibration", "held-out"):
        batches = artifact.batches(kind)
        got = [run(*batch) for batch in batches]
        masks = artifact.masks(batches)
        for stored, what, bound in (
            ("quantized", "artifact against the quantized program", bounds["min_lowering_sqnr"]),
            ("captured", "artifact against the float model", bounds["min_sqnr"]),
        ):
            path = artifact.folder / artifacts.DATA / f"{kind}-{stored}.safetensors"
            expected = artifacts.unpack_batches(load_file(path), names) if path.is_file() else []
            for row in compare(expected, got, names, kind, masks) if expected else []:
                promised = kind == "held-out" and not row.output.startswith(INNER)
                demanded = bound if stored == "quantized" or promised else 0.0
                checks.append(
                    {
                        "what": f"{what}: {row.output}, {kind}",
                        "value": row.sqnr_db,
                        "bound": demanded,
                        "ok": row.sqnr_db >= demanded,
                    }
                )
    return {"ok": all(c["ok"] for c in checks), "checks": checks}
