"""Figures of a study as files, SVG and PNG: the Pareto front, and the heat map of sensitivity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

KINDS = ("svg", "png")
MEASURES = ("kl", "error", "first", "second")


def write(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw `front.svg`, `front.png`, `sensitivity.svg` and `sensitivity.png`.

    Where costs were timed also `front-time.svg` and `front-time.png`.

    Args:
        found: what a study found; see `mixed.Mixer.describe`.
        folder: where they go.

    Returns:
        The files.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = []
    drawings: list[tuple[str, Any, tuple[float, float]]] = [
        ("front", _front, (6.4, 4.2)),
        ("sensitivity", _heat, (6.4, 1.6 + 0.22 * len(found["units"]))),
    ]
    if found.get("front_of_time"):
        drawings.append(("front-time", partial(_front, axis="time"), (6.4, 4.2)))
    for name, draw, size in drawings:
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, found)
        for kind in KINDS:
            path = folder / f"{name}.{kind}"
            figure.savefig(path, dpi=160)
            made.append(path)
    return made


def _front(figure: Any, found: Mapping[str, Any], axis: str = "bits") -> None:
    axes = figure.add_subplot()
    line = found["front" if axis == "bits" else "front_of_time"]
    series = (
        ("one format for all", found["uniform"], {"marker": "o", "color": "#929ca8", "ls": ""}),
        ("integer program", line, {"marker": "o", "color": "#1267a8"}),
        ("chosen", [found["chosen"]] if found.get("chosen") else [],
         {"marker": "o", "color": "#c2500c", "ls": "", "ms": 9}),
    )  # fmt: skip
    for label, points, style in series:
        kept = [p for p in points if p["loss"] > 0]
        if kept:
            axes.plot([p[axis] for p in kept], [p["loss"] for p in kept], label=label, **style)
    axes.set_yscale("log")
    share = "layers' cycles, an estimate" if found.get("estimate") else "model's time"
    axes.set_xlabel("mean bits of a weight" if axis == "bits" else f"share of the float {share}")
    axes.set_ylabel(found["loss"])
    axes.grid(color="#e9ebee")
    axes.legend(frameon=False)


def _heat(figure: Any, found: Mapping[str, Any]) -> None:
    """Units × measures in their coarsest format, logarithms scaled within each column."""
    units = [u for u in found["units"] if len(u["options"]) > 1]
    coarsest = [min(u["options"], key=lambda o: o["bits"])["measures"] for u in units]
    used = [m for m in MEASURES if any(row.get(m) for row in coarsest)]
    columns = []
    for measure in used:
        logs = [math.log10(row[measure]) if row.get(measure) else math.nan for row in coarsest]
        known = [v for v in logs if not math.isnan(v)]
        low, high = min(known), max(known)
        columns.append([(v - low) / (high - low) if high > low else 0.5 for v in logs])
    axes = figure.add_subplot()
    table = [list(row) for row in zip(*columns, strict=True)]
    axes.imshow(table, aspect="auto", cmap="Oranges", vmin=0, vmax=1)
    axes.set_xticks(range(len(used)), used)
    axes.set_yticks(range(len(units)), [u["name"] for u in units], fontsize=6)
    axes.tick_params(length=0)
