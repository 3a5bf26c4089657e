"""Time an artifact beside its float model and what ONNX Runtime's own quantizers make of it.

A driver: it knows how each runtime opens a model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from qcompiler import language_bench
from qcompiler.artifact import REFERENCE, Artifact
from qcompiler.bench import interleave
from qcompiler.errors import InputError
from qcompiler.explaining import FLOATING
from qcompiler.generation import Runtime, float_target, runtime, settings_of
from qcompiler.gpu import device
from qcompiler.lowering import Progress, Run, model_size
from qcompiler.manifest import machine
from qcompiler.target import Target
from qcompiler.verify import compare

T = TypeVar("T")


def bench(
    folder: str | Path,
    against: Sequence[str] = ("float",),
    threads: int = 1,
    seconds: float = 3.0,
    shape: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time an artifact beside its float model and ONNX Runtime's own quantizers.

    All are interleaved in one run.

    Args:
        folder: the artifact; its float model must have been kept.
        against: `float`, `ort-dynamic`, `ort-static`, `ort-int4`, or `ort`: of language models
            `ort-int4`, of others `ort-dynamic`. The float model is always measured: all ratios are
            to it.
        threads: of one operator.
        seconds: of measuring, all candidates together.
        shape: such as "8x128": sizes for the dynamic dimensions of the inputs, in their order; of
            language models the tokens of a prompt, and those before the ones that are written.
    """
    from qcompiler.backends import ort, ort_cuda, torch_half

    say = progress or (lambda step: None)
    artifact = Artifact.open(folder)
    target = Target.parse(str(artifact.manifest["target"]))
    base = artifact.folder / REFERENCE
    kept = (ort.MODEL, FLOATING) if float_target(str(target)) == "torch:cuda" else (ort.MODEL,)
    if not all((base / name).is_file() for name in kept):
        raise InputError(
            f"{folder} keeps no float model; compile with --set keep_reference=true (of some no "
            "ONNX model can be made: compile said so)"
        )
    writes = bool(artifact.manifest.get("generation"))
    usual = "ort-int4" if writes else "ort-dynamic"
    against = list(dict.fromkeys(usual if name == "ort" else name for name in against))
    if writes:
        return _bench_language(artifact, against, threads, seconds, shape, say)
    batches = artifact.batches("held-out")
    if not batches:
        raise InputError(f"{folder} keeps no data to run; compile it again")
    batch = batches[0] if shape is None else _resize(batches[0], artifact.manifest["inputs"], shape)
    names = [o["name"] for o in artifact.manifest["outputs"]]
    with tempfile.TemporaryDirectory() as scratch:
        paths = {"float": base / ort.MODEL, "qcompiler": artifact.folder / ort.MODEL}
        on_cpu = partial(ort.load_model, threads=threads, rest=True)
        open_model = ort_cuda.load_model if target.device == "cuda" else on_cpu
        beside = float_target(str(target))
        match beside:
            case "torch:cuda":
                runs: dict[str, Run] = {"float": torch_half.load(base)}
            case "ort:cpu":
                runs = {"float": on_cpu(paths["float"])}
            case _:
                runs = {"float": open_model(paths["float"])}
        sizes = {"qcompiler": int(artifact.manifest["size"]["model_bytes"])}
        if paths["qcompiler"].is_file():
            runs["qcompiler"] = open_model(paths["qcompiler"])
        else:
            runs["qcompiler"] = artifact.runner(threads)
        peers, notes = _open_peers(artifact, against, Path(scratch), open_model, say)
        runs |= peers
        paths |= {peer: Path(scratch) / peer / ort.MODEL for peer in peers}
        expected, masks = [runs["float"](*b) for b in batches], artifact.masks(batches)
        quality = {
            name: min(
                c.sqnr_db
                for c in compare(expected, [run(*b) for b in batches], names, "held-out", masks)
            )
            for name, run in runs.items()
        }
        say("time")
        timings = interleave({n: partial(run, *batch) for n, run in runs.items()}, seconds)
        emulator = " ".join(getattr(runs["qcompiler"], "emulator", ()))
        slow = f"run by {emulator}: this is not its speed" if emulator else ""
        rows: list[dict[str, Any]] = [
            {
                **asdict(t),
                "size_bytes": sizes.get(t.name) or model_size(paths[t.name]),
                "sqnr_db": None if t.name == "float" else quality[t.name],
                "note": {"qcompiler": slow, "float": _where(target, beside)}.get(t.name, ""),
            }
            for t in timings
        ]
    rows += [
        {
            "name": n, "ms": None, "ratio": None, "low": None, "high": None, "rounds": 0,
            "size_bytes": None, "sqnr_db": None, "note": note,
        }
        for n, note in notes.items()
    ]  # fmt: skip
    first = batch[0]
    return {
        "rows": rows,
        "threads": threads,
        "shape": "×".join(map(str, first.shape)),
        "machine": _machine(str(artifact.manifest["target"])),
    }


