"""The dialect: the few ops that a quantized program has beyond ATen, each with its torch reference.

    qc::quantize          float → integers (or 8-bit floats), with a given scale and zero point
    qc::dequantize        integers → float
    qc::dynamic_quantize  float → integers, scale and zero point computed from the tensor itself
    qc::unpack            packed 2-, 3- and 4-bit weights → int8
    qc::attention         softmax(q kᵀ · scale + mask) v over the heads of
                          (batch, sequence, heads · size) tensors; bfloat16 ones give float32
    qc::rotate            x · (left ⊗ right) along the last axis
    qc::sparse_linear     Σ_k x[…, columns[n, k]] · values[n, k]: k weights for each output n
    qc::cache_round_trip  keys or values as a quantized cache would give them back
    qc::cache_attention   attention that reads the newest tokens in float, older ones quantized

The quantize/dequantize arithmetic is that of ONNX QuantizeLinear-21 and DynamicQuantizeLinear-11.
An axis and a group size are arguments, as in ONNX (`axis`, `block_size`); `group` 0 means none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qcompiler import qtype
from qcompiler.cached import cached_attention, compute_cached_attention, stored_attention
from qcompiler.hadamard import rotate as _rotate
from qcompiler.qtype import ELEMENTS, QType

_library = torch.library.Library("qc", "DEF")
_library.define(
    "quantize(Tensor x, Tensor scale, Tensor zero_point, int axis, int group, int qmin, int qmax)"
    " -> Tensor"
)
_library.define(
    "dequantize(Tensor q, Tensor scale, Tensor zero_point, int axis, int group) -> Tensor"
)
_library.define("dynamic_quantize(Tensor x, str qtype) -> (Tensor, Tensor, Tensor)")
_library.define("unpack(Tensor packed, str element, int[] shape) -> Tensor")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, int heads, int kv_heads, float scale,"
    " bool causal) -> Tensor"
)
_library.define("cache_round_trip(Tensor x, str qtype) -> Tensor")
_library.define(
    "cache_attention(Tensor q, Tensor k, Tensor v, Tensor old_k, Tensor old_v, Tensor? mask,"
    " float? scale, bool causal, int window) -> Tensor"
)
_library.define("rotate(Tensor x, Tensor left, Tensor right) -> Tensor")
_library.define("sparse_linear(Tensor x, Tensor values, Tensor columns) -> Tensor")


def _dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int, group: int) -> Tensor:
    return qtype.dequantize(q, scale, zero_point, axis, group)


def _dynamic_quantize(x: Tensor, text: str) -> tuple[Tensor, Tensor, Tensor]:
    kind = QType.parse(text)
    low, high = kind.ranges(x)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if kind.symmetric:
        scale = torch.maximum(high, -low) / (kind.qmax - kind.middle)
    else:
        scale = (high - low) / (kind.qmax - kind.qmin)
    # All zeros, or so small that the quotient is: any scale will do; ONNX Runtime takes 1.
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.full_like(scale, kind.middle) if kind.symmetric else kind.qmin - low / scale
    zero = zero.round().clamp(kind.qmin, kind.qmax).to(kind.dtype)
    return kind.quantize(x, scale, zero), scale, zero


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool,
) -> Tensor:
    def split(x: Tensor, count: int) -> Tensor:
        heads: Tensor = x.unflatten(-1, (count, x.shape[-1] // count))
        return heads.transpose(1, 2)

    if q.dtype == torch.bfloat16:
        found = _narrow_attention(
            split(q, heads), split(k, kv_heads), split(v, kv_heads), mask, scale, causal
        )
        return found.transpose(1, 2).flatten(2)
    out = torch.nn.functional.scaled_dot_product_attention(
        split(q, heads),
        split(k, kv_heads),
        split(v, kv_heads),
        mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=heads != kv_heads,
    )
    return out.transpose(1, 2).flatten(2)


def _narrow_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """Attention of bfloat16 operands, summed in float32.

    The exponentials are rounded to bfloat16 before they weigh the values; their sum is not.
    """
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1).float(), v.repeat_interleave(repeat, 1).float()
    scores = q.float() @ k.transpose(-1, -2) * scale
    if mask is not None:
        hidden = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, float("-inf")) if hidden else scores + mask
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(~seen.tril(), float("-inf"))
    scores = scores.clamp(min=torch.finfo(torch.float32).min)  # nothing seen: not NaN
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    shares = powers.bfloat16().float() @ v
    return shares / powers.sum(-1, keepdim=True)


def _cache_round_trip(x: Tensor, text: str) -> Tensor:
    """(batch, heads, tokens, size); a scale for each token, or for each channel of n tokens."""
    kind = QType.parse(text)
    if not kind.group:
        return _round_trip_rows(x, kind)
    full = x.shape[2] // kind.group * kind.group  # a group that is not full stays in float
    groups = x[:, :, :full].transpose(-1, -2).unflatten(-1, (-1, kind.group))
    rounded = _round_trip_rows(groups, kind).flatten(-2).transpose(-1, -2)
    return torch.cat([rounded, x[:, :, full:]], 2)


def _round_trip_rows(x: Tensor, kind: QType) -> Tensor:
    rows = QType(kind.element, "token", symmetric=kind.symmetric)
    q, scale, zero = _dynamic_quantize(x, str(rows))
    return _dequantize(q, scale, zero, 0, 0)


def _cache_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    old_k: Tensor,
    old_v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
    window: int,
) -> Tensor:
    repeat = q.shape[1] // k.shape[1]
    k, v, old_k, old_v = (t.repeat_interleave(repeat, 1) for t in (k, v, old_k, old_v))
    queries, keys = q.shape[-2], k.shape[-2]
    # The last query stands at the last key.
    age = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    new = age < window
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.where(new, q @ k.transpose(-1, -2), q @ old_k.transpose(-1, -2)) * scale
    if causal:
        scores = scores.masked_fill(age < 0, float("-inf"))
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        )
    shares = scores.softmax(-1)
    return (shares * new) @ v + (shares * ~new) @ old_v


def _sparse_linear(x: Tensor, values: Tensor, columns: Tensor) -> Tensor:
    """(…, inputs) float32, (outputs, k) float16, (outputs, k) int16 or int32 → (…, outputs)."""
    total = x.new_zeros((*x.shape[:-1], len(columns)))
    for factor, column in zip(values.to(x.dtype).T, columns.long().T, strict=True):
        total = total + x.index_select(-1, column) * factor
    return total


_library.impl("sparse_linear", _sparse_linear, "CompositeExplicitAutograd")
_library.impl("cache_round_trip", _cache_round_trip, "CompositeExplicitAutograd")
_library.impl("cache_attention", _cache_attention, "CompositeExplicitAutograd")
_library.impl("quantize", qtype.quantize, "CompositeExplicitAutograd")
_library.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
_library.impl("dynamic_quantize", _dynamic_quantize, "CompositeExplicitAutograd")
_library.impl("attention", _attention, "CompositeExplicitAutograd")
_library.impl("rotate", _rotate, "CompositeExplicitAutograd")
_library.impl(
    "unpack",
    lambda packed, element, shape: qtype.unpack(packed, element, tuple(shape)),
    "CompositeExplicitAutograd",
)


def _fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, group: int, qmin: int, qmax: int
) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


def _fake_dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int, group: int) -> Tensor:
    return torch.empty_like(q, dtype=scale.dtype)


def _fake_dynamic_quantize(x: Tensor, text: str) -> tuple[Tensor, Tensor, Tensor]:
    kind = QType.parse(text)
    shape = [*x.shape[:-1], 1] if kind.granularity == "token" else []
    return (
        torch.empty_like(x, dtype=kind.dtype),
        x.new_empty(shape),
        x.new_empty(shape, dtype=kind.dtype),
    )


def _fake_unpack(packed: Tensor, element: str, shape: list[int]) -> Tensor:
    return packed.new_empty(shape, dtype=torch.int8 if ELEMENTS[element][1] else torch.uint8)


def _fake_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool,
) -> Tensor:
    dtype = torch.float32 if q.dtype == torch.bfloat16 else q.dtype
    return q.new_empty([*q.shape[:-1], v.shape[-1] // kv_heads * heads], dtype=dtype)


def _fake_cache_round_trip(x: Tensor, text: str) -> Tensor:
    return torch.empty_like(x)


def _fake_cache_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    old_k: Tensor,
    old_v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
    window: int,
) -> Tensor:
    return q.new_empty([*q.shape[:-1], v.shape[-1]])


torch.library.register_fake("qc::cache_round_trip", _fake_cache_round_trip)
torch.library.register_fake("qc::cache_attention", _fake_cache_attention)


def _fake_rotate(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return torch.empty_like(x)


def _fake_sparse_linear(x: Tensor, values: Tensor, columns: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], columns.shape[0]))


torch.library.register_fake("qc::sparse_linear", _fake_sparse_linear)
torch.library.register_fake("qc::quantize", _fake_quantize)
torch.library.register_fake("qc::dequantize", _fake_dequantize)
torch.library.register_fake("qc::dynamic_quantize", _fake_dynamic_quantize)
torch.library.register_fake("qc::unpack", _fake_unpack)
torch.library.register_fake("qc::attention", _fake_attention)
torch.library.register_fake("qc::rotate", _fake_rotate)

quantize = torch.ops.qc.quantize.default
dequantize = torch.ops.qc.dequantize.default
dynamic_quantize = torch.ops.qc.dynamic_quantize.default
unpack = torch.ops.qc.unpack.default
attention = torch.ops.qc.attention.default
rotate = torch.ops.qc.rotate.default
sparse_linear = torch.ops.qc.sparse_linear.default
cache_round_trip = torch.ops.qc.cache_round_trip.default
cache_attention = torch.ops.qc.cache_attention.default

# Ops through which torch cannot trace gradients → the same as a composition of ATen ops.
TRACEABLE: dict[Any, Callable[..., Any]] = {
    attention: _attention,
    rotate: _rotate,
    sparse_linear: _sparse_linear,
    cached_attention: compute_cached_attention,
    stored_attention: compute_cached_attention,
}
