"""Which stages of which pieces of a product a block computes: `Tall`, in the kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.kernels.cuda_code import value
from qcompiler.kernels.cuda_device import DEVICE
from qcompiler.kernels.cuda_tall import Tall
from qcompiler.kernels.cuda_weights import Weights, Widened

DEVICE["qc_number"] = (
    "int32",
    "__device__ __forceinline__ int qc_number(int x) { return x; }",
)


class OwnPieces:
    """A block's pieces.

    Args:
        how, form: of the product.
        tokens: M; an expression where the call says.
        block, split: the block's numbers.

    Attributes:
        common: pieces that all blocks share out; of the others each block takes whole ones.
    """

    def __init__(
        self, how: Tall, form: Weights | Widened, tokens: Any, block: Any, split: Any
    ) -> None:
        self.how, self.block, self.split, self.stages = how, block, split, form.stages
        self.down, self.across = how.pieces(tokens, form)
        self.splits = how.clustered(form)
        self.common = how.common(tokens, form) if how.blocks else 0

    def _held(self, number: Any) -> Any:
        """A number that TVM is not to write out wherever it is used."""
        return T.Bind(value("qc_number", number) if self.how.blocks else number)

    def each(self, body: Callable[[Any, tuple[Any, Any], Any, Any, Any], None]) -> None:
        """Write body(piece, its tokens and rows in pieces, first stage, stages, those before).

        Shared pieces come first, so that their sums are there in time.
        """
        stages, block, blocks, held = self.stages, self.block, self.how.blocks, self._held
        if not blocks:
            part = -(-stages // self.splits)
            start = T.Bind(self.split * part)
            body(block, self._place(block), start, T.min(part, stages - start), 0)
            return
        first = held(block * (self.common * stages) // blocks)
        last = held((block + 1) * (self.common * stages) // blocks)
        own = held(first // stages)
        shared = held((last - 1) // stages - own + 1 if self.common else 0)
        whole = self.down * self.across - self.common
        with T.serial(0, shared + held((whole - block + blocks - 1) // blocks)) as turn:
            inside = T.Bind(turn < shared)
            alone = self.common + block + (turn - shared) * blocks
            piece = held(T.Select(inside, own + turn, alone))
            start = held(T.Select(inside, T.max(first - piece * stages, 0), 0))
            stop = T.min(last - piece * stages, stages)
            count = held(T.Select(inside, stop, stages) - start)
            done = T.Select(inside, piece * stages + start - first, last - first)
            done = done + T.Select(inside, 0, (turn - shared) * stages)
            body(piece, self._place(piece), start, count, held(done))

    def last_of(self, piece: Any) -> Any:
        """The last block of those that share a piece."""
        return T.Bind(((piece + 1) * (self.stages * self.how.blocks) - 1)
                      // (self.common * self.stages))  # fmt: skip

    def _place(self, piece: Any) -> tuple[Any, Any]:
        """A piece's tokens and rows, in pieces."""
        band = self.how.band
        whole = T.Bind(piece // (band * self.across))
        height = T.Bind(T.min(self.down - whole * band, band))
        rest = T.Bind(piece % (band * self.across))
        return self._held(whole * band + rest % height), self._held(rest // height)
