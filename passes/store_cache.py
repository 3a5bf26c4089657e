"""Keep the key-value cache as integers with scales that were measured: what a runtime stores.

    cached_attention(…)  →  stored_attention(…, s_k, s_v, bits)

    s = max |x| / (2^(bits−1) − 1)

over the calibration data, for each channel of each head or for all, of keys after their rotation
and of values. Such a cache takes a quarter (8 bits) or an eighth of
the memory, and the kernel that attends reads it as it is; ranges of single tokens, as in
`quantize_cache`, have no such kernel. Keys have outlier channels (KIVI, Liu 2024, section 3), hence
a scale for each channel.

Refused: attention that is not one op with its cache (see `fuse_cache`). The model then still takes
and gives that layer's cache in float.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler import cached
from qcompiler.program import Batch, Program
from qcompiler.qtype import QType
from qcompiler.rewrite import Draft, operand, rewrite

Extremes = dict[str, tuple[Tensor, Tensor]]  # attention → largest |key| and |value|


@dataclass
class _Seen:
    """Largest magnitudes over the batches, each (kv_heads, 1, size)."""

    key: Tensor
    value: Tensor


def measure_cache(program: Program, batches: Iterable[Batch]) -> Extremes:
    """The largest |key| and |value| that each attention caches, by the name of its node.

    Args:
        program: after `fuse_cache`.
        batches: calibration data; positions that the attention's mask calls padding do not count.

    Returns:
        Pairs of float32 tensors (kv_heads, 1, size).
    """
    nodes = {n.name: n for n in program.exported.graph.nodes if n.target is cached.cached_attention}
    found: dict[str, _Seen] = {}
    for batch in batches:
        given = dict(zip(program.inputs, batch, strict=True))

        def look(node: Node, value: Any, given: Mapping[str, Tensor] = given) -> None:
            if node.name not in nodes:
                return
            mask = given[operand(node, 5).name].bool()
            key, kept = (_largest(value[i], mask) for i in (1, 2))
            seen = found.setdefault(node.name, _Seen(key, kept))
            seen.key = torch.maximum(seen.key, key)
            seen.value = torch.maximum(seen.value, kept)

        program.run(batch, look)
    return {name: (seen.key, seen.value) for name, seen in found.items()}


def _largest(cache: Tensor, mask: Tensor) -> Tensor:
    """Max |x| over batch and tokens of (batch, heads, tokens, size): (heads, 1, size)."""
    return (cache.abs() * mask[:, None, :, None]).amax((0, 2))[:, None].clamp(min=1e-8)


@rewrite(exact=False)
def store_cache(draft: Draft, keys: QType, values: QType, extremes: Extremes) -> None:
    """Quantize the cache of every fused attention.

    Args:
        draft: what is rewritten.
        keys, values: `int8:channel`, `int4:channel`, or the same with `tensor`; of equal width.
        extremes: of `measure_cache`.
    """
    half = (1 << (keys.bits - 1)) - 1
    count = 0
    for node in draft.calls(cached.cached_attention):
        scales = [
            (largest / half if kind.granularity == "channel" else largest.amax().view(1) / half)
            for largest, kind in zip(extremes[node.name], (keys, values), strict=True)
        ]
        constants = [
            draft.add_constant(f"{node.name}_{name}_scale", scale)
            for name, scale in zip(("key", "value"), scales, strict=True)
        ]
        fresh = draft.call(
            cached.stored_attention, *node.args, *constants, keys.bits, before=node, like=node
        )
        draft.swap(node, fresh)
        count += 1
    if count:
        draft.note(f"{count} caches hold keys as {keys}, values as {values}")
