"""Weights of few bits by int8 activations, with ARM's matrix instruction SMMLA.

A register of unpacked weights holds 8 values of k for two columns. Two rows or more go through
SMMLA: sums, scales and what zero points take off lie in the order of its tiles until all groups are
added. A row alone would waste half of that: it goes through SDOT, whose lanes are the two halves of
those 8 values, and the halves are added once a group. Both give the integers of the other kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.kernels import code
from qcompiler.kernels.code import LANES
from qcompiler.kernels.packing import QUAD, Packing, Quads, group_sum, start, zero_points
from qcompiler.kernels.square import ROW, TILES, Square, by_tile
from qcompiler.kernels.tiles import Fill, Product


def tile_fill(product: Product, packing: Packing, unrolled: int) -> Fill:
    """How accumulators are made.

    Args:
        product: the sizes.
        packing: of the weights; a tiled one.
        unrolled: values of k that are written out one after another; they divide a group.
    """
    groups = product.depth // packing.group
    panel_bytes = product.depth // packing.block * packing.bytes

    def octets(
        buffers: list[Any], panel: Any, across: int, first: Any
    ) -> Iterator[Callable[[int, int], Any]]:
        """Of `unrolled` values of k from `first` on, octet by octet: (panel, tile) → a register."""
        for b in range(unrolled // packing.block):
            held = []
            for p in range(across):
                at = (panel + p) * panel_bytes
                at = at + (first // packing.block + b) * packing.bytes
                parts = range(0, LANES, QUAD)
                held.append([Quads(packing, buffers[1], at, part, QUAD) for part in parts])
            for octet in range(packing.block // ROW):
                yield partial(_register, held, octet)

    def each_group(buffers: list[Any], panel: Any, across: int, body: Any, begin: Any, end: Any
                   ) -> None:  # fmt: skip
        """begin(g, zero points of each panel), body(first k) along the group, end(g, scales)."""
        with code.loop(groups) as g:
            spots = [((panel + p) * groups + g) * LANES for p in range(across)]
            zeros = [zero_points(buffers, packing, spot) for spot in spots]
            begin(g, zeros)
            with code.loop(packing.group // unrolled) as chunk:
                body(g * packing.group + chunk * unrolled)
            end(g, zeros, [code.bind(code.load(buffers[2], spot)) for spot in spots])

    def one_row(buffers: list[Any], total: Any, left: Any, panel: Any) -> None:
        code.store(total, 0, code.number(0.0))
        sums = [code.scratch(LANES, "int32") for _ in range(2)]

        def begin(g: Any, zeros: list[Any]) -> None:
            for half in sums:
                code.store(half, 0, code.integer(0))

        def body(first: Any) -> None:
            for o, weights in enumerate(octets(buffers, panel, 1, first)):
                word = code.bits(code.load(buffers[0], left + (first + o * ROW), ROW), "int64", 1)
                given = code.bind(code.bits(T.broadcast(code.bind(word), 2), "int8", 2 * ROW))
                for t in range(TILES):
                    half, at = sums[t // QUAD], t % QUAD * QUAD
                    result = code.intrinsic(
                        "llvm.aarch64.neon.sdot.v4i32.v16i8", "int32x4",
                        code.load(half, at, QUAD), weights(0, t), given,
                    )  # fmt: skip
                    code.store(half, at, result, QUAD)

        def end(g: Any, zeros: list[Any], scales: list[Any]) -> None:
            taken = group_sum(buffers, packing, product, left, 0, g)
            lanes = [code.bind(code.load(half, 0)) for half in sums]
            evens, odds = (T.Shuffle(lanes, list(range(i, 2 * LANES, 2))) for i in range(2))
            whole = evens + odds + start(packing, taken, zeros[0])
            part = code.cast(code.bind(whole), "float32")
            code.store(total, 0, code.fma(part, scales[0], code.load(total, 0)))

        each_group(buffers, panel, 1, body, begin, end)

    def fill(buffers: list[Any], tile: list[Any], left: Any, right: Any, panel: Any,
             height: int, across: int) -> None:  # fmt: skip
        if height == 1:
            for p, total in enumerate(tile):  # one at a time: sixteen registers of sums would spill
                one_row(buffers, total, left, panel + p)
            return
        totals = Square(tile, height, across, "float32")
        totals.start([code.number(0.0)] * across)
        sums = Square([code.scratch(LANES, "int32") for _ in tile], height, across, "int32")
        rows = [left + r * product.row_stride for r in range(height)]
        pairs = [(first, min(first + 1, height - 1)) for first in range(0, height, 2)]

        def begin(g: Any, zeros: list[Any]) -> None:
            if not packing.needs_sums:
                sums.start([code.integer(0)] * across)
                return
            taken = [
                code.bind(group_sum(buffers, packing, product, left, r, g)) for r in range(height)
            ]
            for p, zero in enumerate(zeros):
                off = [code.integer(packing.zero or 0)] * 2 if zero is None else by_tile(zero)
                for first, second in pairs:
                    given = [code.spread(taken[first]), code.spread(taken[second])]
                    both = T.Shuffle(given, [0, 0, LANES, LANES] * QUAD)
                    both = code.bind(code.integer(0) - both)
                    for half, buffer in enumerate(sums.pair(first, p)):
                        code.store(buffer, 0, off[half] * both)

        def body(first: Any) -> None:
            for o, weights in enumerate(octets(buffers, panel, across, first)):
                starts = [row + (first + o * ROW) for row in rows]
                sums.add(buffers[0], starts, weights, _smmla)

        def end(g: Any, zeros: list[Any], scales: list[Any]) -> None:
            for p, scale in enumerate(scales):
                halves = by_tile(scale)
                for first, _ in pairs:
                    parts = zip(totals.pair(first, p), sums.pair(first, p), halves, strict=True)
                    for had, part, factor in parts:
                        value = code.cast(code.load(part, 0), "float32")
                        code.store(had, 0, code.fma(value, factor, code.load(had, 0)))

        each_group(buffers, panel, across, body, begin, end)
        totals.finish()

    return fill


def _register(held: Sequence[Sequence[Quads]], octet: int, panel: int, tile: int) -> Any:
    """Two columns of an octet."""
    return held[panel][tile % QUAD][2 * octet + tile // QUAD]


def _smmla(had: Any, rows: Any, columns: Any) -> Any:
    return code.intrinsic("llvm.aarch64.neon.smmla.v4i32.v16i8", "int32x4", had, rows, columns)
