"""Ops written in terms of simpler ones, where torch has no such formula or one that costs more.

Each takes and returns what the op does; sources are the ops' own documentation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _moments(
    x: Tensor, dim: Any = None, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """(variance, mean) over the dimensions."""
    dims = [*range(x.ndim)] if dim is None else [dim] if isinstance(dim, int) else [*dim]
    dims = dims or [*range(x.ndim)]
    count = 1
    for d in dims:
        count *= x.shape[d]
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    squares = (centred * centred).sum(dims, keepdim=keepdim)
    variance = squares / max(count - (1 if correction is None else correction), 0)
    return variance, mean if keepdim else mean.squeeze(dims)


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, batch: int, channels: int, size: int,
    groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    flat = x.reshape(batch, groups, -1)
    variance, mean = _moments(flat, -1, 0, True)
    factor = torch.rsqrt(variance + eps)
    y = ((flat - mean) * factor).reshape(x.shape)
    shape = [1, channels] + [1] * (x.ndim - 2)
    if weight is not None:
        y = y * weight.reshape(shape)
    if bias is not None:
        y = y + bias.reshape(shape)
    return y, mean.reshape(batch, groups), factor.reshape(batch, groups)


def _lstm_layer(
    x: Tensor, of_input: Tensor, of_state: Tensor, input_bias: Tensor, state_bias: Tensor,
    h: Tensor, c: Tensor, reverse: bool, batch_sizes: Any, mode: int, hidden: int, layers: int,
    has_biases: bool, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One direction of one layer of an LSTM, (time, batch, channels), step by step."""
    biases = (input_bias, state_bias) if has_biases else (None, None)
    h, c = h[0], c[0]
    gates_of_input = torch.nn.functional.linear(x, of_input, biases[0])
    steps = range(x.shape[0])
    made: list[Any] = [None] * x.shape[0]
    for t in reversed(steps) if reverse else steps:
        gates = gates_of_input[t] + torch.nn.functional.linear(h, of_state, biases[1])
        enter, forget, new, leave = gates.chunk(4, -1)
        c = forget.sigmoid() * c + enter.sigmoid() * new.tanh()
        h = leave.sigmoid() * c.tanh()
        made[t] = h
    return torch.stack(made), h.unsqueeze(0), c.unsqueeze(0), x.new_zeros(0)


MUCH = 1e19  # from there on 1 + x² is x², and twice x may be infinite


def _asinh(x: Tensor) -> Tensor:
    """By |x|, as a + a² / (1 + √(1 + a²)) without the square: it does not cancel."""
    a = x.abs()
    turned = 1 / a
    made = torch.log1p(a + a / (turned + (1 + turned * turned).sqrt()))
    made = torch.where(a > MUCH, a.log() + math.log(2), made)
    return torch.where(x < 0, -made, made)


def _acosh(x: Tensor) -> Tensor:
    over = x - 1
    made = torch.log1p(over + over.sqrt() * (over + 2).sqrt())
    return torch.where(x > MUCH, x.log() + math.log(2), made)


def _atanh(x: Tensor) -> Tensor:
    a = x.abs()
    made = torch.log1p(2 * a / (1 - a)) * 0.5
    return torch.where(x < 0, -made, made)


