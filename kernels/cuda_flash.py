"""Attention on a GPU's tensor cores, a tile of keys at a time.

A block takes 16 queries a warp of one head and goes through the keys a tile at a time. Products are
of float16 with float32 sums; the softmax goes along in float32: with m the largest score so far,
sums of exp(s − m) and of exp(s − m) v are scaled down where m grows (Dao 2023, "FlashAttention-2",
algorithm 1). Scores never leave registers: the sums of one product lie as the next one's operand.

`cuda_prompt` reads keys and values from a cache, `cuda_attention_flash` from tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.errors import UnsupportedError
from qcompiler.kernels.cuda_code import HOPPER, WARP, Gpu, address, call, registers, value
from qcompiler.kernels.cuda_device import DEVICE
from qcompiler.kernels.cuda_prompt_device import NEVER, PROMPT

ROWS = 16  # queries of a warp
FEW = 64  # queries up to which blocks are of two warps, so that there are more of them
PAD = 16  # bytes behind a row in shared memory: eight rows then lie in different banks

Move = Callable[[Any, Any], None]

DEVICE |= PROMPT


@dataclass(frozen=True)
class Tiles:
    """How an attention is shared out.

    Attributes:
        warps: of a block, each with 16 queries.
        keys: of a tile, a multiple of 16.
        resident: blocks that a processor must be able to hold at once; 0: the compiler chooses.
    """

    warps: int
    keys: int
    resident: int = 0

    @property
    def queries(self) -> int:
        """Of a block."""
        return self.warps * ROWS

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.warps * WARP

    def shared(self, size: int, bits: int) -> int:
        """Bytes of shared memory: queries, and two tiles of keys and values; then the result.

        Tiles of integers lie there twice as they are in the cache, and once as float16.
        """
        line = size * 2 + PAD
        tiles = 4 * self.keys * line
        if bits < 16:
            tiles = 2 * self.keys * (line + 2 * size * bits // 8)
        return max(self.queries * line + tiles, self.queries * (size + 8) * 4)


def choose_tiles(queries: int, size: int, bits: int = 16, gpu: Gpu = HOPPER) -> Tiles:
    """Four warps, and as many blocks on a processor as their registers allow; else fewer.

    Args:
        queries: of a head.
        size: of a head, a multiple of 16.
        bits: of a number of a key or value.
        gpu: that runs it.

    Raises:
        UnsupportedError: if none fits into shared memory.
    """
    keys = 64 if size <= 128 else 32
    blocks = 3 if size <= 64 else 2 if size <= 128 else 1
    for tiles in (Tiles(4, keys, blocks), Tiles(4, keys), Tiles(2, keys), Tiles(2, 16)):
        fits = tiles.shared(size, bits) * max(tiles.resident, 1) <= gpu.shared
        if fits and (queries > FEW or tiles.warps == 2):
            return tiles
    raise UnsupportedError(f"attention of heads of {size}: no GPU kernel has the room")


class Flash:
    """What a block does with the queries and tiles that lie in its shared memory.

    Args:
        tiles: the partition.
        size: of a head.
        scale: of scores, in powers of two.
        thread: of the block.
        memory: shared memory: queries, then tiles of keys and values, rows of `line` bytes.
    """

    def __init__(self, tiles: Tiles, size: int, scale: float, thread: Any, memory: Any) -> None:
        self.tiles, self.size, self.scale, self.memory = tiles, size, scale, memory
        self.thread = thread
        self.line, self.pieces = size * 2 + PAD, size // 8
        self.steps, self.columns = size // 16, tiles.keys // 8
        self.at_tiles, self.tile_bytes = tiles.queries * self.line, tiles.keys * self.line
        self.resident = size <= 128  # queries stay in registers
        self.lane, self.warp = T.Bind(thread % WARP), T.Bind(thread // WARP)
        self.a = registers(4 * (self.steps if self.resident else 2), "int32")
        self.b, self.p = registers(4, "int32"), registers(self.columns * 2, "int32")
        self.scores = registers(self.columns * 4, "float32")
        self.sums = registers(size // 2, "float32")
        self.top, self.total, self.factor = (registers(2, "float32") for _ in range(3))

    def each(self, count: int, pieces: int, body: Move) -> None:
        """body(row, piece) for `count` rows, shared out among the threads."""
        for begin in range(0, count * pieces, self.tiles.threads):
            at = T.Bind(self.thread + begin)
            with T.If(at < count * pieces), T.Then():
                body(T.Bind(at // pieces), T.Bind(at % pieces))

    def start(self, query: Move, bring: Move) -> None:
        """Bring the queries and the first tile.

        Args:
            query: (row, piece): brings 16 bytes of a query.
            bring: (turn, slot): brings a tile to one of its two places.
        """
        call("qc_after_previous")
        call("qc_let_next")
        self.each(self.tiles.queries, self.pieces, query)
        bring(T.int32(0), T.int32(0))
        call("qc_commit")
        self._clear()
        call("qc_wait", 0)
        call("qc_sync")
        self._keep_queries()

    @contextmanager
    def tile(self, turns: Any, bring: Move) -> Iterator[Any]:
        """What is done with each tile, by its turn, while the next one is on its way."""
        with T.serial(0, turns) as turn:
            call("qc_wait", 0)
            call("qc_sync")
            with T.If(turn + 1 < turns), T.Then():
                bring(turn + 1, (turn + 1) % 2)
            call("qc_commit")
            yield turn

    def _clear(self) -> None:
        """Set the sums to zero."""
        for buffer, count, start in (
            (self.sums, self.size // 2, 0.0), (self.top, 2, NEVER), (self.total, 2, 0.0),
        ):  # fmt: skip
            for i in range(count):
                T.buffer_store(buffer, T.float32(start), [i])

    def _fragment(self, step: int, to: int) -> None:
        at = (self.warp * ROWS + self.lane % 16) * self.line + (step * 2 + self.lane // 16) * 16
        call("qc_ldmatrix", address(self.a, to, 4), address(self.memory, at))

    def _keep_queries(self) -> None:
        """Take the queries into registers, where they fit; they lie in shared memory."""
        for step in range(self.steps if self.resident else 0):
            self._fragment(step, step * 4)

    def score(self, place: Any) -> None:
        """Scores = q · K of a tile."""
        lane, steps = self.lane, self.steps
        for i in range(self.columns * 4):
            T.buffer_store(self.scores, T.float32(0), [i])
        for pair in range(-(-steps // 2)):
            of = [step for step in (2 * pair, 2 * pair + 1) if step < steps]
            for column in range(self.columns):
                piece = pair * 4 + lane // 8
                piece = piece if len(of) == 2 else T.min(piece, self.pieces - 1)
                at = place + (column * 8 + lane % 8) * self.line + piece * 16
                call("qc_ldmatrix", address(self.b, 0, 4), address(self.memory, at))
                for step in of:
                    if not self.resident and column == 0:
                        self._fragment(step, (step % 2) * 4)
                    held = address(self.a, (step if self.resident else step % 2) * 4, 4)
                    call("qc_mma_f16", address(self.scores, column * 4, 4), held,
                         address(self.b, step % 2 * 2, 2))  # fmt: skip

    def weigh(self, place: Any, apart: bool = False) -> None:
        """Take in a tile whose scores are there: sums += exp(scores) · V.

        `apart`: a query may see no key at all, and then the mean of all values.
        """
        lane, columns, size = self.lane, self.columns, self.size
        call("qc_soften", address(self.scores, 0, columns * 4), address(self.top, 0, 2),
             address(self.total, 0, 2), address(self.factor, 0, 2), T.float32(self.scale), columns,
             int(apart))  # fmt: skip
        call("qc_scale_sums", address(self.sums, 0, size // 2), address(self.factor, 0, 2),
             size // 2)  # fmt: skip
        call("qc_to_halves", address(self.p, 0, columns * 2), address(self.scores, 0, columns * 4),
             columns * 2)  # fmt: skip
        for step in range(self.tiles.keys // 16):
            for pair in range(size // 16):
                at = place + (step * 16 + lane % 16) * self.line + (pair * 2 + lane // 16) * 16
                call("qc_ldmatrix_t", address(self.b, 0, 4), address(self.memory, at))
                for half in range(2):
                    call("qc_mma_f16", address(self.sums, (pair * 2 + half) * 4, 4),
                         address(self.p, step * 4, 4), address(self.b, half * 2, 2))  # fmt: skip

    def finish(self, count: Any, write: Callable[[Any, Any, Any], None]) -> None:
        """write(row, element, result) for the first `count` rows of the block."""
        size, rows, threads = self.size, self.tiles.queries, self.tiles.threads
        call("qc_share_sums", address(self.total, 0, 2))
        call("qc_scale_sums", address(self.sums, 0, size // 2), address(self.total, 0, 2),
             size // 2)  # fmt: skip
        # Turned round in shared memory, so that whole rows are stored.
        call("qc_sync")
        wide = size + 8
        for column in range(size // 8):
            for i in range(4):
                row = self.warp * ROWS + self.lane // 4 + i // 2 * 8
                at = row * wide + column * 8 + self.lane % 4 * 2 + i % 2
                call("qc_put", address(self.memory, at * 4), self.sums[column * 4 + i])
        call("qc_sync")
        with T.serial(0, rows * size // threads) as turn:
            at = T.Bind(turn * threads + self.thread)
            row, element = T.Bind(at // size), T.Bind(at % size)
            with T.If(row < count), T.Then():
                write(
                    row, element, value("qc_get", address(self.memory, (row * wide + element) * 4))
                )
