"""Sums in 2 × 2 tiles, as ARM's matrix instructions make them: SMMLA, USMMLA and BFMMLA.

    tile[i, j] += Σ_d a[i, d] · b[j, d]        i, j < 2; 8 bytes of each row

Two rows of activations lie in one register, two columns of weights in another. A pair of rows by 16
columns is eight tiles, which fill the two rows' accumulators until they are taken apart again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.kernels import code
from qcompiler.kernels.code import LANES

ROW = 8  # bytes of a row or column that one instruction reads
TILES = LANES // 2  # of a pair of rows by 16 columns


class Square:
    """Sums of a few rows by a few vectors of 16 columns.

    Args:
        totals: of `rows` times `count`, local buffers of 16, row by row.
        rows: how many.
        count: vectors of columns.
        dtype: of the sums.
    """

    def __init__(self, totals: list[Any], rows: int, count: int, dtype: str) -> None:
        self.totals, self.rows, self.count, self.dtype = totals, rows, count, dtype
        # An odd last row's partner computes the same again.
        self.spare = [code.scratch(LANES, dtype) for _ in range(count)] if rows % 2 else []

    def pair(self, first: int, c: int) -> tuple[Any, Any]:
        """The buffers of the eight tiles of two rows by 16 columns, four in each."""
        low = self.totals[first * self.count + c]
        if first + 1 < self.rows:
            return low, self.totals[(first + 1) * self.count + c]
        return low, self.spare[c]

    def start(self, columns: Sequence[Any]) -> None:
        """What each vector of columns begins with, the same for all rows."""
        for c, values in enumerate(columns):
            for half, tiles in enumerate(by_tile(values)):
                for first in range(0, self.rows, 2):
                    code.store(self.pair(first, c)[half], 0, tiles)

    def add(
        self,
        left: Any,
        starts: Sequence[Any],
        columns: Callable[[int, int], Any],
        multiply: Callable[[Any, Any, Any], Any],
    ) -> None:
        """One step for all sums.

        Args:
            left: buffer of activations.
            starts: of each row's 8 bytes in it.
            columns: (vector, tile) → the weights of the tile's two columns, 8 bytes of each.
            multiply: (tile's sums, two rows, two columns) → sums; the instruction.
        """
        size = ROW // _bytes(left.dtype)
        rows = [code.bind(code.bits(code.load(left, s, size), "int64", 1)) for s in starts]
        rows += rows[-1:] if len(rows) % 2 else []
        pairs = [
            code.bind(code.bits(T.Shuffle([rows[r], rows[r + 1]], [0, 1]), left.dtype, 2 * size))
            for r in range(0, len(rows), 2)
        ]
        for c in range(self.count):
            for tile in range(TILES):
                weights = code.bind(columns(c, tile))
                for number, pair in enumerate(pairs):
                    total = self.pair(2 * number, c)[tile // 4]
                    had = code.load(total, tile % 4 * 4, 4)
                    code.store(total, tile % 4 * 4, multiply(had, pair, weights), 4)

    def finish(self) -> None:
        """Afterwards `totals` are rows."""
        for first in range(0, self.rows, 2):
            for c in range(self.count):
                low, high = self.pair(first, c)
                tiles = [code.bind(code.load(low, 0)), code.bind(code.load(high, 0))]
                for row, total in enumerate((low, high)):
                    order = [4 * tile + 2 * row + j for tile in range(TILES) for j in (0, 1)]
                    code.store(total, 0, T.Shuffle(tiles, order))


def by_tile(values: Any) -> list[Any]:
    """What each of 16 columns has, in the order of the tiles: of the first four and of the rest."""
    orders = [
        [half * TILES + tile * 2 + j for tile in range(4) for j in (0, 1, 0, 1)]
        for half in range(2)
    ]
    return [code.bind(T.Shuffle([values], order)) for order in orders]


def from_memory(right: Any, places: Sequence[Any]) -> Callable[[int, int], Any]:
    """Weights that lie tile by tile, each vector's from its place on; for `Square.add`."""
    size = 2 * ROW // _bytes(right.dtype)
    return lambda c, tile: code.load(right, places[c] + tile * size, size)


def _bytes(dtype: str) -> int:
    return {"int8": 1, "uint8": 1, "uint16": 2}[str(dtype)]
