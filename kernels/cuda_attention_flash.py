"""Attention over keys and values that are tensors, on a GPU's tensor cores.

    out = softmax(q K · scale + mask) V

As `cuda_flash`, with queries, keys and values in float16, two tiles of keys under way. A query that
a mask hides all keys from gets the mean of the values, as float32 arithmetic has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.kernels.code import Argument
from qcompiler.kernels.cuda_code import CudaKernel, address, call, cuda_kernel
from qcompiler.kernels.cuda_flash import ROWS, Flash, Tiles
from qcompiler.kernels.cuda_prompt_device import NEVER
from qcompiler.kernels.expression import Access, Emitter, Expression
from qcompiler.kernels.heads import NOWHERE, Heads, place

LARGEST = 256  # elements of a head
PIECE = 8  # float16 numbers that are copied at once


def computes(queries: int, size: int, value_size: int) -> bool:
    """Whether this kernel is for so many queries, with heads of so many elements."""
    return queries >= ROWS and size == value_size <= LARGEST and size % 16 == 0


def flash_attention(
    name: str, arguments: Sequence[Argument], heads: Heads, tiles: Tiles, expression: Expression
) -> CudaKernel:
    """The kernel.

    Args:
        name: of the function.
        arguments: what the heads' accesses (float16, aligned) and the expression name.
        heads: sizes and layout.
        tiles: the partition.
        expression: over the output's shape, with the result as value 0; it stores it.
    """
    h, size, keys, rows = heads, heads.size, tiles.keys, tiles.queries
    mask, log2 = h.mask, math.log2(math.e)
    blocks = (h.heads, -(-h.queries // rows), h.batch)
    with cuda_kernel(
        name, arguments, blocks, tiles.threads, tiles.shared(size, 16), tiles.resident
    ) as (made, buffers, (head, block, member), thread, memory):
        flash = Flash(tiles, size, h.scale * log2, thread, memory)
        at_tiles, tile_bytes, line = flash.at_tiles, flash.tile_bytes, flash.line
        lane, warp, columns = flash.lane, flash.warp, flash.columns
        first = T.Bind(block * rows)
        behind = h.keys - h.queries  # a causal query sees so many keys more than come before it
        end: Any = T.int32(h.keys)  # behind the last key
        if h.causal:
            end = T.Bind(T.max(T.min(first + (rows + behind), h.keys), 1))
        turns = T.Bind((end + (keys - 1)) // keys)
        of = T.Bind(head // (h.heads // h.kv_heads))

        def copy(access: Access, which: Any, token: Any, last: Any, to: Any, piece: Any) -> None:
            spot = place(access, T.cast(member, "int64"), which, T.min(token, last - 1))
            call("qc_copy16", address(memory, to + piece * 16),
                 address(buffers[access.argument], spot + piece * PIECE),
                 T.cast(token < last, "int32"))  # fmt: skip

        def query(row: Any, piece: Any) -> None:
            copy(h.q, head, T.Bind(first + row), h.queries, row * line, piece)

        def bring(turn: Any, slot: Any) -> None:
            """Keys and values of a tile; zeros behind the last one."""

            def both(row: Any, piece: Any) -> None:
                token = T.Bind(turn * keys + row)
                to = T.Bind(at_tiles + slot * (2 * tile_bytes) + row * line)
                for i, access in enumerate((h.k, h.v)):
                    copy(access, of, token, end, to + i * tile_bytes, piece)

            flash.each(keys, flash.pieces, both)

        mine = T.Bind(first + warp * ROWS + lane // 4)  # a lane's first query; 8 on, the other one

        def hide(key: Any) -> None:
            """Mask the scores of a tile; `key`: the lane's first."""
            if mask is not None:
                a, b, c, d = mask.strides
                held = buffers[mask.argument]
                start = T.Bind(T.cast(member, "int64") * a + head * b + mask.offset)
                for column in range(columns):
                    for i in range(4):
                        t = T.min(key + (column * 8 + i % 2), h.keys - 1)
                        token = T.min(mine + i // 2 * 8, h.queries - 1)
                        found = held[start + token * c + t * d]
                        score = flash.scores[column * 4 + i]
                        if mask.dtype == "bool":
                            score = T.Select(found != 0, score, T.float32(NEVER))
                        else:
                            added = score + found * T.float32(1 / h.scale)
                            score = T.max(added, T.float32(NEVER))
                        T.buffer_store(flash.scores, score, [column * 4 + i])
            if h.causal:
                call("qc_mask_scores", address(flash.scores, 0, columns * 4), key, mine + behind,
                     1 << 30, columns)  # fmt: skip
            if h.keys % keys:
                for column in range(columns):
                    for i in range(4):
                        there = key + (column * 8 + i % 2) < h.keys
                        score = flash.scores[column * 4 + i]
                        score = T.Select(there, score, T.float32(NOWHERE))
                        T.buffer_store(flash.scores, score, [column * 4 + i])

        flash.start(query, bring)
        with flash.tile(turns, bring) as turn:
            at = T.Bind(at_tiles + turn % 2 * (2 * tile_bytes))
            flash.score(at)
            hide(T.Bind(turn * keys + lane % 4 * 2))
            flash.weigh(at + tile_bytes, apart=mask is not None or h.causal)
        emitter = Emitter(expression, buffers)

        def write(row: Any, element: Any, found: Any) -> None:
            spot, column = [member, first + row], head * size + element
            if not h.merged:
                spot, column = [member, head, first + row], element
            emitter.vector(spot, column, 1, T.Bind(found))

        flash.finish(h.queries - first, write)
    return made
