"""What a manifest says, in the words and numbers that the report and the terminal share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

IDENTICAL_DB = 200.0  # stands in manifests for tensors that do not differ at all
MISSING = "–"
PRODUCTS = ("matmul", "gemm", "conv")  # what the names of operators with weights contain

INNER = "present."  # outputs that are a state: a recipe's bound is not about them
Manifest = Mapping[str, Any]
Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Promise:
    """Something that the compiler vouches for, and whether it holds."""

    text: str
    kept: bool


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits, without an exponent where it is of handy size."""
    if value is None or math.isnan(value):
        return MISSING
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -3 or magnitude > 6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.{max(0, digits - 1 - magnitude)}f}"


def decibels(value: float | None) -> str:
    """An SQNR: "38.2 dB", or "identical"."""
    if value is None or math.isnan(value):
        return MISSING
    return "identical" if value >= IDENTICAL_DB else f"{value:.1f} dB"


def size(count: float | None) -> str:
    """Bytes as kB, MB or GB (powers of ten)."""
    if count is None:
        return MISSING
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{number(count / scale)} {unit}"
    return f"{count:.0f} bytes"


def milliseconds(value: float | None) -> str:
    """A running time: "7.21 ms"."""
    return MISSING if value is None else f"{number(value)} ms"


def seconds(value: float | None) -> str:
    """A waiting time: "0.41 s", "2 min 5 s"."""
    if value is None:
        return MISSING
    if value < 0.005:
        return "0 s"
    if value < 99.5:
        return f"{value:.1f} s" if value >= 9.95 else f"{value:.2f} s"
    return f"{int(value + 0.5) // 60} min {int(value + 0.5) % 60} s"


def percent(share: float) -> str:
    """A share of one: "36 %", "0.4 %"."""
    return f"{share * 100:.0f} %" if share >= 0.0995 else f"{share * 100:.1f} %"


def count(items: int, one: str, many: str = "") -> str:
    """`3 layers`, `1 layer`."""
    return f"{items} {one if items == 1 else many or one + 's'}"


def shape(sizes: Iterable[Any]) -> str:
    """`batch × 128`; "scalar" without sizes."""
    return " × ".join(str(part) for part in sizes) or "scalar"


def grouped(refusals: Rows) -> list[tuple[str, list[str]]]:
    """Refusals as reason → places, in order of first appearance."""
    groups: dict[str, list[str]] = {}
    for refusal in refusals:
        groups.setdefault(str(refusal["reason"]), []).append(str(refusal["where"]))
    return list(groups.items())


def passes_refusals(manifest: Manifest) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Each pass that refused something, with its reasons and places."""
    return [
        (str(entry["name"]), grouped(entry["refusals"]))
        for entry in manifest.get("history", [])
        if entry.get("refusals")
    ]


def unfused(manifest: Manifest) -> list[tuple[str, list[str]]]:
    """Layers that run in float, as reason → names."""
    layers = manifest.get("audit", {}).get("layers", [])
    return grouped(
        {"where": place(layer), "reason": layer.get("reason") or "no reason found"}
        for layer in layers
        if layer["kernel"] == "float"
    )


def place(entry: Mapping[str, Any]) -> str:
    """The module path where there is one, or else the node's name."""
    for key in ("path", "tensor", "node", "name", "site"):
        if entry.get(key):
            return str(entry[key])
    return MISSING


def worst(manifest: Manifest, kind: str, data: str | None = None) -> Mapping[str, Any] | None:
    """The row with the lowest SQNR of the "quantization" or "lowering" errors."""
    rows = [
        row
        for row in manifest.get("errors", {}).get(kind, [])
        if data is None or row["data"] == data
    ]
    if kind == "quantization":  # a state is judged by what is made of it
        rows = [row for row in rows if not str(row["output"]).startswith(INNER)] or rows
    return min(rows, key=lambda row: float(row["sqnr_db"]), default=None)


def kernels(manifest: Manifest) -> dict[str, int]:
    """How many layers run on which kind of kernel."""
    counts: dict[str, int] = {}
    for layer in manifest.get("audit", {}).get("layers", []):
        counts[layer["kernel"]] = counts.get(layer["kernel"], 0) + 1
    return counts


def time_sentence(manifest: Manifest) -> str:
    """Where the running time goes, or "" where it was not measured."""
    audit = manifest.get("audit", {})
    shares = [(str(row["op"]), float(row["share"])) for row in audit.get("time_share") or []]
    if not shares:
        return ""
    products = sum(share for op, share in shares if is_product(op))
    rest = sorted((row for row in shares if not is_product(row[0])), key=lambda row: -row[1])
    named = ", ".join(f"{op} {percent(share)}" for op, share in rest[:4] if share >= 0.005)
    speedup = audit.get("linear_speedup")
    start = (
        f"Matrix products and convolutions alone run {number(speedup, 2)} times faster than in "
        f"float and take {percent(products)} of the time"
        if speedup
        else f"Matrix products and convolutions take {percent(products)} of the running time"
    )
    return f"{start}; the rest goes to {named}." if named else f"{start}."


def is_product(op: str) -> bool:
    """Whether an operator's name is that of a matrix product or convolution."""
    return any(part in op.lower() for part in PRODUCTS)


def promises(manifest: Manifest) -> list[Promise]:
    """Everything that was promised and can be read off the manifest's numbers."""
    found: list[Promise] = []
    checked = [
        entry
        for entry in manifest.get("history", [])
        if entry.get("residual") is not None and entry.get("bound") is not None
    ]
    over = [str(entry["name"]) for entry in checked if entry["residual"] > entry["bound"]]
    if over:
        found.append(Promise(f"{', '.join(over)} moved the numbers beyond float rounding", False))
    elif checked:
        text = f"{count(len(checked), 'exact pass', 'exact passes')} within float rounding"
        found.append(Promise(text, True))
    bounds = manifest.get("bounds", {})
    for kind, data, key, what in (
        ("quantization", "held-out", "min_sqnr", "quantization error on held-out data"),
        ("lowering", None, "min_lowering_sqnr", "lowering error"),
    ):
        row, bound = worst(manifest, kind, data), bounds.get(key)
        if row is not None and bound is not None:
            kept = float(row["sqnr_db"]) >= bound
            relation = "at least" if kept else "below"
            value = decibels(row["sqnr_db"])
            found.append(Promise(f"{what}: {value}, {relation} {decibels(bound)}", kept))
    audit = manifest.get("audit")
    if audit:
        found += [Promise(str(text), False) for text in audit.get("broken", [])]
        if not audit.get("broken"):
            kinds = ", ".join(f"{n} {kind}" for kind, n in kernels(manifest).items())
            text = "every layer runs on the kernel that was planned"
            found.append(Promise(f"{text}: {kinds or 'there are none'}", True))
    return found
