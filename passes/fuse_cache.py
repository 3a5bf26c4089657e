"""Join rotary embedding, key-value cache and causal attention into one `qc::cached_attention`.

    k' = cat(past_k, R(p) split(k)),   v' = cat(past_v, split(v))
    merge(sdpa(R(p) split(q), repeat(k'), repeat(v'), mask))  =  cached_attention(q, k, v, …)

with k' and v' outputs of the program. Runtimes have one kernel for the whole, which writes the new
keys and values into the cache in place and never forms the mask.

How a model spells its mask and its rotation is not matched but *evaluated*: the subgraphs are run
on small inputs and compared with the definitions. A mask must be "not padding, not later, and at
most `window` tokens back"; a rotation must turn pairs of channels by an angle that depends on the
position alone (RoPE, Su 2021, equation 34), over all or the first channels, in halves or
interleaved. Its cosines and sines become tables over the model's context.

Refused, the attention then stays as it is: masks that add something else (ALiBi), dropout, keys
that are not a graph input joined with new ones, head sizes that the kernel does not take. Where the
rotation is not recognised (an online Hadamard follows it), it stays outside of the fused op.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler import cached
from qcompiler.op_families import RESHAPES, SDPA, concrete_shape
from qcompiler.probing import Probe
from qcompiler.rewrite import Draft, operand, rewrite
from qcompiler.rotary import Rotation, find_rotation

aten = torch.ops.aten
FAR = 1 << 15  # tokens of the past, at most, with which a window is looked for
LOW = -1e4  # what an additive mask has at most where nothing may be read


@dataclass
class Found:
    """What several attentions share: rotations, and what masks are."""

    probe: Probe
    rotations: list[Rotation] = field(default_factory=list)
    windows: dict[Node, tuple[Node, int] | str] = field(default_factory=dict)


@rewrite(exact=True)
def fuse_cache(draft: Draft, context: int, multiple: int = 16) -> None:
    """Replace attentions over a cache by `qc::cached_attention`.

    Args:
        draft: a language model whose caches are inputs and outputs.
        context: positions that the tables hold.
        multiple: head sizes, and channels that are turned, are multiples of this in the runtime's
            kernel.
    """
    nodes = list(draft.calls(SDPA))
    probe = Probe(draft)
    found = Found(probe)
    for node in nodes:
        probe.pasts |= {past for i in (1, 2) if (past := _joined(draft, node, i)[0]) is not None}
    rotated = fused = 0
    for node in nodes:
        result = _fuse(draft, node, found, context, multiple)
        if isinstance(result, str):
            draft.refuse(node, result)
        else:
            fused += 1
            rotated += result
    if not nodes:
        draft.refuse(draft.graph.output_node(), "its attention is spelled out, not one op")
    if fused:
        draft.note(f"{fused} attentions joined with their caches, {rotated} with their rotation")


def _fuse(draft: Draft, node: Node, found: Found, context: int, multiple: int) -> str | bool:
    """Fuse one attention; whether its rotation went along, or why not."""
    names = ("attn_mask", "dropout_p", "is_causal")
    options = dict(zip(names, node.args[3:], strict=False)) | dict(node.kwargs)
    mask = options.get("attn_mask")
    if options.get("dropout_p"):
        return "it has dropout"
    past_key, new_key, whole_key = _joined(draft, node, 1)
    past_value, new_value, whole_value = _joined(draft, node, 2)
    if past_key is None or past_value is None:
        return "its keys and values are no cache joined with new ones"
    assert new_key is not None
    assert new_value is not None
    query = operand(node, 0)
    heads, size = concrete_shape(query)[1], concrete_shape(query)[3]
    kv_heads, value_size = concrete_shape(new_value)[1], concrete_shape(new_value)[3]
    if concrete_shape(new_key)[1] != kv_heads or heads % kv_heads or size != value_size:
        return f"{heads} query and {kv_heads} value heads of sizes {size} and {value_size}"
    if size % multiple:
        return f"its head size {size} is no multiple of {multiple}"
    if not isinstance(mask, Node) or options.get("is_causal"):
        return "it has no mask that is computed from the inputs"
    if mask not in found.windows:
        # Some models compute a mask of far × far.
        found.windows[mask] = _window(found.probe, mask, min(FAR, context))
    window = found.windows[mask]
    if isinstance(window, str):
        return window
    final = _merged(node)
    if final is None:
        return "its heads are read by something else than their merge"
    turned = find_rotation(found.probe, found.rotations, query, new_key, context, multiple)
    query, new_key, rotation = turned or (query, new_key, None)
    tables = (rotation.cos, rotation.sin, rotation.positions) if rotation else (None, None, None)
    scale = options.get("scale")
    fused = draft.call(
        cached.cached_attention, *(_flat(draft, n, node) for n in (query, new_key, new_value)),
        past_key, past_value, window[0], *tables, heads, kv_heads,
        1 / math.sqrt(size) if scale is None else scale, window[1],
        rotation.interleaved if rotation else False, before=node,
    )  # fmt: skip
    parts = [draft.call(getitem, fused, index, before=node) for index in range(3)]
    draft.swap(final, parts[0])
    _erase(draft, final)  # what repeats the heads read the caches before the fused op
    for old, part in zip((whole_key, whole_value), parts[1:], strict=True):
        draft.swap(old, part)
        _erase(draft, old)
    return rotation is not None


def _erase(draft: Draft, node: Node) -> None:
    """Remove a call that nothing reads, and those that only it read."""
    if node.users or node.op != "call_function" or node._erased:
        return
    sources = node.all_input_nodes
    draft.graph.erase_node(node)
    for source in sources:
        _erase(draft, source)


def _joined(draft: Draft, node: Node, index: int) -> tuple[Node | None, Node | None, Node]:
    """Past and new keys (or values) of an attention and their join, (batch, heads, …, size)."""
    whole = _before_repeat(operand(node, index))
    if whole.target is aten.cat.default and operand(whole, 1) in (2, -2):
        parts = list(operand(whole, 0))
        if len(parts) == 2:
            past, new = parts
            if past.op == "placeholder" and not draft.is_constant(past):
                return past, new, whole
    return None, None, whole


def _before_repeat(node: Node) -> Node:
    """The keys or values before their heads are repeated for the queries."""
    if node.target is aten.repeat_interleave.self_int and operand(node, 2) in (1, -3):
        return operand(node, 0)  # type: ignore[no-any-return]
    wide = operand(node, 0) if node.target in RESHAPES else None
    if isinstance(wide, Node) and wide.target is aten.expand.default:
        single = operand(wide, 0)
        if single.target is aten.unsqueeze.default and operand(single, 1) in (2, -3):
            sizes, joined = concrete_shape(wide), concrete_shape(node)
            if len(sizes) == 5 and joined[1] == sizes[1] * sizes[2]:
                return operand(single, 0)  # type: ignore[no-any-return]
    return node


def _is_swap(node: Any) -> bool:
    """Whether the node exchanges heads and sequence."""
    if not isinstance(node, Node) or node.target not in (aten.transpose.int, aten.permute.default):
        return False
    if node.target is aten.permute.default:
        return list(operand(node, 1)) == [0, 2, 1, 3]
    return sorted(int(operand(node, i)) % 4 for i in (1, 2)) == [1, 2]


def _merged(node: Node) -> Node | None:
    """The (batch, sequence, channels) tensor that the attention's heads become."""
    current = node
    turned = False
    while len(current.users) == 1:
        current = next(iter(current.users))
        if _is_swap(current) and not turned:
            turned = True
        elif current.target in RESHAPES and current.meta["val"].ndim == 3:
            return current if turned else None
        elif current.target in RESHAPES and not turned:
            if concrete_shape(current) != concrete_shape(node):
                return None
        elif current.target not in (aten.contiguous.default, aten.clone.default):
            return None
    return None


