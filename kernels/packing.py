"""How weights of 2, 3, 4 or 8 bits are stored, and how a kernel unpacks them in registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tvm.tirx.script.builder import ir as T

from qcompiler.kernels import code
from qcompiler.kernels.code import LANES
from qcompiler.kernels.isa import Isa
from qcompiler.kernels.tiles import Product

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
        tiled: 8 values of k of a column lie side by side, as ARM's SMMLA reads them, not 4.
    """

    bits: int
    group: int
    zero: int | None
    integer: bool
    signed: bool
    tiled: bool = False

    @property
    def block(self) -> int:
        """Values of k that are stored together for 16 columns; a group holds whole blocks."""
        if self.bits == 8:
            return (2 * QUAD if self.tiled else QUAD) if self.integer else 1
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
    tiled = integer and isa.dot == "smmla" and group % (2 * QUAD) == 0
    zero = zero if zero is None else zero - 128 * signed
    return Packing(bits, group, zero, integer, signed, tiled)


def pack(weight: Tensor, packing: Packing) -> Tensor:
    """(N, K) numbers, 0 the smallest of their bits → flat uint8 (or int8): 16 columns a panel.

    For each panel and block, quads of four k for 16 columns: [quad][16][4]. 4 and 2 bits: quads
    share bytes, the first in the lowest bits. 3 bits: the two low bits of eight quads in two such
    vectors, then the high bits of all, quad i's in bit i. 8 bits by floats: [k][16].

    Where `tiled`, two quads together are [16][8], the first one's memory the columns 0 to 7.
    """
    n, k = weight.shape
    values = torch.zeros(-(-n // LANES) * LANES, k, dtype=torch.int16)
    values[:n] = weight
    if packing.signed:
        values = values - 128
    if packing.block == 1:
        return values.to(torch.int8).reshape(-1, LANES, k).transpose(1, 2).reshape(-1)
    quads = values.reshape(-1, LANES, k // packing.block, packing.block // QUAD, QUAD)
    if packing.tiled:
        octets = quads.unflatten(3, (-1, 2)).permute(0, 2, 3, 1, 4, 5)
        quads = octets.reshape(*quads.shape[:1], -1, quads.shape[3], LANES, QUAD)
    else:
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


class Quads:
    """Unpacks a block's quads: bytes of 4 values of k, for `columns` columns from one on.

    Where the packing is tiled: 8 values of k for half as many columns.
    """

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


def group_sum(
    buffers: list[Any], packing: Packing, product: Product, left: Any, r: int, g: Any
) -> Any:
    """The sum of group g of a row's activations, where a kernel reads it; None elsewhere."""
    if not packing.needs_sums:
        return None
    # One row of sums for each row of activations.
    row = (left - product.offset) // product.row_stride + r
    place = row * (product.depth // packing.group) + g
    return code.load(buffers[4 if packing.zero is None else 3], place, 1)


def zero_points(buffers: list[Any], packing: Packing, at: Any) -> Any:
    """The zero points of 16 columns where they have their own, as the sums' type."""
    if packing.zero is not None:
        return None
    kind = "int32" if packing.integer else "float32"
    return code.bind(code.cast(code.cast(code.load(buffers[3], at), "int32"), kind))


def start(packing: Packing, taken: Any, zero: Any) -> Any:
    """What a group's sum starts from: −zero · the sum of its activations."""
    if not packing.integer:
        return code.number(0.0)
    if taken is None:
        return code.integer(0)
    if packing.zero is not None:
        return code.spread(code.bind(taken * code.integer(-packing.zero, 1)))
    return code.integer(0) - zero * code.spread(code.bind(taken))
