"""Matrix product with weights of 2, 3, 4 or 8 bits, by int8 or float32 activations.

    out[m, n] = Σ_g scale[n, g] · Σ_(k in g) activation[m, k] · (weight[n, k] − zero[n, g])

A group is a run of k with one scale; it may be all of K. Weights are stored unsigned in as many
bits as they have (8-bit ones as they are, where nothing is gained by a shift) and unpacked in
registers, where the integer dot product reads them. For int8 activations the inner sum is exact in
int32: what zero takes off is zero · Σ_(k in g) activation[m, k], and those sums are computed once
for all columns. Scales are applied in float32, group by group in order.

Where bytes are multiplied by vpmaddubsw (AVX2), its int16 results cannot saturate: 15 · 128 · 2
products, added up eight times, are 30 720; then they are widened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
from torch import Tensor
from tvm.tirx.script.builder import ir as T

from qcompiler.kernels import code
from qcompiler.kernels.code import LANES, Argument
from qcompiler.kernels.expression import Expression
from qcompiler.kernels.isa import Isa
from qcompiler.kernels.tiles import Product, tiled

UNROLLED = 32  # values of k, at most, that are written out one after another: one by one, 8
QUAD = 4  # values of k that lie side by side in a 32-bit lane


@dataclass(frozen=True)
class Packing:
    """How weights are stored.

    Attributes:
        bits: 2, 3, 4 or 8.
        group: values of k that share a scale.
        zero: the stored number that stands for 0, or None where each group has its own.
        integer: for int8 activations, not float ones.
        signed: 8-bit weights are stored as int8.
    """

    bits: int
    group: int
    zero: int | None
    integer: bool
    signed: bool

    @property
    def block(self) -> int:
        """Values of k that are stored together for 16 columns; a group holds whole blocks."""
        if self.bits == 8:
            return QUAD if self.integer else 1
        return {2: 16, 3: 32, 4: 8}[self.bits]

    @property
    def bytes(self) -> int:
        """Of a block."""
        return self.block * LANES * self.bits // 8

    @property
    def low(self) -> int:
        """The smallest number that is stored."""
        return -128 if self.signed else 0

    @property
    def needs_sums(self) -> bool:
        """Whether the kernel reads the sum of each group of int8 activations."""
        return self.integer and self.zero != 0


def packing(bits: int, group: int, zero: int | None, integer: bool, isa: Isa) -> Packing:
    """The packing that a machine reads; `zero` counts from the smallest number of `bits` bits."""
    # vpdpbusd multiplies unsigned weights; everything else takes signed bytes as they are.
    signed = bits == 8 and not (integer and isa.dot == "vnni")
    return Packing(bits, group, zero if zero is None else zero - 128 * signed, integer, signed)


def narrow(isa: Isa) -> Isa:
    """The machine with panels of 16 columns, and registers left for the groups' integer sums."""
    return replace(isa, vectors=8 if isa.vectors >= 8 else max(1, isa.vectors // 2))


def pack(weight: Tensor, packing: Packing) -> Tensor:
    """(N, K) numbers, 0 the smallest of their bits → flat uint8 (or int8): 16 columns a panel.

    For each panel and block, quads of four k for 16 columns: [quad][16][4]. 4 and 2 bits: quads
    share bytes, the first in the lowest bits. 3 bits: the two low bits of eight quads in two such
    vectors, then the high bits of all, quad i's in bit i. 8 bits by floats: [k][16].
    """
    n, k = weight.shape
    values = torch.zeros(-(-n // LANES) * LANES, k, dtype=torch.int16)
    values[:n] = weight
    if packing.signed:
        values = values - 128
    if packing.block == 1:
        return values.to(torch.int8).reshape(-1, LANES, k).transpose(1, 2).reshape(-1)
    quads = values.reshape(-1, LANES, k // packing.block, packing.block // QUAD, QUAD)
    quads = quads.permute(0, 2, 3, 1, 4)
    if packing.bits == 8:
        return quads.to(torch.int8 if packing.signed else torch.uint8).reshape(-1)
    if packing.bits == 3:
        parts = [_joined(quads[:, :, i : i + 4] & 3, 2) for i in (0, 4)]
        parts.append(_joined(quads >> 2, 1))
        return torch.cat(parts, 2).to(torch.uint8).reshape(-1)
    return _joined(quads, packing.bits).to(torch.uint8).reshape(-1)


def _joined(quads: Tensor, bits: int) -> Tensor:
    """(panels, blocks, quads, 16, 4) → (panels, blocks, 1, 16, 4): the first in the lowest bits."""
    shifts = (torch.arange(quads.shape[2]) * bits).reshape(-1, 1, 1)
    return (quads.int() << shifts).sum(2, keepdim=True)


def pack_groups(values: Tensor) -> Tensor:
    """(N, groups), scales or zero points → flat [N/16][groups][16]."""
    n, groups = values.shape
    padded = torch.zeros(-(-n // LANES) * LANES, groups, dtype=values.dtype)
    padded[:n] = values
    return padded.reshape(-1, LANES, groups).transpose(1, 2).contiguous().reshape(-1)


def reference(activation: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(M, K), (N, K) integers, (N, groups) twice → (M, N) in float64."""
    group = weight.shape[1] // scale.shape[1]
    wide = scale.double().repeat_interleave(group, 1)
    return activation.double() @ ((weight - zero.repeat_interleave(group, 1)).double() * wide).T


def matmul_packed(
    name: str,
    arguments: Sequence[Argument],
    product: Product,
    packing: Packing,
    expression: Expression,
    isa: Isa,
) -> Any:
    """The kernel.

    Args:
        name: of the function.
        arguments: activations (int8 or float32), packed weights, scales; zero points where
            `packing.zero` is None; where `packing.needs_sums`, the sums of each group of
            activations, (M, groups) int32; then the expression's.
        product: the sizes; K is a multiple of the group, and that of the block.
        packing: of the weights.
        expression: over (…, N), with the float32 sums as value 0.
        isa: the machine.
    """
    groups = product.depth // packing.group
    quads = packing.integer and isa.dot != "multiply"
    unrolled = gcd(packing.group, UNROLLED if quads else UNROLLED // QUAD)
    unrolled = max(packing.block, unrolled)  # both are powers of two
    blocks = unrolled // packing.block
    panel_bytes = product.depth // packing.block * packing.bytes
    kind = "int32" if packing.integer else "float32"
    multiply = _multiplication(packing, isa)

    def fill(buffers: list[Any], tile: list[Any], left: Any, right: Any, panel: Any,
             height: int, across: int) -> None:  # fmt: skip
        for total in tile:
            code.store(total, 0, code.number(0.0))
        sums = [code.scratch(LANES, kind) for _ in tile]
        rows = [left + r * product.row_stride for r in range(height)]

        def run(g: Any, chunk: Any, zeros: list[Any]) -> None:
            """`unrolled` values of k."""
            first = g * packing.group + chunk * unrolled
            for p in range(across):
                number = g * (packing.group // packing.block) + chunk * blocks
                at = (panel + p) * panel_bytes + number * packing.bytes
                mine = [sums[r * across + p] for r in range(height)]
                multiply(buffers, mine, [row + first for row in rows], at, blocks, zeros[p])

        with code.loop(groups) as g:
            zeros: list[Any] = []
            for p in range(across):
                zeros.append(_zero(buffers, packing, ((panel + p) * groups + g) * LANES))
            for r in range(height):
                taken = None
                if packing.needs_sums:
                    # One row of sums for each row of activations.
                    row = (left - product.offset) // product.row_stride + r
                    place = 4 if packing.zero is None else 3
                    taken = code.load(buffers[place], row * groups + g, 1)
                for p in range(across):
                    code.store(sums[r * across + p], 0, _start(packing, taken, zeros[p]))
            if packing.group == unrolled:
                run(g, 0, zeros)
            else:
                with code.loop(packing.group // unrolled) as chunk:
                    run(g, chunk, zeros)
            for p in range(across):
                scale = code.bind(code.load(buffers[2], ((panel + p) * groups + g) * LANES))
                for r in range(height):
                    had = tile[r * across + p]
                    part = code.load(sums[r * across + p], 0)
                    if packing.integer:
                        part = code.cast(part, "float32")
                    code.store(had, 0, code.fma(part, scale, code.load(had, 0)))

    return tiled(name, arguments, product, expression, narrow(isa), "float32", fill)


def _zero(buffers: list[Any], packing: Packing, at: Any) -> Any:
    """The zero points of 16 columns where they have their own, as the sums' type."""
    if packing.zero is not None:
        return None
    kind = "int32" if packing.integer else "float32"
    return code.bind(code.cast(code.cast(code.load(buffers[3], at), "int32"), kind))


def _start(packing: Packing, taken: Any, zero: Any) -> Any:
    """What a group's sum starts from: −zero · the sum of its activations."""
    if not packing.integer:
        return code.number(0.0)
    if taken is None:
        return code.integer(0)
    if packing.zero is not None:
        return code.spread(code.bind(taken * code.integer(-packing.zero, 1)))
    return code.integer(0) - zero * code.spread(code.bind(taken))


def _multiplication(packing: Packing, isa: Isa) -> Any:
    """multiply(buffers, sums, rows, start of the weights, blocks, zero points)."""
    if not packing.integer:
        form = _floats_looked_up if isa.dot == "vnni" and packing.bits < 8 else _floats
    elif isa.dot == "madd" and packing.bits < 8:
        form = _pairs
    else:
        form = {"vnni": _vnni, "sdot": _sdot, "smmla": _sdot}.get(isa.dot, _plain)

    def multiply(buffers: list[Any], sums: list[Any], rows: list[Any], at: Any, blocks: int,
                 zero: Any) -> None:  # fmt: skip
        form(packing, buffers, sums, rows, at, blocks, zero)

    return multiply


class _Quads:
    """Unpacks a block's quads: bytes of 4 values of k, for `columns` columns from one on."""

    def __init__(self, packing: Packing, weights: Any, at: Any, first: int, columns: int) -> None:
        self.packing, self.lanes = packing, columns * QUAD
        count = {2: 1, 3: 3, 4: 1}.get(packing.bits, packing.block // QUAD)
        self.held = [
            code.bind(code.load(weights, at + (i * LANES + first) * QUAD, self.lanes))
            for i in range(count)
        ]

    def _bits(self, value: Any, shift: int, mask: int) -> Any:
        """Bits of each byte; a negative shift goes left."""
        amount = T.broadcast(T.uint8(abs(shift)), self.lanes)
        if shift > 0:
            value = T.shift_right(value, amount)
        elif shift < 0:
            value = T.shift_left(value, amount)
        return T.bitwise_and(value, T.broadcast(T.uint8(mask), self.lanes))

    def __getitem__(self, i: int) -> Any:
        """The quad's bytes as int8."""
        bits = self.packing.bits
        if bits == 8:
            value = self.held[i]
        elif bits == 3:
            low = self._bits(self.held[i // 4], i % 4 * 2, 3)
            value = T.bitwise_or(low, self._bits(self.held[2], i - 2, 4))
        else:
            value = self._bits(self.held[0], i * bits, (1 << bits) - 1)
        return code.bind(code.bits(value, "int8", self.lanes))


def _word(buffers: list[Any], start: Any) -> Any:
    """Four int8 activations as an int32."""
    return code.bind(code.bits(code.load(buffers[0], start, QUAD), "int32", 1))


def _vnni(packing: Packing, buffers: list[Any], sums: list[Any], rows: list[Any], at: Any,
          blocks: int, zero: Any) -> None:  # fmt: skip
    for b in range(blocks):
        quads = _Quads(packing, buffers[1], at + b * packing.bytes, 0, LANES)
        for i in range(packing.block // QUAD):
            weights = quads[i]
            for total, row in zip(sums, rows, strict=True):
                word = _word(buffers, row + b * packing.block + i * QUAD)
                given = code.bits(T.broadcast(word, LANES), "int8", 64)
                result = code.intrinsic(
                    "llvm.x86.avx512.vpdpbusd.512", "int32x16", code.load(total, 0), weights, given
                )
                code.store(total, 0, result)


def _sdot(packing: Packing, buffers: list[Any], sums: list[Any], rows: list[Any], at: Any,
          blocks: int, zero: Any) -> None:  # fmt: skip
    for b in range(blocks):
        for part in range(0, LANES, 4):
            quads = _Quads(packing, buffers[1], at + b * packing.bytes, part, 4)
            for i in range(packing.block // QUAD):
                weights = quads[i]
                for total, row in zip(sums, rows, strict=True):
                    word = _word(buffers, row + b * packing.block + i * QUAD)
                    given = code.bits(T.broadcast(word, 4), "int8", 16)
                    result = code.intrinsic(
                        "llvm.aarch64.neon.sdot.v4i32.v16i8", "int32x4",
                        code.load(total, part, 4), weights, given,
                    )  # fmt: skip
                    code.store(total, part, result, 4)


def _pairs(packing: Packing, buffers: list[Any], sums: list[Any], rows: list[Any], at: Any,
           blocks: int, zero: Any) -> None:  # fmt: skip
    """By vpmaddubsw in int16, widened by a multiplication with ones."""
    half = LANES // 2
    for part in range(0, LANES, half):
        held: list[Any] = [None] * len(sums)
        for b in range(blocks):
            quads = _Quads(packing, buffers[1], at + b * packing.bytes, part, half)
            for i in range(packing.block // QUAD):
                weights = quads[i]
                for r, row in enumerate(rows):
                    word = _word(buffers, row + b * packing.block + i * QUAD)
                    given = code.bits(T.broadcast(word, half), "int8", 32)
                    pairs = code.intrinsic("llvm.x86.avx2.pmadd.ub.sw", "int16x16", weights, given)
                    held[r] = code.bind(pairs if held[r] is None else held[r] + pairs)
        for total, pairs in zip(sums, held, strict=True):
            ones = T.broadcast(T.int16(1), 16)
            wide = code.intrinsic("llvm.x86.avx2.pmadd.wd", "int32x8", pairs, ones)
            code.store(total, part, code.load(total, part, half) + wide, half)


def _lanes(packing: Packing, quad: Any, j: int) -> Any:
    """Value j of a quad as int32, a lane for each of 16 columns."""
    words = code.bits(quad, "int32", LANES)
    if packing.signed:
        return code.bind((words << code.integer(24 - 8 * j)) >> code.integer(24))
    moved = T.shift_right(words, code.integer(8 * j)) if j else words
    return code.bind(T.bitwise_and(moved, code.integer((1 << packing.bits) - 1)))


def _plain(packing: Packing, buffers: list[Any], sums: list[Any], rows: list[Any], at: Any,
           blocks: int, zero: Any) -> None:  # fmt: skip
    for b in range(blocks):
        quads = _Quads(packing, buffers[1], at + b * packing.bytes, 0, LANES)
        for i in range(packing.block // QUAD):
            quad = quads[i]
            for j in range(QUAD):
                weights = _lanes(packing, quad, j)
                for total, row in zip(sums, rows, strict=True):
                    place = row + b * packing.block + i * QUAD + j
                    value = code.bind(T.Cast("int32", code.load(buffers[0], place, 1)))
                    code.store(total, 0, code.load(total, 0) + weights * code.spread(value))


def _add_floats(buffers: list[Any], sums: list[Any], rows: list[Any], k: int, w: Any) -> None:
    for total, row in zip(sums, rows, strict=True):
        value = code.bind(code.load(buffers[0], row + k, 1))
        code.store(total, 0, code.fma(code.spread(value), w, code.load(total, 0)))


def _floats(packing: Packing, buffers: list[Any], sums: list[Any], rows: list[Any], at: Any,
            blocks: int, zero: Any) -> None:  # fmt: skip

    def add(k: int, whole: Any) -> None:
        if packing.zero:
            whole = whole - code.integer(packing.zero)
        value = code.cast(whole, "float32")
        value = code.bind(value if zero is None else value - zero)
        _add_floats(buffers, sums, rows, k, value)

    for b in range(blocks):
        if packing.block == 1:
            add(b, code.cast(code.load(buffers[1], at + b * packing.bytes), "int32"))
            continue
        quads = _Quads(packing, buffers[1], at + b * packing.bytes, 0, LANES)
        for i in range(packing.block // QUAD):
            quad = quads[i]
            for j in range(QUAD):
                add(b * packing.block + i * QUAD + j, _lanes(packing, quad, j))


def _floats_looked_up(packing: Packing, buffers: list[Any], sums: list[Any], rows: list[Any],
                      at: Any, blocks: int, zero: Any) -> None:  # fmt: skip
    """The floats of all stored numbers in one register, permuted by its lanes' lowest four bits."""
    numbers = T.bitwise_and(T.ramp(T.int32(0), 1, LANES), code.integer((1 << packing.bits) - 1))
    table = code.bind(code.cast(numbers - code.integer(packing.zero or 0), "float32"))
    for b in range(blocks):
        start, bits = at + b * packing.bytes, packing.bits
        quads = _Quads(packing, buffers[1], start, 0, LANES)
        for i in range(packing.block // QUAD):
            # Bits above the number's own repeat the table; those of 3-bit quads are clear.
            words = code.bits(quads[i] if bits == 3 else quads.held[0], "int32", LANES)
            for j in range(QUAD):
                shift = 8 * j + (0 if bits == 3 else bits * i)
                index = T.shift_right(words, code.integer(shift)) if shift else words
                value = code.intrinsic("llvm.x86.avx512.permvar.sf.512", "float32x16", table, index)
                value = code.bind(value if zero is None else value - zero)
                _add_floats(buffers, sums, rows, b * packing.block + i * QUAD + j, value)
