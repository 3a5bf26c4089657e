"""Attention of many queries over a cache on a GPU's tensor cores.

    out[s] = softmax(q[s] · K[0 … p + s] · scale) V[0 … p + s]        p: tokens in the cache before

A block takes 16 queries a warp of one head and goes through the keys a tile at a time, two tiles
under way in shared memory (integers of a cache become float16 there, their scales are multiplied
into queries and result). Products are of float16 with float32 sums; the softmax goes along in
float32: with m the largest score so far, sums of exp(s − m) and of exp(s − m) v are scaled down
where m grows (Dao 2023, "FlashAttention-2", algorithm 1). Scores never leave registers: the sums
of one product lie as the next one's operand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.errors import UnsupportedError
from qcompiler.kernels.code import Argument
from qcompiler.kernels.cuda_cache import QUERIES, Decode, Source
from qcompiler.kernels.cuda_code import (
    HOPPER,
    WARP,
    CudaKernel,
    Gpu,
    address,
    call,
    cuda_kernel,
    registers,
    value,
)
from qcompiler.kernels.cuda_device import DEVICE
from qcompiler.kernels.cuda_prompt_device import NEVER, PROMPT
from qcompiler.kernels.expression import Emitter, Expression

ROWS = 16  # queries of a warp
PAD = 16  # bytes behind a row in shared memory: eight rows then lie in different banks

DEVICE |= PROMPT


@dataclass(frozen=True)
class Tiles:
    """How an attention is shared out.

    Attributes:
        warps: of a block, each with 16 queries.
        keys: of a tile, a multiple of 16.
    """

    warps: int
    keys: int

    @property
    def queries(self) -> int:
        """Of a block."""
        return self.warps * ROWS

    def shared(self, size: int, bits: int) -> int:
        """Bytes of shared memory: queries, and two tiles of keys and values; then the result.

        Tiles of integers lie there twice as they are in the cache, and once as float16.
        """
        line = size * 2 + PAD
        tiles = 4 * self.keys * line
        if bits < 16:
            tiles = 2 * self.keys * (line + 2 * size * bits // 8)
        return max(self.queries * line + tiles, self.queries * (size + 8) * 4)


def choose_tiles(sizes: Decode, gpu: Gpu = HOPPER) -> Tiles:
    """The largest blocks of which every processor gets one; else small ones.

    Raises:
        UnsupportedError: if none fits into shared memory.
    """
    keys = 64 if sizes.size <= 128 else 32
    for tiles in (Tiles(8, keys), Tiles(4, keys), Tiles(2, keys), Tiles(2, 16)):
        many = sizes.heads * -(-sizes.new // tiles.queries) >= gpu.processors
        if tiles.shared(sizes.size, sizes.bits) <= gpu.shared and (many or tiles.warps == 2):
            return tiles
    raise UnsupportedError(f"attention of heads of {sizes.size}: no GPU kernel has the room")


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
    line, pieces, threads = size * 2 + PAD, size // 8, tiles.warps * WARP
    steps, columns = size // 16, keys // 8
    at_tiles, tile_bytes = rows * line, keys * line
    bits, scale = sizes.bits, sizes.scale * math.log2(math.e)
    raw = size * bits // 8  # bytes of a row of the cache
    piece_bytes = 16 if raw % 16 == 0 else 8  # that are copied at once
    at_raw, scale = (at_tiles + 2 * tile_bytes, scale / QUERIES) if bits < 16 else (0, scale)
    blocks = (sizes.heads, -(-sizes.new // rows))
    window = sizes.window if sizes.window > 0 else 1 << 30
    resident = size <= 128  # queries stay in registers
    with cuda_kernel(name, arguments, blocks, threads, tiles.shared(size, sizes.bits)) as (
        made, buffers, (head, block), thread, memory,
    ):  # fmt: skip
        caches, queries = buffers[:2], buffers[3]
        position = T.Cast("int32", buffers[2][0])
        position = T.min(T.max(position, T.int32(0)), T.int32(sizes.capacity - sizes.new))
        position = T.Bind(position)
        lane, warp = T.Bind(thread % WARP), T.Bind(thread // WARP)
        # The longest first: they read the most keys.
        first = T.Bind((blocks[1] - 1 - block) * rows)
        end = T.Bind(position + T.min(first + rows, sizes.new))  # behind the last key
        low: Any = T.int32(0)
        if sizes.window > 0:
            low = T.Bind(T.max(position + first - (window - 1), 0) // keys)
        turns = T.Bind((end + (keys - 1)) // keys - low)
        of = T.Bind(head // (sizes.heads // sizes.kv_heads))
        start = T.Bind(T.cast(of, "int64") * (sizes.capacity * size))

        def each(count: int, pieces: int, body: Any) -> None:
            """body(row, piece) for `count` rows, shared out among the threads."""
            for begin in range(0, count * pieces, threads):
                at = T.Bind(thread + begin)
                with T.If(at < count * pieces), T.Then():
                    body(T.Bind(at // pieces), T.Bind(at % pieces))

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

            each(keys, raw // piece_bytes, both)

        def widen(slot: Any) -> None:
            """A tile of integers as float16."""

            def both(row: Any, piece: Any) -> None:
                for i in range(2):
                    source = at_raw + (slot * 2 + i) * (keys * raw) + row * raw + piece * 8
                    to = at_tiles + i * tile_bytes + row * line + piece * (128 // bits)
                    call(f"qc_halves_of_{bits}", address(memory, to), address(memory, source))

            each(keys, raw // 8, both)

        a = registers(4 * (steps if resident else 2), "int32")
        b, p = registers(4, "int32"), registers(columns * 2, "int32")
        scores, sums = registers(columns * 4, "float32"), registers(size // 2, "float32")
        top, total, factor = (registers(2, "float32") for _ in range(3))

        def fragment(step: int, to: int) -> None:
            at = (warp * ROWS + lane % 16) * line + (step * 2 + lane // 16) * 16
            call("qc_ldmatrix", address(a, to, 4), address(memory, at))

        def score(place: Any) -> None:
            """Scores = q · K of a tile."""
            for i in range(columns * 4):
                T.buffer_store(scores, T.float32(0), [i])
            for pair in range(-(-steps // 2)):
                of = [step for step in (2 * pair, 2 * pair + 1) if step < steps]
                for column in range(columns):
                    piece = pair * 4 + lane // 8
                    piece = piece if len(of) == 2 else T.min(piece, pieces - 1)
                    at = place + (column * 8 + lane % 8) * line + piece * 16
                    call("qc_ldmatrix", address(b, 0, 4), address(memory, at))
                    for step in of:
                        if not resident and column == 0:
                            fragment(step, (step % 2) * 4)
                        held = address(a, (step if resident else step % 2) * 4, 4)
                        call("qc_mma_f16", address(scores, column * 4, 4), held,
                             address(b, step % 2 * 2, 2))  # fmt: skip

        def weigh(place: Any) -> None:
            """Sums += exp(scores) · V of a tile."""
            for step in range(keys // 16):
                for pair in range(size // 16):
                    at = place + (step * 16 + lane % 16) * line + (pair * 2 + lane // 16) * 16
                    call("qc_ldmatrix_t", address(b, 0, 4), address(memory, at))
                    for half in range(2):
                        call("qc_mma_f16", address(sums, (pair * 2 + half) * 4, 4),
                             address(p, step * 4, 4), address(b, half * 2, 2))  # fmt: skip

        call("qc_after_previous")
        call("qc_let_next")
        each(rows, pieces, query)
        bring(T.int32(0), T.int32(0))
        call("qc_commit")
        for buffer, count, begin in (
            (sums, size // 2, 0.0), (top, 2, NEVER), (total, 2, 0.0),
        ):  # fmt: skip
            for i in range(count):
                T.buffer_store(buffer, T.float32(begin), [i])
        call("qc_wait", 0)
        call("qc_sync")
        if resident:
            for step in range(steps):
                fragment(step, step * 4)
        mine = T.Bind(position + first + warp * ROWS + lane // 4)  # the first row's last key
        with T.serial(0, turns) as turn:
            call("qc_wait", 0)
            call("qc_sync")
            with T.If(turn + 1 < turns), T.Then():
                bring(turn + 1, (turn + 1) % 2)
            call("qc_commit")
            place: Any = T.int32(at_tiles)
            if bits == 16:
                place = T.Bind(at_tiles + turn % 2 * (2 * tile_bytes))
            else:
                widen(turn % 2)
                call("qc_sync")
            score(place)
            key = T.Bind((low + turn) * keys)
            hides: Any = key + keys > position + first + 1
            if sizes.window > 0:
                hides = T.Or(hides, key <= position + first + (rows - 1 - window))
            with T.If(hides), T.Then():
                call("qc_mask_scores", address(scores, 0, columns * 4), key + lane % 4 * 2, mine,
                     window, columns)  # fmt: skip
            call("qc_soften", address(scores, 0, columns * 4), address(top, 0, 2),
                 address(total, 0, 2), address(factor, 0, 2),
                 T.float32(scale), columns)  # fmt: skip
            call("qc_scale_sums", address(sums, 0, size // 2), address(factor, 0, 2), size // 2)
            call("qc_to_halves", address(p, 0, columns * 2), address(scores, 0, columns * 4),
                 columns * 2)  # fmt: skip
            weigh(place + tile_bytes)
        call("qc_share_sums", address(total, 0, 2))
        call("qc_scale_sums", address(sums, 0, size // 2), address(total, 0, 2), size // 2)
        # Turned round in shared memory, so that whole rows are stored.
        call("qc_sync")
        wide = size + 8
        for column in range(size // 8):
            for i in range(4):
                row = warp * ROWS + lane // 4 + i // 2 * 8
                at = row * wide + column * 8 + lane % 4 * 2 + i % 2
                call("qc_put", address(memory, at * 4), sums[column * 4 + i])
        call("qc_sync")
        emitter = Emitter(expression, buffers)
        with T.serial(0, rows * size // threads) as turn:
            at = T.Bind(turn * threads + thread)
            row, element = T.Bind(at // size), T.Bind(at % size)
            with T.If(first + row < sizes.new), T.Then():
                found = value("qc_get", address(memory, (row * wide + element) * 4))
                if v.scale is not None:
                    found = found * v.step(buffers, of, element)
                emitter.vector([0, first + row], head * size + element, 1, T.Bind(found))
    return made
