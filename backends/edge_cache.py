"""Attention over a cache in the model's state: rotary embedding, update, attention."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qcompiler.backends.edge_group import Group
from qcompiler.backends.edge_ops import Op, Ref
from qcompiler.errors import UnsupportedError
from qcompiler.kernels.cache import Cached, cache_elements, cached_attention, write_cache
from qcompiler.kernels.code import LANES
from qcompiler.kernels.expression import Access

if TYPE_CHECKING:
    from qcompiler.backends.edge_calls import Calls
    from qcompiler.backends.edge_decoder import Decoding

FLOAT = "float32"


def attention_over_cache(calls: Calls, g: Group, op: Op) -> None:
    """The calls for `qc::cached_attention` of one text."""
    q, k, v, _, _, _, cos, sin, positions, heads, kv_heads, scale, window, neighbours = op.args
    decoder, size = sizes_of(calls, op)
    new = q.shape[1]
    if cos is not None:
        q = _turned(calls, q, cos, sin, positions, heads, bool(neighbours), op.label)
        k = _turned(calls, k, cos, sin, positions, kv_heads, bool(neighbours), op.label)
    sizes = Cached(
        heads, kv_heads, new, size, decoder.capacity, float(scale), int(window),
        _by_head(q, size, 0),
    )  # fmt: skip
    count = cache_elements(kv_heads, sizes.capacity, size)
    keys, values = (calls.state(count) for _ in range(2))
    base = [keys, values, decoder.position]

    writer = calls.writer((1,), [*base])
    reads_k, reads_v = (_by_head(x, size, writer.argument(x.storage)) for x in (k, v))
    written = sizes
    calls.add(
        "write_cache", op.label, (written, reads_k, reads_v),
        lambda name: write_cache(name, writer.kernel_arguments(), written, reads_k, reads_v),
        writer, written=2,
    )  # fmt: skip

    end = calls.writer(op.outputs[0].shape, [*base])
    sizes = replace(sizes, q=_by_head(q, size, end.argument(q.storage)))
    end.keep(op.outputs[0], end.step("anchor", FLOAT))
    end.members(g, calls.stored)
    expression, isa, final = end.expression(), calls.isa, sizes
    calls.add(
        "cached_attention", op.label, (sizes, expression, isa),
        lambda name: cached_attention(name, end.kernel_arguments(), final, expression, isa), end,
    )  # fmt: skip


def sizes_of(calls: Calls, op: Op) -> tuple[Decoding, int]:
    """What an attention's cache belongs to, and the size of its heads.

    Raises:
        UnsupportedError: for what no kernel takes.
    """
    q, _, v = op.args[:3]
    heads, kv_heads = op.args[9:11]
    if calls.decoder is None:
        raise UnsupportedError("attention over a cache outside of a language model")
    size = q.shape[2] // heads
    if size % LANES or v.shape[2] // kv_heads != size:
        raise UnsupportedError(
            f"heads of size {size}; attention over a cache takes multiples of {LANES}"
        )
    return calls.decoder, size


def _by_head(x: Ref, size: int, argument: int) -> Access:
    """(1, token, head · element) → an access over (token, head, element)."""
    return Access(argument, FLOAT, x.offset, (x.strides[1], size, 1))


def _turned(
    calls: Calls, x: Ref, cos: Ref, sin: Ref, positions: Ref, heads: int, neighbours: bool,
    label: str,
) -> Ref:  # fmt: skip
    """The rotary embedding of x: each pair of channels turned by its position's angle."""
    new, size, pairs = x.shape[1], x.shape[2] // heads, cos.shape[-1]
    out = calls.temporary(torch.float32, x.shape)
    step, apart = (2, 1) if neighbours else (1, pairs)
    shape = (new, heads, pairs)

    def half(ref: Ref, which: int) -> Ref:
        strides = (ref.strides[1] if new > 1 else 0, size if heads > 1 else 0, step)
        return Ref(ref.storage, ref.dtype, ref.offset + which * apart, shape, strides)

    spots = Ref(
        positions.storage, positions.dtype, positions.offset, (new, 1),
        (positions.strides[-1] if new > 1 else 0, 0),
    )  # fmt: skip
    writer = calls.writer(shape, [])
    a, b = (writer.value(half(x, which), FLOAT) for which in (0, 1))
    c, s = (writer.rows(table, spots) for table in (cos, sin))
    one = writer.step(
        "sub", FLOAT, writer.step("mul", FLOAT, a, c), writer.step("mul", FLOAT, b, s)
    )
    two = writer.step(
        "add", FLOAT, writer.step("mul", FLOAT, b, c), writer.step("mul", FLOAT, a, s)
    )
    writer.store(half(out, 0), one)
    writer.store(half(out, 1), two)
    calls.pointwise(writer, label)
    if 2 * pairs < size:
        rest = (new, heads, size - 2 * pairs)

        def tail(ref: Ref) -> Ref:
            strides = (ref.strides[1] if new > 1 else 0, size if heads > 1 else 0, 1)
            return Ref(ref.storage, ref.dtype, ref.offset + 2 * pairs, rest, strides)

        calls.copy(tail(x), tail(out), label)
    return out
