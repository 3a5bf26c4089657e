"""Measure what each format of each layer costs the model: an analysis, Program → Units.

Unit by unit, with one pass over the data: the program stands still at a unit's first layer (see
`qcompiler.stages`), its weights are rounded in every format with the Hessian of the inputs that are
there (float: what other layers lose is left out), and the rest of the program runs once for each
format with this unit alone changed. So the memory is that of one block, and a unit that was
measured before is passed over.

Units: linears that feed one fused attention and read the same tensor (query, key and value become
one product there) move together; every other linear is its own. Convolutions and embeddings keep
the recipe's format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler import ops
from qcompiler.divergence import Divergence, counting
from qcompiler.errors import InputError
from qcompiler.format import Format
from qcompiler.hessian import Hessian
from qcompiler.observe import Statistics, choose_range
from qcompiler.op_families import LINEAR, MOVES
from qcompiler.outliers import bytes_beside, round_weight
from qcompiler.plan import Rounded
from qcompiler.program import Batch, Program, unpadded
from qcompiler.qtype import QType
from qcompiler.rewrite import module_path, operand, place
from qcompiler.rounding import Factor, outlier_columns
from qcompiler.stages import Function, Stages
from qcompiler.study import Columns, Findings, Option, Settings, Unit, added, with_options

ATTENTIONS = {"qc.attention.default", "qc.cached_attention.default"}


def find_units(program: Program, fixed: Callable[[Node], bool]) -> list[Unit]:
    """The linears that may choose, with no options yet.

    Args:
        program: as it is when formats are allocated.
        fixed: whether a linear keeps the recipe's format.
    """
    constants = program.constants()
    groups: dict[Any, list[Node]] = {}
    for node in program.exported.graph.nodes:
        if node.target is not LINEAR or fixed(node) or operand(node, 1).name not in constants:
            continue
        attention = _attention(node)
        key = (operand(node, 0), attention) if attention is not None else node
        groups.setdefault(key, []).append(node)
    units = []
    for nodes in groups.values():
        weights = [constants[operand(n, 1).name] for n in nodes]
        units.append(
            Unit(
                tuple(n.name for n in nodes),
                tuple(module_path(n) for n in nodes),
                sum(w.numel() for w in weights),
                tuple((int(w.shape[0]), int(w.shape[1])) for w in weights),
                float(torch.cat([w.flatten() for w in weights]).double().var()),
            )
        )
    return units


def _attention(node: Node) -> Node | None:
    """The fused attention that alone reads a linear's output, through ops that move elements."""
    while True:
        users = list(node.users)
        if len(users) != 1:
            return None
        node = users[0]
        if str(node.target) in ATTENTIONS:
            return node
        if node.target not in MOVES:
            return None


@torch.no_grad()
def measure_sensitivity(
    program: Program,
    units: Sequence[Unit],
    formats: Sequence[Format],
    batches: Sequence[Batch],
    settings: Settings,
    findings: Findings,
    stored: Callable[[QType], int],
    mine: Iterable[int] | None = None,
    say: Callable[[str], None] = lambda text: None,
    outlier_bytes: int = 2,
) -> dict[int, Unit]:
    """The units with an option for each format: `error` and `kl`.

    Args:
        program: as it is when formats are allocated.
        units: from `find_units`, in graph order.
        formats: what to try; float is an option of every unit besides.
        batches: real data; the last `settings.trials` of them are for the divergence, all for the
            Hessian and the ranges.
        settings: how to measure.
        findings: where each unit is kept as soon as it is measured, and taken from.
        stored: bits that a weight of a type takes on the target.
        mine: indices of the units to measure; all when not given.
        say: told of each unit.
        outlier_bytes: of the value of a weight beside the grid on the target.
    """
    found = {i: findings.get(i) for i in (range(len(units)) if mine is None else mine)}
    open_ = [i for i, unit in found.items() if unit is None]
    nodes = {n.name: n for n in program.exported.graph.nodes}
    order = {name: i for i, name in enumerate(nodes)}
    if open_:
        data = list(batches)
        masks = [dict(zip(program.inputs, b, strict=True)).get(settings.mask) for b in data]
        first = len(data) - settings.trials
        with Stages(program, data, outputs=counting(settings.logits)) as stages:
            reference = Divergence(stages.outputs(first=first), masks[first:], settings.logits)
            for index in sorted(open_, key=lambda i: order[units[i].nodes[0]]):
                unit = units[index]
                say(unit.name)
                layers = [nodes[name] for name in unit.nodes]
                stages.advance(layers[0])
                unit, weights, ranges, columns = _measured(
                    program, stages, layers, unit, formats, settings, masks, reference, stored,
                    outlier_bytes,
                )  # fmt: skip
                findings.put(index, unit, weights, ranges, columns)
                found[index] = unit
    return {i: unit for i, unit in found.items() if unit is not None}


