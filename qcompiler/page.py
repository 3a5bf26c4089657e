"""A self-contained HTML page: elements that escape what they hold, tables, and the style sheet."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

VOID = {"meta", "br", "hr"}  # elements without an end tag
SHAPES = {"rect", "line", "circle", "path"}  # SVG elements that close themselves when empty


class Html(str):
    """Text that is markup already; anything else is escaped when it is put into an element."""

    __slots__ = ()


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element; children that are not `Html` are escaped, `None` and `False` attributes left out.

    Attribute names lose a trailing `_` and have `-` for other `_`: `class_`, `aria_label`.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID:
        return Html(f"<{name}{written}>")
    if name in SHAPES and not children:
        return Html(f"<{name}{written}/>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(parts: Iterable[Any]) -> Html:
    """Markup one after the other; what is no markup is escaped, `None` left out."""
    return Html(
        "".join(
            part if isinstance(part, Html) else escape(str(part))
            for part in parts
            if part is not None
        )
    )


def _text(value: Any) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def code(text: Any) -> Html:
    """A name from the program, which may break at its dots and underscores."""
    broken = escape(str(text)).replace(".", ".<wbr>").replace("_", "_<wbr>")
    return tag("code", Html(broken.replace("/", "/<wbr>")))


def pill(text: str, kind: str) -> Html:
    """A short state; kind is "good", "bad", "mild" or "plain"."""
    return tag("span", text, class_=f"pill {kind}")


def table(
    head: Sequence[str], rows: Iterable[Sequence[Any]], label: str, numbers: str = ""
) -> Html:
    """A table that scrolls sideways where the screen is narrow.

    Args:
        head: one title a column.
        rows: cells, text or markup.
        label: what the table is, for screen readers.
        numbers: one letter a column, `n` for those that are aligned as numbers.
    """
    kinds = ["n" if letter == "n" else None for letter in numbers.ljust(len(head))]
    titles = [
        tag("th", text, scope="col", class_=kind) for text, kind in zip(head, kinds, strict=True)
    ]
    body = [
        tag("tr", *(tag("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)))
        for row in rows
    ]
    inner = tag("table", tag("thead", tag("tr", *titles)), tag("tbody", *body))
    return tag("div", inner, class_="scroll", role="region", aria_label=label, tabindex=0)


def folded(title: str, *content: Any) -> Html:
    """Content that opens on a click, and is printed open."""
    return tag("details", tag("summary", title), *content)


def section(anchor: str, title: str, *content: Any) -> Html:
    """A part of the page with its heading."""
    return tag("section", tag("h2", title), *content, id=anchor)


def sortable(inner: Html) -> Html:
    """A table whose columns sort by a click on the title; by number where `data-key` has one."""
    return Html(inner.replace("<table>", '<table class="sortable">', 1))


def document(title: str, *content: Any) -> str:
    """The whole page. It may load nothing, and run no script but the one that sorts tables."""
    body = join(content)
    script = Html(SORT) if 'class="sortable"' in body else None
    allowed = f"; script-src '{_digest(SORT)}'" if script is not None else ""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag(
            "meta",
            http_equiv="Content-Security-Policy",
            content=f"default-src 'none'; style-src 'unsafe-inline'{allowed}",
        ),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    last = tag("script", script) if script is not None else None
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', body, last), lang='en')}\n"


def _digest(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


SORT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const down = head.getAttribute("aria-sort") === "descending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "ascending" : "descending");
      const key = row => {
        const cell = row.cells[column];
        const number = parseFloat(cell.querySelector("[data-key]")?.dataset.key);
        return isNaN(number) ? cell.textContent : number;
      };
      const order = (a, b) => typeof a === "number" && typeof b === "number"
        ? b - a : String(a).localeCompare(String(b));
      const rows = [...table.tBodies[0].rows].sort((a, b) => order(key(a), key(b)));
      table.tBodies[0].append(...(down ? rows.reverse() : rows));
    };
  });
}
"""


