"""Attention over heads: softmax(q kᵀ · scale + mask) v, one head at a time.

For a head, the keys are packed into panels once; then a few rows of queries at a time make their
scores, the softmax, and the weighted sum of the values, all in memory that stays in the first-level
cache. Scores are not written for a whole head, and nothing is transposed in the graph.

Queries, keys and values are float32, or bfloat16 (`attention_bf16`); all else is float32.

Source: Vaswani et al. 2017, Attention Is All You Need, eq. 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from tvm.tirx.script.builder import ir as T

from qcompiler.kernels import bfloat16, code
from qcompiler.kernels.attention_bf16 import NarrowProducts
from qcompiler.kernels.code import LANES, Argument
from qcompiler.kernels.expression import Emitter, Expression
from qcompiler.kernels.heads import NEVER, NOWHERE, Heads, Products, place, write_scores
from qcompiler.kernels.isa import Isa


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
    wide, keys = heads.width, heads.padded
    across = max(1, min(isa.vectors // 8, 2))  # vectors of scores, or of values, in a tile
    high = max(1, isa.vectors // across)
    if code.known(heads.queries):
        high = min(high, heads.queries)
    group = heads.heads // heads.kv_heads
    around = bfloat16.available(isa) if heads.narrow else nullcontext()
    with code.kernel(name, arguments) as (made, buffers), around:
        emitter = Emitter(expression, buffers)

        with code.parallel(heads.batch * heads.heads) as task:
            batch, head = task // heads.heads, task % heads.heads
            products: Products
            if heads.narrow:
                products = NarrowProducts(buffers, heads, isa, batch, head // group, high)
            else:
                products = _FloatProducts(buffers, heads, batch, head // group)
            scores = code.scratch(high * keys, "float32")

            def finish(first: Any, r: int, column: int, result: Any) -> None:
                """One vector of the output."""
                if heads.merged:
                    spot, base = [batch, first + r], head * heads.value_size
                else:
                    spot, base = [batch, head, first + r], 0
                left = min(LANES, heads.value_size - column)
                if left == LANES:
                    emitter.vector(spot, base + column, LANES, code.bind(result))
                    return
                held = code.scratch(LANES, "float32")
                code.store(held, 0, result)
                with code.loop(left) as lane:
                    one = code.bind(code.load(held, lane, 1))
                    emitter.vector(spot, base + column + lane, 1, one)

            def rows(first: Any, height: int) -> None:
                start = place(heads.q, batch, head, first)
                _tiles(keys // LANES, across, lambda p, count: products.scores(
                    scores, start, p, height, count))  # fmt: skip
                factors = [
                    _softmax(buffers, heads, scores, r, keys, batch, head, first + r)
                    for r in range(height)
                ]
                products.weigh(scores, height)
                for column in range(0, wide, across * LANES):
                    count = min(across, (wide - column) // LANES)
                    sums = products.weighted(scores, column, height, count)
                    for r in range(height):
                        for v in range(count):
                            result = code.load(sums[r * count + v], 0) * code.spread(factors[r])
                            finish(first, r, column + v * LANES, result)

            times = code.quotient(heads.queries, high)
            if code.same(times, 1):
                rows(0, high)
            else:
                with code.loop(times) as i:
                    rows(i * high, high)
            left = code.remainder_of(heads.queries, high)
            last = heads.queries - left
            if not code.known(left):
                with code.loop(left) as i:
                    rows(last + i, 1)
            elif left:
                rows(last, left)
    return made


def _tiles(panels: Any, across: int, tile: Callable[[Any, int], None]) -> None:
    if code.at_least(panels, across):
        with code.loop(code.quotient(panels, across)) as i:
            tile(i * across, across)
    left = code.remainder_of(panels, across)
    last = panels - left
    if not code.known(left):
        with code.loop(left) as i:
            tile(last + i, 1)
    elif left:
        tile(last, left)


class _FloatProducts:
    """In float32."""

    def __init__(self, buffers: list[Any], heads: Heads, batch: Any, shared: Any) -> None:
        self.buffers, self.heads = buffers, heads
        self.packed = code.scratch(heads.padded * heads.size, "float32")
        self._pack_keys(place(heads.k, batch, shared, 0))
        self.values, self.stride = buffers[heads.v.argument], heads.v.strides[2]
        self.first = place(heads.v, batch, shared, 0)
        if heads.value_size % LANES:
            self.values = self._padded_values()
            self.first, self.stride = 0, heads.width

    def _pack_keys(self, start: Any) -> None:
        """(keys, size) rows → panels [keys/16][size][16]; lanes beyond the last key are zero."""
        heads, packed = self.heads, self.packed
        source, stride = self.buffers[heads.k.argument], heads.k.strides[2]
        whole = heads.keys // LANES

        def panel(p: Any, lanes: Any) -> None:
            if not code.same(lanes, LANES):
                with code.loop(heads.size) as d:
                    code.store(packed, (p * heads.size + d) * LANES, code.number(0.0))
            with code.loop(lanes) as lane, code.loop(heads.size) as d:
                value = code.load(source, start + (p * LANES + lane) * stride + d, 1)
                code.store(packed, (p * heads.size + d) * LANES + lane, value, 1)

        if code.at_least(whole, 1):
            with code.loop(whole) as p:
                panel(p, LANES)
        left = code.remainder_of(heads.keys, LANES)
        if not code.known(left):
            with code.loop(code.minimum(left, 1)):
                panel(whole, left)
        elif left:
            panel(whole, left)

    def _padded_values(self) -> Any:
        heads, wide = self.heads, self.heads.width
        padded = code.scratch(heads.keys * wide, "float32")
        with code.loop(heads.keys) as t:
            for c in range(0, wide, LANES):
                code.store(padded, t * wide + c, code.number(0.0))
            with code.loop(heads.value_size) as d:
                value = code.load(self.values, self.first + t * self.stride + d, 1)
                code.store(padded, t * wide + d, value, 1)
        return padded

    def scores(self, scores: Any, start: Any, panel: Any, height: int, count: int) -> None:
        heads = self.heads
        source, stride = self.buffers[heads.q.argument], heads.q.strides[2]
        sums = _zeros(height * count)
        with code.loop(heads.size) as d:
            parts = [
                code.bind(code.load(self.packed, ((panel + v) * heads.size + d) * LANES))
                for v in range(count)
            ]
            for r in range(height):
                value = code.spread(code.bind(code.load(source, start + r * stride + d, 1)))
                for v in range(count):
                    total = sums[r * count + v]
                    code.store(total, 0, code.fma(value, parts[v], code.load(total, 0)))
        write_scores(heads, scores, sums, panel, height, count)

    def weigh(self, scores: Any, height: int) -> None:
        """The scores are read as they are."""

    def weighted(self, scores: Any, column: int, height: int, count: int) -> list[Any]:
        sums = _zeros(height * count)
        with code.loop(self.heads.keys) as t:
            start = self.first + t * self.stride + column
            parts = [code.bind(code.load(self.values, start + v * LANES)) for v in range(count)]
            for r in range(height):
                weight = code.load(scores, r * self.heads.padded + t, 1)
                weight = code.spread(code.bind(weight))
                for v in range(count):
                    total = sums[r * count + v]
                    code.store(total, 0, code.fma(weight, parts[v], code.load(total, 0)))
        return sums


def _last_vector(
    heads: Heads, scores: Any, base: Any, top: Any, masked: Callable[[Any, int], Any]
) -> None:
    """The keys that fill no whole vector, and the lanes beyond them."""
    keys, left = heads.keys, code.remainder_of(heads.keys, LANES)
    whole = keys - left

    def largest() -> None:
        value = code.load(scores, base + whole)
        code.store(top, 0, code.maximum(code.load(top, 0), value))

    if not code.known(left):
        with code.loop(code.minimum(left, 1)):
            with code.loop(left) as t:
                code.store(scores, base + (whole + t), masked(whole + t, 1), 1)
            with code.loop(LANES - left) as t:
                code.store(scores, base + (keys + t), code.number(NOWHERE, 1), 1)
            largest()
    elif left:
        for t in range(whole, keys):
            code.store(scores, base + t, masked(t, 1), 1)
        for t in range(keys, whole + LANES):
            code.store(scores, base + t, code.number(NOWHERE, 1), 1)
        largest()


def _zeros(count: int) -> list[Any]:
    sums = [code.scratch(LANES, "float32") for _ in range(count)]
    for total in sums:
        code.store(total, 0, code.number(0.0))
    return sums


def _softmax(
    buffers: list[Any],
    heads: Heads,
    scores: Any,
    r: int,
    keys: Any,
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
    plain = heads.mask is None and not heads.causal and code.same(heads.keys, keys)
    last = query + heads.keys - heads.queries  # the last key that a causal query sees

    def masked(t: Any, lanes: int) -> Any:
        value = code.load(scores, r * keys + t, lanes)
        if heads.mask is not None:
            a, b, c, d = heads.mask.strides
            start = heads.mask.offset + batch * a + head * b + query * c + t * d
            buffer = buffers[heads.mask.argument]
            if code.same(d, 0):
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
        if code.at_least(heads.keys, LANES):
            with code.loop(heads.keys // LANES) as i:
                value = masked(i * LANES, LANES)
                code.store(scores, base + i * LANES, value)
                code.store(top, 0, code.maximum(code.load(top, 0), value))
        _last_vector(heads, scores, base, top, masked)
    highest = code.max_lanes(code.load(top, 0), held)
    with code.loop(keys // LANES) as i:
        power = code.exp(code.load(scores, base + i * LANES) - code.spread(highest))
        code.store(scores, base + i * LANES, power)
        code.store(total, 0, code.load(total, 0) + power)
    return code.bind(code.number(1.0, 1) / code.sum_lanes(code.load(total, 0), held))
