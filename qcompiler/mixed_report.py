"""Mixed precision and error attribution as HTML: Pareto front, heat maps, what to change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from qcompiler.charts import legend
from qcompiler.findings import count, number, size
from qcompiler.page import Html, code, document, folded, section, sortable, table, tag

HEIGHT = 300  # of the front, in pixels, without its margins
BOTTOM = 34
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MEASURES = {
    "kl": "loss of the model",
    "error": "noise ÷ signal here",
    "first": "gradient × error",
    "second": "trace × error²",
}
FRONT = (
    "Every mark is a plan that ran end to end, with all of its layers quantized together, on "
    "calibration data. The line is the front that the integer program proposes; lower and further "
    "left is better. Point at a mark for its numbers."
)
TIME = (
    "The same against the time that the measured costs of the layers foresee, as a share of the "
    "float model's."
)
COUNTED = "The same against an estimate of time, as a share of the float layers' cycles: {}."
AXES = {"bits": "mean bits of a weight", "time": "share of the float model's time"}
CYCLES = "share of the float layers' cycles (estimate)"
HEAT = (
    "Each set of layers alone, in its coarsest format, by four measures; darker is worse within a "
    "column. A click on a title sorts. Where columns disagree, the first is what the outputs say."
)
SHARES = (
    "Each place that rounds, measured with everything else in float. The shares are of the sum of "
    "what all do alone; interaction is what they do to each other."
)
NOISE = (
    "Noise ÷ signal at each layer's output: what its own weight and input add, and what it "
    "inherits from the layers before. Lemma 7 of arXiv 2411.06084 bounds the weights' part from "
    "their relative errors alone, for a chain of layers without residual paths."
)


def mixed(found: Mapping[str, Any], latency: Sequence[Mapping[str, Any]] = ()) -> Html | None:
    """How formats were chosen; nothing where none were.

    Args:
        found: the manifest's entry "mixed", or what a study found.
        latency: the manifest's entry of that name.
    """
    if not found:
        return None
    parts: list[Any] = []
    chosen, estimate = found.get("chosen"), found.get("estimate")
    if chosen:
        parts.append(
            tag(
                "p",
                f"{chosen['label']}: {number(chosen['bits'])} bits a weight, "
                f"{size(chosen['bytes'])} of weights, loss {number(chosen['loss'])} where the "
                f"additive model expects {number(chosen['additive'])}. "
                f"{count(len(found['tried']), 'plan')} measured for it.",
            )
        )
    if chosen and chosen.get("time") is not None:
        parts.append(tag("p", _foreseen(found, chosen["time"], latency)))
    parts += [tag("p", FRONT, class_="soft"), front(found)]
    if found.get("front_of_time"):
        about = COUNTED.format(estimate) if estimate else TIME
        parts += [tag("p", about, class_="soft"), front(found, "time")]
    parts += [tag("p", HEAT, class_="soft"), heat(found["units"])]
    points = [
        *found["uniform"], *found["front"], *found.get("front_of_time", ()), *found["tried"],
    ]  # fmt: skip
    timed = any(p.get("time") is not None for p in points)
    rows = [
        (p["label"], _sort(p["bits"]), _sort(p["bytes"], size(p["bytes"])), _sort(p["loss"]),
         _sort(p["additive"]), *([_sort(p["time"])] if timed else []))
        for p in points
    ]  # fmt: skip
    last = ["time, estimated" if estimate else "time"] if timed else []
    titles = ("plan", "bits", "weights", "loss", "additive model", *last)
    parts.append(folded("All plans that were measured", sortable(
        table(titles, rows, "Plans that were measured", " nnnn" + "n" * timed))))  # fmt: skip
    parts += [tag("p", note, class_="soft") for note in found["notes"]]
    return tag("div", *parts)


def _foreseen(found: Mapping[str, Any], share: float, latency: Sequence[Mapping[str, Any]]) -> str:
    if found.get("estimate"):
        return f"Estimated: {number(share)} of the float layers' cycles; {found['estimate']}."
    text = f"Foreseen: {number(share)} of the float model's time, on the target. "
    return text + "".join(
        f"Measured: {number(row['ratio'])} of that of the float ONNX model at {row['shape']}. "
        for row in latency[:1]
    )


def _base(found: Mapping[str, Any]) -> str:
    known = found.get("estimate")
    return "float layers' cycles, an estimate" if known else "float model's time foreseen"


def front(found: Mapping[str, Any], axis: str = "bits") -> Html:
    """Loss, logarithmic, against bits or time, with a title on each mark."""
    tried = [p for p in found["tried"] if p["label"] in ("greedy", "closed form")]
    line = found["front" if axis == "bits" else "front_of_time"]
    about = CYCLES if axis == "time" and found.get("estimate") else AXES[axis]
    series = [
        ("pale", "one format for all", found["uniform"]),
        ("mark", "integer program", line),
        ("ring", "baselines", tried),
        ("low", "chosen", [found["chosen"]] if found.get("chosen") else []),
    ]
    points = [p for _, _, rows in series for p in rows if p["loss"] > 0]
    if not points:
        return tag("p", "nothing was lost")
    values = [p[axis] for p in points]
    logs = [math.log10(p["loss"]) for p in points]
    edge = 0.03 * (max(values) - min(values)) or 0.2
    left, right = min(values) - edge, max(values) + edge
    low, high = math.floor(min(logs)), math.ceil(max(logs) + 1e-9)

    def x(value: float) -> str:
        return f"{100 * (value - left) / (right - left):.2f}%"

    def y(value: float) -> float:
        return 8 + HEIGHT * (high - math.log10(value)) / max(1, high - low)

    marks: list[Html] = []
    for power in range(low, high + 1):
        at = y(10.0**power)
        marks.append(tag("line", x1="0", x2="100%", y1=at, y2=at, class_="grid"))
        marks.append(
            tag("text", f"10{str(power).translate(RAISED)}", x=-8, y=at + 4, text_anchor="end")
        )
    step = 1.0 if axis == "bits" else 0.1
    for index in range(math.ceil(left / step), math.floor(right / step) + 1):
        text = number(index * step)
        marks.append(tag("text", text, x=x(index * step), y=HEIGHT + 26, text_anchor="middle"))
    curve = [p for p in line if p["loss"] > 0]
    for first, second in pairwise(curve):
        marks.append(
            tag("line", x1=x(first[axis]), y1=y(first["loss"]), x2=x(second[axis]),
                y2=y(second["loss"]), class_="line-mark")
        )  # fmt: skip
    for kind, _, rows in series:
        for p in rows:
            if p["loss"] <= 0:
                continue
            title = (
                f"{p['label']}: {number(p['bits'])} bits, {size(p['bytes'])}, loss "
                f"{number(p['loss'])} (additive model {number(p['additive'])})"
            )
            if p.get("time") is not None:
                title += f", {number(p['time'])} of the {_base(found)}"
            radius = 6 if kind == "low" else 4.5
            marks.append(
                tag("circle", tag("title", title), cx=x(p[axis]), cy=y(p["loss"]), r=radius,
                    class_=kind, tabindex=0)
            )  # fmt: skip
    plot = tag(
        "svg", *marks, role="img", class_="plot", height=HEIGHT + BOTTOM,
        aria_label=f"Loss of {len(points)} measured plans against their {about}",
    )  # fmt: skip
    names = {kind: text for kind, text, rows in series if rows}
    caption = tag("figcaption", f"{found['loss']} against {about}")
    return tag("figure", legend(names), plot, caption)


def heat(units: Sequence[Mapping[str, Any]]) -> Html:
    """Units × measures, coloured within each column."""
    coarsest = [
        min((o for o in u["options"] if o["format"] != "float"), key=lambda o: o["bits"])
        for u in units
        if any(o["format"] != "float" for o in u["options"])
    ]
    columns = {
        key: [o["measures"].get(key, 0.0) for o in coarsest]
        for key in MEASURES
        if any(o["measures"].get(key) for o in coarsest)
    }
    rows = []
    for index, unit in enumerate(u for u in units if len(u["options"]) > 1):
        cells = [_warm(values, index) for values in columns.values()]
        rows.append(
            (code(unit["name"]), _sort(unit["weights"], f"{unit['weights']:,}"),
             code(unit.get("format") or coarsest[index]["format"]), *cells)
        )  # fmt: skip
    wanted = "format" if any(u.get("format") for u in units) else "coarsest format"
    titles = ("layers", "weights", wanted, *(MEASURES[key] for key in columns))
    inner = table(titles, rows, "Sensitivity by layer and measure", " n " + "n" * len(columns))
    return sortable(inner)


def _warm(values: Sequence[float], index: int) -> Html:
    """A number on a colour by its place between the least and the most of its column."""
    positive = [math.log(v) for v in values if v > 0]
    value = values[index]
    share = 0.0
    if value > 0 and positive and max(positive) > min(positive):
        share = (math.log(value) - min(positive)) / (max(positive) - min(positive))
    colour = f"background: color-mix(in srgb, var(--low) {round(75 * share)}%, transparent)"
    return tag("span", number(value), data_key=repr(value), class_="heat", style=colour)


def _sort(value: float, text: str | None = None) -> Html:
    return tag("span", text or number(value), data_key=repr(float(value)))


def explanation(found: Mapping[str, Any], name: str) -> str:
    """The page of `qcompiler explain`.

    Args:
        found: what `explaining.explain` returned.
        name: of the model.
    """
    return document(
        f"{name} · where the error comes from",
        tag("header", tag("h1", name), tag("p", "Where the error comes from", class_="soft")),
        tag("section", account(found)),
    )


def account(found: Mapping[str, Any]) -> Html | None:
    """Sources, layers and changes; nothing where nothing was explained."""
    if not found:
        return None
    kinds = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in found["kinds"].items())
    summary = (
        f"{found['loss']}: {number(found['total'])} on "
        f"{count(found['batches'], 'batch', 'batches')}. {kinds}; interaction "
        f"{number(found['interaction'])}; corrected biases take off {number(found['bias'])}; the "
        f"runtime's kernels add {100 * found['kernel']:.1f} % of the error."
    )
    shares = [
        (code(row["source"]["path"] or row["source"]["node"]), row["source"]["kind"],
         code(row["source"]["format"]), _sort(row["alone"]),
         _sort(row["share"], f"{100 * row['share']:.1f} %"))
        for row in found["shares"]
    ]  # fmt: skip
    keys = ("total", "weight", "activation", "inherited", "bound")
    columns = {key: [layer[key] for layer in found["layers"]] for key in keys}
    layers = [
        (code(layer["path"] or layer["node"]), *(_warm(columns[key], i) for key in keys))
        for i, layer in enumerate(found["layers"])
    ]
    titles = ("layer", "total", "weight", "input", "inherited", "lemma 7")
    sources = table(("source", "kind", "format", "alone", "share"), shares, "Sources", "   nn")
    return tag(
        "div",
        tag("p", summary),
        tag("h3", "What to change"),
        *_changes(found["changes"]),
        tag("h3", "Sources"),
        tag("p", SHARES, class_="soft"),
        sortable(sources),
        tag("h3", "Layers"),
        tag("p", NOISE, class_="soft"),
        sortable(table(titles, layers, "Noise by layer", " nnnnn")),
    )


def _changes(changes: Iterable[Mapping[str, Any]]) -> Iterable[Html]:
    for change in changes:
        source = change["source"]
        where = source["path"] or source["node"]
        what = f"{source['kind']} of {where}: {source['format']} → {change['to']}"
        yield tag(
            "p",
            tag("strong", what),
            f": predicted to take {number(change['predicted'])} off the loss, measured alone: "
            f"{number(change['measured'])}",
            f"; the target would refuse it: {change['refused']}" if change.get("refused") else None,
        )
        yield folded("as a recipe", tag("pre", change["recipe"]))


def study_page(found: Mapping[str, Any], name: str) -> str:
    """The page of `qcompiler sensitivity`."""
    header = tag("header", tag("h1", name), tag("p", "What number formats cost", class_="soft"))
    content = mixed(found)
    assert content is not None
    return document(f"{name} · sensitivity", header, section("mixed", "Formats", content))
