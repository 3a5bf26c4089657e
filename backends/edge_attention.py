"""Attention over tensors: `qc::attention` and torch's scaled_dot_product_attention, read alike."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qcompiler import ops
from qcompiler.backends.edge_group import HELD, Writer
from qcompiler.backends.edge_ops import Op, Ref
from qcompiler.backends.edge_steps import NAMES
from qcompiler.errors import UnsupportedError
from qcompiler.kernels.expression import Access
from qcompiler.kernels.heads import Heads
from qcompiler.op_families import SDPA

ATTENTION = frozenset({ops.attention, SDPA})


@dataclass(frozen=True)
class Attended:
    """An attention's operands.

    Attributes:
        q, k, v: (batch, position, head · element) where `merged`, else (batch, head, position,
            element).
        mask: broadcast over (batch, head, query, key), or None.
        heads, kv_heads: numbers of each.
        scale: of scores.
        causal: whether query i sees keys up to i + keys − queries.
        merged: see q; the output is alike.
    """

    q: Ref
    k: Ref
    v: Ref
    mask: Ref | None
    heads: int
    kv_heads: int
    scale: float
    causal: bool
    merged: bool

    @property
    def tensors(self) -> tuple[Ref, Ref, Ref]:
        """Queries, keys and values."""
        return self.q, self.k, self.v

    @property
    def size(self) -> int:
        """Elements of a query's head."""
        return self.q.shape[2] // self.heads if self.merged else self.q.shape[3]

    @property
    def value_size(self) -> int:
        """Elements of a value's head."""
        return self.v.shape[2] // self.kv_heads if self.merged else self.v.shape[3]

    def over(self, q: Ref, k: Ref, v: Ref) -> Attended:
        """The same of other tensors of these shapes."""
        return replace(self, q=q, k=k, v=v)

    def strides(self) -> tuple[tuple[int, ...], ...]:
        """Of queries, keys and values over (batch, head, position, element).

        Raises:
            UnsupportedError: if a head's elements do not lie side by side.
        """
        found = []
        sizes = (self.size, self.size, self.value_size)
        for ref, size in zip(self.tensors, sizes, strict=True):
            a, *rest, d = ref.strides
            if d != 1 and ref.shape[-1] > 1:
                raise UnsupportedError("attention over heads that do not lie side by side")
            b, c = (size, rest[0]) if self.merged else rest
            found.append((a, b, c, 1))
        return tuple(found)

    def heads_of(self, writer: Writer) -> Heads:
        """Sizes and layout, with the tensors as a kernel's arguments."""
        q, k, v = (
            Access(
                writer.argument(ref.storage),
                NAMES.get(ref.dtype) or HELD[ref.dtype],
                ref.offset,
                step,
            )
            for ref, step in zip(self.tensors, self.strides(), strict=True)
        )
        hidden, mask = None, self.mask
        if mask is not None:
            missing = 4 - len(mask.shape)
            steps = (0,) * missing + tuple(
                0 if n == 1 else s for n, s in zip(mask.shape, mask.strides, strict=True)
            )
            hidden = Access(writer.argument(mask.storage), NAMES[mask.dtype], mask.offset, steps)
        position = 1 if self.merged else 2
        return Heads(
            self.q.shape[0], self.heads, self.kv_heads, self.q.shape[position],
            self.k.shape[position], self.size, self.value_size, q, k, v, hidden, self.scale,
            self.causal, self.merged,
        )  # fmt: skip


def attended(op: Op) -> Attended:
    """What an attention reads.

    Raises:
        UnsupportedError: if it is not over four dimensions, or causal over more or fewer keys than
            queries: torch lets the first query see the first key alone, our kernels the last query
            the last key.
    """
    if op.target is ops.attention:
        q, k, v, mask, heads, kv_heads, scale, causal = op.args
        found = Attended(q, k, v, mask, heads, kv_heads, float(scale), bool(causal), True)
    else:
        found = _attended(op)
    position = 1 if found.merged else 2
    if found.causal and found.q.shape[position] != found.k.shape[position]:
        raise UnsupportedError(
            f"'{op.label}': causal attention of {found.q.shape[position]} queries over "
            f"{found.k.shape[position]} keys has no kernel here; give a mask instead of is_causal"
        )
    return found


def _attended(op: Op) -> Attended:
    schema = op.target._schema.arguments
    given = {a.name: a.default_value for a in schema} | dict(op.kwargs)
    given |= {a.name: v for a, v in zip(schema, op.args, strict=False)}
    q, k, v, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
    if len(q.shape) != 4:
        raise UnsupportedError("attention over other than 4 dimensions")
    scale = given["scale"] if given["scale"] is not None else q.shape[3] ** -0.5
    return Attended(
        q, k, v, mask, q.shape[1], k.shape[1], float(scale), bool(given["is_causal"]), False
    )
