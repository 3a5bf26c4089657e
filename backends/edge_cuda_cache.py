"""Attention over a cache in the model's state, for a GPU: float16, or integers with scales."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qcompiler.backends.edge_cache import sizes_of
from qcompiler.backends.edge_group import Group, Writer
from qcompiler.backends.edge_ops import Op, Ref, Storage
from qcompiler.kernels.cache import cache_elements
from qcompiler.kernels.cuda_cache import Decode, Rotary, Source, write_cache
from qcompiler.kernels.cuda_decode import attend
from qcompiler.kernels.cuda_flash import choose_tiles
from qcompiler.kernels.cuda_prompt import prompt_attention
from qcompiler.kernels.expression import Access

if TYPE_CHECKING:
    from qcompiler.backends.edge_cuda_calls import CudaCalls

FLOAT = "float32"
FEW = 16  # queries up to which keys are shared out among blocks


def attention_over_cache(calls: CudaCalls, g: Group, op: Op) -> None:
    """The calls for `qc::cached_attention` or `qc::stored_attention` of one text."""
    q, k, v, _, _, _, cos, sin, positions, heads, kv_heads, scale, window, neighbours = op.args[:14]
    *steps, bits = op.args[14:] or (None, None, 16)
    decoder, size = sizes_of(calls, op)
    new = q.shape[1]
    sizes = Decode(heads, kv_heads, new, size, decoder.capacity, float(scale), int(window), bits)
    count = cache_elements(kv_heads, sizes.capacity, size)
    keys, values = (_state(calls, count, bits) for _ in range(2))
    base = [keys, values, decoder.position]
    few = new <= FEW
    writer = calls.writer(op.outputs[0].shape if few else (1,), [*base])
    queries = calls.temporary(torch.float16, (new, heads, size)).storage
    if few:
        writer.argument(calls.temporary(torch.float32, (sizes.workspace,)).storage)
        writer.argument(calls.counters(sizes.counters))
    else:
        writer.argument(queries)
    read_q = _by_head(q, size, writer.argument(q.storage))
    sources = [
        Source(_by_head(x, size, writer.argument(x.storage)), _scales(writer, step))
        for x, step in ((k, steps[0]), (v, steps[1]))
    ]
    rotary = None
    if cos is not None:
        tables = [calls.constants.known(table) for table in (cos, sin)]
        first, second = (
            Access(writer.argument(t.storage), FLOAT, t.offset, t.strides) for t in tables
        )
        at = Access(
            writer.argument(positions.storage), "int64", positions.offset,
            (positions.strides[-1] if new > 1 else 0,),
        )  # fmt: skip
        rows, pairs = tables[0].shape
        rotary = Rotary(first, second, at, rows, pairs, bool(neighbours))
    given = (sizes, read_q, sources[0], sources[1], rotary)
    if not few:
        calls.launch(
            "write_cache", op.label, given,
            lambda name: write_cache(name, writer.kernel_arguments(), *given), writer,
            written=2, also=(3,),
        )  # fmt: skip
    end, values_of = writer, sources[1]
    if not few:
        end = calls.writer(op.outputs[0].shape, [*base, queries])
        values_of = replace(values_of, scale=_scales(end, steps[1]))
    end.keep(op.outputs[0], end.step("anchor", FLOAT))
    end.members(g, calls.stored)
    expression = end.expression()
    if few:
        calls.launch(
            "cached_attention", op.label, (*given, expression),
            lambda name: attend(name, end.kernel_arguments(), *given, expression), end,
            written=2, also=(3, 4),
        )  # fmt: skip
        return
    tiles = choose_tiles(new, size, bits, calls.gpu)
    calls.launch(
        "prompt_attention", op.label, (sizes, tiles, values_of, expression),
        lambda name: prompt_attention(
            name, end.kernel_arguments(), sizes, tiles, values_of, expression
        ), end,
    )  # fmt: skip


def _state(calls: CudaCalls, count: int, bits: int) -> Storage:
    """Memory of a cache that lives from run to run; the n-th is the same in every entry."""
    dtype = torch.float16 if bits == 16 else torch.uint8
    made = Storage(dtype, count if bits == 16 else count * bits // 8, state=len(calls.states))
    calls.states.append(made)
    return made


def _scales(writer: Writer, scale: Ref | None) -> Access | None:
    """Scales of the tensor (1,) or of each channel (kv_heads, 1, size), over (head, element)."""
    if scale is None:
        return None
    strides = (0, 0) if scale.numel == 1 else (scale.strides[0], scale.strides[2])
    return Access(writer.argument(scale.storage), FLOAT, scale.offset, strides)


def _by_head(x: Ref, size: int, argument: int) -> Access:
    """(1, token, head · element) → an access over (token, head, element)."""
    return Access(argument, FLOAT, x.offset, (x.strides[1], size, x.strides[2]))
