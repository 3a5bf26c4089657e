"""The end of `qcompiler compile` in a terminal: a manifest in one screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qcompiler import findings
from qcompiler.findings import count, decibels, milliseconds, number, size

NAMED = 3  # places that are named for one reason; the report has them all


def summary(manifest: Mapping[str, Any]) -> RenderableType:
    """What each pass did, then error, size, latency, audit, and what was refused.

    Args:
        manifest: the content of `manifest.json`. Parts that it lacks are left out.
    """
    parts: list[RenderableType] = []
    if manifest.get("history"):
        parts += [passes(manifest["history"]), Text()]
    parts.append(_numbers(manifest))
    parts += [Text(), _promises(manifest)]
    refused = _refused(manifest)
    if refused is not None:
        parts += [Text(), refused]
    return Group(*parts)


def passes(history: Sequence[Mapping[str, Any]]) -> Table:
    """The history as a table: a row for each pass."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("pass", no_wrap=True)
    table.add_column("exact", justify="center")
    table.add_column("residual", justify="right", no_wrap=True)
    table.add_column("bound", justify="right", no_wrap=True)
    table.add_column("what it did", overflow="fold")
    for entry in history:
        residual, bound = entry.get("residual"), entry.get("bound")
        over = residual is not None and bound is not None and residual > bound
        notes = "; ".join(entry.get("notes", []))
        if not notes and not entry["changed"]:
            notes = "nothing to do"
        refusals = len(entry.get("refusals", []))
        what = Text(notes)
        if refusals:
            what.append(f"{'; ' if notes else ''}{refusals} refused", "yellow")
        table.add_row(
            Text(str(entry["name"])),
            "yes" if entry["exact"] else "no",
            Text(number(residual), "red" if over else ""),
            number(bound),
            what,
            style=None if entry["changed"] or entry.get("notes") else "dim",
        )
    return table


def _numbers(manifest: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for kind, title in (("quantization", "SQNR to float"), ("lowering", "SQNR to program")):
        row = findings.worst(manifest, kind, "held-out") or findings.worst(manifest, kind)
        if row:
            cosine = f"cosine {row['cosine']:.4f}, lowest {row['lowest_cosine']:.4f}"
            place = f"{row['output']} on {row['data']} data"
            table.add_row(title, Text(f"{decibels(row['sqnr_db'])}, {cosine} ({place})"))
    metric = manifest.get("metric")
    if metric:
        values = f"{number(metric['quantized'], 4)}, float {number(metric['float'], 4)}"
        table.add_row(Text(str(metric["name"])), values)
    sizes = manifest.get("size")
    if sizes:
        values = f"{size(sizes['model_bytes'])}, float {size(sizes['float_bytes'])}"
        table.add_row("size", values)
    for row in manifest.get("latency", []):
        values = (
            f"{milliseconds(row['quantized_ms'])}, float {milliseconds(row['float_ms'])}: ratio "
            f"{number(row['ratio'])} ({number(row['low'])}–{number(row['high'])}) "
            f"at {row['shape']}, {count(row['threads'], 'thread')}"
        )
        table.add_row("latency", Text(values))
    if manifest.get("audit"):
        table.add_row("kernels", Text(_kernels(manifest)))
    return table


def _kernels(manifest: Mapping[str, Any]) -> str:
    kinds = ", ".join(f"{n} {kind}" for kind, n in findings.kernels(manifest).items())
    stray = manifest["audit"].get("stray", 0)
    loose = count(stray, "stray Q/DQ node")
    return f"{kinds or 'no layers'}; {loose}. {findings.time_sentence(manifest)}".strip()


def _promises(manifest: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    promises = findings.promises(manifest)
    for promise in promises:
        state = Text("kept", "green") if promise.kept else Text("BROKEN", "bold red")
        table.add_row(state, Text(promise.text))
    said = {promise.text for promise in promises}
    for text in manifest.get("warnings", []):
        if text not in said:
            table.add_row(Text("warning", "yellow"), Text(str(text)))
    return table


def _refused(manifest: Mapping[str, Any]) -> Table | None:
    groups = [("plan", *group) for group in findings.grouped(manifest.get("refusals", []))]
    for name, refused in findings.passes_refusals(manifest):
        groups += [(name, reason, places) for reason, places in refused]
    groups += [("unfused", reason, places) for reason, places in findings.unfused(manifest)]
    if not groups:
        return None
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("refused by", no_wrap=True)
    table.add_column("why and where", overflow="fold")
    for source, reason, places in groups:
        named = ", ".join(places[:NAMED])
        more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
        times = f"{len(places)} × " if len(places) > 1 else ""
        why = Text.assemble(f"{times}{reason} ", (f"({named}{more})", "dim"))
        table.add_row(Text(source, "cyan"), why)
    return table
