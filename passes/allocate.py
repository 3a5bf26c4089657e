"""Decide which tensor gets which number format: an analysis, Program × Recipe × Target → Plan.

Each layer has the recipe's formats, or its own where the recipe names it.

Linears: the weight, and what the linear reads. Embeddings: the table, with a scale for each row or
for groups of it; a head that is tied to it has the same integers.
Convolutions: the weight and what it reads; ONNX Runtime's integer convolution also writes integers,
so each value between convolutions (after its ReLU or clip), residual sums and pools of such values
are quantized where they are made, once for all readers.

Left in float, with the reason: layers that the recipe keeps, weights that are computed or tied to
something else, convolutions whose output goes to float operators, what the target cannot run.
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

import torch
from torch.fx import Node

from qcompiler.errors import UnsupportedError
from qcompiler.format import FLOAT, Format
from qcompiler.history import Refusal
from qcompiler.op_families import ADDS, CONVS, EMBEDDING, LINEAR, MOVES, PADS
from qcompiler.plan import Assignment, Plan, Site
from qcompiler.program import Program
from qcompiler.qtype import QType
from qcompiler.recipe import Recipe
from qcompiler.rewrite import Draft, module_path, operand, place
from qcompiler.target import Target

aten = torch.ops.aten
CLIPS = (aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default)
POOLS = (aten.adaptive_avg_pool2d.default, aten.max_pool2d.default)


def allocate(program: Program, recipe: Recipe, target: Target) -> Plan:
    """The formats that the recipe gives, as far as the target has kernels for them.

    Raises:
        UnsupportedError: if the target has no kernel for one of the recipe's formats.
    """
    named = [Format.parse(text) for text in recipe.formats.values()]
    own = [wanted for wanted in named if str(wanted) != FLOAT]  # every target has float products
    wanted_formats = [(recipe.weight_type, recipe.activation_type, "float32", 0)]
    wanted_formats += [(f.weight, f.activation, f.products, f.outliers) for f in own]
    for weight, activation, products, outliers in wanted_formats:
        reason = target.refusal(weight, activation, recipe.cache_types, products, outliers)
        if reason:
            raise UnsupportedError(f"recipe '{recipe.name}' on target '{target}': {reason}")
    table = recipe.embedding_type
    reason = target.table_refusal(table) if table is not None else None
    if reason:
        raise UnsupportedError(f"recipe '{recipe.name}' on target '{target}': {reason}")
    draft = Draft(program)
    entries: dict[Site, Assignment] = {}
    refusals: list[Refusal] = []
    general = recipe.format.activation
    static = general is not None and not general.dynamic
    chain = _conv_chain(draft) if static else {}
    for node in draft.calls(LINEAR, EMBEDDING, *CONVS):
        wanted = recipe.format_of(module_path(node), node.name)
        for note in _on_target(wanted, target):
            if note not in refusals:
                refusals.append(note)
        weight, activation = _kernels(wanted, target)
        reason = _obstacle(draft, node, recipe, chain, activation, target)
        if reason:
            refusals.append(Refusal(place(node), f"stays float: {reason}"))
            continue
        tied = _tied_format(draft, node, weight, table)
        if node.target is EMBEDDING:
            if table is not None:
                entries[_site(node, 0)] = Assignment(tied or _fit_table(draft, node, table))
            continue
        if weight is None:
            continue
        fitted = tied or _fit(draft, node, weight)
        if tied is not None and tied != weight:
            refusals.append(
                Refusal(place(node), f"{tied} instead of {weight}: its weight is the embedding")
            )
        elif fitted != weight and fitted is not None:
            refusals.append(
                Refusal(place(node), f"{weight} does not divide its weight; {fitted} instead")
            )
        if fitted is None:
            refusals.append(
                Refusal(place(node), f"stays float: its weight has no groups for {weight}")
            )
            continue
        if wanted.outliers and (node.target is not LINEAR or len(_matrix(node).users) > 1):
            why = "its weight has other readers" if node.target is LINEAR else "it is no linear"
            refusals.append(
                Refusal(place(node), f"keeps none of its weights beside {fitted}: {why}")
            )
        entries[_site(node, 1)] = Assignment(fitted)
        source = node.args[0]
        if activation is not None and not _is_quantized(source, entries):
            reader = source if isinstance(source, Node) and source.target in PADS else node
            entries[_site(reader, 0)] = Assignment(activation)
        if node.target in CONVS and activation is not None:
            for value in chain.get(node, ()):
                entries[_site(value, -1)] = Assignment(activation)
    for node in draft.calls(aten.bmm.default, aten.matmul.default):
        if recipe.weight_type is not None and _are_experts(draft, node):
            reason = "stays float: its weights are those of experts that are chosen when it runs"
            refusals.append(Refusal(place(node), reason))
    if general is not None and static:
        _join(draft, entries, general, chain)
    order = {n.name: i for i, n in enumerate(program.exported.graph.nodes)}
    ordered = dict(sorted(entries.items(), key=lambda e: (order[e[0].node], e[0].operand)))
    return Plan(ordered, tuple(refusals))


def _kernels(wanted: Format, target: Target) -> tuple[QType | None, QType | None]:
    """The formats of a weight and of what it reads, as the target's kernels take them."""
    weight, activation = wanted.weight, wanted.activation
    if target.quantizes_itself(weight, activation):
        return weight, None
    if weight is not None and activation is not None and target.saturates:
        weight = replace(weight, reduced=True)
    return weight, activation


