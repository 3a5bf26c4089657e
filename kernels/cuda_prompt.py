"""Attention of many queries over a cache on a GPU's tensor cores.

    out[s] = softmax(q[s] · K[0 … p + s] · scale) V[0 … p + s]        p: tokens in the cache before

As `cuda_flash`, two tiles of keys under way in shared memory; integers of a cache become float16
there, their scales are multiplied into queries and result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.kernels.code import Argument
from qcompiler.kernels.cuda_cache import QUERIES, Decode, Source
from qcompiler.kernels.cuda_code import CudaKernel, address, call, cuda_kernel
from qcompiler.kernels.cuda_flash import ROWS, Flash, Tiles
from qcompiler.kernels.expression import Emitter, Expression


def prompt_attention(
    name: str, arguments: Sequence[Argument], sizes: Decode, tiles: Tiles, v: Source,
    expression: Expression,
) -> CudaKernel:  # fmt: skip
    """The kernel.

    Args:
        name: of the function.
        arguments: keys' cache, values' cache (float16 or uint8), position (int64), queries (token,
            head, element; float16, with the keys' scales: see `write_cache`), then the scales of
            the values and what the expression reads and writes.
        sizes: of the attention.
        tiles: the partition.
        v: of the values; their scale alone is read.
        expression: over (1, token, head · element), with the result as value 0; it stores it.
    """
    size, keys, rows = sizes.size, tiles.keys, tiles.queries
    bits, scale = sizes.bits, sizes.scale * math.log2(math.e)
    scale = scale / QUERIES if bits < 16 else scale
    raw = size * bits // 8  # bytes of a row of the cache
    piece_bytes = 16 if raw % 16 == 0 else 8  # that are copied at once
    blocks = (sizes.heads, -(-sizes.new // rows))
    window = sizes.window if sizes.window > 0 else 1 << 30
    with cuda_kernel(
        name, arguments, blocks, tiles.threads, tiles.shared(size, bits), tiles.resident
    ) as (made, buffers, (head, block), thread, memory):
        caches, queries = buffers[:2], buffers[3]
        position = T.Cast("int32", buffers[2][0])
        position = T.min(T.max(position, T.int32(0)), T.int32(sizes.capacity - sizes.new))
        position = T.Bind(position)
        flash = Flash(tiles, size, scale, thread, memory)
        at_tiles, tile_bytes, line = flash.at_tiles, flash.tile_bytes, flash.line
        at_raw = at_tiles + 2 * tile_bytes
        # The longest first: they read the most keys.
        first = T.Bind((blocks[1] - 1 - block) * rows)
        end = T.Bind(position + T.min(first + rows, sizes.new))  # behind the last key
        low: Any = T.int32(0)
        if sizes.window > 0:
            low = T.Bind(T.max(position + first - (window - 1), 0) // keys)
        turns = T.Bind((end + (keys - 1)) // keys - low)
        of = T.Bind(head // (sizes.heads // sizes.kv_heads))
        start = T.Bind(T.cast(of, "int64") * (sizes.capacity * size))

        def query(row: Any, piece: Any) -> None:
            token = T.Bind(first + row)
            spot = (T.min(token, sizes.new - 1) * sizes.heads + head) * size + piece * 8
            call("qc_copy16", address(memory, row * line + piece * 16), address(queries, spot),
                 T.cast(token < sizes.new, "int32"))  # fmt: skip

        def bring(turn: Any, slot: Any) -> None:
            """Keys and values of a tile; zeros behind the last one, whatever the cache holds."""

            def both(row: Any, piece: Any) -> None:
                t = T.Bind((low + turn) * keys + row)
                spot: Any = start + T.min(t, end - 1) * size + piece * (piece_bytes * 8 // bits)
                spot = T.Bind(spot * bits // 8 if bits < 16 else spot)
                to, step = (at_tiles + row * line, tile_bytes) if bits == 16 else (
                    at_raw + row * raw, keys * raw
                )  # fmt: skip
                to = T.Bind(to + slot * (2 * step) + piece * piece_bytes)
                for i, cache in enumerate(caches):
                    call(f"qc_copy{piece_bytes}", address(memory, to + i * step),
                         address(cache, spot), T.cast(t < end, "int32"))  # fmt: skip

            flash.each(keys, raw // piece_bytes, both)

        def widen(slot: Any) -> None:
            """A tile of integers as float16."""

            def both(row: Any, piece: Any) -> None:
                for i in range(2):
                    source = at_raw + (slot * 2 + i) * (keys * raw) + row * raw + piece * 8
                    to = at_tiles + i * tile_bytes + row * line + piece * (128 // bits)
                    call(f"qc_halves_of_{bits}", address(memory, to), address(memory, source))

            flash.each(keys, raw // 8, both)

        flash.start(query, bring)
        # The first row's last key.
        mine = T.Bind(position + first + flash.warp * ROWS + flash.lane // 4)
        with flash.tile(turns, bring) as turn:
            place: Any = T.int32(at_tiles)
            if bits == 16:
                place = T.Bind(at_tiles + turn % 2 * (2 * tile_bytes))
            else:
                widen(turn % 2)
                call("qc_sync")
            flash.score(place)
            key = T.Bind((low + turn) * keys)
            hides: Any = key + keys > position + first + 1
            if sizes.window > 0:
                hides = T.Or(hides, key <= position + first + (rows - 1 - window))
            with T.If(hides), T.Then():
                call("qc_mask_scores", address(flash.scores, 0, flash.columns * 4),
                     key + flash.lane % 4 * 2, mine, window, flash.columns)  # fmt: skip
            flash.weigh(place + tile_bytes)
        emitter = Emitter(expression, buffers)

        def write(row: Any, element: Any, found: Any) -> None:
            if v.scale is not None:
                found = found * v.step(buffers, of, element)
            emitter.vector([0, first + row], head * size + element, 1, T.Bind(found))

        flash.finish(sizes.new - first, write)
    return made