def _measured(
    program: Program,
    stages: Stages,
    layers: list[Node],
    unit: Unit,
    formats: Sequence[Format],
    settings: Settings,
    masks: list[Tensor | None],
    reference: Divergence,
    stored: Callable[[QType], int],
    outlier_bytes: int,
) -> tuple[
    Unit, dict[str, list[Rounded]], dict[str, tuple[float, float]], dict[str, list[Columns]]
]:
    constants = program.constants()
    source = operand(layers[0], 0)
    matrices = [constants[operand(n, 1).name] for n in layers]
    seen = Statistics(source.name, -1)
    if any(f.activation is not None and not f.activation.dynamic for f in formats):
        for value, mask in zip(stages.values(source), masks, strict=True):
            seen.update(unpadded(value, mask))
    try:
        found = Hessian.of(stages.values(source), masks)
    except InputError as error:
        raise InputError(f"{place(layers[0])}: {error}") from error
    hessian, unit = found.matrix, replace(unit, left_out=found.left_out)
    factor = Factor.of(hessian) if settings.gptq else None
    first = len(masks) - settings.trials
    exact = _signal(stages, layers, first, masks)
    float_bytes = 4 * unit.weights
    options = [Option("float", 32, float_bytes, {"error": 0.0, "kl": 0.0})]
    weights: dict[str, list[Rounded]] = {}
    columns: dict[str, list[Columns]] = {}
    ranges: dict[str, tuple[float, float]] = {}
    done: dict[str, tuple[list[Rounded], list[Columns]]] = {}
    for wanted in formats:
        kinds = _kinds(wanted, matrices)
        if kinds is None or wanted.outliers >= min(w.shape[1] for w in matrices):
            continue  # its groups divide no axis, or its rows are shorter
        key = f"{kinds}+{wanted.columns}~{wanted.outliers}"
        if key not in done:  # formats that differ in their activations share the weights
            kept = _outliers(matrices, kinds, hessian, wanted.columns)
            rests = [_without(w, k) for w, k in zip(matrices, kept, strict=True)]
            made = [
                _rounded(w, hessian, kind, settings, factor, wanted.outliers)
                for w, kind in zip(rests, kinds, strict=True)
            ]
            if wanted.outliers:
                kept = [_beside(r) for r in made]
            done[key] = made, kept
        rounded, kept = weights[str(wanted)], columns[str(wanted)] = done[key]
        kind = wanted.activation
        if kind is not None and not kind.dynamic:
            ranges[str(kind)] = choose_range(seen, kind, settings.calibration, settings.parameter)
        functions = {
            node: simulated(added(r.weight, k), wanted, ranges.get(str(kind)))
            for node, r, k in zip(layers, rounded, kept, strict=True)
        }
        got: dict[Node, list[Tensor]] = {node: [] for node in layers}

        def watch(node: Node, value: Any, got: dict[Node, list[Tensor]] = got) -> None:
            if node in got:
                got[node].append(value)

        divergence = reference(stages.outputs(functions, watch, first))
        signal = noise = 0.0
        for node, values in got.items():
            for value, want, mask in zip(values, exact[node], masks[first:], strict=True):
                signal += float(want.double().square().sum())
                noise += float((unpadded(value, mask) - want).double().square().sum())
        size = sum(
            _bytes(w, kind, r, stored) for w, kind, r in zip(matrices, kinds, rounded, strict=True)
        )
        if wanted.outliers:
            beside = sum(bytes_beside(*k, outlier_bytes) for k in kept)
            size += beside
            bits = wanted.bits + 8 * beside / unit.weights
        else:
            size += sum(part.numel() * part.element_size() for k in kept for part in k)
            bits = wanted.bits + 32 * sum(v.numel() for _, v in kept) / unit.weights
        measures = {"error": noise / max(signal, 1e-300), "kl": divergence}
        options.append(Option(str(wanted), bits, size, measures))
    return with_options(unit, options), weights, ranges, columns


