"""The products of an attention over bfloat16 queries, keys and values, summed in float32.

The exponentials of the softmax are rounded to bfloat16 before they weigh the values. Keys and
values are packed once for a head, as `bfloat16.pack` packs a matrix's columns; places past the last
key are zero.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.kernels import bfloat16, code
from qcompiler.kernels.code import LANES
from qcompiler.kernels.heads import Heads, place, write_scores
from qcompiler.kernels.isa import Isa


class NarrowProducts:
    """`heads.Products` in bfloat16; a head's size is a multiple of `isa.narrow_depth`."""

    def __init__(
        self, buffers: list[Any], heads: Heads, isa: Isa, batch: Any, shared: Any, high: int
    ) -> None:
        self.buffers, self.heads, self.isa, self.depth = buffers, heads, isa, isa.narrow_depth
        self.packed = code.scratch(heads.padded * heads.size, "uint16")
        self.values = code.scratch(heads.padded * heads.width, "uint16")
        self.shares = code.scratch(high * heads.padded, "uint16")
        self._pack_keys(place(heads.k, batch, shared, 0))
        self._pack_values(place(heads.v, batch, shared, 0))

    def _pack_keys(self, start: Any) -> None:
        """(keys, size) rows → panels [keys/16][size/depth][16][depth]."""
        heads, depth = self.heads, self.depth
        source, stride = self.buffers[heads.k.argument], heads.k.strides[2]

        def panel(p: Any, lanes: int) -> None:
            base = p * heads.size * LANES
            if lanes < LANES:
                zeros = T.broadcast(T.uint16(0), LANES)
                with code.loop(heads.size) as d:
                    code.store(self.packed, base + d * LANES, zeros)
            with code.loop(lanes) as lane, code.loop(heads.size // depth) as d:
                word = code.load(source, start + (p * LANES + lane) * stride + d * depth, depth)
                code.store(self.packed, base + (d * LANES + lane) * depth, word, depth)

        whole = heads.keys // LANES
        if whole:
            with code.loop(whole) as p:
                panel(p, LANES)
        if heads.keys % LANES:
            panel(whole, heads.keys % LANES)

    def _pack_values(self, start: Any) -> None:
        """(keys, size) rows → panels [size/16][keys/depth][16][depth]."""
        heads, depth = self.heads, self.depth
        source, stride = self.buffers[heads.v.argument], heads.v.strides[2]
        wide = f"uint{16 * depth}"

        def step(t: Any, column: int, lanes: int, rows: int) -> None:
            """`depth` neighbours of each column side by side: shifted together in one word."""
            word = T.Cast(code.named(wide, lanes), code.spread(T.uint16(0), lanes))
            for row in range(rows):
                part = code.load(source, start + (t * depth + row) * stride + column, lanes)
                part = T.Cast(code.named(wide, lanes), part)
                shift = code.spread(T.Cast(wide, T.int32(16 * row)), lanes)
                word = word | (part << shift) if row else part
            first = (column // LANES * heads.padded // depth + t) * LANES * depth
            first = first + column % LANES * depth
            code.store(self.values, first, code.bits(word, "uint16", lanes * depth), lanes * depth)

        def steps(t: Any, rows: int) -> None:
            for column in range(0, heads.value_size // LANES * LANES, LANES):
                step(t, column, LANES, rows)
            for column in range(heads.value_size // LANES * LANES, heads.value_size):
                step(t, column, 1, rows)

        if heads.keys != heads.padded or heads.value_size != heads.width:
            with code.loop(heads.padded * heads.width // LANES) as i:
                code.store(self.values, i * LANES, T.broadcast(T.uint16(0), LANES))
        if heads.keys // depth:
            with code.loop(heads.keys // depth) as t:
                steps(t, depth)
        if heads.keys % depth:
            steps(heads.keys // depth, heads.keys % depth)

    def scores(self, scores: Any, start: Any, panel: Any, height: int, count: int) -> None:
        """See `heads.Products`."""
        heads, depth = self.heads, self.depth
        source, stride = self.buffers[heads.q.argument], heads.q.strides[2]
        sums = [code.scratch(LANES, "float32") for _ in range(height * count)]
        tile = bfloat16.Tile(self.isa, sums, height, count)
        with code.loop(heads.size // depth) as d:
            rows = [start + r * stride + d * depth for r in range(height)]
            places = [((panel + v) * heads.size + d * depth) * LANES for v in range(count)]
            tile.add(source, rows, self.packed, places)
        tile.finish()
        write_scores(heads, scores, sums, panel, height, count)

    def weigh(self, scores: Any, height: int) -> None:
        """Round the exponentials."""
        with code.loop(height * self.heads.padded // LANES) as i:
            rounded = code.round_bfloat16(code.bind(code.load(scores, i * LANES)))
            code.store(self.shares, i * LANES, code.narrow(rounded))

    def weighted(self, scores: Any, column: int, height: int, count: int) -> list[Any]:
        """See `heads.Products`."""
        heads, depth = self.heads, self.depth
        sums = [code.scratch(LANES, "float32") for _ in range(height * count)]
        tile = bfloat16.Tile(self.isa, sums, height, count)
        with code.loop(heads.padded // depth) as t:
            rows = [r * heads.padded + t * depth for r in range(height)]
            places = [
                ((column // LANES + v) * heads.padded + t * depth) * LANES for v in range(count)
            ]
            tile.add(self.shares, rows, self.values, places)
        tile.finish()
        return sums