def _hypot(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    long, ratio = torch.maximum(x, y), torch.minimum(x, y) / torch.maximum(x, y)
    found = torch.where(long == 0, long, long * (1 + ratio * ratio).sqrt())
    return torch.where((x == math.inf) | (y == math.inf), math.inf, found)


def _where(condition: Tensor, a: Any, b: Any) -> Tensor:
    kind = torch.result_type(a, b)
    a, b = (x if isinstance(x, Tensor) else torch.full((), x, dtype=kind) for x in (a, b))
    found: Tensor = aten.where.self(condition, a, b)
    return found


def _flip(x: Tensor, dims: list[int]) -> Tensor:
    for dim in dims:
        x = x.index_select(dim, torch.arange(x.shape[dim] - 1, -1, -1))
    return x


def _distances(x: Tensor, y: Tensor, p: float, mode: int | None) -> Tensor:
    apart = (x.unsqueeze(-2) - y.unsqueeze(-3)).abs()
    if p == 2:
        return (apart * apart).sum(-1).sqrt()
    if p == math.inf:
        return apart.amax(-1)
    if p == 0:
        return (apart != 0).to(x.dtype).sum(-1)
    return apart.sum(-1) if p == 1 else apart.pow(p).sum(-1).pow(1 / p)


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """Products of integers, (…, m, k) by (…, k, n): matrices are multiplied as floats elsewhere."""
    return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2).to(a.dtype)


def cut_and_padded(x: Tensor, pads: list[int], value: float = 0) -> Tensor:
    """Padding by less than nothing cuts."""
    for place, dim in enumerate(range(x.ndim - 1, x.ndim - 1 - len(pads) // 2, -1)):
        before, after = pads[2 * place : 2 * place + 2]
        cut, end = max(0, -before), x.shape[dim] - max(0, -after)
        x = x.narrow(dim, cut, end - cut)
    padded: Tensor = aten.constant_pad_nd.default(x, [max(0, p) for p in pads], value)
    return padded


def transposed_convolution(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int],
    output_padding: list[int], groups: int, dilation: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x′, weight′), whose convolution with stride 1 and no padding is the transposed one.

    Zeros are put between the input's positions and around them; the filters are turned round
    (Dumoulin and Visin 2016, A Guide to Convolution Arithmetic, section 4).

    Args:
        x: (N, C, H, W).
        weight: (C, K / groups, h, w).
        stride, padding, output_padding, groups, dilation: of the transposed convolution.
    """
    n, channels, height, width = x.shape
    down, across = stride
    if down > 1 or across > 1:
        wide = x.reshape(n, channels, height, 1, width, 1)
        wide = aten.constant_pad_nd.default(wide, [0, across - 1, 0, 0, 0, down - 1], 0)
        wide = wide.reshape(n, channels, height * down, width * across)
        x = wide[:, :, : (height - 1) * down + 1, : (width - 1) * across + 1]
    pads: list[int] = []
    for d in (1, 0):
        reach = dilation[d] * (weight.shape[2 + d] - 1) - padding[d]
        pads += [reach, reach + output_padding[d]]
    x = cut_and_padded(x, pads)
    parts = weight.reshape(groups, channels // groups, *weight.shape[1:])
    turned = parts.transpose(1, 2).reshape(-1, channels // groups, *weight.shape[2:])
    return x, turned.flip([2, 3])


FORMULAS: dict[Any, Callable[..., Any]] = {
    aten.var.correction: lambda x, dim=None, correction=None, keepdim=False: _moments(
        x, dim, correction, keepdim
    )[0],
    aten.std.correction: lambda x, dim=None, correction=None, keepdim=False: _moments(
        x, dim, correction, keepdim
    )[0].sqrt(),
    aten.var_mean.correction: _moments,
    aten.native_group_norm.default: _group_norm,
    aten.flip.default: _flip,
    aten._cdist_forward.default: _distances,
    aten.max.default: lambda x: x.amax(),
    aten.min.default: lambda x: x.amin(),
    aten.signbit.default: lambda x: x < 0,
    torch.ops.prims.where.default: _where,
    aten.hypot.default: _hypot,
    aten.asinh.default: _asinh,
    aten.acosh.default: _acosh,
    aten.atanh.default: _atanh,
    aten.mkldnn_rnn_layer.default: _lstm_layer,
    aten.full_like.default: lambda x, value, dtype=None, **rest: torch.full(
        x.shape, value, dtype=dtype or x.dtype
    ),
}
RECURRENT = {
    op: torch._decomp.decomposition_table[op]
    for op in (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
}
