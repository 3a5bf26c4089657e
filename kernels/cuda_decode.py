"""Attention over a key-value cache in float16 on a GPU: few queries, keys shared out among blocks.

    out[s] = softmax(q[s] · K[0 … p + s] · scale) V[0 … p + s]        p: tokens in the cache before

Caches are rows, [head][tokens][size]. A block reads `CHUNK` keys of one key head once for all the
query heads that share it (up to four), and leaves the largest score m, Σ exp(s − m) and
Σ exp(s − m) v; the last block of a query puts the parts together (Dao et al. 2023,
"Flash-Decoding for long-context inference").

    M = max m,   out = Σ_parts exp(m − M) acc / Σ_parts exp(m − M) l
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.kernels import code
from qcompiler.kernels.code import Argument
from qcompiler.kernels.cuda_code import (
    WARP,
    CudaKernel,
    address,
    call,
    cuda_kernel,
    registers,
    value,
)
from qcompiler.kernels.cuda_expressions import SCRATCH, THREADS
from qcompiler.kernels.expression import Access, Emitter, Expression

WARPS = 4  # of a block
SHARERS = 4  # query heads that a block computes at most
NEVER = -3.0e38


@dataclass(frozen=True)
class Decode:
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

    @property
    def chunk(self) -> int:
        """Keys of a block."""
        return 64 if self.size <= 128 else 32

    @property
    def parts(self) -> int:
        """Blocks that share out the keys of a query at most."""
        return -(-self.capacity // self.chunk)

    @property
    def sharers(self) -> int:
        """Query heads that a block computes."""
        group = self.heads // self.kv_heads
        return max(n for n in range(1, SHARERS + 1) if group % n == 0)

    @property
    def counters(self) -> int:
        """int32 numbers, zero before and after."""
        return self.new * (self.heads // self.sharers)

    @property
    def workspace(self) -> int:
        """float32 numbers of the parts: sums, then the largest score and the sum of powers."""
        return self.new * self.heads * self.parts * (self.size + 2)

    @property
    def lanes(self) -> int:
        """Of a warp that read one key: a power of two."""
        return min(WARP, 1 << (self.size // 8 - 1).bit_length())


@dataclass(frozen=True)
class Rotary:
    """Tables of the rotary embedding.

    Attributes:
        cos, sin: accesses over (position, pair).
        positions: over (token).
        rows, pairs: of the tables.
        neighbours: whether pairs are neighbours, not the two halves.
    """

    cos: Access
    sin: Access
    positions: Access
    rows: int
    pairs: int
    neighbours: bool


def write_cache(
    name: str, arguments: Sequence[Argument], sizes: Decode, q: Access, k: Access, v: Access,
    rotary: Rotary | None,
) -> CudaKernel:  # fmt: skip
    """A kernel that turns queries and keys, and puts keys and values into their caches.

    Args:
        name: of the function.
        arguments: keys' cache, values' cache (float16), position (int64), where the queries go
            (token, head, element; float32), then those of the accesses.
        sizes: of the attention.
        q, k, v: accesses over (token, head, element).
        rotary: None leaves queries and keys as they are.
    """
    heads, kv_heads, size, half = sizes.heads, sizes.kv_heads, sizes.size, sizes.size // 2
    every = heads + 2 * kv_heads
    count = sizes.new * every * half
    with cuda_kernel(name, arguments, (-(-count // THREADS),), THREADS) as (
        made, buffers, (block,), thread, _,
    ):  # fmt: skip
        call("qc_after_previous")
        call("qc_let_next")
        index = T.Bind(block * THREADS + thread)

        def pair(access: Access, token: Any, head: Any, first: Any, second: Any) -> tuple[Any, Any]:
            a, b, c = access.strides
            start = T.Bind(access.offset + token * a + head * b)
            held = buffers[access.argument]
            return T.Bind(held[start + first * c]), T.Bind(held[start + second * c])

        def turned(access: Access, token: Any, head: Any, j: Any, keep: Any) -> None:
            """keep(element, number), twice."""
            pairs = rotary.pairs if rotary is not None else 0

            def plain() -> None:
                spot = T.Bind(2 * j)
                for i, x in enumerate(pair(access, token, head, spot, spot + 1)):
                    keep(spot + i, x)

            if rotary is None:
                plain()
                return
            with T.If(j < pairs):
                with T.Then():
                    first = T.Bind(2 * j if rotary.neighbours else j)
                    second = T.Bind(first + (1 if rotary.neighbours else pairs))
                    x, y = pair(access, token, head, first, second)
                    where = rotary.positions
                    found = buffers[where.argument][where.offset + token * where.strides[0]]
                    row = T.Cast("int32", found)
                    row = T.Bind(T.min(T.max(row, T.int32(0)), T.int32(rotary.rows - 1)))
                    c, s = (
                        T.Bind(buffers[t.argument][
                            t.offset + row * t.strides[0] + j * t.strides[1]
                        ])
                        for t in (rotary.cos, rotary.sin)
                    )  # fmt: skip
                    keep(first, x * c - y * s)
                    keep(second, y * c + x * s)
                if pairs < half:
                    with T.Else():
                        plain()

        with T.If(index < count), T.Then():
            j = T.Bind(index % half)
            head = T.Bind(index // half % every)
            token = T.Bind(index // (half * every))
            position = T.Cast("int32", buffers[2][0])
            # Never beyond the cache, whatever the caller passed.
            spot = T.Bind(T.min(T.max(position + token, T.int32(0)), T.int32(sizes.capacity - 1)))

            def to_cache(cache: Any, of: Any) -> Any:
                start = T.Bind((of * sizes.capacity + spot) * size)

                def keep(element: Any, x: Any) -> None:
                    T.buffer_store(cache, T.Cast("float16", x), [start + element])

                return keep

            def to_queries(element: Any, x: Any) -> None:
                T.buffer_store(buffers[3], x, [(token * heads + head) * size + element])

            with T.If(head < heads):
                with T.Then():
                    turned(q, token, head, j, to_queries)
                with T.Else(), T.If(head < heads + kv_heads):
                    with T.Then():
                        of = T.Bind(head - heads)
                        turned(k, token, of, j, to_cache(buffers[0], of))
                    with T.Else():
                        of = T.Bind(head - (heads + kv_heads))
                        keep = to_cache(buffers[1], of)
                        spot_of = T.Bind(2 * j)
                        for i, x in enumerate(pair(v, token, of, spot_of, spot_of + 1)):
                            keep(spot_of + i, x)
    return made


def attend(
    name: str, arguments: Sequence[Argument], sizes: Decode, expression: Expression
) -> CudaKernel:
    """The attention.

    Args:
        name: of the function.
        arguments: keys' cache, values' cache (float16), position (int64), queries (token, head,
            element; float32), workspace (float32), counters (int32), then the expression's.
        sizes: of it.
        expression: over (1, token, head · element), with the result as value 0; it stores it.
    """
    size, lanes, sharers, parts = sizes.size, sizes.lanes, sizes.sharers, sizes.parts
    pieces = size // 8  # of 8 numbers
    deep = -(-pieces // lanes)  # that a lane holds of a key
    keys = WARP // lanes  # that a warp reads at once
    turns = sizes.chunk // (WARPS * keys)
    blocks = (parts, sizes.heads // sharers, sizes.new)
    shared = SCRATCH + WARPS * sharers * size * 4
    with cuda_kernel(name, arguments, blocks, WARPS * WARP, shared) as (
        made, buffers, (part, block, token), thread, memory,
    ):  # fmt: skip
        cache_k, cache_v, places, queries, workspace, counters = buffers[:6]
        call("qc_after_previous")
        call("qc_let_next")
        position = T.Cast("int32", places[0])
        position = T.min(T.max(position, T.int32(0)), T.int32(sizes.capacity - sizes.new))
        last = T.Bind(position + token)
        low: Any = T.int32(0)
        if sizes.window > 0:
            low = T.Bind(T.max(last - (sizes.window - 1), 0))
        first_part = T.Bind(low // sizes.chunk)
        active = T.Bind(last // sizes.chunk - first_part + 1)
        with T.If(part < active), T.Then():
            lane, warp = T.Bind(thread % WARP), T.Bind(thread // WARP)
            piece = T.Bind(lane % lanes)
            head = T.Bind(block * sharers)
            start = T.Bind((first_part + part) * sizes.chunk + warp * keys + lane // lanes)
            of = T.Bind(head // (sizes.heads // sizes.kv_heads))
            held_k, held_v = (registers(turns * deep * 4, "int32") for _ in range(2))
            for cache, held in ((cache_k, held_k), (cache_v, held_v)):
                for turn in range(turns):
                    t = T.Bind(T.min(start + turn * (WARPS * keys), last))
                    row = T.Bind((T.cast(of, "int64") * sizes.capacity + t) * size)
                    for i in range(deep):
                        at = T.min(piece + i * lanes, pieces - 1) * 8
                        call("qc_move16", address(held, (turn * deep + i) * 4, 4),
                             address(cache, row + at))  # fmt: skip
            given = registers(sharers * deep * 8, "float32")
            for n in range(sharers):
                for i in range(deep):
                    at = piece + i * lanes
                    row = (token * sizes.heads + head + n) * size
                    for e in range(8):
                        x = queries[row + T.min(at, pieces - 1) * 8 + e]
                        x = T.Select(at < pieces, x * code.number(sizes.scale, 1), T.float32(0))
                        T.buffer_store(given, x, [(n * deep + i) * 8 + e])
            scores = registers(sharers * turns, "float32")
            tops, sums = [], []
            for n in range(sharers):
                top = registers(1, "float32")
                T.buffer_store(top, T.float32(NEVER), [0])
                for turn in range(turns):
                    dot = registers(1, "float32")
                    T.buffer_store(dot, T.float32(0), [0])
                    for i in range(deep):
                        call("qc_dot8", address(dot), address(held_k, (turn * deep + i) * 4, 4),
                             address(given, (n * deep + i) * 8, 8))  # fmt: skip
                    score = T.Bind(value("qc_lanes_sum", dot[0], lanes))
                    t = start + turn * (WARPS * keys)
                    score = T.Select(T.And(t <= last, t >= low), score, T.float32(NEVER))
                    T.buffer_store(scores, score, [n * turns + turn])
                    T.buffer_store(top, code.maximum(top[0], scores[n * turns + turn]), [0])
                tops.append(T.Bind(value("qc_block_max", top[0], address(memory), WARPS)))
                total = registers(1, "float32")
                T.buffer_store(total, T.float32(0), [0])
                for turn in range(turns):
                    at = n * turns + turn
                    # A masked score is far below any other of its block.
                    T.buffer_store(scores, code.exp(scores[at] - tops[n], 1), [at])
                    T.buffer_store(total, total[0] + scores[at], [0])
                own = T.Select(piece == 0, total[0], T.float32(0))
                sums.append(T.Bind(value("qc_block_sum", own, address(memory), WARPS)))
            for n in range(sharers):
                acc = registers(deep * 8, "float32")
                for i in range(deep * 8):
                    T.buffer_store(acc, T.float32(0), [i])
                for turn in range(turns):
                    for i in range(deep):
                        call("qc_add_scaled8", address(acc, i * 8, 8),
                             address(held_v, (turn * deep + i) * 4, 4),
                             scores[n * turns + turn])  # fmt: skip
                for i in range(deep):
                    call("qc_sum_groups8", address(acc, i * 8, 8), lanes)
                    at = T.Bind(piece + i * lanes)
                    with T.If(T.And(lane < lanes, at < pieces)), T.Then():
                        for e in range(8):
                            spot = ((warp * sharers + n) * size + at * 8 + e) * 4
                            call("qc_put", address(memory, SCRATCH + spot), acc[i * 8 + e])
            call("qc_sync")
            rows = sizes.new * sizes.heads
            room = T.Bind((token * sizes.heads + head) * parts)  # of this query's parts
            for begin in range(0, sharers * size, WARPS * WARP):
                index = T.Bind(thread + begin)
                with T.If(index < sharers * size), T.Then():
                    result: Any = T.float32(0)
                    for w in range(WARPS):
                        at = SCRATCH + (w * sharers * size + index) * 4
                        result = result + value("qc_get", address(memory, at))
                    to = (room + index // size * parts + part) * size + index % size
                    T.buffer_store(workspace, result, [to])
            after = rows * parts * size  # the largest scores and sums lie behind the results
            with T.If(thread == 0), T.Then():
                for n in range(sharers):
                    at = T.Bind(after + (room + n * parts + part) * 2)
                    T.buffer_store(workspace, tops[n], [at])
                    T.buffer_store(workspace, sums[n], [at + 1])
            counter = address(counters, token * (sizes.heads // sharers) + block)
            with T.If(value("qc_is_last", counter, active) != 0), T.Then():
                emitter = Emitter(expression, buffers)
                for begin in range(0, sharers * size, WARPS * WARP):
                    index = T.Bind(thread + begin)
                    with T.If(index < sharers * size), T.Then():
                        mine = T.Bind(room + index // size * parts)
                        found = registers(1, "float32")
                        call("qc_merge_parts", address(found), address(workspace, mine * size),
                             address(workspace, after + mine * 2), active, size,
                             index % size)  # fmt: skip
                        column = (head + index // size) * size + index % size
                        emitter.vector([0, token], T.Bind(column), 1, T.Bind(found[0]))
    return made