STYLE = """
:root {
  --page: #f7f7f5; --card: #ffffff; --ink: #1c2127; --soft: #56606b; --line: #dfe2e6;
  --grid: #e9ebee; --mark: #1267a8; --pale: #929ca8; --low: #c2500c;
  --good: #17703f; --good-back: #e2f3e9; --bad: #b3261e; --bad-back: #fbe6e4;
  --mild: #8a5300; --mild-back: #fdf0d8; --plain-back: #eceef1;
  --mono: ui-monospace, "SF Mono", "Cascadia Code", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121518; --card: #1a1e22; --ink: #e4e7ea; --soft: #9fa9b4; --line: #30363d;
    --grid: #262b31; --mark: #5aa9e6; --pale: #76818d; --low: #f0894a;
    --good: #5fcf97; --good-back: #16301f; --bad: #ff8a7f; --bad-back: #3b1a18;
    --mild: #f0b95a; --mild-back: #352710; --plain-back: #262b31;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0 auto; max-width: 70rem; padding: 2.2rem clamp(0.9rem, 3vw, 2rem) 4rem;
  background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
}
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.015em; }
h2 { margin: 0 0 0.35rem; font-size: 1.25rem; line-height: 1.3; letter-spacing: -0.01em; }
h3 { margin: 1.4rem 0 0.3rem; font-size: 1rem; }
p { margin: 0.3rem 0 0.8rem; max-width: 46rem; }
section > p.soft { font-size: 0.94rem; }
.soft, figcaption, .tile small, nav { color: var(--soft); }
code, pre { font-family: var(--mono); font-size: 0.88em; }
table code, .rows code, .where code { font-size: 0.93em; }
code { overflow-wrap: break-word; }
pre {
  margin: 0.4rem 0; padding: 0.7rem 0.9rem; border: 1px solid var(--line); border-radius: 6px;
  background: var(--page); white-space: pre-wrap; overflow-wrap: anywhere;
}
a { color: var(--mark); text-decoration: none; }
a:hover { text-decoration: underline; }
:focus-visible { outline: 2px solid var(--mark); outline-offset: 2px; }
header p { margin: 0.25rem 0; max-width: none; }
nav { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; margin: 1.2rem 0; font-size: 0.9rem; }
section {
  margin: 1rem 0; padding: 1.2rem clamp(0.9rem, 2.4vw, 1.5rem) 1.3rem;
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  scroll-margin-top: 0.5rem;
}
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(11.2rem, 1fr)); gap: 0.7rem;
  margin: 1.2rem 0 0.8rem;
}
.tile {
  padding: 0.8rem 1rem 0.9rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px;
}
.tile span { display: block; font-size: 0.83rem; color: var(--soft); }
.tile strong {
  display: block; font-size: 1.5rem; font-weight: 620; line-height: 1.25;
  letter-spacing: -0.02em; font-variant-numeric: tabular-nums;
}
.tile small { display: block; font-size: 0.83rem; line-height: 1.4; }
ul.marks { list-style: none; margin: 0.5rem 0 0; padding: 0; }
ul.marks li { display: flex; gap: 0.6rem; align-items: baseline; padding: 0.18rem 0; }
ul.marks li > span:last-child { min-width: 0; overflow-wrap: anywhere; }
.pill {
  display: inline-block; flex: none; padding: 0.05rem 0.55rem; border-radius: 1rem;
  font-size: 0.78rem; font-weight: 600; white-space: nowrap; line-height: 1.5;
}
.good { color: var(--good); background: var(--good-back); }
.bad { color: var(--bad); background: var(--bad-back); }
.mild { color: var(--mild); background: var(--mild-back); }
.plain { color: var(--soft); background: var(--plain-back); }
.scroll { overflow-x: auto; margin: 0.5rem 0; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem; line-height: 1.4; }
th, td { padding: 0.4rem 0.9rem 0.4rem 0; text-align: left; vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
th {
  border-bottom: 1px solid var(--line); color: var(--soft); font-weight: 600; font-size: 0.8rem;
  white-space: nowrap; vertical-align: bottom;
}
th button {
  all: unset; cursor: pointer; font: inherit; color: inherit; border-bottom: 1px dotted;
}
th button:focus-visible { outline: 2px solid var(--mark); }
th[aria-sort=descending] button::after { content: " ↓"; }
th[aria-sort=ascending] button::after { content: " ↑"; }
.heat { display: block; padding: 0 0.35rem; border-radius: 3px; }
td { border-bottom: 1px solid var(--grid); font-variant-numeric: tabular-nums; }
tbody tr:last-child td { border-bottom: 0; }
td code { overflow-wrap: normal; }
.n { text-align: right; white-space: nowrap; }
th.n:not(:first-child), td.n:not(:first-child) { padding-left: 0.4rem; }
td ul { margin: 0; padding: 0; list-style: none; }
details { margin: 0.7rem 0 0; }
details > details, details details { margin-left: 0; }
summary { cursor: pointer; color: var(--mark); font-size: 0.92rem; padding: 0.15rem 0; }
.reason { margin: 0.7rem 0 0; }
.reason p { margin: 0; }
.where { margin: 0.3rem 0; padding: 0; font-size: 0.88rem; color: var(--soft); list-style: none; }
figure { margin: 0.8rem 0 0.4rem; }
figcaption { font-size: 0.85rem; margin-top: 0.3rem; max-width: 46rem; }
.legend {
  display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; font-size: 0.85rem; color: var(--soft);
  margin: 0 0 0.5rem;
}
.legend i {
  display: inline-block; width: 0.8rem; height: 0.8rem; border-radius: 3px;
  margin-right: 0.4rem; vertical-align: -0.08rem;
}
.rows {
  display: grid; gap: 0.15rem 1.2rem; grid-template-columns: minmax(0, 19rem) minmax(0, 1fr);
}
.rows > .label {
  align-self: center; font-size: 0.86rem; line-height: 1.3; min-width: 0; overflow-wrap: anywhere;
}
.rows > svg { width: calc(100% - 1.2rem); margin: 0 0.6rem; }
svg { display: block; overflow: visible; }
svg text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg text.value { fill: var(--ink); font-size: 13px; }
.plot { width: calc(100% - 3.4rem); margin: 0 0.6rem 0 2.8rem; }
.grid { stroke: var(--grid); } .axis { stroke: var(--pale); }
.mark { fill: var(--mark); } .pale { fill: var(--pale); } .low { fill: var(--low); }
.ring { fill: var(--card); stroke: var(--pale); stroke-width: 2; }
i.ring { background: var(--card); border: 2px solid var(--pale); }
.line-mark { stroke: var(--mark); stroke-width: 1.5; }
.line-pale { stroke: var(--pale); stroke-width: 1.5; }
.median { stroke: var(--card); stroke-width: 2; }
.hit { fill: transparent; }
g:hover > .hit { fill: var(--plain-back); }
i.mark { background: var(--mark); } i.pale { background: var(--pale); }
i.low { background: var(--low); }
footer { margin-top: 1.5rem; font-size: 0.85rem; color: var(--soft); }
@media (max-width: 40rem) {
  body { padding-top: 1.3rem; }
  h1 { font-size: 1.55rem; }
  .rows { grid-template-columns: minmax(0, 1fr); gap: 0; }
  .rows > .label { margin-top: 0.7rem; }
  .rows > .label:empty { display: none; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0.6rem; }
  .tile { padding: 0.65rem 0.75rem; }
  .tile strong { font-size: 1.35rem; }
  td code { white-space: nowrap; }
  td wbr { display: none; }
  td:last-child:not(.n), td ul { min-width: 11rem; }
}
@media print {
  body { background: none; max-width: none; padding: 0; font-size: 11pt; }
  section { break-inside: avoid-page; border: 0; padding: 0.6rem 0; }
  nav { display: none; }
  .scroll { overflow: visible; }
}
"""
