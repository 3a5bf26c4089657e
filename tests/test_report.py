"""The report and the summary of a manifest that has everything in it."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qcompiler import findings
from qcompiler.page import VOID, Html, tag
from qcompiler.report import render
from qcompiler.summary import summary

MANIFEST = Path(__file__).parent / "manifest.json"
LOADING = {"src", "srcset", "data", "poster", "action", "xlink:href", "background"}

Manifest = dict[str, Any]


@pytest.fixture
def manifest() -> Manifest:
    found: Manifest = json.loads(MANIFEST.read_text(encoding="utf-8"))
    return found


class Page(HTMLParser):
    """A strict reader: every element is closed in order; it keeps text, titles, links and ids."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.names: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.words: list[str] = []
        self.titles: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        keys = [name for name, _ in attrs]
        assert len(keys) == len(set(keys)), f"an attribute twice in <{tag}>"

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)
        if self.open and self.open[-1] == "title":
            self.titles.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def terminal(manifest: Mapping[str, Any], width: int = 400) -> str:
    console = Console(width=width, file=None, force_terminal=False, highlight=False)
    with console.capture() as captured:
        console.print(summary(manifest))
    return captured.get()


def without_breaks(text: str) -> str:
    return text.replace("<wbr>", "")


def refusals(manifest: Manifest) -> Iterator[Mapping[str, str]]:
    yield from manifest["refusals"]
    for entry in manifest["history"]:
        yield from entry["refusals"]


def test_is_valid(manifest: Manifest) -> None:
    page = Page(without_breaks(render(manifest)))
    assert page.names[:2] == ["html", "head"]
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = {value for tag_, name, value in page.attributes if (tag_, name) == ("a", "href")}
    assert links == {f"#{anchor}" for anchor in ids if anchor != "promises"}


def test_is_self_contained(manifest: Manifest) -> None:
    text = render(manifest)
    page = Page(without_breaks(text))
    assert not LOADING & {name for _, name, _ in page.attributes}
    assert not {"script", "link", "img", "iframe", "object"} & set(page.names)
    assert all(v and v.startswith("#") for _, name, v in page.attributes if name == "href")
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert "http:" not in text
    assert "https:" not in text
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style


def test_charts_are_labelled(manifest: Manifest) -> None:
    page = Page(without_breaks(render(manifest)))
    drawn = page.names.count("svg")
    labelled = sum(t == "svg" and n in ("aria-label", "aria-hidden") for t, n, _ in page.attributes)
    assert drawn == labelled > 10
    for index, site in enumerate(manifest["sites"], 1):
        assert f"{index}. {site['path']}: {site['sqnr_db']:.1f} dB" in page.titles


