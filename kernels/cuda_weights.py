"""Weights of float16 products on a GPU, packed into the order in which tensor cores read them.

A warp multiplies 16 rows of the weight (A, row-major) by 8 tokens (B) with mma.m16n8k16. There
lane l = 4g + t holds of A: rows g and g + 8, columns 2t, 2t + 1, 2t + 8, 2t + 9. So the weights are
stored lane by lane: no shuffle, no ldmatrix, 16-byte copies alone.

    stream[tile][stage] = weights [16 bytes][lane][16 bytes], then scales [group][g][row g, g + 8]

A tile is 16 rows, a stage 64 or 128 columns. Integers are stored with an offset, 8 or 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompiler.kernels.cuda_units import UNIT, UNIT_BYTES, UNIT_ROWS, Kind, unit_bytes

ROWS = 16  # of a tile
NIBBLE = 16  # `Nibbles` are multiplied that many times too large, and their scales made smaller
LIFT = 64  # what `Widened` weights are multiplied with in float16


class _Tiled:
    """A weight in tiles of `ROWS` rows, each in stages of some columns."""

    rows: int
    depth: int

    @property
    def stage(self) -> int:
        """Columns of a stage."""
        return UNIT_BYTES

    @property
    def stages(self) -> int:
        """Stages of a tile; the last one is filled up with zeros."""
        return -(-self.depth // self.stage)

    @property
    def tiles(self) -> int:
        """Tiles; the last one is filled up with zeros."""
        return -(-self.rows // ROWS)


@dataclass(frozen=True)
class Weights(_Tiled):
    """Form of a packed weight.

    Attributes:
        rows: N, outputs.
        depth: K, inputs; a multiple of 8.
        bits: 4 or 8.
        group: columns that share a scale, 32, 64 or 128; 0 where a row has one scale, which then
            is an argument of its own.
    """

    rows: int
    depth: int
    bits: int = 4
    group: int = 128

    @property
    def stage(self) -> int:
        """Columns of a stage."""
        return 128 if self.group == 128 or self.depth % 128 == 0 or self.depth > 2048 else 64

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights in a stage of a tile."""
        return ROWS * self.stage * self.bits // 8

    @property
    def stage_bytes(self) -> int:
        """Bytes of a stage of a tile."""
        scales = 2 * ROWS * (self.stage // self.group) if self.group else 0
        return self.weight_bytes + scales

    @property
    def nbytes(self) -> int:
        """Of all."""
        return self.tiles * self.stages * self.stage_bytes

    @property
    def line(self) -> int:
        """Bytes of a token's activations in a stage."""
        return self.stage * 2

    @property
    def scaled_after(self) -> bool:
        """Whether sums are multiplied with the scale of their row."""
        return not self.group

    def start(self, tile: Any, stage: Any) -> Any:
        """Where a stage of a tile lies."""
        return (tile * self.stages + stage) * self.stage_bytes


@dataclass(frozen=True)
class Bytes(_Tiled):
    """Form of an int8 or e4m3 weight that is multiplied as it is: units (`cuda_units`).

    Attributes:
        rows: N, outputs.
        depth: K, inputs.
        kind: of activations.
    """

    rows: int
    depth: int
    kind: Kind = "s8"

    line = UNIT_BYTES
    stage_bytes = ROWS * UNIT_BYTES
    scaled_after = False

    @property
    def nbytes(self) -> int:
        """Of all."""
        return unit_bytes(self.rows, self.depth, 1)

    def start(self, tile: Any, stage: Any) -> Any:
        """Where a stage of a tile lies."""
        per = UNIT_ROWS // ROWS
        return (tile // per * self.stages + stage) * UNIT + tile % per * self.stage_bytes


@dataclass(frozen=True)
class Nibbles(_Tiled):
    """Form of a 4-bit weight that is multiplied as integers, by int8 activations; see `Widened`.

    A warp multiplies by mma.m16n8k32: lane l = 4g + t holds of A rows g and g + 8, columns 4t to
    4t + 3 and those + 16. A byte holds row g's weight in its low bits, that of row g + 8 above.

        stream[tile][stage] = weights [16 bytes][lane][16 bytes], scales [group][g][row g, g + 8]

    Attributes:
        rows: N, outputs.
        depth: K, inputs.
        group: columns that share a scale, 32, 64 or 128.
    """

    rows: int
    depth: int
    group: int

    line = UNIT_BYTES
    weight_bytes = ROWS * UNIT_BYTES // 2
    scaled_after = False
    kind: Kind = "s8"

    @property
    def stage_bytes(self) -> int:
        """Bytes of a stage of a tile; scales are float32."""
        return self.weight_bytes + UNIT_BYTES // self.group * ROWS * 4

    @property
    def nbytes(self) -> int:
        """Of all."""
        return self.tiles * self.stages * self.stage_bytes

    def start(self, tile: Any, stage: Any) -> Any:
        """Where a stage of a tile lies."""
        return (tile * self.stages + stage) * self.stage_bytes


class Widened(Nibbles):
    """`Nibbles` that are multiplied in float16, by activations in the order of `widened_columns`.

    A lane's numbers of 16 columns are then a fragment of A for mma.m16n8k16, whose columns 2t,
    2t + 1, 2t + 8 and 2t + 9 are the weight's 4t to 4t + 3.
    """

    bits = 4
    line = 2 * UNIT_BYTES

    @property
    def largest(self) -> float:
        """The largest scale that float16 has room for."""
        return 65504 / (8 * LIFT)


Form = Weights | Bytes | Nibbles


def widened_columns(width: int) -> Tensor:
    """int64 (width,), a multiple of 16: which column of x lies where, for `Widened` weights."""
    place = torch.arange(width)
    inside = place % 16
    return place - inside + inside % 8 // 2 * 4 + inside // 8 * 2 + inside % 2


def pack_nibbles(weight: Tensor, scale: Tensor, form: Nibbles) -> Tensor:
    """Pack a weight of 4 bits for products of integers.

    Args:
        weight: (N, K) int8, −8…7.
        scale: (N, K / group), float32. Stored a sixteenth as large: see `cuda_sums`.
        form: sizes.

    Returns:
        Flat uint8 of `form.nbytes`.
    """
    n, stages = form.tiles * ROWS, form.stages
    across = n, stages * UNIT_BYTES
    whole = torch.zeros(across, dtype=torch.uint8, device=weight.device)
    whole[: form.rows, : form.depth] = weight.view(torch.uint8) & 15
    # [tile][row half][g][stage][two steps][step][column half][t][4]
    parts = whole.reshape(form.tiles, 2, 8, stages, 2, 2, 2, 4, 4)
    parts = parts[:, 0] | parts[:, 1] << 4
    # → [tile][stage][two steps][g][t][step][column half][4]
    packed = parts.permute(0, 2, 3, 1, 6, 4, 5, 7).reshape(form.tiles, stages, form.weight_bytes)
    groups = torch.zeros(n, across[1] // form.group, device=weight.device)
    groups[: form.rows, : scale.shape[1]] = scale / NIBBLE
    held = groups.reshape(form.tiles, 2, 8, stages, -1).permute(0, 3, 4, 2, 1).contiguous()
    scales = held.reshape(form.tiles, stages, -1).view(torch.uint8)
    return torch.cat([packed, scales], -1).reshape(-1)


def pack(weight: Tensor, scale: Tensor | None, form: Weights) -> Tensor:
    """Pack a weight.

    Args:
        weight: (N, K) int8, −8…7 or −128…127.
        scale: (N, K / group), float; None where a row has one scale.
        form: sizes.

    Returns:
        Flat uint8 of `form.nbytes`.
    """
    n, k, wide = form.tiles * ROWS, form.stages * form.stage, form.stage
    whole = torch.zeros(n, k, dtype=torch.int32, device=weight.device)
    whole[: form.rows, : form.depth] = weight
    whole += 1 << (form.bits - 1)
    # [tile][row half][g][stage][step][column half][t][pair]
    parts = whole.reshape(form.tiles, 2, 8, form.stages, wide // 16, 2, 4, 2)
    # → [tile][stage][step][g][t][column half][row half][pair]: registers a0 … a3 of each lane
    parts = parts.permute(0, 3, 4, 2, 6, 5, 1, 7)
    lanes = parts.reshape(form.tiles, form.stages, wide // 16, 32, 4, 2)
    if form.bits == 4:  # register r: its first number in nibble r, its second in nibble r + 4
        shifts = torch.tensor([[0, 16], [4, 20], [8, 24], [12, 28]], device=weight.device)
        words = (lanes.long() << shifts).sum((-1, -2)).unsqueeze(-1)
    else:
        shifts = torch.tensor([[0, 8], [16, 24]], device=weight.device)
        words = (lanes.reshape(*lanes.shape[:4], 2, 2, 2).long() << shifts).sum((-1, -2))
    # [step][lane][words] → [16 bytes][lane][4 words]
    per = words.shape[-1]
    words = words.reshape(form.tiles, form.stages, wide // 16 * per // 4, 4 // per, 32, per)
    words = words.permute(0, 1, 2, 4, 3, 5).reshape(form.tiles, form.stages, -1)
    packed = (words & 0xFFFFFFFF).to(torch.uint32).view(torch.uint8)
    packed = packed.reshape(form.tiles, form.stages, form.weight_bytes)
    if form.group:
        assert scale is not None
        held = torch.zeros(n, k // form.group, dtype=torch.float16, device=weight.device)
        held[: form.rows, : scale.shape[1]] = scale
        groups = held.reshape(form.tiles, 2, 8, form.stages, wide // form.group)
        groups = groups.permute(0, 3, 4, 2, 1).contiguous()
        scales = groups.reshape(form.tiles, form.stages, -1).view(torch.uint8)
        packed = torch.cat([packed, scales], -1)
    return packed.contiguous().reshape(-1)


def reference(activation: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """(M, K), (N, K) int8, (N, groups) → (M, N) in float64; scales as float16 stores them."""
    wide = scale.half().double().repeat_interleave(-(-weight.shape[1] // scale.shape[1]), 1)
    return activation.double() @ (weight.double() * wide[:, : weight.shape[1]]).T
