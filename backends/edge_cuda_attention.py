"""Attention over tensors on a GPU's tensor cores, where they have that form; else `cuda_attention`.

Queries, keys and values are read in float16, which the kernels that make them store where possible.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcompiler.backends.edge_attention import Attended, attended
from qcompiler.backends.edge_group import Group
from qcompiler.backends.edge_ops import Op, Ref
from qcompiler.kernels.cuda_attention_flash import PIECE, computes, flash_attention
from qcompiler.kernels.cuda_flash import choose_tiles

if TYPE_CHECKING:
    from qcompiler.backends.edge_cuda_calls import CudaCalls

FLOAT = "float32"


def by_tiles(found: Attended) -> bool:
    """Whether tensor cores compute it."""
    queries = found.q.shape[1 if found.merged else 2]
    floats = all(ref.dtype == torch.float32 for ref in found.tensors)
    return floats and computes(queries, found.size, found.value_size)


def rows_aligned(x: Ref) -> bool:
    """Whether the tensor's rows in float16 would begin at multiples of 16 bytes."""
    steps = (x.offset, *x.strides[:-1])
    return x.strides[-1] == 1 and all(step % PIECE == 0 for step in steps)


def attention_by_tiles(calls: CudaCalls, g: Group, op: Op) -> None:
    """The call, and those that round what is not stored in float16."""
    found = attended(op)
    halves = []
    for x in found.tensors:
        half = calls.stored_half(x) if rows_aligned(x) else None
        halves.append(calls.half(x, op.label) if half is None else half)
    writer = calls.writer(op.out.shape, [])
    heads = found.over(*halves).heads_of(writer)
    writer.keep(op.out, writer.step("anchor", FLOAT))
    writer.members(g, calls.stored)
    expression = writer.expression()
    tiles = choose_tiles(heads.queries, heads.size, gpu=calls.gpu)
    calls.launch(
        "flash_attention", op.label, (heads, tiles, expression),
        lambda name: flash_attention(name, writer.kernel_arguments(), heads, tiles, expression),
        writer,
    )  # fmt: skip
