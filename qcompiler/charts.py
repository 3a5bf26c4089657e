"""Charts of the report as inline SVG that needs no script.

Horizontal positions are in percent and text is in pixels, so a chart follows the width of the
screen while its labels keep their size. Every mark has a title that shows when pointed at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qcompiler.findings import IDENTICAL_DB, count, decibels, number, place
from qcompiler.page import Html, code, folded, join, tag

HEIGHT = 210  # of the plot of layers, in pixels, without its margins
TOP = 26
SHOWN = 36  # rows of boxes that are shown at once
HISTOGRAMS = 12  # rows of histograms that are shown at once
TALL = 44  # of a histogram, in pixels
LOWEST = 3  # layers that stand out


@dataclass(frozen=True)
class Bar:
    """One bar: its series (a class of the style sheet), length, and the text at its end."""

    series: str
    value: float
    text: str


def legend(entries: Mapping[str, str]) -> Html:
    """What the colours mean: class → text."""
    return tag(
        "div", *(tag("span", tag("i", class_=c), t) for c, t in entries.items()), class_="legend"
    )


def bars(rows: Iterable[tuple[Any, Sequence[Bar]]], label: str, alone: bool = False) -> Html:
    """Horizontal bars from zero; the longest leaves room for its text.

    Args:
        rows: a label, text or markup, and the bars beside it.
        label: what is shown, for screen readers.
        alone: each row has a scale of its own.
    """
    rows = list(rows)
    every = max((bar.value for _, group in rows for bar in group), default=0.0)
    parts: list[Html] = []
    for title, group in rows:
        longest = (max(bar.value for bar in group) if alone else every) or 1.0
        spoken = "; ".join(bar.text for bar in group)
        marks = []
        for index, bar in enumerate(group):
            width = max(0.4, 70 * bar.value / longest)
            top = 3 + 21 * index
            marks += [
                tag("rect", tag("title", bar.text), class_=bar.series, x=0, y=top, rx=2,
                    width=f"{width:.2f}%", height=16),
                tag("text", bar.text, x=f"{width:.2f}%", dx=7, y=top + 12.5, class_="value"),
            ]  # fmt: skip
        parts += [
            tag("div", title, class_="label"),
            tag(
                "svg",
                *marks,
                role="img",
                aria_label=f"{label}: {spoken}",
                height=21 * len(group) + 3,
            ),
        ]
    return tag("div", *parts, class_="rows")


def layers(sites: Sequence[Mapping[str, Any]]) -> Html:
    """SQNR of each layer's output as bars, in graph order; the lowest ones stand out."""
    finite = [float(s["sqnr_db"]) for s in sites if s["sqnr_db"] < IDENTICAL_DB]
    step, low, high = _scale(min([0.0, *finite]), max([10.0, *finite]))
    lowest = sorted(range(len(sites)), key=lambda i: float(sites[i]["sqnr_db"]))
    lowest = lowest[: min(LOWEST, 1 + len(sites) // 8)]

    def height(db: float) -> float:
        return TOP + HEIGHT * (high - min(max(db, low), high)) / (high - low)

    parts = [tag("text", "SQNR in dB", x=-40, y=12)]
    for tick in range(math.ceil(low / step), math.floor(high / step) + 1):
        y = height(tick * step)
        style = "axis" if tick == 0 else "grid"
        parts += [
            tag("line", class_=style, x1=0, x2="100%", y1=y, y2=y),
            tag("text", f"{tick * step:g}", x=-8, y=y + 4, text_anchor="end"),
        ]
    slot = 100 / len(sites)
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000) if len(sites) / n <= 13)
    zero = height(0.0)
    for index, site in enumerate(sites):
        y, left = height(float(site["sqnr_db"])), index * slot
        title = f"{index + 1}. {place(site)}: {decibels(site['sqnr_db'])}"
        hit = tag(
            "rect", class_="hit", x=f"{left:.3f}%", y=TOP, width=f"{slot:.3f}%", height=HEIGHT
        )
        mark = tag(
            "rect",
            class_="low" if index in lowest else "mark",
            x=f"{left + slot * 0.14:.3f}%",
            y=min(y, zero),
            width=f"{slot * 0.72:.3f}%",
            height=max(abs(zero - y), 1.0),
        )
        parts.append(tag("g", tag("title", title), hit, mark))
        if (index + 1) % every == 0 or (index == 0 and every > 2):
            x = f"{left + slot / 2:.3f}%"
            parts.append(tag("text", index + 1, x=x, y=TOP + HEIGHT + 17, text_anchor="middle"))
    bottom = TOP + HEIGHT + 36
    parts.append(tag("text", "layer, in graph order", x="50%", y=bottom, text_anchor="middle"))
    label = f"SQNR in dB of {count(len(sites), 'layer')}, in graph order; the table below has them"
    plot = tag("svg", *parts, class_="plot", role="img", aria_label=label, height=bottom + 8)
    named = join(
        tag("li", f"{i + 1}. ", code(place(sites[i])), f" {decibels(sites[i]['sqnr_db'])}")
        for i in sorted(lowest)
    )
    legends = legend(
        {
            "low": f"the lowest {len(lowest)}" if len(lowest) > 1 else "the lowest",
            "mark": "all other layers",
        }
    )
    return join([legends, plot, tag("ul", named, class_="where")])


