"""Linears that read one tensor become one linear, and slices of its output.

    [x W₁ᵀ + b₁ ; x W₂ᵀ + b₂ ; …] = x [W₁ ; W₂ ; …]ᵀ + [b₁ ; b₂ ; …]

One larger matrix product keeps the multipliers busier than several small ones, and the input is
quantized and packed once (query, key and value; gate and up). Where only some of the linears have
a bias, the others are given zeros.

Refused: linears whose weights have other readers (they would be stored twice).
"""

from __future__ import annotations

import torch
from torch.fx import Node

from qcompiler.op_families import LINEAR
from qcompiler.rewrite import Draft, operand, place, rewrite

aten = torch.ops.aten


@rewrite(exact=True)
def merge_linears(draft: Draft) -> None:
    """Merge the linears that share an input."""
    groups: dict[Node, list[Node]] = {}
    for node in draft.calls(LINEAR):
        weight = operand(node, 1)
        if not draft.is_constant(weight):
            continue
        if len(weight.users) > 1:
            draft.refuse(node, f"the weight {place(weight)} has another reader")
            continue
        if any(b is not None and not draft.is_constant(b) for b in node.args[2:]):
            draft.refuse(node, "its bias is computed")
            continue
        groups.setdefault(operand(node, 0), []).append(node)
    merged = 0
    for source, members in groups.items():
        if len(members) > 1:
            _merge(draft, source, members)
            merged += len(members)
    if merged:
        draft.note(f"{merged} linears became {sum(len(m) > 1 for m in groups.values())}")


def _merge(draft: Draft, source: Node, members: list[Node]) -> None:
    first = members[0]
    weights = [draft.constant(m.args[1]) for m in members]
    sizes = [w.shape[0] for w in weights]
    weight = draft.add_constant(f"{first.name}_merged_weight", torch.cat(weights))
    biases = [m.args[2] if len(m.args) > 2 else None for m in members]
    bias = None
    if any(b is not None for b in biases):
        rows = [
            draft.constant(b) if isinstance(b, Node) else w.new_zeros(w.shape[0])
            for b, w in zip(biases, weights, strict=True)
        ]
        bias = draft.add_constant(f"{first.name}_merged_bias", torch.cat(rows))
    whole = draft.call(LINEAR, source, weight, bias, before=first)
    axis, start = whole.meta["val"].ndim - 1, 0
    for member, size in zip(members, sizes, strict=True):
        part = draft.call(
            aten.slice.Tensor, whole, axis, start, start + size, before=first, like=member
        )
        draft.swap(member, part)
        start += size
