"""Attention over heads in float32: softmax(q kᵀ · scale + mask) v, one head at a time.

For a head, the keys are packed into panels once; then a few rows of queries at a time make their
scores, the softmax, and the weighted sum of the values, all in memory that stays in the first-level
cache. Scores are not written for a whole head, and nothing is transposed in the graph.

Source: Vaswani et al. 2017, Attention Is All You Need, eq. 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tvm.tirx.script.builder import ir as T

from qcompiler.kernels import code
from qcompiler.kernels.code import LANES, Argument
from qcompiler.kernels.expression import Access, Emitter, Expression
from qcompiler.kernels.isa import Isa

NEVER = -3.0e38  # the score of a position that is masked
NOWHERE = -3.4e38  # and of lanes past the last key: nothing even where every position is masked


@dataclass(frozen=True)
class Heads:
    """Sizes and layout of an attention.

    Attributes:
        batch, heads, kv_heads: numbers of each.
        queries, keys: sequence lengths.
        size, value_size: of a head.
        q, k, v: accesses over (batch, head, position, element); element by element contiguous.
        mask: over (batch, head, query, key), bool (True: attend) or float (added), or None.
        scale: what scores are multiplied by.
        causal: whether query i sees keys up to i + keys − queries.
        merged: whether the output is (batch, position, head · element), not (batch, head, position,
            element).
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    size: int
    value_size: int
    q: Access
    k: Access
    v: Access
    mask: Access | None
    scale: float
    causal: bool
    merged: bool


def reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """(B, H, S, D), (B, G, T, D) twice → (B, H, S, D) in float64."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, NEVER) if mask.dtype == torch.bool else scores + mask
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[-2] - q.shape[-2])
        scores = scores.masked_fill(~seen, NEVER)
    return scores.softmax(-1) @ v


def attention(
    name: str, arguments: Sequence[Argument], heads: Heads, expression: Expression, isa: Isa
) -> Any:
    """The kernel; the expression goes on from the output, its value 0."""
    size, wide = heads.size, -(-heads.value_size // LANES) * LANES
    keys = -(-heads.keys // LANES) * LANES
    across = max(1, min(isa.vectors // 8, 2))  # vectors of scores, or of values, in a tile
    high = max(1, isa.vectors // across)
    high = min(high, heads.queries)
    group = heads.heads // heads.kv_heads
    straight = heads.value_size % LANES == 0
    with code.kernel(name, arguments) as (made, buffers):
        emitter = Emitter(expression, buffers)

        def at(access: Access, batch: Any, head: Any, position: Any) -> Any:
            a, b, c, _ = access.strides
            return access.offset + batch * a + head * b + position * c

        with code.parallel(heads.batch * heads.heads) as task:
            batch, head = task // heads.heads, task % heads.heads
            shared = head // group
            packed = code.scratch(keys * size, "float32")
            scores = code.scratch(high * keys, "float32")
            _pack_keys(buffers, heads, packed, at(heads.k, batch, shared, 0))
            values, row_of_values = buffers[heads.v.argument], heads.v.strides[2]
            first_value = at(heads.v, batch, shared, 0)
            if not straight:
                values = _pad_values(buffers, heads, first_value, wide)
                first_value, row_of_values = 0, wide

            def rows(first: Any, height: int) -> None:
                _scores(buffers, heads, packed, scores, at(heads.q, batch, head, first),
                        keys, height, across)  # fmt: skip
                factors = []
                for r in range(height):
                    factors.append(
                        _softmax(buffers, heads, scores, r, keys, batch, head, first + r)
                    )
                for c in range(0, wide, across * LANES):
                    count = min(across, (wide - c) // LANES)
                    sums = [code.scratch(LANES, "float32") for _ in range(height * count)]
                    for total in sums:
                        code.store(total, 0, code.number(0.0))
                    with code.loop(heads.keys) as t:
                        parts = [
                            code.bind(
                                code.load(values, first_value + t * row_of_values + c + v * LANES)
                            )
                            for v in range(count)
                        ]
                        for r in range(height):
                            weight = code.spread(code.bind(code.load(scores, r * keys + t, 1)))
                            for v in range(count):
                                total = sums[r * count + v]
                                code.store(
                                    total, 0, code.fma(weight, parts[v], code.load(total, 0))
                                )
                    for r in range(height):
                        for v in range(count):
                            result = code.load(sums[r * count + v], 0) * code.spread(factors[r])
                            column = c + v * LANES
                            if heads.merged:
                                place, base = [batch, first + r], head * heads.value_size
                            else:
                                place, base = [batch, head, first + r], 0
                            left = min(LANES, heads.value_size - column)
                            if left == LANES:
                                emitter.vector(place, base + column, LANES, code.bind(result))
                            else:
                                held = code.scratch(LANES, "float32")
                                code.store(held, 0, result)
                                with code.loop(left) as lane:
                                    one = code.bind(code.load(held, lane, 1))
                                    emitter.vector(place, base + column + lane, 1, one)

            if heads.queries // high == 1:
                rows(0, high)
            else:
                with code.loop(heads.queries // high) as i:
                    rows(i * high, high)
            if heads.queries % high:
                rows(heads.queries // high * high, heads.queries % high)
    return made


def _pack_keys(buffers: list[Any], heads: Heads, packed: Any, start: Any) -> None:
    """(keys, size) rows → panels [keys/16][size][16]; the last panel's lanes beyond stay zero."""
    source, stride = buffers[heads.k.argument], heads.k.strides[2]
    whole = heads.keys // LANES

    def panel(p: Any, lanes: int) -> None:
        if lanes < LANES:
            with code.loop(heads.size) as d:
                code.store(packed, (p * heads.size + d) * LANES, code.number(0.0))
        with code.loop(lanes) as lane, code.loop(heads.size) as d:
            value = code.load(source, start + (p * LANES + lane) * stride + d, 1)
            code.store(packed, (p * heads.size + d) * LANES + lane, value, 1)

    if whole:
        with code.loop(whole) as p:
            panel(p, LANES)
    if heads.keys % LANES:
        panel(whole, heads.keys % LANES)


