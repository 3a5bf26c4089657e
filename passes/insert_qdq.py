"""Insert a quantize/dequantize pair at every site of a plan.

Weights: `dequantize(quantize(W))` on the constant, which `pack_weights` computes. Activations: a
static pair with the plan's range, or `dynamic_quantize`. Readers of one value with one format share
the pair. Embeddings: the rows are looked up as integers and dequantized after that, never the whole
table. A convolution's bias becomes int32 with the scale s_x · s_w, which integer accumulators add
without rounding; a weight scale too small for that is raised ("A Survey of Low-bit Large Language
Models", section 2.2; Jacob 2018, section 2.2).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler import ops
from qcompiler.op_families import CONVS, LINEAR, PADS
from qcompiler.plan import Assignment, Plan, Rounded, Site
from qcompiler.qtype import QType
from qcompiler.rewrite import Draft, following, rewrite
from qcompiler.rounding import weight_axis

aten = torch.ops.aten


@rewrite(exact=False)
def insert_qdq(draft: Draft, plan: Plan, rounded: Mapping[Site, Rounded] | None = None) -> None:
    """Quantize and dequantize at the plan's sites; `rounded` weights come as their integers."""
    rounded = rounded or {}
    nodes = {n.name: n for n in draft.graph.nodes}
    shared: dict[tuple[Node, Assignment], Node] = {}
    tables: dict[Node, tuple[Node, Node, Node]] = {}
    for site, assignment in plan.items():
        node = nodes.get(site.node)
        if node is None:
            raise ValueError(f"the plan names '{site.node}', which the program does not have")
        if site.operand == -1:
            _quantize_value(draft, node, assignment)
        elif node.target is aten.embedding.default:
            tied = [s for s in plan if _reads(nodes[s.node], s, node.args[0])]
            own = next((rounded[s] for s in tied if s in rounded), None)
            table = _quantize_table(draft, node, assignment.qtype, own)
            tables |= dict.fromkeys((nodes[s.node] for s in tied), table)
        elif site.operand == 1 and node in tables:
            kind = assignment.qtype
            axis = weight_axis(kind)
            pair = draft.call(ops.dequantize, *tables[node], axis, kind.group or 0, before=node)
            draft.set_input(node, site.operand, pair)
        elif draft.is_constant(node.args[site.operand]):
            _quantize_weight(draft, node, site, assignment.qtype, rounded.get(site))
        else:
            source = node.args[site.operand]
            assert isinstance(source, Node)
            key = (source, assignment)
            if key not in shared:
                shared[key] = _pair(draft, source, assignment, before=following(source))
            draft.set_input(node, site.operand, shared[key])
    for node in draft.calls(*CONVS):
        _quantize_bias(draft, node)
    if plan:
        draft.note(f"{len(plan)} sites quantized")


def _pair(draft: Draft, source: Node, assignment: Assignment, before: Node) -> Node:
    """Quantize → dequantize of an activation; returns the float side."""
    kind = assignment.qtype
    if kind.dynamic:
        triple = draft.call(ops.dynamic_quantize, source, str(kind), before=before, like=source)
        q, scale, zero = (
            draft.call(operator.getitem, triple, i, before=before, like=source) for i in range(3)
        )
    else:
        assert assignment.low is not None
        assert assignment.high is not None
        s, z = kind.scale_for(torch.tensor(assignment.low), torch.tensor(assignment.high))
        scale = draft.add_constant(f"{source.name}_scale", s)
        zero = draft.add_constant(f"{source.name}_zero_point", z)
        q = draft.call(
            ops.quantize, source, scale, zero, 0, 0, kind.qmin, kind.qmax,
            before=before, like=source,
        )  # fmt: skip
    return draft.call(ops.dequantize, q, scale, zero, 0, 0, before=before, like=source)


def _quantize_value(draft: Draft, node: Node, assignment: Assignment) -> None:
    readers = list(node.users)
    float_side = _pair(draft, node, assignment, before=following(node))
    for reader in readers:
        if reader.target is not aten.sym_size.int:
            reader.replace_input_with(node, float_side)


