"""bfloat16 products with float32 sums: the machines' instructions.

    total[n] += Σ_(d < depth) a[d] · b[n, d]

AVX512-BF16 has VDPBF16PS, two products into each of 16 lanes; ARM has BFMMLA, which multiplies two
rows of four by two columns of four into a 2 × 2 tile. TVM rewrites every bfloat16 type into 16-bit
integers before it generates code, so that LLVM's intrinsics no longer fit: they are reached through
a few lines of LLVM's own language, inlined where they are called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tvm.tirx.script.builder import ir as T

from qcompiler.kernels import code
from qcompiler.kernels.code import LANES
from qcompiler.kernels.isa import Isa

_DPBF16 = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define linkonce_odr hidden <16 x float> @qc_dpbf16(
    <16 x float> %total, <32 x i16> %a, <32 x i16> %b) alwaysinline {
  %x = bitcast <32 x i16> %a to <32 x bfloat>
  %y = bitcast <32 x i16> %b to <32 x bfloat>
  %sum = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
    <16 x float> %total, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %sum
}
"""


def _picked(name: str, first: int) -> str:
    """The lanes of one row out of eight 2 × 2 tiles, which stand in two vectors of 16."""
    lanes = ", ".join(f"i32 {4 * tile + first + lane}" for tile in range(8) for lane in (0, 1))
    return f"""
define linkonce_odr hidden <16 x float> @{name}(<16 x float> %a, <16 x float> %b) alwaysinline {{
  %row = shufflevector <16 x float> %a, <16 x float> %b, <16 x i32> <{lanes}>
  ret <16 x float> %row
}}
"""


_BFMMLA = """
declare <4 x float> @llvm.aarch64.neon.bfmmla(<4 x float>, <8 x bfloat>, <8 x bfloat>)
define linkonce_odr hidden <4 x float> @qc_bfmmla(
    <4 x float> %total, <8 x i16> %a, <8 x i16> %b) alwaysinline {
  %x = bitcast <8 x i16> %a to <8 x bfloat>
  %y = bitcast <8 x i16> %b to <8 x bfloat>
  %sum = call <4 x float> @llvm.aarch64.neon.bfmmla(
    <4 x float> %total, <8 x bfloat> %x, <8 x bfloat> %y)
  ret <4 x float> %sum
}
define linkonce_odr hidden <8 x i16> @qc_two_rows(<4 x i16> %a, <4 x i16> %b) alwaysinline {
  %both = shufflevector <4 x i16> %a, <4 x i16> %b,
    <8 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7>
  ret <8 x i16> %both
}
"""
SOURCES = {
    "dpbf16": _DPBF16,
    "bfmmla": _BFMMLA + _picked("qc_first_row", 0) + _picked("qc_second_row", 2),
}


@contextmanager
def available(isa: Isa) -> Iterator[None]:
    """Inside, `Tile` may be used; around a kernel's body."""
    with T.attr(0, "pragma_import_llvm", SOURCES[isa.narrow]):
        yield


def pack(weight: Tensor, isa: Isa) -> Tensor:
    """(N, K) → flat bfloat16 panels [N/panel][K/depth][panel][depth], padded with zeros."""
    n, k = weight.shape
    panel, depth = isa.panel, isa.narrow_depth
    padded = torch.zeros(-(-n // panel) * panel, -(-k // depth) * depth, dtype=torch.bfloat16)
    padded[:n, :k] = weight
    blocks = padded.reshape(-1, panel, padded.shape[1] // depth, depth)
    return blocks.transpose(1, 2).contiguous().reshape(-1)


class Tile:
    """Sums of a few rows by a few vectors of 16 columns, in registers.

    Args:
        isa: the machine.
        totals: of `rows` times `count`, local float32 buffers of 16, row by row; set to zero here.
        rows: how many.
        count: vectors of columns.
    """

    def __init__(self, isa: Isa, totals: list[Any], rows: int, count: int) -> None:
        self.isa, self.totals, self.rows, self.count = isa, totals, rows, count
        for total in totals:
            code.store(total, 0, code.number(0.0))
        self.spare = {}
        if isa.narrow == "bfmmla" and rows % 2:  # the last row's partner computes the same again
            self.spare = {
                ((rows - 1) * count + c): code.scratch(LANES, "float32") for c in range(count)
            }
            for total in self.spare.values():
                code.store(total, 0, code.number(0.0))

    def add(self, left: Any, starts: list[Any], right: Any, places: list[Any]) -> None:
        """One step of `isa.narrow_depth` products for all sums.

        Args:
            left: uint16 buffer of activations.
            starts: of each row's operands in it.
            right: uint16 buffer of packed weights.
            places: of each vector's 16 · depth operands in it.
        """
        if self.isa.narrow == "bfmmla":
            self._add_tiles(left, starts, right, places)
            return
        weights = [code.bind(code.load(right, place, 2 * LANES)) for place in places]
        for r, start in enumerate(starts):
            word = code.bits(code.load(left, start, 2), "int32", 1)
            word = code.bind(code.bits(T.broadcast(word, LANES), "uint16", 2 * LANES))
            for c, weight in enumerate(weights):
                total = self.totals[r * self.count + c]
                had = code.load(total, 0)
                code.store(total, 0, code.extern("qc_dpbf16", "float32x16", had, word, weight))

    def _pair(self, first: int, c: int) -> tuple[Any, Any]:
        """The buffers that hold the eight 2 × 2 tiles of two rows by 16 columns."""
        number = first * self.count + c
        spare = self.spare.get(number)
        return self.totals[number], self.totals[number + self.count] if spare is None else spare

    def _add_tiles(self, left: Any, starts: list[Any], right: Any, places: list[Any]) -> None:
        rows = [code.load(left, start, 4) for start in starts]
        rows += rows[-1:] if len(rows) % 2 else []
        pairs = [
            code.bind(code.extern("qc_two_rows", "uint16x8", rows[r], rows[r + 1]))
            for r in range(0, len(rows), 2)
        ]
        for c, place in enumerate(places):
            for tile in range(LANES // 2):
                weight = code.bind(code.load(right, place + tile * 8, 8))
                for number, pair in enumerate(pairs):
                    total = self._pair(2 * number, c)[tile // 4]
                    had = code.load(total, tile % 4 * 4, 4)
                    summed = code.extern("qc_bfmmla", "float32x4", had, pair, weight)
                    code.store(total, tile % 4 * 4, summed, 4)

    def finish(self) -> None:
        """Afterwards `totals` are rows."""
        if self.isa.narrow != "bfmmla":
            return
        for first in range(0, self.rows, 2):
            for c in range(self.count):
                low, high = self._pair(first, c)
                tiles = code.bind(code.load(low, 0)), code.bind(code.load(high, 0))
                code.store(low, 0, code.extern("qc_first_row", "float32x16", *tiles))
                code.store(high, 0, code.extern("qc_second_row", "float32x16", *tiles))
