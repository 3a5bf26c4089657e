"""Attention over a key-value cache on a GPU: few queries, keys shared out among blocks.

    out[s] = softmax(q[s] · K[0 … p + s] · scale) V[0 … p + s]        p: tokens in the cache before

Caches are rows, [head][tokens][size]. A block reads a chunk of keys of one key head once for all
the query heads that share it (up to four), and leaves the largest score m, l = Σ exp(s − m) and
acc = Σ exp(s − m) v; the last block of a query puts the parts together (Dao et al. 2023,
"Flash-Decoding for long-context inference"). What the cache had before is read while the kernel
before still runs; the new keys are turned here, and kept. Scales of integer caches are multiplied
into the query and the result.

    M = max m,   out = Σ_parts exp(m − M) acc / Σ_parts exp(m − M) l
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.kernels import code
from qcompiler.kernels.code import Argument
from qcompiler.kernels.cuda_cache import Decode, Rotary, Source, stored, turned
from qcompiler.kernels.cuda_code import (
    WARP,
    CudaKernel,
    address,
    call,
    cuda_kernel,
    registers,
    value,
)
from qcompiler.kernels.cuda_decode_device import ATTENTION
from qcompiler.kernels.cuda_device import DEVICE
from qcompiler.kernels.expression import Access, Emitter, Expression

DEVICE |= ATTENTION

WARPS = 4  # of a block
NEVER = -3.0e38


def attend(
    name: str, arguments: Sequence[Argument], sizes: Decode, q: Access, k: Source, v: Source,
    rotary: Rotary | None, expression: Expression,
) -> CudaKernel:  # fmt: skip
    """The attention; it turns queries and keys, and writes the new keys and values.

    Args:
        name: of the function.
        arguments: keys' cache, values' cache (float16 or uint8), position (int64), workspace
            (float32), counters (int32), then those of the accesses and the expression.
        sizes: of it.
        q: access over (token, head, element).
        k, v: keys and values.
        rotary: None leaves queries and keys as they are.
        expression: over (1, token, head · element), with the result as value 0; it stores it.
    """
    size, lanes, sharers, parts = sizes.size, sizes.lanes, sizes.sharers, sizes.parts
    group = sizes.heads // sizes.kv_heads
    pieces = size // 8  # of 8 numbers
    deep = -(-pieces // lanes)  # that a lane holds of a key
    keys = WARP // lanes  # that a warp reads at once
    turns = sizes.chunk // (WARPS * keys)
    blocks = (parts, sizes.heads // sharers, sizes.new)
    at_ends = WARPS * sharers * size * 4  # behind each warp's sums
    at_queries = at_ends + WARPS * sharers * 8  # float32
    bits, words = sizes.bits, sizes.bits // 4  # words of eight numbers of a cache
    per = 2 if bits == 4 else 1  # numbers that are stored at once
    at_keys = at_queries + sharers * size * 4  # new ones, as in the cache
    at_values = at_keys + sizes.new * size * bits // 8
    shared = at_values + sizes.new * size * bits // 8
    move = f"qc_move{4 * words}"
    with cuda_kernel(name, arguments, blocks, WARPS * WARP, shared) as (
        made, buffers, (part, block, token), thread, memory,
    ):  # fmt: skip
        cache_k, cache_v, places, workspace, counters = buffers[:5]
        # An input, and so written before any kernel ran; what the cache had before, too.
        position = T.Cast("int32", places[0])
        position = T.min(T.max(position, T.int32(0)), T.int32(sizes.capacity - sizes.new))
        position = T.Bind(position)
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
            of = T.Bind(head // group)
            begin = T.Bind((first_part + part) * sizes.chunk)
            start = T.Bind(begin + warp * keys + lane // lanes)
            held_k, held_v = (registers(turns * deep * words, "int32") for _ in range(2))
            both = ((cache_k, held_k, at_keys), (cache_v, held_v, at_values))
            for cache, held, _ in both:
                for turn in range(turns):
                    t = T.Bind(T.max(T.min(start + turn * (WARPS * keys), position - 1), 0))
                    row = T.Bind((T.cast(of, "int64") * sizes.capacity + t) * size)
                    for i in range(deep):
                        at = T.min(piece + i * lanes, pieces - 1) * 8
                        spot = row + at if bits == 16 else (row + at) * bits // 8
                        call(move, address(held, (turn * deep + i) * words, words),
                             address(cache, spot))  # fmt: skip
            call("qc_after_previous")
            call("qc_let_next")
            for first in range(0, sharers * size, WARPS * WARP):
                index = T.Bind(thread + first)
                with T.If(index < sharers * size), T.Then():
                    x = turned(buffers, q, rotary, size, token, head + index // size, index % size)
                    spot = address(memory, at_queries + index * 4)
                    x = x * code.number(sizes.scale, 1) * k.step(buffers, of, index % size)
                    call("qc_put", spot, x)
            with T.If(begin + sizes.chunk > position), T.Then():
                threads, across = WARPS * WARP, size // per
                with T.serial(0, ((token + 1) * across + (threads - 1)) // threads) as turn:
                    index = T.Bind(turn * threads + thread)
                    new, element = T.Bind(index // across), T.Bind(index % across * per)
                    with T.If(new <= token), T.Then():
                        # One block keeps it: the first of its key head, at its own place.
                        mine = T.And(new == token, head % group == 0)
                        mine = T.And(mine, T.And(last >= begin, last < begin + sizes.chunk))
                        row = (T.cast(of, "int64") * sizes.capacity + last) * size
                        to = T.Bind((row + element) // per)
                        for source, turns_it, cache, at in (
                            (k, rotary, cache_k, at_keys), (v, None, cache_v, at_values),
                        ):  # fmt: skip
                            numbers = [
                                T.Bind(turned(buffers, source.x, turns_it, size, new, of,
                                              element + i))
                                for i in range(per)
                            ]  # fmt: skip
                            q_ = T.Bind(stored(buffers, source, bits, of, element, numbers))
                            if bits == 16:
                                call("qc_put_half", address(memory, at + index * 2), q_)
                            else:
                                call("qc_put_byte", address(memory, at + index), q_)
                            with T.If(mine), T.Then():
                                T.buffer_store(cache, q_, [to])
            call("qc_sync")
            for turn in range(turns):
                t = T.Bind(start + turn * (WARPS * keys))
                with T.If(T.And(t >= position, t <= last)), T.Then():
                    for _, held, begins in both:
                        for i in range(deep):
                            at = (t - position) * size + T.min(piece + i * lanes, pieces - 1) * 8
                            call(move, address(held, (turn * deep + i) * words, words),
                                 address(memory, begins + at * bits // 8))  # fmt: skip
            given = registers(sharers * deep * 8, "float32")
            for n in range(sharers):
                for i in range(deep):
                    at = T.Bind(piece + i * lanes)
                    for e in range(8):
                        spot = at_queries + (n * size + T.min(at, pieces - 1) * 8 + e) * 4
                        x = value("qc_get", address(memory, spot))
                        x = T.Select(at < pieces, x, T.float32(0))
                        T.buffer_store(given, x, [(n * deep + i) * 8 + e])
            scores = registers(sharers * turns, "float32")
            wide = address(registers(8, "float32"), 0, 8)
            ends = []  # of each warp: its largest score, its sum
            for n in range(sharers):
                top = registers(1, "float32")
                T.buffer_store(top, T.float32(NEVER), [0])
                for turn in range(turns):
                    dot = registers(1, "float32")
                    T.buffer_store(dot, T.float32(0), [0])
                    for i in range(deep):
                        at = (turn * deep + i) * words
                        call(f"qc_eight_{bits}", wide, address(held_k, at, words))
                        call("qc_dot8", address(dot), wide, address(given, (n * deep + i) * 8, 8))
                    score = T.Bind(value("qc_lanes_sum", dot[0], lanes))
                    t = start + turn * (WARPS * keys)
                    score = T.Select(T.And(t <= last, t >= low), score, T.float32(NEVER))
                    T.buffer_store(scores, score, [n * turns + turn])
                    T.buffer_store(top, code.maximum(top[0], scores[n * turns + turn]), [0])
                most = T.Bind(value("qc_warp_max", top[0]))
                total = registers(1, "float32")
                T.buffer_store(total, T.float32(0), [0])
                for turn in range(turns):
                    at = n * turns + turn
                    # A masked score is far below any other; a warp of such ones counts for nothing.
                    T.buffer_store(scores, code.exp(scores[at] - most, 1), [at])
                    T.buffer_store(total, total[0] + scores[at], [0])
                own = T.Select(piece == 0, total[0], T.float32(0))
                ends.append((most, T.Bind(value("qc_warp_sum", own))))
            for n, pair in enumerate(ends):
                with T.If(lane == 0), T.Then():
                    for i in range(2):
                        spot = at_ends + ((warp * sharers + n) * 2 + i) * 4
                        call("qc_put", address(memory, spot), pair[i])
            for n in range(sharers):
                acc = registers(deep * 8, "float32")
                for i in range(deep * 8):
                    T.buffer_store(acc, T.float32(0), [i])
                for turn in range(turns):
                    for i in range(deep):
                        at = (turn * deep + i) * words
                        call(f"qc_eight_{bits}", wide, address(held_v, at, words))
                        call("qc_add_scaled8", address(acc, i * 8, 8), wide,
                             scores[n * turns + turn])  # fmt: skip
                for i in range(deep):
                    call("qc_sum_groups8", address(acc, i * 8, 8), lanes)
                    at = T.Bind(piece + i * lanes)
                    with T.If(T.And(lane < lanes, at < pieces)), T.Then():
                        for e in range(8):
                            spot = ((warp * sharers + n) * size + at * 8 + e) * 4
                            call("qc_put", address(memory, spot), acc[i * 8 + e])
            call("qc_sync")
            rows = sizes.new * sizes.heads
            room = T.Bind((token * sizes.heads + head) * parts)  # of this query's parts
            after = rows * parts * size  # the largest scores and sums lie behind the results

            def merged(n: Any, of_warp: Callable[[int], Any]) -> tuple[Any, Any]:
                """The largest score of head n, and Σ over warps of exp(m − that) · of_warp."""
                tops = [
                    T.Bind(value("qc_get", address(memory, at_ends + (w * sharers + n) * 8)))
                    for w in range(WARPS)
                ]
                most: Any = tops[0]
                for top in tops[1:]:
                    most = code.maximum(most, top)
                most = T.Bind(most)
                result: Any = T.float32(0)
                for w in range(WARPS):
                    result = result + code.exp(tops[w] - most, 1) * of_warp(w)
                return most, result

            def sums(index: Any) -> Callable[[int], Any]:
                start = T.Bind(index * 4)
                return lambda w: value("qc_get", address(memory, start + w * sharers * size * 4))

            for begin in range(0, sharers * size, WARPS * WARP):
                index = T.Bind(thread + begin)
                with T.If(index < sharers * size), T.Then():
                    _, result = merged(index // size, sums(index))
                    to = (room + index // size * parts + part) * size + index % size
                    T.buffer_store(workspace, result, [to])
            with T.If(thread < sharers), T.Then():
                most, total = merged(thread, lambda w: value(
                    "qc_get", address(memory, at_ends + (w * sharers + thread) * 8 + 4)
                ))  # fmt: skip
                at = T.Bind(after + (room + thread * parts + part) * 2)
                T.buffer_store(workspace, most, [at])
                T.buffer_store(workspace, total, [at + 1])
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
                        result = found[0] * v.step(buffers, of, index % size)
                        emitter.vector([0, token], T.Bind(column), 1, T.Bind(result))
    return made