def ranges(rows: Sequence[Mapping[str, Any]]) -> Html:
    """Boxes of the channels' largest magnitudes, before and after smoothing, on one log scale."""
    values = [
        v for r in rows for k in ("before", "after") if r.get(k) for v in r[k]["channel_absmax"]
    ]
    positive = [v for v in values if v > 0] or [1.0]
    top = math.log10(max(positive))
    bottom = min(max(math.log10(min(positive)), top - 6), top - 0.5)

    def across(value: float) -> float:
        logarithm = math.log10(value) if value > 0 else bottom
        return 100 * (max(logarithm, bottom) - bottom) / (top - bottom)

    ticks = [10.0**e for e in range(math.ceil(bottom), math.floor(top) + 1)]
    if top - bottom < 2:
        ticks = sorted(
            m * 10.0**e
            for e in range(math.floor(bottom), math.ceil(top) + 1)
            for m in (1, 2, 5)
            if bottom <= math.log10(m * 10.0**e) <= top
        )
    axis = tag(
        "svg",
        *(tag("text", f"{t:g}", x=f"{across(t):.2f}%", y=14, text_anchor="middle") for t in ticks),
        height=20,
        aria_hidden="true",
    )
    title = tag("div", "largest magnitude of a channel, log scale", class_="label soft")
    drawn = [_boxes(row, across, ticks) for row in rows]
    shown = tag("div", title, axis, *drawn[:SHOWN], class_="rows")
    if len(drawn) <= SHOWN:
        return shown
    rest = tag("div", title, axis, *drawn[SHOWN:], class_="rows")
    return join([shown, folded(f"{len(drawn) - SHOWN} more tensors", rest)])


def _boxes(
    row: Mapping[str, Any], across: Callable[[float], float], ticks: Sequence[float]
) -> Html:
    """One tensor: its label, and up to two boxes over the grid."""
    kinds = [(k, s) for k, s in (("before", "pale"), ("after", "mark")) if row.get(k)]
    height = 14 * max(len(kinds), 1) + 6
    parts = [
        tag(
            "line",
            class_="grid",
            x1=f"{across(t):.2f}%",
            x2=f"{across(t):.2f}%",
            y1=-7,
            y2=height + 9,
        )
        for t in ticks
    ]
    spoken = []
    for index, (kind, series) in enumerate(kinds):
        five = [float(v) for v in row[kind]["channel_absmax"]]
        low, quarter, median, _, high = (f"{across(v):.2f}%" for v in five)
        wide = f"{max(across(five[3]) - across(five[1]), 0.4):.2f}%"
        y = 10 + 14 * index
        text = (
            f"{kind} smoothing: {number(five[0])} to {number(five[4])}, "
            f"quartiles {number(five[1])}, {number(five[2])}, {number(five[3])}; "
            f"values from {number(row[kind]['low'])} to {number(row[kind]['high'])}"
        )
        spoken.append(text)
        parts.append(
            tag(
                "g",
                tag("title", f"{place(row)}, {text}"),
                tag("rect", class_="hit", x=0, y=y - 7, width="100%", height=14),
                tag("line", class_=f"line-{series}", x1=low, x2=high, y1=y, y2=y),
                tag("line", class_=f"line-{series}", x1=low, x2=low, y1=y - 3, y2=y + 3),
                tag("line", class_=f"line-{series}", x1=high, x2=high, y1=y - 3, y2=y + 3),
                tag("rect", class_=series, x=quarter, y=y - 5, width=wide, height=10, rx=1.5),
                tag("line", class_="median", x1=median, x2=median, y1=y - 5, y2=y + 5),
            )
        )
    label = f"{place(row)}, {'; '.join(spoken)}"
    drawing = tag("svg", *parts, role="img", aria_label=label, height=height)
    return join([tag("div", code(place(row)), class_="label"), drawing])


def histograms(rows: Sequence[Mapping[str, Any]]) -> Html:
    """Values of each site before and after they were quantized; heights are logarithms of counts.

    Args:
        rows: with the fields of a `Distribution`, and of the site its `kind` and `qtype`.
    """
    drawn = [_histogram(row) for row in rows]
    shown = tag("div", *drawn[:HISTOGRAMS], class_="rows")
    if len(drawn) <= HISTOGRAMS:
        return shown
    rest = tag("div", *drawn[HISTOGRAMS:], class_="rows")
    return join([shown, folded(f"{count(len(drawn) - HISTOGRAMS, 'site')} more", rest)])


def _histogram(row: Mapping[str, Any]) -> Html:
    highest = math.log1p(max(*row["before"], *row["after"]))

    def outline(counts: Sequence[int], gap: float) -> str:
        """A box for each bin that holds something, in units of a bin and of a pixel."""
        boxes = []
        for index, amount in enumerate(counts):
            if amount:
                tall = max(1.0, TALL * math.log1p(amount) / highest)
                wide = 1 - 2 * gap
                boxes.append(f"M{index + gap:g} {TALL}v-{tall:.1f}h{wide:g}v{tall:.1f}z")
        return "".join(boxes)

    text = (
        f"{row['kind']}, {row['qtype']}: {number(row['low'])} to {number(row['high'])}; "
        f"{100 * row['moved']:.2g} % moved by more than half a bin"
    )
    drawing = tag(
        "svg",
        tag("title", f"{place(row)}, {text}"),
        tag("path", class_="pale", d=outline(row["before"], 0.04)),
        tag("path", class_="mark", d=outline(row["after"], 0.28)),
        viewBox=f"0 0 {len(row['before'])} {TALL}", preserveAspectRatio="none", height=TALL,
        role="img", aria_label=f"{place(row)}, {text}",
    )  # fmt: skip
    label = tag("div", code(place(row)), tag("br"), text, class_="label soft")
    return join([label, drawing])


def _scale(low: float, high: float) -> tuple[float, float, float]:
    """Step, lower and upper end of an axis with at most seven round ticks."""
    step = next((s for s in (1, 2, 5, 10, 20, 25, 50) if (high - low) / s <= 6), 100)
    return step, math.floor(low / step) * step, math.ceil(high / step) * step
