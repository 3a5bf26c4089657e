"""How values lie before and after they are quantized, site by site: histograms for the report.

Both histograms of a site have the same bins, from the smallest to the largest value before. Weights
of more than `SAMPLE` elements are counted in even strides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler import ops
from qcompiler.plan import Plan, Site
from qcompiler.program import Batch, Program, unpadded

BINS = 32
SAMPLE = 1 << 20


@dataclass(frozen=True)
class Distribution:
    """One site's values.

    Attributes:
        low, high: ends of the bins.
        before, after: how many values lie in each bin, in float and as quantized.
        moved: share of the values that quantization moved by more than half a bin.
    """

    low: float
    high: float
    before: tuple[int, ...]
    after: tuple[int, ...]
    moved: float


def distributions(
    floating: Program, quantized: Program, plan: Plan, batch: Batch, mask: str = ""
) -> dict[Site, Distribution]:
    """Histograms of the plan's sites, where both programs have their values.

    Args:
        floating: just before quantization.
        quantized: the same after it.
        plan: what was quantized.
        batch: real inputs.
        mask: name of the input that is 0 at padding.
    """
    sources, results = _nodes(floating), _nodes(quantized)
    wanted: dict[str, list[Site]] = {}
    made: dict[str, list[Site]] = {}
    for site in plan:
        before = _value_of(sources.get(site.node), site)
        after = _dequantized(results.get(site.node), site)
        if before is not None and after is not None:
            wanted.setdefault(before.name, []).append(site)
            made.setdefault(after.name, []).append(site)
    kept: dict[Site, Tensor] = {}
    found: dict[Site, Distribution] = {}
    present = dict(zip(floating.inputs, batch, strict=True)).get(mask)

    def remember(value: Any, sites: list[Site], present: Tensor | None) -> None:
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            kept.update(dict.fromkeys(sites, _sample(value, present).clone()))

    def compare(value: Any, sites: list[Site], present: Tensor | None) -> None:
        for site in sites:
            if isinstance(value, Tensor) and site in kept:
                sample = _sample(value, present)
                if sample.shape == kept[site].shape:
                    found[site] = _histograms(kept.pop(site), sample)

    constants = floating.constants()
    given = dict(zip(floating.inputs, batch, strict=True))
    for name, sites in wanted.items():
        if name in constants:  # no copy: it stays where it is
            kept.update(dict.fromkeys(sites, _sample(constants[name], None)))
        elif name in given:
            remember(given[name], sites, present)
    floating.run(batch, lambda node, value: remember(value, wanted.get(node.name, []), present))
    weights = {site for name in wanted if name in constants for site in wanted[name]}

    def of_quantized(node: Node, value: Any) -> None:
        sites = made.get(node.name, [])
        compare(value, sites, None if weights.issuperset(sites) else present)

    quantized.run(batch, of_quantized)
    return {site: found[site] for site in plan if site in found}


def described(
    found: Mapping[Site, Distribution], floating: Program, plan: Plan
) -> list[dict[str, Any]]:
    """For the manifest: those sites first of which most values moved."""
    constants, nodes = floating.constants(), _nodes(floating)

    def kind(site: Site) -> str:
        value = _value_of(nodes[site.node], site)
        known = site.operand != -1 and value is not None and value.name in constants
        return "weight" if known else "activation"

    rows = [
        {"node": site.node, "path": site.path, "kind": kind(site),
         "qtype": str(plan[site].qtype), **asdict(one)}
        for site, one in found.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -float(row["moved"]))


def _nodes(program: Program) -> Mapping[str, Node]:
    return {node.name: node for node in program.exported.graph.nodes}


def _value_of(node: Node | None, site: Site) -> Node | None:
    if node is None or site.operand == -1:
        return node
    value = node.args[site.operand]
    return value if isinstance(value, Node) else None


def _dequantized(node: Node | None, site: Site) -> Node | None:
    """The float side of the site's pair."""
    value = _value_of(node, site)
    if value is None or site.operand != -1:
        return value if value is not None and value.target is ops.dequantize else None
    for reader in value.users:
        for after in reader.users if reader.target is ops.quantize else ():
            if after.target is ops.dequantize:
                return after
    return None


def _sample(value: Tensor, present: Tensor | None) -> Tensor:
    """At most `SAMPLE` numbers in even strides, in the value's own memory where it is float32."""
    flat = unpadded(value.detach(), present).flatten().float()
    return flat[:: max(1, -(-flat.numel() // SAMPLE))]


def _histograms(before: Tensor, after: Tensor) -> Distribution:
    low, high = float(before.min()), float(before.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    width = (high - low) / BINS

    def counts(values: Tensor) -> tuple[int, ...]:
        bins = ((values - low) / width).long().clamp(0, BINS - 1)
        return tuple(torch.bincount(bins, minlength=BINS).tolist())

    moved = float(((after - before).abs() > width / 2).float().mean())
    return Distribution(low, high, counts(before), counts(after), moved)
