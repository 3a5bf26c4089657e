"""`qc::cached_attention`: rotary embedding, key-value cache and causal attention as one op.

    k' = cat(past_k, R(p) k),   v' = cat(past_v, v),   out = softmax(R(p) q k'ᵀ · scale) v'

over the heads of (batch, sequence, heads · size) tensors. A query reads what is no padding, not
later than itself and within the window. The caches are (batch, kv_heads, tokens, size). It also
returns k' and v'. The torch reference below is what backends are compared with.

`qc::stored_attention` is the same over a cache of 8- or 4-bit integers with given scales, of the
tensor (1,) or of each channel of each head (kv_heads, 1, size): k' and v' are rounded, then read.

    Q(x) = clamp(round(x / s), −2^(b−1), 2^(b−1) − 1) · s

Past and present stay floats here, on that grid, which rounding again does not change; a backend
keeps the integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("qc", "FRAGMENT")
_library.define(
    "cached_attention(Tensor q, Tensor k, Tensor v, Tensor past_key, Tensor past_value,"
    " Tensor mask, Tensor? cos, Tensor? sin, Tensor? positions, int heads, int kv_heads,"
    " float scale, int window, bool interleaved) -> (Tensor, Tensor, Tensor)"
)


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn pairs of channels of x (…, positions, size) by angles (…, positions, pairs).

    The pairs are the two halves of the first 2 · pairs channels, or neighbours; what is left of the
    channels stays as it is.
    """
    count = cos.shape[-1]
    turned, rest = x[..., : 2 * count], x[..., 2 * count :]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        pair = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turned[..., :count], turned[..., count:]
        pair = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([pair, rest], -1)


def visible(mask: Tensor, new: int, window: int) -> Tensor:
    """What each of the last `new` tokens may read, bool (batch, 1, new, total).

    Args:
        mask: (batch, total), 0 at padding.
        new: tokens that read.
        window: tokens back at most, itself among them; −1: all.
    """
    total = mask.shape[1]
    key = torch.arange(total, device=mask.device)
    place = torch.arange(new, device=mask.device)[:, None] + (total - new)
    allowed = key <= place
    if window > 0:
        allowed = allowed & (key > place - window)
    return allowed & (mask != 0)[:, None, None]


_library.define(
    "stored_attention(Tensor q, Tensor k, Tensor v, Tensor past_key, Tensor past_value,"
    " Tensor mask, Tensor? cos, Tensor? sin, Tensor? positions, int heads, int kv_heads,"
    " float scale, int window, bool interleaved, Tensor key_scale, Tensor value_scale, int bits)"
    " -> (Tensor, Tensor, Tensor)"
)


def stored(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The integers that a cache of that many bits keeps of x, as floats."""
    half = 1 << (bits - 1)
    return torch.round(x / scale).clamp(-half, half - 1)


def compute_cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    mask: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int,
    interleaved: bool,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    bits: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The torch reference of the op; its arguments and results are described above."""
    query, key, value = (
        x.unflatten(-1, (count, x.shape[-1] // count)).transpose(1, 2)
        for x, count in ((q, heads), (k, kv_heads), (v, kv_heads))
    )
    if cos is not None and sin is not None and positions is not None:
        c, s = (table[positions][:, None] for table in (cos, sin))
        query, key = (turn(x, c, s, interleaved) for x in (query, key))
    key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    if key_scale is not None and value_scale is not None:
        key = stored(key, key_scale, bits) * key_scale
        value = stored(value, value_scale, bits) * value_scale
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        visible(mask, q.shape[1], window),
        scale=scale,
        enable_gqa=heads != kv_heads,
    )
    return out.transpose(1, 2).flatten(2), key, value


def _fake_cached_attention(
    q: Tensor, k: Tensor, v: Tensor, past_key: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    batch, new, _ = q.shape
    _, kv_heads, past, size = past_key.shape
    present = [batch, kv_heads, past + new, size]
    return torch.empty_like(q), past_key.new_empty(present), past_key.new_empty(present)


for _name in ("cached_attention", "stored_attention"):
    _library.impl(_name, compute_cached_attention, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qc::{_name}", _fake_cached_attention)
cached_attention = torch.ops.qc.cached_attention.default
stored_attention = torch.ops.qc.stored_attention.default
CACHED = frozenset({cached_attention, stored_attention})
