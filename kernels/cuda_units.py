"""The layout in which Hopper's tensor cores read matrices from shared memory.

A matrix is stored as units: 64 rows of 128 bytes (64 float16 or 128 int8 columns), the 16-byte
pieces of a row in the order that is read without bank conflicts: piece c of row r at place
c xor (r mod 8). Weights are packed so when they are compiled, activations by the kernel that makes
them.

Source: PTX ISA 8.0, wgmma, "128B swizzle".
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

UNIT_ROWS = 64
UNIT_BYTES = 128  # of a row
UNIT = UNIT_ROWS * UNIT_BYTES
# Of activations of 8 bits: int8 or uint8, which int8 weights multiply, or e4m3, with weights alike.
Kind = Literal["s8", "u8", "e4m3"]


def sums_of(kind: Kind) -> str:
    """The dtype of such products' sums."""
    return "float32" if kind == "e4m3" else "int32"


def units(matrix: Tensor) -> Tensor:
    """(R, C) of 8 or 16 bits → flat uint8, [R / 64][C / unit][64][128 bytes], zeros at the ends."""
    across = UNIT_BYTES // matrix.element_size()
    rows, columns = -(-matrix.shape[0] // UNIT_ROWS), -(-matrix.shape[1] // across)
    whole = matrix.new_zeros(rows * UNIT_ROWS, columns * across)
    whole[: matrix.shape[0], : matrix.shape[1]] = matrix
    pieces = whole.view(torch.uint8).reshape(rows, UNIT_ROWS, columns, 8, 16).transpose(1, 2)
    row = torch.arange(UNIT_ROWS, device=matrix.device)[:, None] % 8
    source = torch.arange(8, device=matrix.device)[None] ^ row  # its own inverse
    index = source.reshape(1, 1, UNIT_ROWS, 8, 1).expand(rows, columns, -1, -1, 16)
    return pieces.contiguous().gather(3, index).reshape(-1)


def unit_bytes(rows: int, columns: int, size: int) -> int:
    """Bytes of a matrix as units; `size`: of an element."""
    return -(-rows // UNIT_ROWS) * -(-columns * size // UNIT_BYTES) * UNIT
