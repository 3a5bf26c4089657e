"""Ops that write into their first operand, as ops that make a tensor.

What is written into a selected or sliced part goes back into the whole: `x[:, 0] += 1` becomes
`x' = select_scatter(x, x[:, 0] + 1, 1, 0)`, and who read `x` or its part afterwards reads `x'` or
its part. Refused: other views that are read later, and buffers, which would keep what a call wrote
for the next.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.fx import Node

from qcompiler.errors import UnsupportedError
from qcompiler.rewrite import Draft, operand, place

aten = torch.ops.aten
_BACK = {
    aten.select.int: aten.select_scatter.default,
    aten.slice.Tensor: aten.slice_scatter.default,
}


def make_functional(draft: Draft) -> None:
    """Replace every op that writes in place.

    Raises:
        UnsupportedError: for what has no such form, with the place.
    """
    for node in draft.calls():
        schema = getattr(node.target, "_schema", None)
        if (
            schema is None
            or not schema.is_mutable
            or not str(node.target).split(".")[1].endswith("_")
        ):
            continue
        target = node.args[0]
        packet, overload = str(node.target).removeprefix("aten.").split(".")
        functional = getattr(getattr(aten, packet.removesuffix("_"), None), overload, None)
        if isinstance(target, Node) and draft.is_constant(_root(target)):
            raise UnsupportedError(
                f"{place(node)} writes into '{_root(target).name}', which the model would keep for "
                "its next call; let the model take and return such a state"
            )
        if functional is None or not isinstance(target, Node):
            raise UnsupportedError(
                f"{place(node)} writes into its input in a way that has no functional form"
            )
        parts = [target]  # then what it is a part of, and so on
        while parts[-1].target in _BACK:
            parts.append(operand(parts[-1], 0))
        if _alias_is_read_later(parts, node):
            raise UnsupportedError(
                f"{place(node)} writes into a view that is read later; use the out-of-place "
                "operation in the model"
            )
        if packet in ("copy_", "fill_") and isinstance(operand(node, 1), Node):
            fresh = _spread(draft, operand(node, 1), target, node)
        else:
            options: dict[str, Any] = dict(node.kwargs)
            fresh = draft.call(functional, *node.args, before=node, **options)
            dtype = target.meta["val"].dtype
            if fresh.meta["val"].dtype != dtype:  # what is written into keeps its own
                fresh = draft.call(aten.to.dtype, fresh, dtype, before=node)
        nodes = list(draft.graph.nodes)
        later = set(nodes[nodes.index(node) + 1 :])
        value = fresh
        for part, whole in pairwise(parts):
            op: Any = part.target
            value = draft.call(_BACK[op], whole, value, *part.args[1:], before=node)
        # Parts are taken again: what is written into them next goes back into the whole, too.
        for part in reversed(parts):
            if part is not parts[-1]:
                op = part.target
                value = draft.call(op, value, *part.args[1:], before=node)
            part.replace_all_uses_with(value, delete_user_cb=later.__contains__)
        draft.swap(node, value)
        draft.graph.erase_node(node)


def _spread(draft: Draft, value: Node, target: Node, before: Node) -> Node:
    """A tensor like `target` that holds `value`, which broadcasts."""
    dtype = target.meta["val"].dtype
    if value.meta["val"].dtype != dtype:
        value = draft.call(aten.to.dtype, value, dtype, before=before)
    wide = draft.call(aten.expand_as.default, value, target, before=before)
    return draft.call(aten.clone.default, wide, before=before)


def _is_view(node: Node) -> bool:
    if getattr(node.target, "__name__", "") == "getitem":
        return _is_view(operand(node, 0))  # of several results, each a view or a tensor of its own
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    shared = (result.alias_info for result in schema.returns)
    return schema.name == "aten::dropout" or any(a is not None and not a.is_write for a in shared)


def _root(node: Node) -> Node:
    while _is_view(node):
        node = operand(node, 0)
    return node


def _alias_is_read_later(parts: list[Node], writer: Node) -> bool:
    """Whether another value that shares memory with the first of `parts` is read after the write.

    The parts themselves are followed: their later readers get the new values.
    """
    family = [_root(parts[-1])]
    for value in family:  # grows while it is read
        family += [user for user in value.users if _is_view(user) and user < writer]
    return any(user > writer for value in family if value not in parts for user in value.users)
