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
from dataclasses import replace
from math import gcd
from typing import Any

from torch import Tensor
from tvm.tirx.script.builder import ir as T

from qcompiler.kernels import code
from qcompiler.kernels.code import LANES, Argument
from qcompiler.kernels.expression import Expression
from qcompiler.kernels.isa import Isa
from qcompiler.kernels.packed_tiles import tile_fill
from qcompiler.kernels.packing import QUAD, Packing, Quads, group_sum, start, zero_points
from qcompiler.kernels.tiles import Product, tiled

UNROLLED = 32  # values of k, at most, that are written out one after another: one by one, 8


def narrow(isa: Isa) -> Isa:
    """The machine with panels of 16 columns, and registers left for the groups' integer sums."""
    if isa.dot == "smmla":  # rows go in pairs
        return replace(isa, vectors=4)
    return replace(isa, vectors=8 if isa.vectors >= 8 else max(1, isa.vectors // 2))


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
                zeros.append(zero_points(buffers, packing, ((panel + p) * groups + g) * LANES))
            for r in range(height):
                taken = group_sum(buffers, packing, product, left, r, g)
                for p in range(across):
                    code.store(sums[r * across + p], 0, start(packing, taken, zeros[p]))
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

    made = tile_fill(product, packing, unrolled) if packing.tiled else fill
    return tiled(name, arguments, product, expression, narrow(isa), "float32", made)


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


def _word(buffers: list[Any], start: Any) -> Any:
    """Four int8 activations as an int32."""
    return code.bind(code.bits(code.load(buffers[0], start, QUAD), "int32", 1))


def _vnni(packing: Packing, buffers: list[Any], sums: list[Any], rows: list[Any], at: Any,
          blocks: int, zero: Any) -> None:  # fmt: skip
    for b in range(blocks):
        quads = Quads(packing, buffers[1], at + b * packing.bytes, 0, LANES)
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
            quads = Quads(packing, buffers[1], at + b * packing.bytes, part, 4)
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
            quads = Quads(packing, buffers[1], at + b * packing.bytes, part, half)
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
        quads = Quads(packing, buffers[1], at + b * packing.bytes, 0, LANES)
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
        quads = Quads(packing, buffers[1], at + b * packing.bytes, 0, LANES)
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
        quads = Quads(packing, buffers[1], start, 0, LANES)
        for i in range(packing.block // QUAD):
            # Bits above the number's own repeat the table; those of 3-bit quads are clear.
            words = code.bits(quads[i] if bits == 3 else quads.held[0], "int32", LANES)
            for j in range(QUAD):
                shift = 8 * j + (0 if bits == 3 else bits * i)
                index = T.shift_right(words, code.integer(shift)) if shift else words
                value = code.intrinsic("llvm.x86.avx512.permvar.sf.512", "float32x16", table, index)
                value = code.bind(value if zero is None else value - zero)
                _add_floats(buffers, sums, rows, b * packing.block + i * QUAD + j, value)
