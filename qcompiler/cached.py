"""`qc::cached_attention`: rotary embedding, key-value cache and causal attention as one op.

    k' = cat(past_k, R(p) k),   v' = cat(past_v, v),   out = softmax(R(p) q k'ᵀ · scale) v'

over the heads of (batch, sequence, heads · size) tensors. A query reads what is no padding, not
later than itself and within the window. The caches are (batch, kv_heads, tokens, size). It also
returns k' and v'. The torch reference below is what backends are compared with.
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
) -> tuple[Tensor, Tensor, Tensor]:
    batch, new, _ = q.shape
    present = [batch, kv_heads, past_key.shape[2] + new, past_key.shape[3]]
    return torch.empty_like(q), past_key.new_empty(present), past_value.new_empty(present)


_library.impl("cached_attention", compute_cached_attention, "CompositeExplicitAutograd")
torch.library.register_fake("qc::cached_attention", _fake_cached_attention)
cached_attention = torch.ops.qc.cached_attention.default