def _on_target(wanted: Format, target: Target) -> list[Refusal]:
    """What the target does otherwise than a format says."""
    weight, notes = wanted.weight, []
    if target.quantizes_itself(weight, wanted.activation):
        reason = f"'{target}' quantizes what {weight} weights read to int8 itself, block by block"
        notes.append(Refusal("all activations", reason))
    if weight is not None and target.stored_bits(weight) != weight.bits:
        stored = f"{weight}: '{target}' stores each weight in {target.stored_bits(weight)} bits"
        notes.append(Refusal("all weights", stored))
    return notes


def _site(node: Node, operand: int) -> Site:
    return Site(node.name, operand, module_path(node))


def _obstacle(
    draft: Draft,
    node: Node,
    recipe: Recipe,
    chain: dict[Node, list[Node]],
    activation: QType | None,
    target: Target,
) -> str | None:
    path = module_path(node)
    if any(fnmatch(path, pattern) for pattern in recipe.keep_float):
        return "the recipe keeps it"
    table = _matrix(node)
    if not draft.is_constant(table):
        return "its weight is computed"
    if len(table.users) > 1 and {u.target for u in table.users} != {node.target}:
        others = [u for u in table.users if u is not node]
        kept = any(
            fnmatch(module_path(u), pattern) for u in others for pattern in recipe.keep_float
        )
        foreign = {u.target for u in table.users} != {EMBEDDING, LINEAR}
        if node.target is EMBEDDING and (kept or foreign or recipe.weight_type is None):
            return f"its table is tied to {place(others[0])}"
    if node.target in CONVS and activation is not None:
        if activation.dynamic:
            return "ONNX Runtime has no fast convolution with dynamic ranges"
        if node not in chain and target.runtime == "ort":
            return "its output goes to float operators, and the integer convolution writes integers"
    return None


def _tied_format(
    draft: Draft, node: Node, weight: QType | None, table: QType | None
) -> QType | None:
    """The one format of a table that embeddings and linears share; None for other weights.

    Its rows are the linear's output channels, so the scales of a row serve both.
    """
    constant = _matrix(node)
    if weight is None or table is None or {u.target for u in constant.users} != {EMBEDDING, LINEAR}:
        return None
    fits = (weight.bits, weight.granularity, weight.symmetric) == (8, "channel", True)
    return weight if fits else _fit_table(draft, node, table)


def _are_experts(draft: Draft, product: Node) -> bool:
    """Whether an operand of a product is picked from a stack of constant matrices."""
    for source in product.args[:2]:
        while isinstance(source, Node) and source.target in (*MOVES, aten.index.Tensor):
            source = source.args[0]
        if draft.is_constant(source) and draft.constant(source).ndim == 3:
            return True
    return False


def _fit(draft: Draft, node: Node, weight: QType) -> QType | None:
    """The format with the largest group that divides the layer's input features.

    The group is not above the wanted one.
    """
    if weight.group is None:
        return weight
    if node.target in CONVS:
        return QType("int8", "channel")
    return weight.fitted(draft.constant(_matrix(node)).shape[1])


def _fit_table(draft: Draft, node: Node, table: QType) -> QType:
    """The format of a table, with a scale for each row in 8 bits where no group divides it."""
    return _fit(draft, node, table) or QType("int8", "channel")


def _matrix(node: Node) -> Node:
    """The weight of a linear, or the table of an embedding."""
    matrix: Node = operand(node, 0 if node.target is EMBEDDING else 1)
    return matrix


def _final(node: Node) -> Node:
    """The value after the ReLU or clip that alone reads `node`."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in CLIPS else node


def _conv_chain(draft: Draft) -> dict[Node, list[Node]]:
    """Convolutions whose output stays among integer ops, each with the values to quantize.

    These are its own, after the clip.
    """
    values: dict[Node, Node] = {}  # value → the convolution, sum or pool that makes it
    for node in draft.calls():
        if node.target in CONVS or (
            node.target in ADDS and all(a in values for a in node.args[:2])
        ):
            values[_final(node)] = node
        elif node.target in POOLS and node.args[0] in values:
            values[node] = node
    good = {
        value
        for value in values
        if any(u.target in (*CONVS, *ADDS, *POOLS, *PADS) for u in value.users)
        or (
            any(u.target in (LINEAR, *MOVES) for u in value.users) and values[value].target in POOLS
        )
    }
    return {
        maker: [value] for value, maker in values.items() if value in good and maker.target in CONVS
    }


def _join(
    draft: Draft, entries: dict[Site, Assignment], activation: QType, chain: dict[Node, list[Node]]
) -> None:
    """Quantize sums and pools of quantized values as well.

    Then no convolution meets a float in between.
    """
    if not chain:
        return
    for node in draft.calls(*ADDS, *POOLS):
        operands = node.args[:2] if node.target in ADDS else node.args[:1]
        if all(isinstance(a, Node) and _site(a, -1) in entries for a in operands):
            entries[_site(_final(node), -1)] = Assignment(activation)
    for site in [s for s in entries if s.operand == 0]:
        node = next(n for n in draft.graph.nodes if n.name == site.node)
        if _is_quantized(node.args[0], entries):
            del entries[site]


def _is_quantized(source: Any, entries: dict[Site, Assignment]) -> bool:
    """Whether a value is already quantized where it is made.

    Data movement and padding are seen through.
    """
    while isinstance(source, Node):
        if _site(source, -1) in entries:
            return True
        if source.target not in MOVES and source.target not in PADS:
            return False
        source = source.args[0]
    return False
