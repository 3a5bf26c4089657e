"""Attention over a key-value cache that lies in place, and what writes to it.

    out[s] = softmax(q[s] · K[0 … p + s] · scale) V[0 … p + s]        p: tokens in the cache before

Keys are kept in panels of 16 tokens, [head][tokens/16][size][16], so that one vector of scores is a
chain of multiply-adds over contiguous memory; values in rows, [head][tokens][size]. The number of
keys read is that of the tokens there are, not the capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.kernels import code
from qcompiler.kernels.code import LANES, Argument
from qcompiler.kernels.expression import Access, Emitter, Expression
from qcompiler.kernels.heads import NEVER
from qcompiler.kernels.isa import Isa


@dataclass(frozen=True)
class Sizes:
    """Sizes of an attention over a cache, for one text.

    Attributes:
        heads, kv_heads: numbers of each.
        new: tokens read now.
        size: of a head; a multiple of 16.
        capacity: tokens that the cache holds.
        scale: what scores are multiplied by.
        window: tokens that a query sees, itself included; −1 for all.
    """

    heads: int
    kv_heads: int
    new: int
    size: int
    capacity: int
    scale: float
    window: int


@dataclass(frozen=True)
class Cached(Sizes):
    """Sizes on a CPU, where the capacity is a multiple of 16, and where queries lie.

    Attributes:
        q: access over (token, head, element); element by element contiguous.
    """

    q: Access


def cache_elements(kv_heads: int, capacity: int, size: int) -> int:
    """Elements of one cache, of keys or of values."""
    return kv_heads * capacity * size


def write_cache(
    name: str, arguments: Sequence[Argument], cached: Cached, k: Access, v: Access
) -> Any:
    """A kernel that puts new keys and values into their caches.

    Arguments: keys' cache, values' cache, position (int64), then those of `k` and `v`, which are
    accesses over (token, head, element).
    """
    with code.kernel(name, arguments) as (made, buffers):
        position = code.bind(T.Cast("int32", code.load(buffers[2], 0, 1)))
        with code.loop(cached.new) as s, code.loop(cached.kv_heads) as h:
            # Never beyond the cache, whatever the caller passed.
            p = code.bind(T.min(T.max(position + s, T.int32(0)), T.int32(cached.capacity - 1)))
            panel = (h * (cached.capacity // LANES) + p // LANES) * cached.size * LANES + p % LANES
            row = (h * cached.capacity + p) * cached.size
            with code.loop(cached.size) as d:
                value = code.load(buffers[k.argument], _at(k, s, h, d), 1)
                code.store(buffers[0], panel + d * LANES, value, 1)
            with code.loop(cached.size // LANES) as c:
                value = code.load(buffers[v.argument], _at(v, s, h, c * LANES))
                code.store(buffers[1], row + c * LANES, value)
    return made


def _at(access: Access, token: Any, head: Any, element: Any) -> Any:
    a, b, c = access.strides
    return access.offset + token * a + head * b + element * c


def cached_attention(
    name: str, arguments: Sequence[Argument], cached: Cached, expression: Expression, isa: Isa
) -> Any:
    """The kernel. Arguments: keys' cache, values' cache, position, then q's and the expression's.

    The expression runs over (1, token, head · element), the output being its value 0.
    """
    group = cached.heads // cached.kv_heads
    single = cached.new == 1
    across = 2 if isa.vectors >= 16 else 1
    high = min(group if single else cached.new, max(1, isa.vectors // across))
    wide = cached.size // LANES
    with code.kernel(name, arguments) as (made, buffers):
        emitter = Emitter(expression, buffers)
        tasks = cached.kv_heads if single else cached.heads
        with code.parallel(tasks) as task:
            position = code.bind(T.Cast("int32", code.load(buffers[2], 0, 1)))
            position = code.bind(
                T.min(T.max(position, T.int32(0)), T.int32(cached.capacity - cached.new))
            )
            shared = task if single else task // group
            keys = shared * cached.capacity * cached.size
            scores = code.scratch(high * cached.capacity, "float32")

            def place(first: Any, r: int) -> tuple[Any, Any]:
                """Token and head of row r of a block."""
                return (0, shared * group + first + r) if single else (first + r, task)

            def rows(first: Any, height: int) -> None:
                last = position if single else position + first + (height - 1)  # last key seen
                panels = code.bind((last + LANES) // LANES)
                _scores(buffers, cached, scores, keys, panels, height, across,
                        lambda r: place(first, r))  # fmt: skip
                factors = []
                for r in range(height):
                    token, _ = place(first, r)
                    factors.append(_softmax(cached, scores, r, panels, position + token))
                count = code.bind(last + 1)
                for c in range(0, wide, across):
                    parts = min(across, wide - c)
                    _weighted(buffers, cached, scores, keys, count, height, c, parts, factors,
                              emitter, lambda r: place(first, r))  # fmt: skip

            total = group if single else cached.new
            if total // high == 1:
                rows(0, high)
            else:
                with code.loop(total // high) as i:
                    rows(i * high, high)
            if total % high:
                rows(total // high * high, total % high)
    return made


def _scores(
    buffers: list[Any],
    cached: Cached,
    scores: Any,
    keys: Any,
    panels: Any,
    height: int,
    across: int,
    place: Any,
) -> None:
    q, size = cached.q, cached.size

    def tile(p: Any, count: int) -> None:
        sums = [code.scratch(LANES, "float32") for _ in range(height * count)]
        for total in sums:
            code.store(total, 0, code.number(0.0))
        with code.loop(size) as d:
            parts = [
                code.bind(code.load(buffers[0], keys + ((p + v) * size + d) * LANES))
                for v in range(count)
            ]
            for r in range(height):
                token, head = place(r)
                value = code.load(buffers[q.argument], _at(q, token, head, d), 1)
                value = code.spread(code.bind(value))
                for v in range(count):
                    total = sums[r * count + v]
                    code.store(total, 0, code.fma(value, parts[v], code.load(total, 0)))
        for r in range(height):
            for v in range(count):
                result = code.load(sums[r * count + v], 0) * code.number(cached.scale)
                code.store(scores, r * cached.capacity + (p + v) * LANES, result)

    # A panel more than needed is read where the tile is two wide; the cache ends on an even one.
    with code.loop((panels + across - 1) // across) as i:
        tile(i * across, across)


def _softmax(cached: Cached, scores: Any, r: int, panels: Any, place: Any) -> Any:
    """Hide what the query at `place` does not see, exponentiate, return 1 / the sum."""
    base = r * cached.capacity
    top, total, held = (code.scratch(LANES, "float32") for _ in range(3))
    code.store(top, 0, code.number(NEVER))
    code.store(total, 0, code.number(0.0))

    with code.loop(panels) as i:
        key = T.ramp(i * LANES, 1, LANES)
        value = code.load(scores, base + i * LANES)
        value = T.Select(key <= code.spread(place), value, code.number(NEVER))
        if cached.window > 0:
            far = code.spread(place - cached.window)
            value = T.Select(key > far, value, code.number(NEVER))
        value = code.bind(value)
        code.store(scores, base + i * LANES, value)
        code.store(top, 0, code.maximum(code.load(top, 0), value))
    highest = code.max_lanes(code.load(top, 0), held)
    with code.loop(panels) as i:
        power = code.exp(code.load(scores, base + i * LANES) - code.spread(highest))
        code.store(scores, base + i * LANES, power)
        code.store(total, 0, code.load(total, 0) + power)
    return code.bind(code.number(1.0, 1) / code.sum_lanes(code.load(total, 0), held))


def _weighted(
    buffers: list[Any],
    cached: Cached,
    scores: Any,
    keys: Any,
    count: Any,
    height: int,
    column: int,
    parts: int,
    factors: list[Any],
    emitter: Emitter,
    place: Any,
) -> None:
    """The sums of values, `parts` vectors of each row from vector `column` on."""
    sums = [code.scratch(LANES, "float32") for _ in range(height * parts)]
    for total in sums:
        code.store(total, 0, code.number(0.0))
    with code.loop(count) as t:
        values = [
            code.bind(code.load(buffers[1], keys + t * cached.size + (column + v) * LANES))
            for v in range(parts)
        ]
        for r in range(height):
            weight = code.load(scores, r * cached.capacity + t, 1)
            weight = code.spread(code.bind(weight))
            for v in range(parts):
                total = sums[r * parts + v]
                code.store(total, 0, code.fma(weight, values[v], code.load(total, 0)))
    for r in range(height):
        token, head = place(r)
        for v in range(parts):
            result = code.load(sums[r * parts + v], 0) * code.spread(factors[r])
            first = head * cached.size + (column + v) * LANES
            emitter.vector([0, token], first, LANES, code.bind(result))
