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
from qcompiler.kernels.square import Square, from_memory

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
"""
SOURCES = {"dpbf16": _DPBF16, "bfmmla": _BFMMLA}


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
        self.square = None
        if isa.narrow == "bfmmla":
            self.square = Square(totals, rows, count, "float32")
            self.square.start([code.number(0.0)] * count)
            return
        for total in totals:
            code.store(total, 0, code.number(0.0))

    def add(self, left: Any, starts: list[Any], right: Any, places: list[Any]) -> None:
        """One step of `isa.narrow_depth` products for all sums.

        Args:
            left: uint16 buffer of activations.
            starts: of each row's operands in it.
            right: uint16 buffer of packed weights.
            places: of each vector's 16 · depth operands in it.
        """
        if self.square is not None:
            self.square.add(left, starts, from_memory(right, places), _bfmmla)
            return
        weights = [code.bind(code.load(right, place, 2 * LANES)) for place in places]
        for r, start in enumerate(starts):
            word = code.bits(code.load(left, start, 2), "int32", 1)
            word = code.bind(code.bits(T.broadcast(word, LANES), "uint16", 2 * LANES))
            for c, weight in enumerate(weights):
                total = self.totals[r * self.count + c]
                had = code.load(total, 0)
                code.store(total, 0, code.extern("qc_dpbf16", "float32x16", had, word, weight))

    def finish(self) -> None:
        """Afterwards `totals` are rows."""
        if self.square is not None:
            self.square.finish()


def _bfmmla(had: Any, rows: Any, columns: Any) -> Any:
    return code.extern("qc_bfmmla", "float32x4", had, rows, columns)
