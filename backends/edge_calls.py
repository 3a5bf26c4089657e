"""Each group as kernel calls: which kernel, with which arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from qcompiler import ops
from qcompiler.backends import edge_bf16, edge_steps
from qcompiler.backends.edge_attention import ATTENTION, attended
from qcompiler.backends.edge_cache import attention_over_cache
from qcompiler.backends.edge_convolution import bordered, convolution
from qcompiler.backends.edge_decoder import Decoding
from qcompiler.backends.edge_dynamic import dynamic_quantize
from qcompiler.backends.edge_float import float_linear, product
from qcompiler.backends.edge_group import (
    CONV,
    POOLS,
    PRODUCTS,
    ROWS,
    Constants,
    Group,
    Grouping,
    Writer,
    group,
    in_integers,
)
from qcompiler.backends.edge_integer import Source, integer_linear, layers
from qcompiler.backends.edge_loops import (
    FOLDS,
    RANKS,
    SCATTERS,
    folded,
    ranked,
    reduced,
    scattered,
)
from qcompiler.backends.edge_ops import Op, Ref, Storage, Trace, dense_order
from qcompiler.backends.edge_packed import packed_product
from qcompiler.backends.edge_pool import pool
from qcompiler.backends.edge_rotate import rotation
from qcompiler.backends.edge_rows import reduce, row_kernel
from qcompiler.backends.edge_trace import OVERWRITE
from qcompiler.cached import cached_attention
from qcompiler.errors import UnsupportedError
from qcompiler.kernels import attention
from qcompiler.kernels.elementwise import elementwise
from qcompiler.kernels.isa import Isa
from qcompiler.kernels.packing import Packing
from qcompiler.op_families import LINEAR

aten = torch.ops.aten


@dataclass(eq=False)
class Call:
    """One kernel call.

    Attributes:
        kind: which kernel, for people and the audit.
        label: the op that it is for.
        key: equal for calls that need the same code.
        build: name → the kernel.
        arguments: storages in the kernel's order.
        writes: those that it writes.
    """

    kind: str
    label: str
    key: Any
    build: Callable[[str], Any]
    arguments: list[Storage]
    writes: list[Storage]


class Calls:
    """The calls of a trace."""

    def __init__(
        self, trace: Trace, isa: Isa, constants: Constants, decoder: Decoding | None = None
    ) -> None:
        self.trace, self.isa, self.constants = trace, isa, constants
        self.decoder = decoder
        self.calls: list[Call] = []
        self.sums: dict[int, Storage] = {}  # of groups of activations, by the activations
        self.states: list[Storage] = []
        self.integer, self.packings = self._layers()
        skipped = self._bypassed()
        self.moved = bordered(trace, self.integer)
        self.filled: set[int] = set()  # ids of the storages in `moved` whose border is written
        kept = Trace(trace.inputs, trace.outputs, tuple(o for o in trace.ops if o not in skipped))
        self.narrow = edge_bf16.narrow_products(trace, isa)
        direct = dict.fromkeys(self.integer, (0,)) | self.narrow
        self.grouping: Grouping = group(kept, direct)
        home = {
            id(op.out.storage): number
            for number, g in enumerate(self.grouping.groups)
            for op in ([g.anchor] if g.anchor else []) + g.members
        }
        self.stored = {id(ref.storage) for ref in trace.outputs}
        for number, g in enumerate(self.grouping.groups):
            for op in ([g.anchor] if g.anchor else []) + g.members:
                for storage in self._reads(op):
                    if home.get(id(storage)) != number:
                        self.stored.add(id(storage))
        for g in self.grouping.groups:
            self._group(g)

    def _layers(self) -> tuple[dict[Op, Source], dict[Op, Packing]]:
        """The layers with integer products, and those whose weights stay packed."""
        return layers(self.trace, self.isa)

    def _bypassed(self) -> set[Op]:
        """Padding and copies that integer convolutions do themselves."""
        gone: set[Op] = set()
        for op, source in self.integer.items():
            made, ref = source.op.out, op.args[0]
            while ref.storage.maker not in (None, source.op):
                gone.add(ref.storage.maker)
                ref = ref.storage.maker.args[0]
            if op not in made.storage.readers:
                made.storage.readers.append(op)
                op.args = (made, *op.args[1:])
        for op in gone:
            for ref in op.refs():
                if op in ref.storage.readers:
                    ref.storage.readers.remove(op)
        return gone

    def _reads(self, op: Op) -> list[Storage]:
        """What the op's kernel reads, through the ops that it computes on the fly."""
        found = []
        for ref in op.refs():
            maker = ref.storage.maker
            converted = [op.args[i] for i in self.narrow.get(op, ())]
            if maker is not None and any(ref is c for c in converted):
                found += [r.storage for r in maker.refs()]
            elif op in self.integer and ref is op.args[0]:
                found += [r.storage for r in self.integer[op].op.refs()]
            elif maker is not None and maker in self.grouping.inlined:
                found += self._reads(maker)
            else:
                found.append(ref.storage)
        return found

    def _group(self, g: Group) -> None:
        op = g.anchor
        if op is None:
            self._elementwise(g)
        elif op in self.narrow:
            (edge_bf16.linear if op.target is LINEAR else edge_bf16.product)(self, g, op)
        elif op.target is LINEAR:
            self._linear(g, op)
        elif op.target in PRODUCTS:
            product(self, g, op, op.args[0], op.args[1])
        elif op.target in ATTENTION:
            self._attention(g, op)
        elif op.target in FOLDS:
            folded(self, op)
        elif op.target in RANKS:
            ranked(self, op)
        elif op.target in SCATTERS:
            scattered(self, op)
        elif op.target is OVERWRITE:
            self.copy(op.args[0], op.out, op.label)
            self.copy(op.args[1], op.kwargs["to"], op.label)
        elif in_integers(op):
            reduced(self, op)
        elif op.target in ROWS:
            row_kernel(self, g, op)
        elif op.target in edge_steps.REDUCE:
            reduce(self, g, op)
        elif op.target is aten.cat.default:
            self._cat(op)
        elif op.target is aten.constant_pad_nd.default:
            self._pad(op)
        elif op.target is ops.dynamic_quantize:
            dynamic_quantize(self, op)
        elif op.target is CONV:
            convolution(self, g, op)
        elif op.target is cached_attention:
            attention_over_cache(self, g, op)
        elif op.target is ops.rotate:
            rotation(self, g, op)
        elif op.target in POOLS:
            pool(self, g, op)
        else:
            raise UnsupportedError(f"no kernel for '{op.target}' ({op.label})")

    def add(
        self, kind: str, label: str, key: Any, build: Callable[[str], Any], writer: Writer,
        written: int = 0,
        also: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Note a call whose arguments the writer has collected.

        It writes what the expression stores, the first `written` arguments, and those in `also`.
        """
        declared = tuple((a.dtype, a.size) for a in writer.kernel_arguments())
        stored = {*range(written), *also, *(a.argument for _, a in writer.stores)}
        self.calls.append(
            Call(
                kind, label, (kind, key, declared), build, list(writer.arguments),
                [writer.arguments[i] for i in sorted(stored)],
            )
        )  # fmt: skip

    def writer(
        self, shape: tuple[int, ...], arguments: list[Storage], order: tuple[int, ...] | None = None
    ) -> Writer:
        """A writer of expressions over that shape."""
        return Writer(
            shape, self.grouping.inlined, arguments, self.constants, order, self.isa.fused,
            self.moved,
        )  # fmt: skip

    def _elementwise(self, g: Group) -> None:
        writer = self.writer(g.out.shape, [], dense_order(g.out))
        writer.members(g, self.stored)
        self.pointwise(writer, g.label)

    def pointwise(self, writer: Writer, label: str) -> None:
        """An elementwise kernel of what was written."""
        expression = writer.expression()
        self.add(
            "elementwise", label, expression,
            lambda name: elementwise(name, writer.kernel_arguments(), expression), writer,
        )  # fmt: skip

    def copy(self, source: Ref, to: Ref, label: str) -> None:
        """A copy between tensors of the same shape, each with its own strides."""
        writer = self.writer(to.shape, [], _walk(to))
        writer.store(to, writer.value(source, edge_steps.NAMES[to.dtype]))
        self.pointwise(writer, label)

    def fill(self, to: Ref, value: Any, label: str) -> None:
        """Set every element: to a number, or to a one-element tensor's."""
        writer = self.writer(to.shape, [], _walk(to))
        writer.store(to, writer.value(value, edge_steps.NAMES[to.dtype]))
        self.pointwise(writer, label)

    def constant(self, key: Any, make: Callable[[], torch.Tensor]) -> Ref:
        """A constant tensor, contiguous."""
        storage = self.constants.of(key, make)
        assert storage.constant is not None
        return flat_ref(storage, tuple(storage.constant.shape))

    def state(self, count: int) -> Storage:
        """float32 memory that lives from run to run; the n-th is the same in every entry."""
        made = Storage(torch.float32, count, state=len(self.states))
        self.states.append(made)
        return made

    def temporary(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Ref:
        """New memory, contiguous."""
        return flat_ref(Storage(dtype, prod(shape)), shape)

    def _linear(self, g: Group, op: Op) -> None:
        if op in self.packings:
            x, bias = op.args[0], op.args[2] if len(op.args) > 2 else None
            source = self.integer.get(op)
            rows_of = self.contiguous(source.ref if source is not None else x, op.label)
            count = prod(op.out.shape[:-1])
            packed_product(self, g, op, rows_of, count, self.packings[op], bias, source)
            return
        if op in self.integer:
            integer_linear(self, g, op, self.integer[op])
            return
        float_linear(self, g, op)

    @staticmethod
    def order(op: Op) -> tuple[int, ...] | None:
        """The order in which a layer's kernel goes over the output's dimensions."""
        return (0, 2, 3, 1) if op.target is CONV else None

    def lengthened(self, q: Ref, count: int, k: int, deep: int, label: str) -> Ref:
        """Rows made longer, so that the dot product's steps come out even."""
        rows_of = Ref(q.storage, q.dtype, q.offset, (count, k), (k, 1))
        made = self.temporary(q.dtype, (count, deep))
        tail = Ref(made.storage, q.dtype, k, (count, deep - k), (deep, 1))
        self.fill(tail, 0, label)
        self.copy(rows_of, Ref(made.storage, q.dtype, 0, (count, k), (deep, 1)), label)
        return made

    def contiguous(self, ref: Ref, label: str) -> Ref:
        """The tensor itself where its elements lie in order, or a copy."""
        if ref.contiguous and ref.storage.weight is None:
            return ref
        made = self.temporary(ref.dtype, ref.shape)
        self.copy(ref, made, label)
        return made

    def _widened(self, ref: Ref, label: str) -> Ref:
        """A float32 copy."""
        made = self.temporary(torch.float32, ref.shape)
        self.copy(ref, made, label)
        return made

    def _attention(self, g: Group, op: Op) -> None:
        found = attended(op)
        narrow = self.isa.narrow and found.size % self.isa.narrow_depth == 0
        if found.q.dtype == torch.bfloat16 and found.merged and not narrow:
            found = found.over(*(self._widened(ref, op.label) for ref in found.tensors))
        writer = self.writer(op.out.shape, [])
        sizes = found.heads_of(writer)
        writer.keep(op.out, writer.step("anchor", "float32"))
        writer.members(g, self.stored)
        expression, isa = writer.expression(), self.isa
        self.add(
            "attention", op.label, (sizes, expression, isa),
            lambda name: attention.attention(
                name, writer.kernel_arguments(), sizes, expression, isa
            ), writer,
        )  # fmt: skip

    def _cat(self, op: Op) -> None:
        parts = op.args[0]
        dim = (op.args[1] if len(op.args) > 1 else 0) % len(op.out.shape)
        offset = op.out.offset
        for part in parts:
            if part.numel == 0:
                continue
            to = Ref(op.out.storage, op.out.dtype, offset, part.shape, op.out.strides)
            self.copy(part, to, op.label)
            offset += part.shape[dim] * op.out.strides[dim]

    def _pad(self, op: Op) -> None:
        x, pads = op.args[0], op.args[1]
        value = op.args[2] if len(op.args) > 2 else 0
        if min(pads) < 0:
            raise UnsupportedError("padding by less than nothing")
        self.fill(op.out, value, op.label)
        offset = op.out.offset
        for place, amount in enumerate(pads[::2]):
            offset += amount * op.out.strides[len(x.shape) - 1 - place]
        self.copy(x, Ref(op.out.storage, op.out.dtype, offset, x.shape, op.out.strides), op.label)


def flat_ref(storage: Storage, shape: tuple[int, ...]) -> Ref:
    """A contiguous tensor over a storage's start."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    return Ref(storage, storage.dtype, 0, shape, tuple(strides))


def _walk(ref: Ref) -> tuple[int, ...]:
    """The order of dimensions that goes through memory in steps that grow smaller."""
    return tuple(sorted(range(len(ref.shape)), key=lambda d: (-ref.strides[d], d)))
