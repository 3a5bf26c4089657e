"""Join head split, scaled dot-product attention and head merge into one `qc::attention`.

    transpose(sdpa(split(q), split(k), split(v), mask, scale))·merge
        =  attention(q, k, v, mask, heads, kv_heads, scale)

where split is (batch, sequence, heads · size) → (batch, heads, sequence, size). Runtimes have one
kernel for the whole, which saves the transposes. Grouped key/value heads repeated by expand and
reshape are taken as such.

Refused: attention with dropout, with an interleaved head layout, or whose heads are read by
something else on the way.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler import ops
from qcompiler.op_families import SDPA, concrete_shape
from qcompiler.rewrite import Draft, operand, rewrite

aten = torch.ops.aten
_RESHAPES = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default,
    aten.flatten.using_ints, aten.unflatten.int,
)  # fmt: skip
_TRANSPOSES = (aten.transpose.int, aten.permute.default)


@rewrite(exact=True)
def fuse_attention(draft: Draft) -> None:
    """Replace each attention over split heads by `qc::attention`."""
    count = 0
    for node in draft.calls(SDPA):
        reason = _fuse(draft, node)
        if reason:
            draft.refuse(node, reason)
        else:
            count += 1
    if count:
        draft.note(f"{count} attentions fused")


def _fuse(draft: Draft, node: Node) -> str | None:
    query, key, value = (operand(node, i) for i in range(3))
    names = ("attn_mask", "dropout_p", "is_causal")
    options = dict(zip(names, node.args[3:], strict=False)) | dict(node.kwargs)
    if options.get("dropout_p"):
        return "it has dropout"
    heads = concrete_shape(query)[1]
    inputs = [_merged(n) for n in (query, key, value)]
    missing = [name for name, n in zip(("query", "key", "value"), inputs, strict=True) if n is None]
    if missing:
        return (
            f"the {missing[0]} is not the split of a (batch, sequence, channels) tensor into heads"
        )
    (q, _), (k, kv_heads), (v, v_heads) = (n for n in inputs if n is not None)
    if kv_heads != v_heads or heads % kv_heads:
        return f"{heads} query, {kv_heads} key and {v_heads} value heads"
    final = _merge(node)
    if final is None:
        return "its heads are read by something else than their merge"
    size = concrete_shape(query)[-1]
    scale = options.get("scale")
    mask = options.get("attn_mask")
    fused = draft.call(
        ops.attention, q, k, v, mask, heads, kv_heads,
        1 / math.sqrt(size) if scale is None else scale, bool(options.get("is_causal", False)),
        before=node,
    )  # fmt: skip
    # The merge may order its sizes by other symbols than the fused op infers; they are equal.
    draft.swap(final, fused)
    return None


def _is_swap(node: Any) -> bool:
    """Whether the node exchanges axes 1 and 2 of four."""
    if not isinstance(node, Node) or node.target not in _TRANSPOSES or node.meta["val"].ndim != 4:
        return False
    if node.target is aten.permute.default:
        return list(operand(node, 1)) == [0, 2, 1, 3]
    return sorted(int(operand(node, i)) % 4 for i in (1, 2)) == [1, 2]


def _merged(node: Any) -> tuple[Node, int] | None:
    """The (batch, sequence, channels) tensor that `node` splits into heads, and their number.

    The number is that before any repetition.
    """
    node = _before_repeat(node)
    if not _is_swap(node):
        return None
    split = node.args[0]
    if not isinstance(split, Node) or split.target not in _RESHAPES:
        return None
    whole = operand(split, 0)
    shape, before = split.meta["val"].shape, whole.meta["val"].shape
    if len(before) != 3 or len(shape) != 4 or str(shape[1]) != str(before[1]):
        return None
    return whole, int(shape[2])


def _before_repeat(node: Any) -> Any:
    """The node before key/value heads are repeated: unsqueeze(2) → expand → reshape."""
    if isinstance(node, Node) and node.target is aten.repeat_interleave.self_int:
        dim = node.args[2] if len(node.args) > 2 else None
        return node.args[0] if dim in (1, -3) and node.meta["val"].ndim == 4 else node
    if isinstance(node, Node) and node.target in _RESHAPES:
        wide = node.args[0]
        if (
            isinstance(wide, Node)
            and wide.target is aten.expand.default
            and wide.meta["val"].ndim == 5
        ):
            single: Any = wide.args[0]
            sizes, joined = concrete_shape(wide), concrete_shape(node)
            if joined != [sizes[0], sizes[1] * sizes[2], *sizes[3:]]:
                return node
            if (
                isinstance(single, Node)
                and single.target is aten.unsqueeze.default
                and single.args[1] in (2, -3)
            ):
                return single.args[0]
    return node


def _merge(node: Node) -> Node | None:
    """The node where the heads of the attention's output are one axis again."""
    current = node
    while len(current.users) == 1:
        user = next(iter(current.users))
        before, after = current.meta["val"], user.meta.get("val")
        if not isinstance(after, Tensor):
            return None
        if user.target in _RESHAPES and after.ndim == 4 and not _is_swap(current):
            if concrete_shape(user) != concrete_shape(current):
                return None
            current = user  # a reshape to the same shape, written with other symbols
        elif (_is_swap(user) and not _is_swap(current)) or user.target in (
            aten.contiguous.default,
            aten.clone.default,
        ):
            current = user
        elif user.target in _RESHAPES and after.ndim == 3 and before.ndim == 4:
            return user if _swapped(node, current) else None
        else:
            return None
    return None


def _swapped(start: Node, end: Node) -> bool:
    while end is not start:
        if _is_swap(end):
            return True
        end = operand(end, 0)
    return False
