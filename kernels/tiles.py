"""The loops around a tile of accumulators, shared by all matrix products.

A product C[m, n] = Σ_k A[m, k] · B[n, k] goes tile by tile: a few rows by a few panels of columns,
the accumulators in registers. Panels are the threads' work; the rows of A stay in the cache while
they pass. Nothing is summed across threads, so results do not depend on their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

from qcompiler.kernels import code
from qcompiler.kernels.code import LANES, Argument
from qcompiler.kernels.expression import Emitter, Expression
from qcompiler.kernels.isa import Isa

ROWS = 256  # rows of A that stay in the second-level cache while panels pass
FEW = 4  # rows of a smaller tile, for the last of a number that only the call knows


@dataclass(frozen=True)
class Product:
    """Sizes of a matrix product, or of a batch of them.

    Attributes:
        rows, columns, depth: M, N and K.
        row_stride: elements of A from row to row; a row is contiguous.
        offset: of A's first element.
        batch: leading sizes; the output has batch · rows rows.
        left, right: elements of A, and of packed B, from one member of the batch to the next, for
            each of the batch's dimensions (0: shared).
        runs: where a row of A lies in pieces, as a convolution's input under its filter does:
            (count, elements from one to the next) of each loop over them, the outermost first.
        groups: products side by side: the columns of each follow those of the one before.
        left_group, right_group: elements of A, and of packed B, from one of them to the next.
    """

    rows: int
    columns: int
    depth: int
    row_stride: int
    offset: int = 0
    batch: tuple[int, ...] = ()
    left: tuple[int, ...] = ()
    right: tuple[int, ...] = ()
    runs: tuple[tuple[int, int], ...] = ()
    groups: int = 1
    left_group: int = 0
    right_group: int = 0

    @contextmanager
    def steps(self, size: int) -> Iterator[tuple[Any, Any]]:
        """A loop over k, `size` values at a time: their place in a row of A, and their number."""
        place: Any = 0
        number: Any = 0
        run = self.depth // prod(count for count, _ in self.runs) // size
        with ExitStack() as loops:
            for count, stride in self.runs:
                i = loops.enter_context(code.loop(count))
                place, number = place + i * stride, number * count + i
            k = loops.enter_context(code.loop(run))
            yield place + k * size, number * run + k


# fill(buffers, accumulators, start of A's rows, start of B, panel, rows, panels across): computes
# accumulators[r · vectors + c] for each row r and vector c of the tile.
Fill = Callable[[list[Any], list[Any], Any, Any, Any, int, int], None]


def tiled(
    name: str,
    arguments: Sequence[Argument],
    product: Product,
    expression: Expression,
    isa: Isa,
    dtype: str,
    fill: Fill,
    around: AbstractContextManager[None] | None = None,
) -> Any:
    """The kernel: `fill` makes the accumulators of a tile, the expression goes on from them.

    `around` is entered for the kernel's body.
    """
    vectors = isa.panel // LANES
    columns, rows = product.columns, product.rows
    if not code.known(columns):
        raise ValueError("the number of a product's columns, by which its panels are laid out")
    panels = -(-columns // isa.panel)
    whole = panels if columns % isa.panel == 0 else panels - 1
    block = min(rows, ROWS) if code.known(rows) else ROWS
    high, wide = isa.tile(block)
    with code.kernel(name, arguments) as (made, buffers), around or nullcontext():
        emitter = Emitter(expression, buffers)

        def line(tile: list[Any], first: Any, row: Any, r: Any, panel: Any, tail: bool) -> None:
            """The expression over one row of the tile; columns past the last are left out."""
            place = emitter.coordinates(row + r)
            for c, part in enumerate(tile):
                column = first + panel * isa.panel + c * LANES
                left = columns - whole * isa.panel - c * LANES if tail else LANES
                for start, lanes in pieces(left):
                    value = code.bind(code.load(part, r * LANES + start, lanes))
                    emitter.vector(place, column + start, lanes, value)

        def work(start: tuple[Any, Any, Any, Any], row: Any, panel: Any, height: int, across: int,
                 tail: bool) -> None:  # fmt: skip
            left, right, base, first = start
            count = across * vectors
            accumulators = [code.scratch(LANES, dtype) for _ in range(height * count)]
            left = left + row * product.row_stride
            fill(buffers, accumulators, left, right, panel, height, across)
            if height == 1:
                line(accumulators, first, base + row, 0, panel, tail)
                return
            # Copied, because a buffer that is indexed by a variable cannot live in registers.
            tile = [code.scratch(height * LANES, dtype) for _ in range(count)]
            for r in range(height):
                for c in range(count):
                    code.store(tile[c], r * LANES, code.load(accumulators[r * count + c], 0))
            with code.loop(height) as r:
                line(tile, first, base + row, r, panel, tail)

        def band(start: Any, first: Any, total: Any, panel: Any, across: int, tail: bool) -> None:
            times, left = code.quotient(total, high), code.remainder_of(total, high)
            if code.same(times, 1):
                work(start, first, panel, high, across, tail)
            elif code.at_least(times, 1):
                with code.loop(times) as i:
                    work(start, first + i * high, panel, high, across, tail)
            last = first + (total - left)
            if code.known(left):
                if left:
                    work(start, last, panel, left, across, tail)
                return
            for height in (FEW, 1) if high > FEW and across > 1 else (1,):
                rest = code.remainder_of(left, height) if height > 1 else 0
                with code.loop(code.quotient(left, height) if height > 1 else left) as i:
                    work(start, last + i * height, panel, height, across, tail)
                last, left = last + (left - rest), rest

        def bands(start: Any, threads: bool, first: int, many: Any, total: int) -> None:
            """`many` blocks of `total` rows each, from row `first`, by all panels."""
            each = code.parallel if threads else code.loop
            tiles = whole // wide

            def block(number: Any) -> tuple[Any, Any]:
                """Its first row, and how many it has; the last may have fewer."""
                row = first + number * total
                if code.known(rows):
                    return row, total
                return row, code.bind(code.minimum(total, rows - row))

            if code.at_least(many * tiles, 1) and tiles:
                with each(many * tiles) as number:
                    row, count = block(number // tiles)
                    band(start, row, count, number % tiles * wide, wide, False)
            rest = [(panel, False) for panel in range(tiles * wide, whole)]
            for panel, tail in rest + ([(whole, True)] if whole < panels else []):
                with each(many) as number:
                    row, count = block(number)
                    band(start, row, count, panel, 1, tail)

        def matrix(start: Any, threads: bool) -> None:
            if not code.known(rows):
                bands(start, threads, 0, code.quotient(rows + block - 1, block), block)
                return
            bands(start, threads, 0, rows // block, block)
            if rows % block:
                bands(start, threads, rows // block * block, 1, rows % block)

        def side_by_side(left: Any, right: Any, base: Any, threads: bool) -> None:
            if product.groups == 1:
                matrix((left, right, base, 0), threads)
                return
            with code.loop(product.groups) as g:
                start = (left + g * product.left_group, right + g * product.right_group, base,
                         g * columns)  # fmt: skip
                matrix(start, threads)

        members = prod(product.batch)
        if code.same(members, 1):
            side_by_side(product.offset, 0, 0, True)
        else:
            with code.parallel(members) as member:
                left, right, rest = product.offset, 0, member
                for size, a, b in zip(
                    reversed(product.batch), reversed(product.left), reversed(product.right),
                    strict=True,
                ):  # fmt: skip
                    index = rest % size
                    left, right, rest = left + index * a, right + index * b, rest // size
                side_by_side(left, right, member * rows, False)
    return made


def pieces(count: int) -> list[tuple[int, int]]:
    """(start, lanes) of the vectors that cover at most 16 elements: 16, 8, 4, then one by one."""
    found: list[tuple[int, int]] = []
    start, left = 0, max(0, min(count, LANES))
    for lanes in (LANES, LANES // 2, LANES // 4, 1):
        while left >= lanes:
            found.append((start, lanes))
            start, left = start + lanes, left - lanes
    return found
