"""Which ops become one kernel.

An op that makes a tensor by more than one element at a time (a product, a norm, an attention) is an
anchor; elementwise ops that follow join its kernel as long as they keep its shape and everything
else that they read exists by then. What only another kernel needs again is stored; the rest never
leaves the registers. Cheap conversions (dequantize, casts, table lookups) are not stored at all:
each reader computes them on the fly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qcompiler import ops
from qcompiler.backends import edge_steps
from qcompiler.backends.edge_ops import Op, Ref, Storage, Trace, dense_order
from qcompiler.backends.edge_steps import LOOKUPS, NAMES, REDUCE
from qcompiler.cached import CACHED
from qcompiler.errors import UnsupportedError
from qcompiler.kernels.code import Argument
from qcompiler.kernels.expression import Access, Expression, Step
from qcompiler.op_families import LINEAR

aten = torch.ops.aten

# What kernels declare, for their bits; float16 and float8 are for a GPU alone.
HELD = {
    torch.bool: "uint8", torch.bfloat16: "uint16", torch.float16: "float16", torch.int16: "int16",
    torch.float8_e4m3fn: "uint8",
}  # fmt: skip
CONV = aten.conv2d.default
ROWS = {
    aten.layer_norm.default: "layer_norm",
    aten.rms_norm.default: "rms_norm",
    aten.softmax.int: "softmax",
    aten._softmax.default: "softmax",
}
PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default})
POOLS = frozenset({aten.max_pool2d_with_indices.default, aten.avg_pool2d.default})
INLINE = frozenset({ops.dequantize, aten._to_copy.default, aten.embedding.default})
# Their kernels end with an expression that elementwise ops may join.
ANCHORS = frozenset(
    {LINEAR, CONV, ops.attention, ops.rotate, *CACHED,
     aten.scaled_dot_product_attention.default,
     *PRODUCTS, *ROWS, *REDUCE, *POOLS}
)  # fmt: skip


@dataclass(eq=False)
class Group:
    """Ops that become one kernel: an anchor, or none, and elementwise ops on its result."""

    anchor: Op | None
    members: list[Op] = field(default_factory=list)

    @property
    def out(self) -> Ref:
        """The tensor whose shape the kernel runs over."""
        return self.anchor.out if self.anchor is not None else self.members[0].out

    @property
    def label(self) -> str:
        """For people: the op that it is known by."""
        return (self.anchor or self.members[-1]).label


@dataclass
class Grouping:
    """The groups in the order in which they run, and the ops that readers compute themselves."""

    groups: list[Group]
    inlined: set[Op]


def whole(ref: Ref, of: Ref) -> bool:
    """Whether `ref` is the same tensor as `of`, not a part or another arrangement of it."""
    return (ref.storage, ref.offset, ref.shape, ref.strides) == (
        of.storage, of.offset, of.shape, of.strides,
    )  # fmt: skip


def in_integers(op: Op) -> bool:
    """Whether it is a reduction that float32 would round."""
    return op.target in REDUCE and not op.out.dtype.is_floating_point


def quantized_operand(ref: Ref, rows: bool = False) -> Op | None:
    """The `qc::dequantize` that made a layer's input, or None.

    It has one scale for the tensor, or, with `rows`, one for each row.
    """
    maker = ref.storage.maker
    if maker is None or maker.target is not ops.dequantize or not whole(ref, maker.out):
        return None
    scale, zero = maker.args[1], maker.args[2]
    if rows and scale.shape == (*maker.out.shape[:-1], 1) and zero.shape == scale.shape:
        return maker
    return maker if scale.numel == 1 and zero.numel == 1 else None


def group(trace: Trace, direct: Mapping[Op, Sequence[int]]) -> Grouping:
    """Find the groups.

    Args:
        trace: the ops.
        direct: ops that read what a conversion converts, at these operands.
    """
    final = {id(ref.storage) for ref in trace.outputs}
    inlined: set[Op] = set()
    home: dict[Op, int] = {}
    groups: list[Group] = []

    def cheap(op: Op) -> bool:
        if op.target not in INLINE or not edge_steps.writes(op) or id(op.out.storage) in final:
            return False
        if op.out.dtype == torch.bfloat16:  # what products read
            return False
        if op.target is aten._to_copy.default and not whole(
            Ref(op.out.storage, op.out.dtype, 0, op.args[0].shape, op.args[0].strides), op.out
        ):
            return False
        for reader in op.out.storage.readers:
            if reader.target in LOOKUPS:
                return False
            own = [reader.args[i].storage for i in direct.get(reader, ())]
            if any(storage is op.out.storage for storage in own):
                continue
            mine = [r for r in reader.refs() if r.storage is op.out.storage]
            fits = edge_steps.writes(reader) or reader.target in ROWS
            # Integers are put in order first, which is another walk.
            fits = fits or (reader.target in REDUCE and not in_integers(reader))
            if not fits or not all(_same_walk(r, op.out) for r in mine):
                return False
        return True

    def makers(op: Op) -> list[int]:
        found = []
        for ref in op.refs():
            maker = ref.storage.maker
            if maker is None:
                continue
            found += makers(maker) if maker in inlined else [home[maker]]
        return found

    def joins(op: Op, number: int) -> bool:
        """Whether all that the op takes from that group are whole values of its shape."""
        target = groups[number]
        if target.anchor is not None and target.anchor.target not in ANCHORS:
            return False
        if target.anchor is not None and in_integers(target.anchor):
            return False
        if (op.out.shape, op.out.strides) != (target.out.shape, target.out.strides):
            return False
        if op.target in LOOKUPS:
            return False
        touched = False
        for ref in _leaves(op, inlined):
            maker = ref.storage.maker
            if maker is None or home.get(maker) != number:
                continue
            if not whole(ref, maker.out) or ref.shape != op.out.shape:
                return False
            touched = True
        return touched

    for op in trace.ops:
        if cheap(op):
            inlined.add(op)
            continue
        if edge_steps.writes(op):
            if dense_order(op.out) is None:
                raise UnsupportedError(f"'{op.target}' ({op.label}) leaves gaps in memory")
            before = max(makers(op), default=-1)
            if before >= 0 and joins(op, before):
                groups[before].members.append(op)
                home[op] = before
                continue
            groups.append(Group(None, [op]))
        else:
            groups.append(Group(op))
        home[op] = len(groups) - 1
    return Grouping(groups, inlined)


def _leaves(op: Op, inlined: set[Op]) -> list[Ref]:
    found = []
    for ref in op.refs():
        maker = ref.storage.maker
        found += _leaves(maker, inlined) if maker in inlined and maker is not None else [ref]
    return found


def _same_walk(ref: Ref, of: Ref) -> bool:
    """The same tensor, perhaps broadcast over new or single dimensions."""
    if ref.offset != of.offset:
        return False
    return ref.shape == of.shape and ref.strides == of.strides


def looked_up(op: Op) -> tuple[Ref, dict[int, Ref], int]:
    """The table, the indices by the dimension that each picks from, where they come to lie."""
    table, *rest = op.args
    if op.target is aten.embedding.default:
        return table, {0: rest[0]}, 0
    if op.target is aten.index.Tensor:
        found = {dim: ref for dim, ref in enumerate(rest[0]) if ref is not None}
        dims = list(found)
        together = dims == list(range(dims[0], dims[0] + len(dims)))
        return table, found, dims[0] if together else 0
    dim = rest[0] % max(len(table.shape), 1)
    return table, {dim: rest[1]}, dim


class Writer:
    """Writes a group's expression and collects the kernel's arguments."""

    def __init__(
        self,
        shape: tuple[int, ...],
        inlined: set[Op],
        arguments: list[Storage],
        constants: Constants,
        order: tuple[int, ...] | None = None,
        fused: bool = True,
        moved: Mapping[int, Ref] | None = None,
    ) -> None:
        self.shape, self.inlined, self.arguments, self.fused = shape, inlined, arguments, fused
        self.moved = moved or {}
        self.constants = constants
        self.order = order or tuple(range(len(shape)))
        self.steps: list[Step] = []
        self.stores: list[tuple[int, Access]] = []
        self.made: dict[int, tuple[int, Ref]] = {}
        self.seen: dict[Any, int] = {}

    def argument(self, storage: Storage) -> int:
        """The number of a storage among the kernel's arguments."""
        for number, known in enumerate(self.arguments):
            if known is storage:
                return number
        self.arguments.append(storage)
        return len(self.arguments) - 1

    def access(self, ref: Ref) -> Access:
        """How a tensor lies under the expression's shape, broadcast as torch does."""
        home = self.moved.get(id(ref.storage))
        ref = home if home is not None else ref
        missing = len(self.shape) - len(ref.shape)
        strides = (0,) * missing + tuple(
            0 if n == 1 else s for n, s in zip(ref.shape, ref.strides, strict=True)
        )
        placed = tuple(strides[d] for d in self.order)
        kind = NAMES.get(ref.dtype) or HELD[ref.dtype]
        return Access(self.argument(ref.storage), kind, ref.offset, placed)

    def add(self, step: Step) -> int:
        """A step, or the equal one that is there."""
        if step not in self.seen:
            self.steps.append(step)
            self.seen[step] = len(self.steps) - 1
        return self.seen[step]

    def step(self, op: str, dtype: str, *values: int, numbers: tuple[float, ...] = ()) -> int:
        """See `edge_steps.Steps`."""
        return self.add(Step(op, dtype, values, None, numbers))

    def value(self, operand: Any, dtype: str) -> int:
        """See `edge_steps.Steps`."""
        if not isinstance(operand, Ref):
            return self.add(Step("constant", dtype, numbers=(float(operand),)))
        index, have = self._tensor(operand), NAMES[operand.dtype]
        return index if have == dtype else self.step("cast", dtype, index)

    def _tensor(self, ref: Ref) -> int:
        made = self.made.get(id(ref.storage))
        if made is not None and whole(ref, made[1]):
            return made[0]
        maker = ref.storage.maker
        if maker is not None and maker in self.inlined:
            return edge_steps.write(maker, self)
        ref = self.constants.known(ref)
        return self.add(Step("load", NAMES[ref.dtype], access=self.access(ref)))

    def lookup(self, op: Op) -> int:
        """See `edge_steps.Steps`."""
        return self._taken(*looked_up(op), op.target is aten.gather.default)

    def rows(self, table: Ref, index: Ref) -> int:
        """Rows of a matrix, found at run time."""
        return self._taken(table, {0: index}, 0, False)

    def _taken(self, table: Ref, found: Mapping[int, Ref], first: int, same: bool) -> int:
        table = self.constants.known(table)
        place, indices, numbers = self.spots(table, found, first, same)
        return self.add(Step("lookup", NAMES[table.dtype], (), place, numbers, indices))

    def spots(
        self, table: Ref, found: Mapping[int, Ref], first: int, same: bool
    ) -> tuple[Access, tuple[Access, ...], tuple[float, ...]]:
        """Accesses under the expression's shape to a table and its indices; see `Step`.

        Args:
            table: a tensor.
            found: indices by the table's dimension that they pick from.
            first: the shape's dimension at which theirs begin.
            same: they have the expression's shape.
        """
        rank = len(self.shape)

        def access(ref: Ref, dims: dict[int, int]) -> Access:
            """A tensor whose dimensions lie at those of the output."""
            strides = [0] * rank
            for dim, at in dims.items():
                if ref.shape[dim] > 1:
                    strides[at] = ref.strides[dim]
            placed = tuple(strides[d] for d in self.order)
            kind = NAMES.get(ref.dtype) or HELD[ref.dtype]
            return Access(self.argument(ref.storage), kind, ref.offset, placed)

        wide = rank if same else max((len(ref.shape) for ref in found.values()), default=0)
        kept: dict[int, int] = {}
        at = 0
        for dim in range(len(table.shape)):
            if not same and at == first:
                at += wide
            if dim not in found:
                kept[dim] = dim if same else at
                at += 1
        numbers: list[float] = []
        indices = []
        for dim, ref in found.items():
            start = 0 if same else first + wide - len(ref.shape)
            indices.append(access(ref, {d: start + d for d in range(len(ref.shape))}))
            numbers += [float(table.strides[dim]), float(table.shape[dim])]
        return access(table, kept), tuple(indices), tuple(numbers)

    def written(self, index: int) -> Step:
        """See `edge_steps.Steps`."""
        return self.steps[index]

    def keep(self, ref: Ref, index: int) -> None:
        """Remember that a tensor is this step's value."""
        self.made[id(ref.storage)] = (index, ref)

    def store(self, ref: Ref, index: int) -> None:
        """Write a value to memory."""
        self.stores.append((index, self.access(ref)))

    def members(self, group: Group, stored: set[int]) -> None:
        """The group's elementwise ops; `stored`: ids of storages that others read."""
        if group.anchor is not None and id(group.anchor.out.storage) in stored:
            self.store(group.anchor.out, self.made[id(group.anchor.out.storage)][0])
        for op in group.members:
            index = edge_steps.write(op, self)
            self.keep(op.out, index)
            if id(op.out.storage) in stored:
                self.store(op.out, index)

    def expression(self) -> Expression:
        """What was written."""
        shape = tuple(self.shape[d] for d in self.order)
        return Expression(shape, tuple(self.steps), tuple(self.stores))

    def kernel_arguments(self) -> list[Argument]:
        """The arguments as the kernel declares them."""
        return [
            Argument(f"a{i}", HELD.get(s.dtype) or NAMES[s.dtype], s.size)
            for i, s in enumerate(self.arguments)
        ]


class Constants:
    """Storages for constants, one for each key.

    A key holds the tensors themselves, not their ids: Python gives the id of a tensor that is gone
    to the next one.
    """

    def __init__(self) -> None:
        self.by_key: dict[Any, Storage] = {}

    def of(self, key: Any, make: Any) -> Storage:
        """The constant known by that key, made where it is new."""
        if key not in self.by_key:
            tensor: torch.Tensor = make().contiguous()
            self.by_key[key] = Storage(tensor.dtype, tensor.numel(), tensor)
        return self.by_key[key]

    def known(self, ref: Ref) -> Ref:
        """The tensor itself, or the float constant where its storage holds a quantized one."""
        weight = ref.storage.weight
        if weight is None:
            return ref
        storage = self.of((weight.q, "float"), weight.dequantized)
        return Ref(storage, ref.dtype, ref.offset, ref.shape, ref.strides)
