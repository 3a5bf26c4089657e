"""What follows the passes: lower, audit, verify, time, report.

And doing so again with an artifact on disk.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
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
from qcompiler.errors import UnsupportedError, VerifyError, first_line
from qcompiler.findings import INNER
from qcompiler.lowering import Job, Lowered, Run, integer_layers, lower
from qcompiler.manifest import Compiled, manifest_of
from qcompiler.memory import peak_memory
from qcompiler.op_families import LINEAR
from qcompiler.program import Batch, Program
from qcompiler.recipe import Recipe
from qcompiler.spec import ModelSpec
from qcompiler.target import Target
from qcompiler.verify import compare, finite

KEPT = 2  # batches of each kind kept with the artifact
UNMEASURED = 30.0  # dB that an artifact reaches at least where only rounding differs, some integers

Progress = Callable[[str], None]


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
    say("verify")
    errors: dict[str, list[dict[str, Any]]] = {"quantization": [], "lowering": []}
    known: dict[torch.fx.Node, Any] = {}
    sound = True
    batches: list[Batch] = []
    left_out: list[str] = []
    for kind, whole in (("calibration", calibration), ("held-out", held_out)):
        batches, captured, reasons = _taken(compiled.source, whole, lowered)
        left_out += reasons
        quantized = [lowered.view(integer.run(compiled.quantized, b, known)) for b in batches]
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
    latency, run_float = [], lowered.run_float
    if run_float is not None and batches:  # held out
        say("time")
        try:
            latency.append(_timed(run_float, run, batches[0]))
        except UnsupportedError as error:
            run_float = None
            lowered.notes.append(f"not timed beside its float model: {error}")
    metric = None
    if spec.metric is not None and run_float is not None:
        say(f"metric: {spec.metric_name}")
        spec_of = compiled.source.exported.call_spec.out_spec
        metric = {
            "name": spec.metric_name,
            "float": spec.metric(_as_module(run_float, inputs, spec_of)),
            "quantized": spec.metric(_as_module(run, inputs, spec_of)),
        }
    for name, source in spec.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            (folder / name).write_bytes(source)
        else:
            shutil.copyfile(source, folder / name)
    (folder / "program.txt").write_text(str(compiled.quantized) + "\n")
    manifest = manifest_of(spec, compiled, recipe, target, command, names)
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
    if left_out:
        manifest["warnings"].append(
            f"verified without {len(left_out)} parts of the data, cut to the sizes that there is "
            f"code for, which the model does not take ({left_out[0]}): give sizes of the data "
            "(--bucket)"
        )
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


def _taken(
    source: Program, whole: Sequence[Batch], lowered: Lowered
) -> tuple[list[Batch], list[Any], list[str]]:
    """The batches that both artifact and model take, what the model gives, and why others are not.

    A part of a batch may be no input of the model, though the whole is one: where a graph is cut,
    its edges lead to nodes that are gone.

    Raises:
        IndexError, RuntimeError: the model's own, for a whole batch.
    """
    sizes = [[x.shape for x in batch] for batch in whole]
    taken, results, reasons = [], [], []
    for batch in lowered.fit(whole):
        try:
            result = source.run(batch)
        except (IndexError, RuntimeError) as error:
            if [x.shape for x in batch] in sizes:
                raise
            reasons.append(first_line(error))
            continue
        taken.append(batch)
        results.append(lowered.view(result))
    return taken, results, reasons


def _lowering_bound(errors: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
    """What `verify` demands of the artifact against the program, in dB.

    It is what was measured here, less 6 dB for another CPU's kernels. Where the artifact could not
    run here, it is the quantization error, or `UNMEASURED` where that is smaller, less as much.
    """
    measured = [float(row["sqnr_db"]) for row in errors["lowering"]]
    expected = [UNMEASURED, *(float(row["sqnr_db"]) for row in errors["quantization"])]
    bound: float = min(measured or expected) - 6.0
    return round(max(0.0, bound), 1)


def _warnings(manifest: Mapping[str, Any]) -> list[str]:
    found = [*manifest["audit"]["broken"], *manifest["mixed"].get("warnings", ())]
    if not any("float" in output["dtype"] for output in manifest["outputs"]):
        found.append("not verified: none of its outputs are floats, and no others are compared")
    elif not manifest["errors"]["quantization"]:
        found.append(
            "not verified: no batch of the data has a size that there is code for; give sizes of "
            "the data (--bucket)"
        )
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