def _pad_values(buffers: list[Any], heads: Heads, start: Any, wide: int) -> Any:
    padded = code.scratch(heads.keys * wide, "float32")
    with code.loop(heads.keys) as t:
        for c in range(0, wide, LANES):
            code.store(padded, t * wide + c, code.number(0.0))
        with code.loop(heads.value_size) as d:
            value = code.load(buffers[heads.v.argument], start + t * heads.v.strides[2] + d, 1)
            code.store(padded, t * wide + d, value, 1)
    return padded


def _scores(
    buffers: list[Any],
    heads: Heads,
    packed: Any,
    scores: Any,
    start: Any,
    keys: int,
    height: int,
    across: int,
) -> None:
    """scores[r][t] = q[r] · k[t] · scale for `height` rows of queries."""
    source, stride = buffers[heads.q.argument], heads.q.strides[2]

    def tile(p: Any, count: int) -> None:
        sums = [code.scratch(LANES, "float32") for _ in range(height * count)]
        for total in sums:
            code.store(total, 0, code.number(0.0))
        with code.loop(heads.size) as d:
            parts = [
                code.bind(code.load(packed, ((p + v) * heads.size + d) * LANES))
                for v in range(count)
            ]
            for r in range(height):
                value = code.spread(code.bind(code.load(source, start + r * stride + d, 1)))
                for v in range(count):
                    total = sums[r * count + v]
                    code.store(total, 0, code.fma(value, parts[v], code.load(total, 0)))
        for r in range(height):
            for v in range(count):
                result = code.load(sums[r * count + v], 0) * code.number(heads.scale)
                code.store(scores, r * keys + (p + v) * LANES, result)

    panels = keys // LANES
    if panels // across:
        with code.loop(panels // across) as i:
            tile(i * across, across)
    if panels % across:
        tile(panels // across * across, panels % across)


def _softmax(
    buffers: list[Any],
    heads: Heads,
    scores: Any,
    r: int,
    keys: int,
    batch: Any,
    head: Any,
    query: Any,
) -> Any:
    """Mask row r of the scores, replace it by its exponentials, return 1 / their sum."""
    top = code.scratch(LANES, "float32")
    total = code.scratch(LANES, "float32")
    held = code.scratch(LANES, "float32")
    code.store(top, 0, code.number(NEVER))
    code.store(total, 0, code.number(0.0))
    plain = heads.mask is None and not heads.causal and heads.keys == keys
    last = query + heads.keys - heads.queries  # the last key that a causal query sees

    def masked(t: Any, lanes: int) -> Any:
        value = code.load(scores, r * keys + t, lanes)
        if heads.mask is not None:
            a, b, c, d = heads.mask.strides
            start = heads.mask.offset + batch * a + head * b + query * c + t * d
            buffer = buffers[heads.mask.argument]
            if d == 0:
                mask = code.spread(code.load(buffer, start, 1), lanes)
            else:
                mask = code.load(buffer, start, lanes, d)
            never = code.number(NEVER, lanes)
            if heads.mask.dtype == "bool":
                value = T.Select(T.NE(mask, code.spread(T.uint8(0), lanes)), value, never)
            else:
                value = code.maximum(value + mask, never)
        if heads.causal:
            if lanes == 1:
                position = t
            else:
                position = T.ramp(t, 1, lanes)
            seen = position <= code.spread(last, lanes)
            value = T.Select(seen, value, code.number(NEVER, lanes))
        return code.bind(value)

    base = r * keys
    if plain:
        with code.loop(keys // LANES) as i:
            value = code.load(scores, base + i * LANES)
            code.store(top, 0, code.maximum(code.load(top, 0), value))
    else:
        if heads.keys // LANES:
            with code.loop(heads.keys // LANES) as i:
                value = masked(i * LANES, LANES)
                code.store(scores, base + i * LANES, value)
                code.store(top, 0, code.maximum(code.load(top, 0), value))
        for t in range(heads.keys // LANES * LANES, heads.keys):
            code.store(scores, base + t, masked(t, 1), 1)
        for t in range(heads.keys, keys):
            code.store(scores, base + t, code.number(NOWHERE, 1), 1)
        if heads.keys % LANES:
            value = code.load(scores, base + keys - LANES)
            code.store(top, 0, code.maximum(code.load(top, 0), value))
    highest = code.max_lanes(code.load(top, 0), held)
    with code.loop(keys // LANES) as i:
        power = code.exp(code.load(scores, base + i * LANES) - code.spread(highest))
        code.store(scores, base + i * LANES, power)
        code.store(total, 0, code.load(total, 0) + power)
    return code.bind(code.number(1.0, 1) / code.sum_lanes(code.load(total, 0), held))