def weight_scales(weight: Tensor, kind: QType, axis: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a weight from its extremes; the shape is that of `QType.ranges`."""
    return kind.scale_for(*kind.ranges(weight, axis))


def _quantize_weight(
    draft: Draft, node: Node, site: Site, kind: QType, rounded: Rounded | None
) -> None:
    constant = node.args[site.operand]
    assert isinstance(constant, Node)
    q, s, z = _integers(draft, node, constant, "weight", kind, rounded)
    axis, group = weight_axis(kind), kind.group or 0
    draft.set_input(
        node, site.operand, draft.call(ops.dequantize, q, s, z, axis, group, before=node)
    )


def _integers(
    draft: Draft, node: Node, constant: Node, role: str, kind: QType, rounded: Rounded | None
) -> tuple[Node, Node, Node]:
    """The integers of a node's weight or table, their scale and zero point."""
    axis = weight_axis(kind)
    if rounded is None:
        scale, zero = weight_scales(draft.constant(constant), kind, axis)
    else:
        scale, zero = rounded.scale, rounded.zero_point
    s = draft.add_constant(f"{node.name}_{role}_scale", scale)
    z = draft.add_constant(f"{node.name}_{role}_zero_point", zero)
    if rounded is None:
        bounds = (kind.qmin, kind.qmax)
        q = draft.call(ops.quantize, constant, s, z, axis, kind.group or 0, *bounds, before=node)
    else:
        q = draft.add_constant(f"{node.name}_{role}_rounded", rounded.stored)
    q.meta["qtype"] = str(kind)
    return q, s, z


def _reads(node: Node, site: Site, table: Any) -> bool:
    """Whether a linear's weight is that table."""
    return site.operand == 1 and node.target is LINEAR and node.args[1] is table


def _quantize_table(
    draft: Draft, node: Node, kind: QType, rounded: Rounded | None
) -> tuple[Node, Node, Node]:
    """Look up integers; returns them with scale and zero point, for a linear that is tied."""
    table = node.args[0]
    assert isinstance(table, Node)
    q, s, z = _integers(draft, node, table, "table", kind, rounded)
    scale, group = draft.constant(s), kind.group or 0
    rows = draft.call(aten.embedding.default, q, *node.args[1:], before=node)
    # A scale for each row, or one for each group in it.
    column = draft.add_constant(f"{node.name}_row_scale", scale.reshape(len(scale), -1))
    scales = draft.call(aten.embedding.default, column, node.args[1], before=node)
    middle = draft.add_constant(
        f"{node.name}_row_zero_point", torch.full((), kind.middle, dtype=kind.dtype)
    )
    along = -1 if group else 0
    draft.swap(node, draft.call(ops.dequantize, rows, scales, middle, along, group, before=node))
    return q, s, z


def _quantize_bias(draft: Draft, node: Node) -> None:
    """int32 bias of a convolution whose input and weight are quantized with static scales."""
    bias = node.args[2] if len(node.args) > 2 else None
    data: Any = node.args[0]
    while isinstance(data, Node) and data.target in PADS:
        data = data.args[0]
    weight = node.args[1]
    pairs = [n for n in (data, weight) if isinstance(n, Node) and n.target is ops.dequantize]
    if not isinstance(bias, Node) or not draft.is_constant(bias) or len(pairs) != 2:
        return
    scales = [p.args[1] for p in pairs]
    if not all(draft.is_constant(s) for s in scales):
        return
    _widen(draft, scales[1], draft.constant(scales[0]), draft.constant(bias))
    scale = (draft.constant(scales[0]).double() * draft.constant(scales[1]).double()).float()
    s = draft.add_constant(f"{node.name}_bias_scale", scale)
    z = draft.add_constant(
        f"{node.name}_bias_zero_point", torch.zeros_like(scale, dtype=torch.int32)
    )
    low, high = -(2**31), 2**31 - 1
    q = draft.call(ops.quantize, bias, s, z, 0, 0, low, high, before=node)
    q.meta["qtype"] = "int32:channel"
    draft.set_input(node, 2, draft.call(ops.dequantize, q, s, z, 0, 0, before=node))


def _widen(draft: Draft, weight_scale: Any, input_scale: Tensor, bias: Tensor) -> None:
    """Raise the weight scales whose bias would not fit into int32.

    A channel whose weights all but vanished (a dead filter, common where a batch normalization was
    folded) has so small a scale that its bias saturates; larger steps cost such a channel nothing.
    Half of the range is kept free for bias correction.
    """
    scale = draft.constant(weight_scale)
    least = bias.double().abs() / (2**30 * input_scale.double())
    widened = torch.maximum(scale.double(), least).float()
    if not torch.equal(widened, scale):
        draft.set_constant(weight_scale, widened)
