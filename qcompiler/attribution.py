"""Where the error of a quantized program comes from.

Every place that rounds (a *source*: a weight, an activation, a cached key or value) is a
quantize/dequantize pair of the program, and can be bypassed, so that its reader gets the float
value. With L the divergence of the outputs from the float program (`qcompiler.divergence`):

    alone(s)    = L with all sources but s bypassed
    share(s)    = alone(s) / Σ alone
    interaction = L − Σ alone: what the sources do to each other; negative where errors cancel
    gain(s)     = L − L with s alone bypassed: what leaving s in float would buy

At each layer's output the noise is split into what its own weight and input add (local) and what
comes from the layers before it (inherited). Beside the noise that is measured there stands the
bound of arXiv 2411.06084, lemma 7: Π (1 + ε) − 1 with ε = ‖Ŵ − W‖ / ‖W‖ (Frobenius) of each layer
so far, which knows neither residual paths nor activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from qcompiler.divergence import Divergence, counting
from qcompiler.op_families import CONVS, LINEAR
from qcompiler.program import Batch, Program, unpadded
from qcompiler.qtype import QType
from qcompiler.rewrite import module_path
from qcompiler.sources import Site, Source, find_sources, float_biases, op_of, relative_error
from qcompiler.stages import Function, Stages

CHANGES = 5  # changes of the plan that are measured
EIGHT = 8


@dataclass(frozen=True)
class Share:
    """What one source does to the outputs; see the module."""

    source: Source
    alone: float
    share: float
    gain: float | None = None


@dataclass(frozen=True)
class LayerNoise:
    """Noise ÷ signal at one layer's output.

    Attributes:
        node, path: of the layer.
        total: in the quantized program.
        weight, activation: what its own weight and its own input add, each alone.
        inherited: the rest; 0 at least.
        bound: lemma 7's, as a ratio of norms squared.
    """

    node: str
    path: str
    total: float
    weight: float
    activation: float
    inherited: float
    bound: float


@dataclass(frozen=True)
class Change:
    """A change of the plan that would make the error smaller.

    Attributes:
        source: what is changed.
        to: the format that it gets instead.
        predicted: how much smaller the divergence is expected to be, from `alone`.
        measured: how much smaller it is with this change alone.
        settings: the recipe's fields that make the change.
    """

    source: Source
    to: str
    predicted: float
    measured: float
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Attribution:
    """The whole account.

    Attributes:
        total: divergence of the quantized program from the float one.
        shares: all sources, largest first.
        interaction: total less the sum of what the sources do alone, and less what the corrected
            biases do.
        bias: what the corrected biases take off the total; negative where they add to it.
        layers: in graph order.
        changes: those that would buy the most.
        batches: on how many batches all of this was measured.
    """

    total: float
    shares: tuple[Share, ...]
    interaction: float
    bias: float
    layers: tuple[LayerNoise, ...] = ()
    changes: tuple[Change, ...] = ()
    batches: int = 0

    def by_kind(self) -> dict[str, float]:
        """Sum of the shares of each kind."""
        found: dict[str, float] = {}
        for row in self.shares:
            found[row.source.kind] = found.get(row.source.kind, 0.0) + row.share
        return found


def attribute(
    floating: Program,
    quantized: Program,
    batches: Sequence[Batch],
    mask: str = "",
    logits: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Attribution:
    """Account for the error of `quantized`.

    Args:
        floating: the program before formats were put in.
        quantized: the same with quantize/dequantize pairs; layers keep their names.
        batches: real data.
        mask: name of the input that is 0 at padding.
        logits: whether the first output is logits.
        say: told of each source.
    """
    sites = find_sources(floating, quantized)
    masks = [dict(zip(floating.inputs, b, strict=True)).get(mask) for b in batches]
    exact = {n.name: n for n in floating.exported.graph.nodes}
    layers = [
        n for n in quantized.exported.graph.nodes
        if n.target in (LINEAR, *CONVS) and n.name in exact
    ]  # fmt: skip
    names = {n.name for n in layers}
    clean: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(node: Node, value: Any) -> None:
        if node.name in names:
            clean[node.name].append(value)

    reference = Divergence((floating.run(b, keep) for b in batches), masks, logits)
    everything = {n: f for site in sites for n, f in site.bypass.items()}
    biases = float_biases(floating, layers)

    def noise(seen: Mapping[str, list[Tensor]], name: str) -> float:
        rows = zip(seen[name], clean[name], masks, strict=True)
        pairs = [(unpadded(a, m).double(), unpadded(b, m).double()) for a, b, m in rows]
        signal = sum(float(b.square().sum()) for _, b in pairs)
        return sum(float((a - b).square().sum()) for a, b in pairs) / max(signal, 1e-300)

    def run(
        stages: Stages, functions: Mapping[Node, Function], wanted: set[str] | None = None
    ) -> tuple[float, dict[str, list[Tensor]]]:
        seen: dict[str, list[Tensor]] = {name: [] for name in wanted or ()}

        def watch(node: Node, value: Any) -> None:
            if node.name in seen:
                seen[node.name].append(value)

        return reference(stages.outputs(functions, watch)), seen

    own: dict[tuple[str, str], float] = {}  # (layer, kind) → noise of that kind alone
    alone: dict[str, float] = {}
    with Stages(quantized, batches, outputs=counting(logits)) as stages:
        total, seen = run(stages, {}, names)
        totals = {name: noise(seen, name) for name in names}
        uncorrected, _ = run(stages, biases)
        say("sources alone")
        stages.functions = {**everything, **biases}
        index = {n: i for i, n in enumerate(quantized.exported.graph.nodes)}
        for number, site in enumerate(sorted(sites, key=lambda s: index[s.start]), 1):
            say(f"source {number}/{len(sites)}")
            stages.advance(site.start)
            restored: dict[Node, Function] = {n: op_of(n) for n in site.bypass}
            readers = {n.name for n in site.readers}
            alone[site.source.node], seen = run(stages, restored, readers)
            for name in readers:
                key = (name, site.source.kind)
                own[key] = own.get(key, 0.0) + noise(seen, name)
    whole = sum(alone.values())
    ranked = sorted(sites, key=lambda s: -alone[s.source.node])
    say("changes")
    changes, gains = _changes(quantized, batches, ranked, alone, total, reference)
    shares = tuple(
        Share(
            s.source, alone[s.source.node], alone[s.source.node] / max(whole, 1e-300),
            gains.get(s.source.node),
        )
        for s in ranked
    )  # fmt: skip
    rows, product = [], 1.0
    weights = {r.name: s for s in sites for r in s.readers if s.source.kind == "weight"}
    for node in layers:
        product *= 1 + relative_error(weights.get(node.name), quantized)
        weight, activation = (own.get((node.name, k), 0.0) for k in ("weight", "activation"))
        inherited = max(0.0, totals[node.name] - weight - activation)
        rows.append(
            LayerNoise(
                node.name, module_path(exact[node.name]), totals[node.name], weight, activation,
                inherited,
                (product - 1) ** 2,
            )
        )  # fmt: skip
    bias = uncorrected - total
    return Attribution(
        total, shares, uncorrected - whole, bias, tuple(rows), tuple(changes), len(batches)
    )


def _changes(
    quantized: Program,
    batches: Sequence[Batch],
    ranked: Sequence[Site],
    alone: Mapping[str, float],
    total: float,
    reference: Divergence,
) -> tuple[list[Change], dict[str, float]]:
    """The changes that would buy the most, measured; and what float in those places would buy."""
    found, gains = [], {}
    kinds = (s.source for s in ranked if s.source.kind == "weight")
    weights = {path: source.format for source in kinds for path in source.readers}
    with Stages(quantized, batches, outputs=counting(reference.logits)) as stages:
        for site in ranked[:CHANGES]:
            gain = total - reference(stages.outputs(site.bypass))
            gains[site.source.node] = gain
            finer = _finer(site)
            if finer is None:
                settings, to = _float_settings(site.source, weights), "float"
                predicted, measured = alone[site.source.node], gain
            else:
                kind, function = finer
                to = str(kind)
                settings = {"formats": dict.fromkeys(site.source.readers, to)}
                changed = {site.start: function}
                measured = total - reference(stages.outputs(changed))
                # Noise falls with the square of the step.
                before = QType.parse(site.source.format).bits
                predicted = alone[site.source.node] * (1 - 4.0 ** (before - kind.bits))
            found.append(Change(site.source, to, predicted, measured, settings))
    return sorted(found, key=lambda change: -change.measured), gains


def _finer(site: Site) -> tuple[QType, Function] | None:
    """A weight below 8 bits in 8, rounded to nearest."""
    if site.weight is None or site.source.kind != "weight":
        return None
    kind = QType.parse(site.source.format)
    if kind.bits >= EIGHT:
        return None
    finer = QType("int8", kind.granularity, kind.group)
    weight = finer.round_trip(site.weight, 1 if finer.group else 0)
    return finer, lambda *_, w=weight: w


def _float_settings(source: Source, weights: Mapping[str, str]) -> dict[str, Any]:
    """The recipe's fields that leave a source in float; `weights`: layer → its weight's format."""
    if source.kind == "kv cache":
        return {"keys": None, "values": None}
    if source.kind == "activation":  # the layers keep their weights
        return {"formats": {path: weights[path] for path in source.readers if path in weights}}
    if not source.readers:  # an embedding, which `formats` is not about
        return {"keep_float": (source.path,)}
    return {"formats": dict.fromkeys(source.readers, "float")}
