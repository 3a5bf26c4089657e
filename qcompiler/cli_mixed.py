"""What `qcompiler sensitivity` and `qcompiler explain` do and print."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from qcompiler.findings import number, size
from qcompiler.terminal import add_row, table

if TYPE_CHECKING:
    from qcompiler.program import Program
    from qcompiler.recipe import Recipe
    from qcompiler.spec import Batches, ModelSpec
    from qcompiler.target import Target

Progress = Callable[[str], None]
SHOWN = 12  # rows of a table on the terminal


def study(
    source: ModelSpec | Program,
    target: Target,
    recipe: Recipe,
    calibration: Batches | None,
    out: Path,
    jobs: int,
    ray: str | None,
    progress: Progress,
) -> dict[str, Any]:
    """Make or finish a study, with its figures."""
    import qcompiler.compiler as compiler
    from qcompiler.mixed_report import study_page

    found = compiler.study(
        source, target=target, recipe=recipe, calibration=calibration, out=out, jobs=jobs,
        ray=ray, progress=progress,
    )  # fmt: skip
    name = getattr(source, "name", "") or "model"
    (out / "study.html").write_text(study_page(found, name))
    return found


def study_table(found: Mapping[str, Any]) -> Iterable[RenderableType]:
    """The study for a terminal: the most sensitive units, plans of one format, the front."""
    texts = list(found["candidates"])
    rows = table("layers", "weights", *texts, numbers=" n" + "n" * len(texts))
    for unit in _most_sensitive(found["units"])[:SHOWN]:
        by_format = {o["format"]: o["measures"].get("kl") for o in unit["options"]}
        losses = [number(by_format.get(text)) for text in texts]
        add_row(rows, unit["name"], f"{unit['weights']:,}", *losses)
    yield f"loss ({found['loss']}) with one set of layers quantized, the most sensitive first\n"
    yield rows
    rest = len(found["units"]) - SHOWN
    if rest > 0:
        yield f"… and {rest} more in {found['folder']}/study.json"
    yield "\nplans that ran end to end"
    rows = table("plan", "bits", "weights", "loss", "additive model", numbers=" nnnn")
    for point in [*found["uniform"], *found["front"]]:
        add_row(
            rows, point["label"], number(point["bits"]), size(point["bytes"]),
            number(point["loss"]), number(point["additive"]),
        )  # fmt: skip
    yield rows
    yield from found["notes"]
    yield (
        f"\n{found['seconds']:.0f} s; any point of the front: qcompiler compile … --recipe "
        f"{found['folder']}/points/NN.yaml"
    )


def _most_sensitive(units: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(units, key=lambda u: -max(o["measures"].get("kl", 0.0) for o in u["options"]))


def explain(folder: Path, progress: Progress) -> dict[str, Any]:
    """See `qcompiler.explaining`; written beside the artifact's report as well."""
    from qcompiler import explaining
    from qcompiler.artifact import Artifact
    from qcompiler.mixed_report import explanation as page

    found = explaining.explain(folder, progress)
    name = Artifact.open(folder).manifest.get("name", "model")
    (folder / "explain.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "explain.html").write_text(page(found, name))
    return found


def explanation(found: Mapping[str, Any]) -> Iterable[RenderableType]:
    """The account for a terminal."""
    kinds = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in found["kinds"].items())
    yield (
        f"loss ({found['loss']}) {number(found['total'])} on {found['batches']} batches: {kinds}; "
        f"interaction {number(found['interaction'])}, corrected biases take off "
        f"{number(found['bias'])}; the runtime's kernels add {100 * found['kernel']:.1f} % of the "
        "error\n"
    )
    rows = table("source", "kind", "format", "alone", "share", numbers="   nn")
    for row in found["shares"][:SHOWN]:
        source = row["source"]
        add_row(
            rows, source["path"] or source["node"], source["kind"], source["format"],
            number(row["alone"]), f"{100 * row['share']:.1f} %",
        )  # fmt: skip
    yield rows
    yield "\nnoise ÷ signal at the layers' outputs, the noisiest first"
    rows = table("layer", "total", "weight", "input", "inherited", "lemma 7", numbers=" nnnnn")
    for layer in sorted(found["layers"], key=lambda r: -r["total"])[:SHOWN]:
        values = (layer[k] for k in ("total", "weight", "activation", "inherited", "bound"))
        add_row(rows, layer["path"] or layer["node"], *map(number, values))
    yield rows
    yield "\nchanges that would buy the most"
    rows = table("change", "to", "predicted", "measured", numbers="  nn")
    for change in found["changes"]:
        source = change["source"]
        add_row(
            rows, f"{source['kind']} of {source['path'] or source['node']}",
            change["to"] + (" (no kernel)" if change.get("refused") else ""),
            number(change["predicted"]), number(change["measured"]),
        )  # fmt: skip
    yield rows
    yield "\neach change as a recipe, all sources and layers: explain.html, explain.json"
