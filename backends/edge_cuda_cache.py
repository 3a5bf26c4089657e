"""Attention over a cache in the model's state, for a GPU: two kernels, the cache in float16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcompiler.backends.edge_group import Group
from qcompiler.backends.edge_ops import Op, Ref, Storage
from qcompiler.errors import UnsupportedError
from qcompiler.kernels.cache import cache_elements
from qcompiler.kernels.cuda_attention import cached_attention
from qcompiler.kernels.cuda_decode import Decode, Rotary, attend, write_cache
from qcompiler.kernels.expression import Access

if TYPE_CHECKING:
    from qcompiler.backends.edge_cuda_calls import CudaCalls

FLOAT = "float32"
MULTIPLE = 16  # of a head's size
FEW = 16  # queries up to which keys are shared out among blocks


def attention_over_cache(calls: CudaCalls, g: Group, op: Op) -> None:
    """The calls for `qc::cached_attention` of one text."""
    q, k, v, _, _, _, cos, sin, positions, heads, kv_heads, scale, window, neighbours = op.args
    if calls.decoder is None:
        raise UnsupportedError("attention over a cache outside of a language model")
    new, size = q.shape[1], q.shape[2] // heads
    if size % MULTIPLE or v.shape[2] // kv_heads != size:
        raise UnsupportedError(
            f"heads of size {size}; attention over a cache takes multiples of {MULTIPLE}"
        )
    sizes = Decode(
        heads, kv_heads, new, size, calls.decoder.capacity, float(scale), int(window)
    )  # fmt: skip
    count = cache_elements(kv_heads, sizes.capacity, size)
    keys, values = (_state(calls, count) for _ in range(2))
    queries = calls.temporary(torch.float32, (new, heads, size))
    base = [keys, values, calls.decoder.position]

    writer = calls.writer((1,), [*base, queries.storage])
    read_q, read_k, read_v = (_by_head(x, size, writer.argument(x.storage)) for x in (q, k, v))
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
    calls.launch(
        "write_cache", op.label, (sizes, read_q, read_k, read_v, rotary),
        lambda name: write_cache(
            name, writer.kernel_arguments(), sizes, read_q, read_k, read_v, rotary
        ),
        writer, written=2, also=(3,),
    )  # fmt: skip

    end = calls.writer(op.outputs[0].shape, [*base, queries.storage])
    few = new <= FEW
    if few:
        end.argument(calls.temporary(torch.float32, (sizes.workspace,)).storage)
        end.argument(calls.counters(sizes.counters))
    end.keep(op.outputs[0], end.step("anchor", FLOAT))
    end.members(g, calls.stored)
    expression, make = end.expression(), attend if few else cached_attention
    calls.launch(
        "cached_attention", op.label, (sizes, expression),
        lambda name: make(name, end.kernel_arguments(), sizes, expression), end,
        also=(4, 5) if few else (),
    )  # fmt: skip


def _state(calls: CudaCalls, count: int) -> Storage:
    """float16 memory that lives from run to run; the n-th is the same in every entry."""
    made = Storage(torch.float16, count, state=len(calls.states))
    calls.states.append(made)
    return made


def _by_head(x: Ref, size: int, argument: int) -> Access:
    """(1, token, head · element) → an access over (token, head, element)."""
    return Access(argument, FLOAT, x.offset, (x.strides[1], size, x.strides[2]))
