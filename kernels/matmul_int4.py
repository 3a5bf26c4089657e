"""Matrix product with 4-bit weights in groups, by int8 or float32 activations.

    out[m, n] = Σ_g scale[n, g] · Σ_(k in g) activation[m, k] · weight[n, k]

Weights are symmetric, −8…7, and stored as w + 8 in nibbles; they are unpacked in registers, where
the integer dot product reads them. For int8 activations the inner sum is exact in int32; where the
dot product takes unsigned weights, what + 8 adds is taken off by −8 · Σ_(k in g) activation[m, k],
computed once for a matrix. Scales are applied in float32, group by group in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tvm.tirx.script.builder import ir as T

from qcompiler.kernels import code
from qcompiler.kernels.code import LANES, Argument
from qcompiler.kernels.expression import Expression
from qcompiler.kernels.isa import Isa, activation_word
from qcompiler.kernels.tiles import Product, tiled

BLOCK = 8  # values of k that one vector of nibbles holds for 16 columns
ZERO = 8  # what the stored nibble of a weight of 0 is


def narrow(isa: Isa) -> Isa:
    """The machine with panels of 16 columns, and registers left for the groups' integer sums."""
    return replace(isa, vectors=8 if isa.vectors >= 8 else max(1, isa.vectors // 2))


def pack(weight: Tensor, group: int) -> Tensor:
    """(N, K) int8 of −8…7 → flat uint8 [N/16][K/8][16][4]: low nibbles k, high nibbles k + 4."""
    n, k = weight.shape
    padded = torch.zeros(-(-n // LANES) * LANES, k, dtype=torch.int16)
    padded[:n] = weight
    blocks = (padded + ZERO).reshape(-1, LANES, k // BLOCK, 2, 4).permute(0, 2, 3, 1, 4)
    packed = blocks[:, :, 0] | blocks[:, :, 1] << 4
    return packed.to(torch.uint8).contiguous().reshape(-1)


def pack_scales(scale: Tensor) -> Tensor:
    """(N, groups) float32 → flat [N/16][groups][16]."""
    n, groups = scale.shape
    padded = torch.zeros(-(-n // LANES) * LANES, groups)
    padded[:n] = scale
    return padded.reshape(-1, LANES, groups).transpose(1, 2).contiguous().reshape(-1)


def reference(activation: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """(M, K), (N, K) int8, (N, groups) → (M, N) in float64."""
    wide = scale.double().repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    return activation.double() @ (weight.double() * wide).T


def needs_sums(isa: Isa) -> bool:
    """Whether the kernel reads −8 · the sum of each group of int8 activations."""
    return isa.dot == "vnni"


def matmul_int4(
    name: str,
    arguments: Sequence[Argument],
    product: Product,
    group: int,
    integer: bool,
    expression: Expression,
    isa: Isa,
) -> Any:
    """The kernel.

    Args:
        name: of the function.
        arguments: activations (int8 or float32), packed weights, packed scales, for int8
            activations where `needs_sums` the sums (M, groups) int32; then the expression's.
        product: the sizes; K is a multiple of `group`, which is one of 8.
        group: values of k that share a scale.
        integer: int8 activations.
        expression: over (…, N), with the float32 sums as value 0.
        isa: the machine.
    """
    machine = narrow(isa)
    groups, blocks = product.depth // group, group // BLOCK
    one = product.depth // BLOCK * LANES * 4  # bytes of a panel

    def fill(buffers: list[Any], tile: list[Any], left: Any, right: Any, panel: Any,
             height: int, across: int) -> None:  # fmt: skip
        for total in tile:
            code.store(total, 0, code.number(0.0))
        sums = [code.scratch(LANES, "int32" if integer else "float32") for _ in tile]

        def block(g: Any, b: Any) -> None:
            k = g * group + b * BLOCK
            for p in range(across):
                at = (panel + p) * one + (g * blocks + b) * LANES * 4
                mine = [sums[r * across + p] for r in range(height)]
                rows = [left + r * product.row_stride + k for r in range(height)]
                if not integer:
                    _floats(buffers, mine, rows, at)
                elif isa.dot == "vnni":
                    _vnni(buffers, mine, rows, at)
                elif isa.dot == "sdot":
                    _sdot(isa, buffers, mine, rows, at)
                else:
                    _plain(buffers, mine, rows, at)

        with code.loop(groups) as g:
            for r in range(height):
                start = code.number(0.0) if not integer else code.integer(0)
                if integer and needs_sums(isa):
                    # One row of sums for each row of activations.
                    row = (left - product.offset) // product.row_stride + r
                    start = code.spread(code.bind(code.load(buffers[3], row * groups + g, 1)))
                for p in range(across):
                    code.store(sums[r * across + p], 0, start)
            if blocks <= 4:
                for b in range(blocks):
                    block(g, b)
            else:
                with code.loop(blocks) as b:
                    block(g, b)
            for p in range(across):
                scale = code.bind(code.load(buffers[2], ((panel + p) * groups + g) * LANES))
                for r in range(height):
                    had = tile[r * across + p]
                    part = code.load(sums[r * across + p], 0)
                    if integer:
                        part = code.cast(part, "float32")
                    code.store(had, 0, code.fma(part, scale, code.load(had, 0)))

    return tiled(name, arguments, product, expression, machine, "float32", fill)


def _nibbles(buffers: list[Any], at: Any, lanes: int) -> tuple[Any, Any]:
    """Low and high nibbles of `lanes` bytes."""
    packed = code.bind(code.load(buffers[1], at, lanes))
    mask = T.broadcast(T.uint8(15), lanes)
    low = code.bind(T.bitwise_and(packed, mask))
    return low, code.bind(T.shift_right(packed, T.broadcast(T.uint8(4), lanes)))


def _vnni(buffers: list[Any], sums: list[Any], rows: list[Any], at: Any) -> None:
    for half, weights in enumerate(_nibbles(buffers, at, 64)):
        unsigned = code.bind(code.bits(weights, "int8", 64))
        for total, row in zip(sums, rows, strict=True):
            word = code.bind(code.bits(code.load(buffers[0], row + half * 4, 4), "int32", 1))
            given = code.bits(T.broadcast(word, LANES), "int8", 64)
            result = code.intrinsic(
                "llvm.x86.avx512.vpdpbusd.512", "int32x16", code.load(total, 0), unsigned, given
            )
            code.store(total, 0, result)


def _sdot(isa: Isa, buffers: list[Any], sums: list[Any], rows: list[Any], at: Any) -> None:
    for part in range(0, LANES, 4):
        for half, weights in enumerate(_nibbles(buffers, at + part * 4, 16)):
            signed = code.bits(weights, "int8", 16) - T.broadcast(T.int8(ZERO), 16)
            signed = code.bind(signed)
            for total, row in zip(sums, rows, strict=True):
                word = activation_word(isa, buffers[0], row + half * 4, True)
                given = code.bits(T.broadcast(word, 4), "int8", 16)
                result = code.intrinsic(
                    "llvm.aarch64.neon.sdot.v4i32.v16i8", "int32x4",
                    code.load(total, part, 4), signed, given,
                )  # fmt: skip
                code.store(total, part, result, 4)


def _words(buffers: list[Any], at: Any) -> Any:
    """The 64 bytes as 16 int32, a lane for each column."""
    return code.bind(code.bits(code.load(buffers[1], at, 64), "int32", LANES))


def _unpacked(words: Any, k: int) -> Any:
    """Weight k of the block for 16 columns, int32."""
    shift = (k % 4) * 8 + (k // 4) * 4
    nibble = T.bitwise_and(T.shift_right(words, code.integer(shift)), code.integer(15))
    return code.bind(nibble - code.integer(ZERO))


def _plain(buffers: list[Any], sums: list[Any], rows: list[Any], at: Any) -> None:
    words = _words(buffers, at)
    for k in range(BLOCK):
        weights = _unpacked(words, k)
        for total, row in zip(sums, rows, strict=True):
            value = code.bind(T.Cast("int32", code.load(buffers[0], row + k, 1)))
            code.store(total, 0, code.load(total, 0) + weights * code.spread(value))


def _floats(buffers: list[Any], sums: list[Any], rows: list[Any], at: Any) -> None:
    words = _words(buffers, at)
    for k in range(BLOCK):
        weights = code.bind(code.cast(_unpacked(words, k), "float32"))
        for total, row in zip(sums, rows, strict=True):
            value = code.bind(code.load(buffers[0], row + k, 1))
            code.store(total, 0, code.fma(code.spread(value), weights, code.load(total, 0)))