def _flat(draft: Draft, node: Node, before: Node) -> Node:
    """(batch, heads, sequence, size) → (batch, sequence, channels); a split is undone."""
    if _is_swap(node):
        split = operand(node, 0)
        if split.target in RESHAPES and operand(split, 0).meta["val"].ndim == 3:
            return operand(split, 0)  # type: ignore[no-any-return]
    else:
        split = draft.call(aten.transpose.int, node, 1, 2, before=before)
    return draft.call(aten.flatten.using_ints, split, 2, before=before)


def _window(probe: Probe, mask: Node, most: int) -> tuple[Node, int] | str:
    """The padding input that a mask reads and its window (−1: none), or why it is another mask."""
    for candidate in probe.matrices:
        far = _allowed(probe, mask, candidate, torch.ones(1, most + 1), 1)
        if far is None:
            continue
        seen = int(far.sum())
        window = -1 if seen == most + 1 else seen
        past = 4 if window < 0 else window + 2
        padding = torch.ones(3, past + 3)
        padding[1, -2:], padding[2, :3] = 0, 0  # behind and before the text
        got = _allowed(probe, mask, candidate, padding, 3)
        if got is not None and torch.equal(got, cached.visible(padding, 3, window)):
            return candidate, window
    return "its mask is not that of a causal language model with padding"


def _allowed(probe: Probe, mask: Node, candidate: Node, padding: Tensor, new: int) -> Tensor | None:
    """What the mask lets each of `new` queries read, bool (batch, 1, new, total)."""
    batch, total = padding.shape
    given = probe.inputs(batch, new, total - new)
    given[candidate] = padding.to(candidate.meta["val"].dtype)
    value = probe.compute(mask, given)
    if value is None or value.ndim != 4 or value.shape[-2:] != (new, total):
        return None
    if value.dtype != torch.bool:
        if not bool(((value == 0) | (value <= LOW)).all()):
            return None
        value = value == 0
    return value.expand(batch, -1, -1, -1)[:, :1] if value.shape[1] == 1 else None
