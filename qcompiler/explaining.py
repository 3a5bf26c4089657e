"""Explain an artifact's error from what was kept with it: its programs and verification data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from qcompiler.artifact import REFERENCE, Artifact
from qcompiler.attribution import attribute
from qcompiler.errors import InputError
from qcompiler.format import Format
from qcompiler.program import Batch, Program, load_pt2
from qcompiler.target import Target

FLOATING, QUANTIZED = "floating.pt2", "quantized.pt2"


def keep(folder: Path, floating: Program, quantized: Program) -> None:
    """Write both programs into the artifact, for `explain`."""
    with warnings.catch_warnings(action="ignore"):  # of weights that are views of others
        for name, program in ((FLOATING, floating), (QUANTIZED, quantized)):
            torch.export.save(program.exported, folder / REFERENCE / name)


def explain(folder: Path, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Where an artifact's error comes from.

    Args:
        folder: the artifact.
        say: told of each step.

    Returns:
        `Attribution` as plain data; `kinds`, the sum of the shares of each kind; `kernel`, what the
        runtime's kernels add to the error, as a share of the whole; `loss`, what is measured; each
        change with `recipe`, its fields as YAML for `--recipe`, and `refused`, why the target would
        not take it, or None.

    Raises:
        InputError: the artifact keeps no programs or no data.
    """
    artifact = Artifact.open(folder)
    paths = [folder / REFERENCE / name for name in (FLOATING, QUANTIZED)]
    if not all(path.is_file() for path in paths):
        raise InputError(
            f"{folder} keeps no programs to explain: compile with --set keep_reference=true"
        )
    batches = artifact.batches("calibration") or artifact.batches("held-out")
    if not batches:
        raise InputError(f"{folder} keeps no data to explain with; compile the model again")
    floating, quantized = (load_pt2(path) for path in paths)
    manifest = artifact.manifest
    return account(floating, quantized, batches, manifest, say)


def account(
    floating: Program,
    quantized: Program,
    batches: Sequence[Batch],
    manifest: Mapping[str, Any],
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """What `explain` returns, from the programs themselves and an artifact's manifest."""
    logits = bool(manifest.get("logits"))
    found = attribute(floating, quantized, batches, manifest.get("padding_mask", ""), logits, say)
    kernel, whole = (_noise(manifest["errors"][kind]) for kind in ("lowering", "quantization"))
    return {
        **asdict(found),
        "kinds": found.by_kind(),
        "kernel": kernel / whole if whole else 0.0,
        "loss": "KL divergence, nats" if logits else "half of noise ÷ signal",
        "changes": [
            {
                **asdict(change),
                "recipe": _recipe(manifest["recipe"], change.settings),
                "refused": _refusal(str(manifest["target"]), change.settings),
            }
            for change in found.changes
        ],
    }


def _noise(rows: list[dict[str, Any]]) -> float:
    """Noise ÷ signal of the first output, on held-out data where there are some."""
    for row in [*(r for r in rows if r["data"] == "held-out"), *rows]:
        return float(10 ** (-row["sqnr_db"] / 10))
    return 0.0


def _refusal(target: str, settings: Mapping[str, Any]) -> str | None:
    """Why the target cannot run layers in the formats of a change, or None."""
    wanted = {*settings.get("formats", {}).values()} - {"float"}
    reasons = (
        Target.parse(target).refusal(f.weight, f.activation, products=f.products)
        for f in map(Format.parse, sorted(wanted))
    )
    return next((reason for reason in reasons if reason), None)


def _recipe(recipe: dict[str, Any], settings: Any) -> str:
    """The recipe with changed fields, as YAML that `compile --recipe` takes."""
    fields = {**recipe, **settings}
    fields["formats"] = {**recipe.get("formats", {}), **settings.get("formats", {})}
    fields["keep_float"] = [*recipe.get("keep_float", ()), *settings.get("keep_float", ())]
    kept = {key: value for key, value in fields.items() if value not in ((), [], {})}
    return yaml.safe_dump(kept, sort_keys=False)