def _bench_language(
    artifact: Artifact,
    against: Sequence[str],
    threads: int,
    seconds: float,
    shape: str | None,
    say: Progress,
) -> dict[str, Any]:
    """Tokens a second of the artifact, of its float model and of the peers."""
    from qcompiler.backends import ort

    target, base = str(artifact.manifest["target"]), artifact.folder / REFERENCE
    settings = settings_of(artifact.folder, artifact.manifest)
    room = int(artifact.manifest.get("capacity") or settings["context"])
    prompt, past = language_bench.sizes_of(shape, room)
    beside = float_target(target)
    peers_on = "ort:cuda" if Target.parse(target).device == "cuda" else "ort:cpu"
    sizes = {
        "float": model_size(base / ort.MODEL),
        "qcompiler": int(artifact.manifest["size"]["model_bytes"]),
    }
    with tempfile.TemporaryDirectory() as scratch:
        writers: dict[str, Runtime] = {
            "float": runtime(base, beside, threads),
            "qcompiler": runtime(artifact.folder, target, threads),
        }
        peers, notes = _open_peers(
            artifact, against, Path(scratch),
            lambda model: runtime(model.parent, peers_on, threads), say,
        )  # fmt: skip
        writers |= peers
        sizes |= {peer: model_size(Path(scratch) / peer / ort.MODEL) for peer in peers}
        say("time")
        rows = language_bench.time_writers(writers, prompt, past, seconds)
    notes["float"] = _where(Target.parse(target), beside)
    rows = [{**r, "size_bytes": sizes[r["name"]], "note": notes.get(r["name"], "")} for r in rows]
    absent = {n: note for n, note in notes.items() if n not in writers}
    rows += [{"name": n, "phase": "", "note": note} for n, note in absent.items()]
    return {
        "rows": rows, "threads": threads, "machine": _machine(target),
        "shape": f"a prompt of {prompt}, {language_bench.STEPS} after {past}",
    }  # fmt: skip


def _where(target: Target, beside: str) -> str:
    """What ran the float model of an artifact for a GPU; nothing of others."""
    if target.device != "cuda":
        return ""
    return {"torch:cuda": "torch, float16", "ort:cpu": "ONNX Runtime on the CPU"}.get(
        beside, "ONNX Runtime on this GPU"
    )


def _machine(target: str) -> dict[str, Any]:
    """What it ran on, with the GPU's name where that was one."""
    return machine() | ({"gpu": device().name} if Target.parse(target).device == "cuda" else {})


def _open_peers(
    artifact: Artifact,
    against: Sequence[str],
    scratch: Path,
    open_model: Callable[[Path], T],
    say: Progress,
) -> tuple[dict[str, T], dict[str, str]]:
    """The peers but the float model, each made in a folder of its own; of the others, why not."""
    from qcompiler.backends import ort, ort_peers

    opened: dict[str, T] = {}
    notes: dict[str, str] = {}
    for peer in (name for name in against if name != "float"):
        say(peer)
        model = scratch / peer / ort.MODEL
        model.parent.mkdir(exist_ok=True)
        try:
            made = ort_peers.build(
                peer, artifact.folder / REFERENCE / ort.MODEL, model.parent,
                lambda: artifact.batches("calibration"),
                [i["name"] for i in artifact.manifest["inputs"]],
            )  # fmt: skip
            made.rename(model)
            opened[peer] = open_model(model)
        except InputError:
            raise
        except Exception as error:  # a peer that fails is a result, not our failure
            notes[peer] = _failed(error)
    return opened, notes


def _failed(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__  # a MemoryError says nothing
    return f"failed: {text.splitlines()[0][:200]}"


def _resize(
    batch: Sequence[torch.Tensor], inputs: Sequence[Mapping[str, Any]], shape: str
) -> tuple[torch.Tensor, ...]:
    """The batch with its dynamic sizes set, in order of appearance.

    Its data are repeated and cut.
    """
    symbols: list[str] = []
    for entry in inputs:
        symbols += [s for s in entry["shape"] if isinstance(s, str) and s not in symbols]
    try:
        sizes = [int(part) for part in shape.lower().replace("×", "x").split("x")]
    except ValueError:
        sizes = []
    if len(sizes) != len(symbols) or any(s < 1 for s in sizes):
        raise InputError(
            f"--shape {shape}: give {len(symbols)} sizes for {', '.join(symbols)}, such as 8x128"
        )
    wanted = dict(zip(symbols, sizes, strict=True))
    resized = []
    for tensor, entry in zip(batch, inputs, strict=True):
        for dim, size in enumerate(entry["shape"]):
            if isinstance(size, str):
                index = torch.arange(wanted[size]) % tensor.shape[dim]
                tensor = tensor.index_select(dim, index)
        resized.append(tensor)
    return tuple(resized)