def _kinds(wanted: Format, matrices: Sequence[Tensor]) -> list[QType | None] | None:
    """The integer format of each weight, None for bfloat16; None for all where one has none."""
    if wanted.weight is None:
        return [None] * len(matrices)
    fits = [wanted.weight.fitted(w.shape[1]) for w in matrices]
    return None if None in fits else fits


def _bytes(
    weight: Tensor, kind: QType | None, rounded: Rounded, stored: Callable[[QType], int]
) -> int:
    """Of a weight as the target stores it, scales included."""
    if kind is None:
        return 2 * weight.numel()
    return (weight.numel() * stored(kind) + 7) // 8 + kind.bytes_for(0, rounded.scale.numel())


def _outliers(
    matrices: Sequence[Tensor], kinds: Sequence[QType | None], hessian: Tensor, count: int
) -> list[Columns]:
    """The columns of each weight that stay in float; none where `count` is 0."""
    found = []
    for weight, kind in zip(matrices, kinds, strict=True):
        kept = (
            outlier_columns(weight, hessian.diagonal(), kind, count)
            if kind is not None
            else torch.arange(0)
        )
        found.append((kept, weight[:, kept].clone()))
    return found


def _without(weight: Tensor, columns: Columns) -> Tensor:
    rest = weight.clone()
    rest[:, columns[0]] = 0
    return rest


def _beside(rounded: Rounded) -> Columns:
    """The single weights beside a grid."""
    assert rounded.columns is not None
    assert rounded.values is not None
    return rounded.columns, rounded.values


def _signal(
    stages: Stages, layers: list[Node], first: int, masks: list[Tensor | None]
) -> dict[Node, list[Tensor]]:
    """What the layers give in float, for each trial batch, without padding."""
    found: dict[Node, list[Tensor]] = {}
    source = operand(layers[0], 0)
    values = list(stages.values(source))[first:]
    for node in layers:
        rest: list[Any] = [stages.constant(n) if isinstance(n, Node) else n for n in node.args[1:]]
        found[node] = [
            unpadded(torch.nn.functional.linear(x, *rest), mask)
            for x, mask in zip(values, masks[first:], strict=True)
        ]
    return found


def _rounded(
    weight: Tensor,
    hessian: Tensor,
    kind: QType | None,
    settings: Settings,
    factor: Factor | None,
    outliers: int,
) -> Rounded:
    if kind is None:
        return Rounded(weight.bfloat16(), weight.new_empty(0), weight.new_empty(0))
    return round_weight(weight, kind, hessian, factor, settings.clip, outliers)


def simulated(weight: Tensor, wanted: Format, reach: tuple[float, float] | None = None) -> Function:
    """A linear with another weight, and an input that is rounded as a format says.

    Args:
        weight: on its grid, float32.
        wanted: decides how the input is rounded.
        reach: the range that a static format covers.
    """
    linear = torch.nn.functional.linear
    activation = wanted.activation
    if wanted.narrow:
        return lambda x, _, bias=None: linear(x.bfloat16().float(), weight, bias)
    if activation is None:
        return lambda x, _, bias=None: linear(x, weight, bias)
    if reach is None:
        text = str(activation)

        def dynamic(x: Tensor, _: Any, bias: Tensor | None = None) -> Tensor:
            q, scale, zero = ops.dynamic_quantize(x, text)
            return linear(ops.dequantize(q, scale, zero, 0, 0), weight, bias)

        return dynamic
    s, z = activation.scale_for(*(torch.tensor(end) for end in reach))
    bounds = (activation.qmin, activation.qmax)

    def static(x: Tensor, _: Any, bias: Tensor | None = None) -> Tensor:
        q = ops.quantize(x, s, z, 0, 0, *bounds)
        return linear(ops.dequantize(q, s, z, 0, 0), weight, bias)

    return static
