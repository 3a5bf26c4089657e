"""The parts of report.html about number formats: errors, ranges, the plan, what was refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qcompiler import charts, findings
from qcompiler.findings import count, decibels, number, place
from qcompiler.page import Html, code, folded, join, pill, table, tag

FOLD = 14  # rows beyond which a table is folded
PLACES = 8  # places of one refusal beyond which they are folded
RANGES = (
    "Each box is the spread of the channels' largest magnitudes in one tensor: quartiles, median, "
    "smallest and largest channel. A tensor has one scale, so one long whisker to the right "
    "takes resolution from all other channels. Smoothing moves such channels into the weights."
)
RUN_TIME = (
    "The ranges of {} are taken at run time and were not measured: of those only what smoothing "
    "looked at is shown, its outcome computed from its factors."
)
VALUES = (
    "Weights, and activations on one held-out batch, those first of which most values moved by "
    "more than half a bin. Heights are logarithms of counts, so that the tails can be seen; the "
    "bins span what there was before."
)


def sites(manifest: Mapping[str, Any]) -> Html | None:
    """The error of each layer's output."""
    found = manifest.get("sites")
    if not found:
        return None
    rows = [[i + 1, code(place(s)), decibels(s["sqnr_db"])] for i, s in enumerate(found)]
    lead = (
        "SQNR of each layer's output on held-out data, higher is better. It holds the layer's own "
        "error and what it inherits from the layers before it."
    )
    return join(
        [
            tag("p", lead, class_="soft"),
            tag("figure", charts.layers(found)),
            folded("All layers", table(["#", "Layer", "SQNR"], rows, "layers", "n-n")),
        ]
    )


def ranges(manifest: Mapping[str, Any]) -> Html | None:
    """Ranges of activations before and after smoothing."""
    rows = [row for row in manifest.get("ranges") or [] if row.get("before") or row.get("after")]
    if not rows:
        return None
    colours = {"pale": "before smoothing", "mark": "after, as quantized"}
    figure = tag("figure", charts.legend(colours), charts.ranges(rows))
    unseen = int(manifest.get("unobserved") or 0)
    lead = RANGES + (f" {RUN_TIME.format(count(unseen, 'tensor'))}" if unseen else "")
    return join([tag("p", lead, class_="soft"), figure])


def distributions(manifest: Mapping[str, Any]) -> Html | None:
    """Histograms of values before and after."""
    rows = manifest.get("distributions")
    if not rows:
        return None
    legends = charts.legend({"pale": "in float", "mark": "as quantized"})
    return join([tag("p", VALUES, class_="soft"), tag("figure", legends, charts.histograms(rows))])


def _fold_long(rows: Sequence[Sequence[Any]], title: str, inner: Html) -> Html:
    return folded(title, inner) if len(rows) > FOLD else inner


def smoothing(manifest: Mapping[str, Any]) -> Html | None:
    """What smoothing gained."""
    factors = manifest.get("smoothing")
    if not factors:
        return None
    rows = [
        [
            code(place(f)),
            f["method"],
            f"{f['gain_db']:+.2f} dB",
            "merged into the layer before" if f["merged"] else "one multiplication",
        ]
        for f in factors
    ]
    merged = sum(bool(f["merged"]) for f in factors)
    lead = (
        f"{count(len(rows), 'tensor')} smoothed: {merged} at no cost, {len(rows) - merged} by a "
        "multiplication. The gain is that in the SQNR of the tensor's readers."
    )
    body = table(["Tensor", "Method", "Gain", "How"], rows, "smoothing", "--n-")
    return join([tag("p", lead, class_="soft"), _fold_long(rows, "All smoothed tensors", body)])


def plan(manifest: Mapping[str, Any]) -> Html | None:
    """Which tensor use gets which format."""
    entries = manifest.get("plan")
    if not entries:
        return None
    formats: dict[str, int] = {}
    rows = []
    for entry in entries:
        formats[entry["qtype"]] = formats.get(entry["qtype"], 0) + 1
        ranges = [number(entry.get("low")), number(entry.get("high"))]
        rows.append(
            [code(entry["site"]), code(entry.get("path") or ""), code(entry["qtype"]), *ranges]
        )
    lead = ["Which tensor use gets which number format: "]
    for index, (name, uses) in enumerate(formats.items()):
        lead += [", " if index else "", tag("code", name), f" {count(uses, 'time')}"]
    body = table(["Site", "Layer", "Format", "Low", "High"], rows, "plan", "---nn")
    return join([tag("p", *lead, ".", class_="soft"), folded(f"All {len(rows)} entries", body)])


def _reasons(groups: Sequence[tuple[str, Sequence[str]]]) -> Html:
    parts = []
    for reason, places in groups:
        named = join(part for p in places for part in (code(p), ", "))
        listed = tag("div", Html(named.removesuffix(", ")), class_="where")
        if len(places) > PLACES:
            listed = folded(count(len(places), "place"), listed)
        times = pill(f"{len(places)} ×", "plain") if len(places) > 1 else None
        title = tag("p", reason, " " if times else None, times)
        parts.append(tag("div", title, listed, class_="reason"))
    return join(parts)


def refusals(manifest: Mapping[str, Any]) -> Html | None:
    """What was not done, with its reasons."""
    parts: list[Html] = []
    if manifest.get("refusals"):
        kept = findings.grouped(manifest["refusals"])
        parts += [tag("h3", "By the plan"), _reasons(kept)]
    for name, groups in findings.passes_refusals(manifest):
        parts += [tag("h3", "By ", code(name)), _reasons(groups)]
    if not parts:
        return tag("p", "Nothing was refused.", class_="soft") if "history" in manifest else None
    lead = "What was not done, and why."
    return join([tag("p", lead, class_="soft"), *parts])
