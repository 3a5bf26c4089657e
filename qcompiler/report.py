"""report.html: everything a manifest says, as one page that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcompiler import charts, findings, mixed_report, report_formats
from qcompiler.charts import Bar
from qcompiler.findings import count, decibels, milliseconds, number, place, size
from qcompiler.page import Html, code, document, folded, join, pill, section, table, tag

QUANTIZATION = (
    "The artifact, as it runs, beside the model as it was captured, in float: what quantizing "
    "cost. It is expected, and the recipe bounds it."
)
LOWERING = (
    "The artifact, as it runs, beside the quantized program computed step by step: what the "
    "runtime's kernels add. It should be rounding only; a low value here is a fault of the "
    "lowering and says nothing about the number formats."
)
KERNELS = {"integer": "good", "float8": "good", "float": "mild", "weights only": "plain",
           "bfloat16": "plain"}  # fmt: skip


def render(manifest: Mapping[str, Any]) -> str:
    """The report of an artifact as one HTML page.

    Args:
        manifest: the content of `manifest.json`. Parts that it lacks are left out.

    Returns:
        A page without links to other files, and with no script but the one that sorts tables; the
        manifest's text is escaped.
    """
    parts = [
        ("passes", "Passes", _passes(manifest)),
        ("layers", "Error by layer", report_formats.sites(manifest)),
        ("ranges", "Activation ranges", report_formats.ranges(manifest)),
        ("distributions", "Values before and after", report_formats.distributions(manifest)),
        ("speed", "Size and latency", _speed(manifest)),
        ("audit", "Fusion audit", _audit(manifest)),
        ("errors", "Errors", _errors(manifest)),
        ("smoothing", "Smoothing", report_formats.smoothing(manifest)),
        (
            "mixed",
            "Mixed precision",
            mixed_report.mixed(manifest.get("mixed", {}), manifest.get("latency") or ()),
        ),
        (
            "explanation",
            "Where the error comes from",
            mixed_report.account(manifest.get("explanation", {})),
        ),
        ("plan", "Plan", report_formats.plan(manifest)),
        ("refusals", "Refusals", report_formats.refusals(manifest)),
        ("origin", "How it was made", _origin(manifest)),
    ]
    present = [(anchor, title, content) for anchor, title, content in parts if content]
    links = [tag("a", title, href=f"#{anchor}") for anchor, title, _ in present]
    name = str(manifest.get("name", "model"))
    return document(
        f"{name} · {_recipe(manifest)} · {manifest.get('target', '')}",
        _header(manifest, name),
        _tiles(manifest),
        section("promises", "Promises", _promises(manifest)),
        tag("nav", *links, aria_label="Parts of this report"),
        tag("main", *(section(*part) for part in present)),
        tag("footer", f"Written by qcompiler {manifest.get('versions', {}).get('qcompiler', '')}."),
    )


def _recipe(manifest: Mapping[str, Any]) -> str:
    return str(manifest.get("recipe", {}).get("name", "custom"))


def _header(manifest: Mapping[str, Any], name: str) -> Html:
    what = [
        "compiled for ",
        code(manifest.get("target", "?")),
        " with recipe ",
        code(_recipe(manifest)),
    ]
    created = str(manifest.get("created", "")).replace("T", " ").replace("+00:00", " UTC")
    return tag(
        "header",
        tag("h1", name),
        tag("p", *what, f" · {created}" if created else None, class_="soft"),
    )


def _tile(title: str, value: str, *notes: str | None) -> Html:
    small = [tag("small", note) for note in notes if note]
    return tag("div", tag("span", title), tag("strong", value), *small, class_="tile")


def _tiles(manifest: Mapping[str, Any]) -> Html:
    tiles = []
    sizes = manifest.get("size")
    if sizes:
        share = sizes["model_bytes"] / sizes["float_bytes"] if sizes["float_bytes"] else 0.0
        note = f"{number(share, 2)} of the float model's {size(sizes['float_bytes'])}"
        tiles.append(_tile("Size", size(sizes["model_bytes"]), note))
    for row in manifest.get("latency", [])[:1]:
        tiles.append(
            _tile(
                "Latency, float = 1",
                number(row["ratio"]),
                f"{milliseconds(row['quantized_ms'])} beside {milliseconds(row['float_ms'])}",
                f"{row['shape']}, {count(row['threads'], 'thread')}",
            )
        )
    row = findings.worst(manifest, "quantization", "held-out")
    if row:
        bound = manifest.get("bounds", {}).get("min_sqnr")
        tiles.append(
            _tile(
                "SQNR on held-out data",
                decibels(row["sqnr_db"]),
                f"lowest output: {row['output']}",
                None if bound is None else f"the recipe demands {decibels(bound)}",
            )
        )
    metric = manifest.get("metric")
    if metric:
        change = metric["quantized"] - metric["float"]
        note = f"float: {number(metric['float'], 4)} ({change:+.4f})".replace("-", "−")
        tiles.append(_tile(str(metric["name"]), number(metric["quantized"], 4), note))
    kernels = findings.kernels(manifest)
    if kernels:
        value = f"{sum(kernels.values()) - kernels.get('float', 0)} of {sum(kernels.values())}"
        kinds = ", ".join(f"{n} {kind}" for kind, n in kernels.items())
        tiles.append(_tile("Layers quantized", value, kinds))
    return tag("div", *tiles, class_="tiles")


def _promises(manifest: Mapping[str, Any]) -> Html:
    promises = findings.promises(manifest)
    said = {promise.text for promise in promises}
    marks = [
        tag("li", pill("kept", "good") if p.kept else pill("broken", "bad"), tag("span", p.text))
        for p in promises
    ]
    marks += [
        tag("li", pill("warning", "mild"), tag("span", text))
        for text in manifest.get("warnings", [])
        if text not in said
    ]
    return tag("ul", *marks, class_="marks")


def _passes(manifest: Mapping[str, Any]) -> Html | None:
    history = manifest.get("history")
    if not history:
        return None
    rows = []
    for entry in history:
        residual, bound = entry.get("residual"), entry.get("bound")
        if residual is None or bound is None:
            unchecked = entry["exact"] and entry["changed"]
            state = pill("not checked", "plain") if unchecked else None
        else:
            state = pill("kept", "good") if residual <= bound else pill("broken", "bad")
        notes = list(entry.get("notes", []))
        if not notes and not entry["changed"]:
            notes = ["nothing to do"]
        refused = len(entry.get("refusals", []))
        rows.append(
            [
                code(entry["name"]),
                "exact" if entry["exact"] else "approximate",
                number(residual),
                number(bound),
                state,
                tag("ul", *(tag("li", note) for note in notes)),
                tag("a", refused, href="#refusals") if refused else "0",
                findings.seconds(entry.get("seconds")),
            ]
        )
    lead = (
        "An exact pass claims to compute the same function. The claim is checked on calibration "
        "batches: the residual, ‖new − old‖ / ‖old‖ of the outputs, must stay under what float "
        "rounding explains."
    )
    head = ["Pass", "Claim", "Residual", "Bound", "", "What it did", "Refusals", "Time"]
    held = manifest.get("memory", {})
    steps = [
        [name, findings.seconds(value), size(held[name]) if held.get(name) else ""]
        for name, value in manifest.get("seconds", {}).items()
    ]
    step_table = table(["Step", "Time", "Memory, at most"], steps, "steps", "-nn")
    return join(
        [
            tag("p", lead, class_="soft"),
            table(head, rows, "passes", "--nn--nn"),
            folded("Time and memory of each step", step_table) if steps else None,
        ]
    )


def _speed(manifest: Mapping[str, Any]) -> Html | None:
    parts: list[Html] = []
    sizes = manifest.get("size")
    latency = manifest.get("latency") or []
    if sizes or latency:
        parts.append(charts.legend({"pale": "float", "mark": "quantized"}))
    if sizes:
        pair = [
            Bar("pale", sizes["float_bytes"], size(sizes["float_bytes"])),
            Bar("mark", sizes["model_bytes"], size(sizes["model_bytes"])),
        ]
        parts += [
            tag("h3", "Size of the model file"),
            charts.bars([("with its weights", pair)], "size"),
        ]
    if latency:
        rows = []
        for row in latency:
            spread = f"{number(row['ratio'])} of float ({number(row['low'])}–{number(row['high'])})"
            title = [
                f"{row['shape']}, {count(row['threads'], 'thread')}",
                tag("div", spread, class_="soft"),
            ]
            pair = [
                Bar("pale", row["float_ms"], milliseconds(row["float_ms"])),
                Bar("mark", row["quantized_ms"], milliseconds(row["quantized_ms"])),
            ]
            rows.append((join(title), pair))
        caption = (
            "Median time of one call; in brackets the quartiles of the ratio. Float is the same "
            "graph in float32 on the same runtime, measured in turns with the quantized model. "
            "Each pair has its own scale."
        )
        parts += [
            tag("h3", "Latency"),
            tag("figure", charts.bars(rows, "latency", alone=True), tag("figcaption", caption)),
        ]
    shares = manifest.get("audit", {}).get("time_share") or []
    if shares:
        bars = [
            (
                code(row["op"]),
                [Bar("mark" if findings.is_product(row["op"]) else "pale", row["share"],
                     findings.percent(row["share"]))],
            )
            for row in shares
        ]  # fmt: skip
        parts += [
            tag("h3", "Where the time goes"),
            tag("p", findings.time_sentence(manifest), class_="soft"),
            charts.legend({"mark": "matrix products and convolutions", "pale": "the rest"}),
            charts.bars(bars[:10], "share of the running time"),
        ]
        if len(bars) > 10:
            parts.append(
                folded(f"{len(bars) - 10} more operators", charts.bars(bars[10:], "share"))
            )
    return join(parts) if parts else None


def _audit(manifest: Mapping[str, Any]) -> Html | None:
    audit = manifest.get("audit")
    if not audit:
        return None
    rows = [
        [
            code(place(layer)),
            tag("code", layer["op"]),
            pill(layer["kernel"], KERNELS.get(layer["kernel"], "plain")),
            layer.get("reason", ""),
        ]
        for layer in audit.get("layers", [])
    ]
    stray = int(audit.get("stray", 0))
    good = "good" if stray == 0 else "mild"
    loose = "Quantize/Dequantize nodes that stayed unfused"
    kernels = sorted(audit.get("kernels", {}).items(), key=lambda item: -item[1])
    lead = (
        "What the runtime really runs, read from its optimised graph: every matrix product and "
        "convolution, with the reason where its kernel is not integer."
    )
    full = table(["Layer", "Operator", "Kernel", "Why"], rows, "layers and their kernels")
    if len(rows) > report_formats.FOLD:
        # What needs attention comes first, layers with one reason together, in graph order.
        alike: dict[tuple[str, str, str], list[list[Any]]] = {}
        for layer, row in zip(audit.get("layers", []), rows, strict=True):
            if row[3]:
                alike.setdefault((layer["op"], layer["kernel"], row[3]), []).append(row)
        notable = [
            [join([of[0][0], f" and {len(of) - 1} more" if of[1:] else None]), *of[0][1:]]
            for of in alike.values()
        ]
        attention = (
            table(["Layer", "Operator", "Kernel", "Why"], notable, "layers not on integer kernels")
            if notable
            else None
        )
        full = join([attention, folded(f"All {len(rows)} layers", full)])
    every = table(
        ["Operator", "Count"], [[tag("code", k), n] for k, n in kernels], "operators", "-n"
    )
    return join(
        [
            tag("p", lead, class_="soft"),
            tag("p", pill(str(stray), good), f" {loose}"),
            full,
            folded(f"All {sum(n for _, n in kernels)} operators that run", every)
            if kernels
            else None,
        ]
    )


def _errors(manifest: Mapping[str, Any]) -> Html | None:
    errors = manifest.get("errors")
    if not errors:
        return None
    parts: list[Html] = []
    for kind, title, text, key in (
        ("quantization", "Quantization error", QUANTIZATION, "min_sqnr"),
        ("lowering", "Lowering error", LOWERING, "min_lowering_sqnr"),
    ):
        rows = [
            [code(r["output"]), r["data"], decibels(r["sqnr_db"]), f"{r['cosine']:.6f}",
             f"{r['lowest_cosine']:.6f}"]
            for r in errors.get(kind, [])
        ]  # fmt: skip
        bound = manifest.get("bounds", {}).get(key)
        demanded = None if bound is None else tag("p", f"Bound: {decibels(bound)}.", class_="soft")
        head = ["Output", "Data", "SQNR", "Mean cosine", "Lowest cosine"]
        parts += [
            tag("h3", title),
            tag("p", text, class_="soft"),
            table(head, rows, title, "--nnn"),
        ]
        parts += [demanded] if demanded else []
    metric = manifest.get("metric")
    if metric:
        row = [metric["name"], number(metric["float"], 4), number(metric["quantized"], 4)]
        head = ["Metric", "Float", "Quantized"]
        parts += [tag("h3", "The task's metric"), table(head, [row], "metric", "-nn")]
    return join(parts)


def _origin(manifest: Mapping[str, Any]) -> Html:
    machine = manifest.get("machine", {})
    facts = [["Machine", f"{machine.get('cpu', '?')}, {count(machine.get('cores', 1), 'core')}"]]
    if machine.get("feature"):
        facts.append(["Its kernels", machine["feature"]])
    if manifest.get("peak_memory_bytes"):
        facts.append(["Peak memory", size(manifest["peak_memory_bytes"])])
    for kind in ("inputs", "outputs"):
        for entry in manifest.get(kind, []):
            text = f"{entry['dtype']}, {findings.shape(entry['shape'])}"
            facts.append([kind.capitalize()[:-1], join([code(entry["name"]), f" {text}"])])
    versions = list(manifest.get("versions", {}).items())
    recipe = [[code(key), _setting(value)] for key, value in manifest.get("recipe", {}).items()]
    return join(
        [
            tag("p", "This command makes it again:", class_="soft")
            if manifest.get("command")
            else None,
            tag("pre", manifest["command"]) if manifest.get("command") else None,
            table(["What", "Value"], facts, "machine, inputs and outputs"),
            tag("h3", "Versions"),
            table(["Package", "Version"], versions, "versions"),
            folded("All settings of the recipe", table(["Setting", "Value"], recipe, "recipe")),
        ]
    )


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or findings.MISSING
    return findings.MISSING if value is None else str(value)