def test_escapes_everything(manifest: Manifest) -> None:
    """Every string of a manifest may hold markup; none of it becomes any."""
    evil = '"><script>alert(1)</script>&amp;\'<b x="'

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poison(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [poison(inner) for inner in value]
        return f"{value}{evil}" if isinstance(value, str) else value

    dirty_manifest = poison(manifest)
    for holder, key in ((dirty_manifest, "versions"), (dirty_manifest["audit"], "kernels")):
        holder[key] = {f"{name}{evil}": value for name, value in holder[key].items()}
    dirty_manifest["seconds"] = {evil: 1.0}
    dirty_manifest["recipe"][evil] = evil
    clean, dirty = Page(without_breaks(render(manifest))), render(dirty_manifest)
    page = Page(without_breaks(dirty))
    assert "<script" not in dirty
    assert set(page.names) == set(clean.names)
    assert {name for _, name, _ in page.attributes} == {name for _, name, _ in clean.attributes}
    assert "<script>alert(1)</script>&amp;'" in page.text


def test_has_every_refusal(manifest: Manifest) -> None:
    text = Page(without_breaks(render(manifest))).text
    found = [*refusals(manifest)]
    assert len(found) > 4
    for refusal in found:
        assert refusal["reason"] in text
        assert refusal["where"] in text


def test_numbers_are_those_of_the_manifest(manifest: Manifest) -> None:
    text = Page(without_breaks(render(manifest))).text
    for value in (
        findings.size(manifest["size"]["float_bytes"]),
        findings.size(manifest["size"]["model_bytes"]),
        manifest["command"],
        manifest["machine"]["cpu"],
        *manifest["versions"].values(),
    ):
        assert value in text
    for row in manifest["latency"]:
        assert f"{row['shape']}, {findings.count(row['threads'], 'thread')}" in text
        assert findings.milliseconds(row["float_ms"]) in text
        assert findings.milliseconds(row["quantized_ms"]) in text
        assert f"{row['ratio']:.3f} of float ({row['low']:.3f}–{row['high']:.3f})" in text
    for kind in ("quantization", "lowering"):
        for row in manifest["errors"][kind]:
            cells = f"{row['output']}{row['data']}{row['sqnr_db']:.1f} dB"
            assert f"{cells}{row['cosine']:.6f}{row['lowest_cosine']:.6f}" in text
    for entry in manifest["history"]:
        assert entry["name"] in text
        assert findings.number(entry["residual"]) in text
        assert all(note in text for note in entry["notes"])
    for entry in manifest["plan"]:
        assert entry["site"] in text
    for layer in manifest["audit"]["layers"]:
        assert layer["reason"] in text


def test_headline_is_the_worst_held_out(manifest: Manifest) -> None:
    errors = manifest["errors"]["quantization"]
    worst = min(row["sqnr_db"] for row in errors if row["data"] == "held-out")
    text = Page(without_breaks(render(manifest))).text
    assert f"SQNR on held-out data{worst:.1f} dB" in text
    errors[0] |= {"data": "held-out", "sqnr_db": 9.2}
    text = Page(without_breaks(render(manifest))).text
    assert "SQNR on held-out data9.2 dB" in text
    assert "brokenquantization error on held-out data: 9.2 dB, below 10.0 dB" in text


def test_promises(manifest: Manifest) -> None:
    promises = findings.promises(manifest)
    assert [p.text for p in promises if not p.kept] == manifest["audit"]["broken"]
    manifest["audit"]["broken"] = []
    manifest["history"][1]["residual"] = 1.0
    broken = [p.text for p in findings.promises(manifest) if not p.kept]
    assert broken == ["fold_norm moved the numbers beyond float rounding"]


@pytest.mark.parametrize("gone", [*json.loads(MANIFEST.read_text(encoding="utf-8"))])
def test_a_missing_part_is_left_out(manifest: Manifest, gone: str) -> None:
    del manifest[gone]
    Page(without_breaks(render(manifest)))
    assert terminal(manifest)


def test_an_empty_manifest_renders() -> None:
    Page(without_breaks(render({})))
    terminal({})


def test_extreme_numbers(manifest: Manifest) -> None:
    """Identical tensors, dead channels, one layer, noise above the signal, no range before."""
    manifest["sites"] = [{"node": "a", "path": "", "sqnr_db": 200.0}]
    dead = {"low": 0.0, "high": 0.0, "channel_absmax": [0.0] * 5}
    manifest["ranges"] = [{"tensor": "a", "path": "", "before": None, "after": dead}]
    page = Page(without_breaks(render(manifest)))
    assert "1. a: identical" in page.titles
    manifest["sites"].append({"node": "b", "path": "", "sqnr_db": -7.5})
    manifest["ranges"] = [{"tensor": "a", "path": "", "before": None, "after": None}]
    page = Page(without_breaks(render(manifest)))
    assert "2. b: -7.5 dB" in page.titles


@pytest.mark.parametrize("count", [1, 24, 200, 1500])
def test_labels_do_not_overlap(manifest: Manifest, count: int) -> None:
    """At most 14 numbers stand under the plot of layers, whatever their number."""
    layers = [{"node": f"n{i}", "path": f"layer.{i}", "sqnr_db": 30.0} for i in range(count)]
    text = render({"sites": layers})
    plot = text[text.index('class="plot"') :]
    plot = plot[: plot.index("</svg>")]
    labels = re.findall(r'<text x="([\d.]+)%" y="253" text-anchor="middle">(\d+)</text>', plot)
    places = [float(x) for x, _ in labels]
    assert 1 <= len(labels) <= 14
    assert all(b - a > 3.5 for a, b in itertools.pairwise(places))


def test_summary(manifest: Manifest) -> None:
    text = terminal(manifest)
    for entry in manifest["history"]:
        assert entry["name"] in text
    assert "2.31e-7" in text
    assert "27.4 dB, cosine 0.9991, lowest 0.9934 (last_hidden_state on held-out data)" in text
    assert "23.1 MB, float 90.9 MB" in text
    assert "7.21 ms, float 20.3 ms: ratio 0.355 (0.349–0.362) at 1×128, 1 thread" in text
    assert "BROKEN" in text
    assert text.count("its output is also read by a residual add") == 1
    assert "3 × its output is also read" in text
    assert "DequantizeLinear stayed before it" in text


def test_layers_with_one_reason_stand_together(manifest: Manifest) -> None:
    layer = {**manifest["audit"]["layers"][0], "reason": "read in blocks"}
    manifest["audit"]["layers"] = [{**layer, "path": f"layers.{i}"} for i in range(20)]
    page = without_breaks(render(manifest))
    assert page.count(" and 19 more") == 1
    assert all(f"layers.{i}<" in page for i in range(20))  # every one, folded


def test_analyses_say_what_they_found(manifest: Manifest) -> None:
    """Rounding is an analysis: it changes no program, and is not nothing."""
    entry = {**manifest["history"][0], "name": "round_weights", "changed": False}
    manifest["history"] = [{**entry, "notes": ["24 weights rounded"]}]
    for text in (render(manifest), terminal(manifest)):
        assert "24 weights rounded" in text
        assert "nothing to do" not in text
    manifest["history"] = [{**entry, "notes": []}]
    for text in (render(manifest), terminal(manifest)):
        assert "nothing to do" in text


def test_summary_fits_a_narrow_terminal(manifest: Manifest) -> None:
    assert all(len(line) <= 80 for line in terminal(manifest, width=80).splitlines())


def test_summary_takes_names_as_text(manifest: Manifest) -> None:
    """Brackets in names are not markup of the terminal."""
    changed = copy.deepcopy(manifest)
    changed["refusals"] = [{"where": "[bold]a[/bold]", "reason": "[red]no[/nothing]"}]
    changed["metric"]["name"] = "[top-1]"
    text = terminal(changed)
    assert "[red]no[/nothing] ([bold]a[/bold])" in text
    assert "[top-1]" in text


def test_tag_escapes() -> None:
    assert tag("a", "<&", Html("<br>"), title='"<') == '<a title="&quot;&lt;">&lt;&amp;<br></a>'


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0, "0"),
        (2.31e-7, "2.31e-7"),
        (0.355, "0.355"),
        (7.214, "7.21"),
        (171.9, "172"),
        (90871234, "9.09e7"),
        (-3.2, "-3.20"),
        (float("inf"), "inf"),
        (float("nan"), "–"),
        (None, "–"),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert findings.number(value) == text


def test_units() -> None:
    assert findings.size(23112345) == "23.1 MB"
    assert findings.size(12) == "12 bytes"
    assert findings.seconds(125.2) == "2 min 5 s"
    assert findings.decibels(200.0) == "identical"
    assert findings.percent(0.355) == "36 %"


def test_time_sentence(manifest: Manifest) -> None:
    sentence = findings.time_sentence(manifest)
    assert sentence.startswith("Matrix products and convolutions take 52 % of the running time")
    assert "MultiHeadAttention 18 %" in sentence
    manifest["audit"]["linear_speedup"] = 3.21
    assert "alone run 3.2 times faster than in float" in findings.time_sentence(manifest)
    del manifest["audit"]["time_share"]
    assert findings.time_sentence(manifest) == ""
