"""Quantize what a key-value cache would hold: simulated, as the attention reads it.

Values share a scale within a token and head; keys do so too, or within a channel over a group of
tokens, because keys have outlier channels (KIVI, Liu 2024, section 3):

    k̂ = Q(k),  v̂ = Q(v)       softmax(q k̂ᵀ) v̂

The newest `window` tokens, as seen from each query, may stay in float (KIVI's residual); then the
attention is computed from both (`qc::cache_attention`). A group of tokens that is not full yet
stays in float, too, since its scale is not known.

Run before `fuse_attention`, after rotations. Grouped heads are quantized before they are repeated.
Refused: attention that is spelled out (softmax between two products), since nothing tells its
operands from other products.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from qcompiler import ops
from qcompiler.op_families import SDPA
from qcompiler.qtype import QType
from qcompiler.regions import before_repeat
from qcompiler.rewrite import Draft, operand, rewrite


@rewrite(exact=False)
def quantize_cache(draft: Draft, keys: QType | None, values: QType | None, window: int = 0) -> None:
    """Quantize the keys and values of every attention.

    Args:
        draft: what is rewritten.
        keys: per token and head (`uint4:token:affine`), or per channel over n tokens
            (`uint4:g32:affine`); None: float.
        values: per token and head; None: float.
        window: newest tokens that each query reads in float.
    """
    shared: dict[tuple[Node, QType], Node] = {}
    count = 0
    for attention in draft.calls(SDPA):
        quantized: list[Any] = list(attention.args[:3])
        for index, kind in ((1, keys), (2, values)):
            if kind is None:
                continue
            reader, position = before_repeat(attention, index)
            source = operand(reader, position)
            if (source, kind) not in shared:
                behind = source.next
                while behind.op == "placeholder":
                    behind = behind.next
                shared[source, kind] = draft.call(
                    ops.cache_round_trip, source, str(kind), before=behind, like=source
                )
            if window == 0:
                draft.set_input(reader, position, shared[source, kind])
            else:
                quantized[index] = _repeated(draft, attention, index, source, shared[source, kind])
        if window:
            _both(draft, attention, quantized, window)
        count += 1
    if count:
        kept = f", the newest {window} tokens in float" if window else ""
        draft.note(f"{count} attentions read keys as {keys}, values as {values}{kept} (simulated)")


def _repeated(draft: Draft, attention: Node, index: int, source: Node, fresh: Node) -> Node:
    """The chain from `source` to the attention's operand, built again on `fresh`."""
    chain: list[Node] = []
    node = operand(attention, index)
    while node is not source:
        chain.append(node)
        node = operand(node, 0)
    for node in reversed(chain):
        options: dict[str, Any] = dict(node.kwargs)
        fresh = draft.call(node.target, fresh, *node.args[1:], before=attention, **options)
    return fresh


def _both(draft: Draft, attention: Node, quantized: list[Any], window: int) -> None:
    names = ("attn_mask", "dropout_p", "is_causal")
    options = dict(zip(names, attention.args[3:], strict=False)) | dict(attention.kwargs)
    query, key, value = attention.args[:3]
    fused = draft.call(
        ops.cache_attention, query, key, value, *quantized[1:], options.get("attn_mask"),
        options.get("scale"), bool(options.get("is_causal", False)), window,
        before=attention,
    )  # fmt: skip
    draft.swap(attention, fused)
