"""What `qcompiler inspect` shows: the parts of an artifact, or the program of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.text import Text

from qcompiler.artifact import MANIFEST, Artifact
from qcompiler.errors import InputError
from qcompiler.findings import decibels, number, place
from qcompiler.program import Program
from qcompiler.spec import ModelSpec
from qcompiler.summary import passes
from qcompiler.terminal import add_row, table

PROGRAM = "program.txt"  # the quantized program, in an artifact's folder
PARTS = ("program", "plan", "sites", "history", "audit")


def inspected(text: str, part: str, capture: Callable[[str], Program]) -> dict[str, Any]:
    """The parts asked for, as plain data by their names.

    Args:
        text: an artifact's folder, or a model.
        part: one of `PARTS`, or "all".
        capture: gives the program of a model.

    Raises:
        InputError: nothing there, or a model was asked for what only an artifact has.
    """
    folder = Path(text).expanduser()
    wanted = PARTS if part == "all" else (part,)
    if (folder / MANIFEST).is_file() or (
        folder.is_dir() and not (folder / "config.json").is_file()
    ):
        manifest = Artifact.open(folder).manifest
        return {
            name: _program(folder) if name == "program" else manifest.get(name, [])
            for name in wanted
        }
    if part not in ("all", "program"):
        raise InputError(
            f"{text} is a model and has no {part} yet; compile it, then inspect the folder"
        )
    return {"program": str(capture(text))}


def _program(folder: Path) -> str:
    path = folder / PROGRAM
    if not path.is_file():
        raise InputError(f"{path} is missing; compile the model again")
    return path.read_text(encoding="utf-8").rstrip("\n")


def shown(parts: Mapping[str, Any]) -> Iterator[RenderableType]:
    """The parts for people; a title over each where there are several."""
    for name, value in parts.items():
        if len(parts) > 1:
            yield Text(f"\n{name}\n", "bold")
        match name:
            case "program":
                yield str(value)
            case "plan":
                yield _plan(value)
            case "sites":
                yield _sites(value)
            case "history":
                yield passes(value)
            case _:
                yield from _audit(value)


def _plan(plan: list[dict[str, Any]]) -> RenderableType:
    rows = table("site", "layer", "format", "low", "high", numbers="   nn")
    for entry in plan:
        texts = (entry["site"], entry.get("path") or "", entry["qtype"])
        add_row(rows, *texts, number(entry.get("low")), number(entry.get("high")))
    return rows


def _sites(sites: list[dict[str, Any]]) -> RenderableType:
    rows = table("#", "layer", "SQNR", numbers="n n")
    for index, site in enumerate(sites, 1):
        add_row(rows, str(index), place(site), decibels(site["sqnr_db"]))
    return rows


def _audit(audit: Mapping[str, Any]) -> Iterator[RenderableType]:
    rows = table("layer", "operator", "kernel", "why")
    for layer in audit.get("layers", []):
        add_row(rows, place(layer), layer["op"], layer["kernel"], layer.get("reason", ""))
    yield rows
    kernels = sorted(audit.get("kernels", {}).items(), key=lambda item: -item[1])
    counts = ", ".join(f"{name} {count}" for name, count in kernels)
    yield f"\nstray Q/DQ nodes: {audit.get('stray', 0)}\noperators: {counts}"
    yield from (f"broken promise: {text}" for text in audit.get("broken", []))


def spec_of(program: Program, name: str) -> ModelSpec:
    """The inputs of a captured program as a `ModelSpec`, for reading its calibration data.

    The example inputs have the program's names and dtypes; dynamic sizes are 2 in them.
    """
    inputs: dict[str, torch.Tensor] = {}
    dynamic: dict[str, dict[int, str]] = {}
    for key in program.inputs:
        value = program.placeholder(key).meta["val"]
        if isinstance(value, torch.Tensor):
            shape: Sequence[Any] = value.shape  # integers, and symbols for dynamic sizes
            sizes = [size if isinstance(size, int) else 2 for size in shape]
            inputs[key] = torch.zeros(sizes, dtype=value.dtype)
            symbols = {d: str(s) for d, s in enumerate(shape) if not isinstance(s, int)}
            dynamic |= {key: symbols} if symbols else {}
    return ModelSpec(name, torch.nn.Identity(), inputs, dynamic)
