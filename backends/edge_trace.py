"""A Program at fixed sizes, as a list of ops on memory: what the code generator works from.

The graph is interpreted with fake tensors of the sizes asked for. Whatever depends on constants and
sizes alone is computed here and becomes a constant; views (slices, transpositions, reshapes that
copy nothing) become offsets and strides; ops that the generator does not know are decomposed by
torch into ops that it does. What is left is one `Op` after another, each writing memory of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from qcompiler import ops, qtype
from qcompiler.cached import cached_attention
from qcompiler.errors import QCompilerError, UnsupportedError
from qcompiler.program import Program
from qcompiler.rewrite import place

aten = torch.ops.aten


@dataclass(eq=False)
class Weight:
    """A constant tensor that is stored as integers: (q − zero_point) · scale.

    Attributes:
        q: int8 or uint8 of the tensor's shape.
        scale, zero_point, axis, group: as in `qc::dequantize`.
    """

    q: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int
    group: int

    def dequantized(self) -> Tensor:
        """The float tensor."""
        return qtype.dequantize(self.q, self.scale, self.zero_point, self.axis, self.group)


@dataclass(eq=False)
class Storage:
    """A piece of memory.

    Attributes:
        dtype: of its elements.
        size: number of elements.
        constant: its contents where they are known.
        weight: its contents where they are quantized.
        port: name of the input that it is.
        state: its number among what lives from run to run; −1 for the rest.
        maker: the op that writes it.
        readers: the ops that read it.
    """

    dtype: torch.dtype
    size: int
    constant: Tensor | None = None
    weight: Weight | None = None
    port: str = ""
    state: int = -1
    maker: Op | None = None
    readers: list[Op] = field(default_factory=list)


@dataclass(frozen=True)
class Ref:
    """A tensor: a strided view of a storage, in elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie in order without gaps."""
        return dense_order(self) == tuple(range(len(self.shape)))


def dense_order(ref: Ref) -> tuple[int, ...] | None:
    """The dimensions from the outermost to the innermost where the tensor has no gaps."""
    order = sorted(range(len(ref.shape)), key=lambda d: (-ref.strides[d], d))
    order = [d for d in order if ref.shape[d] != 1] + [d for d in order if ref.shape[d] == 1]
    expected = 1
    for d in reversed([d for d in order if ref.shape[d] != 1]):
        if ref.strides[d] != expected:
            return None
        expected *= ref.shape[d]
    kept = [d for d in order if ref.shape[d] != 1]
    # Dimensions of size 1 lie anywhere: leave them where the logical order has them.
    if kept == sorted(kept):
        return tuple(range(len(ref.shape)))
    return tuple(order)


@dataclass(eq=False)
class Op:
    """One op: arguments are `Ref`s and plain values, nested as in the op's schema."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Ref, ...]
    label: str

    @property
    def out(self) -> Ref:
        """The only output."""
        return self.outputs[0]

    def refs(self) -> list[Ref]:
        """The tensors that it reads."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return [leaf for leaf in leaves if isinstance(leaf, Ref)]


@dataclass(frozen=True)
class Trace:
    """A program at fixed sizes."""

    inputs: tuple[Ref, ...]
    outputs: tuple[Ref, ...]
    ops: tuple[Op, ...]


# Taken as they are, not decomposed.
NATIVE = frozenset(
    {
        aten.linear.default,
        aten.layer_norm.default,
        aten.rms_norm.default,
        aten.scaled_dot_product_attention.default,
        aten.conv2d.default,
        aten.embedding.default,
        aten.gelu.default,
        aten.silu.default,
        aten.relu6.default,
        aten.hardswish.default,
        aten.hardsigmoid.default,
        aten.softmax.int,
        aten.matmul.default,
        ops.quantize,
        ops.dequantize,
        ops.dynamic_quantize,
        ops.attention,
        ops.rotate,
        cached_attention,
    }
)
# Known at the level below: recorded when torch reaches them.
BASIC = frozenset(
    {
        aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default,
        aten.abs.default, aten.relu.default, aten.sqrt.default, aten.rsqrt.default,
        aten.reciprocal.default, aten.exp.default, aten.erf.default, aten.sigmoid.default,
        aten.tanh.default, aten.clamp.default, aten.hardtanh.default, aten.leaky_relu.default,
        aten.log.default, aten.sin.default, aten.cos.default, aten.floor.default,
        aten.ceil.default, aten.round.default, aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor,
        aten.maximum.default, aten.minimum.default, aten.where.self, aten.where.ScalarOther,
        aten.eq.Scalar, aten.ne.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar,
        aten.ge.Scalar, aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor, aten.le.Tensor,
        aten.gt.Tensor, aten.ge.Tensor, aten.logical_and.default, aten.logical_or.default,
        aten.logical_not.default, aten.bitwise_and.Tensor, aten.bitwise_or.Tensor,
        aten.bitwise_not.default, aten.__and__.Tensor, aten.__or__.Tensor, aten._to_copy.default,
        aten.clone.default, aten.add.Scalar, aten.mul.Scalar, aten.sub.Scalar, aten.div.Scalar,
        aten.rsub.Scalar, aten.rsub.Tensor, aten.masked_fill.Scalar, aten.gelu.default,
        aten.silu.default, aten.hardswish.default, aten.hardsigmoid.default,
        aten._softmax.default, aten.mean.dim, aten.sum.dim_IntList, aten.amax.default,
        aten.amin.default, aten.cat.default, aten.constant_pad_nd.default, aten.full.default,
        aten.index_select.default, aten.embedding.default, aten.bmm.default, aten.mm.default,
        aten.max_pool2d_with_indices.default, aten.avg_pool2d.default, aten.sum.default,
        aten.mean.default,
    }
)  # fmt: skip


def rows_looked_up(trace: Trace) -> dict[str, int]:
    """Inputs whose numbers are rows of a table → the fewest rows that such a table has."""
    found: dict[str, int] = {}
    for op in trace.ops:
        if op.target is not aten.embedding.default:
            continue
        table, index = op.args[:2]
        whole = index.numel == index.storage.size and index.dtype == torch.int64
        if index.storage.port and whole:
            name = index.storage.port
            found[name] = min(found.get(name, table.shape[0]), table.shape[0])
    return found


def trace(
    program: Program,
    sizes: Mapping[str, Sequence[int]],
    module: torch.fx.GraphModule | None = None,
    counted: Mapping[str, Storage] | None = None,
) -> Trace:
    """The program at the sizes given.

    Args:
        program: with only ATen and qc ops.
        sizes: shape of each input, by name.
        module: a graph to trace in place of the program's own, with the same inputs.
        counted: inputs that are not given but counted: from the int64 number in the storage on,
            along their last dimension.

    Raises:
        UnsupportedError: names the op and the model's source line.
    """
    return _Tracer(program, module).run_at(sizes, counted or {})


class _Tracer(Interpreter):
    def __init__(self, program: Program, module: torch.fx.GraphModule | None) -> None:
        super().__init__(module or program.exported.graph_module, garbage_collect_values=False)
        self.extra_traceback = False  # errors say where already
        self.program = program
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.recorder = _Recorder(self)
        self.storages: dict[int, Storage] = {}
        self.kept: list[Any] = []  # tensors whose storages are known by address
        self.ops: list[Op] = []
        self.label = ""

    def run_at(self, sizes: Mapping[str, Sequence[int]], counted: Mapping[str, Storage]) -> Trace:
        constants = self.program.constants()
        inputs: list[Tensor] = []
        arguments: list[Any] = []
        for node in self.program.exported.graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in constants:
                arguments.append(constants[node.name])
                continue
            value = node.meta.get("val")
            if not isinstance(value, Tensor):
                raise UnsupportedError(f"input '{node.name}' is not a tensor")
            with self.mode:
                fake = torch.empty(tuple(sizes[node.name]), dtype=value.dtype)
            if node.name in counted:
                self._count(fake, counted[node.name])
            else:
                self._know(fake).port = node.name
                inputs.append(fake)
            arguments.append(fake)
        with torch.no_grad():
            outputs = self.run(*arguments, enable_io_processing=False)
        found = []
        for value in outputs:
            if not isinstance(value, Tensor):
                raise UnsupportedError("an output is not a tensor")
            found.append(self.ref(value))
        return Trace(tuple(self.ref(i) for i in inputs), tuple(found), tuple(self.ops))

    def _count(self, fake: Tensor, first: Storage) -> None:
        """An input that is computed: first, first + 1, …"""
        size = fake.shape[-1]
        start = Ref(first, torch.int64, 0, tuple(fake.shape), (0,) * fake.ndim)
        steps = self.ref(torch.arange(size))
        self._know(fake)
        out = self.ref(fake)
        op = Op(aten.add.Tensor, (start, steps), {}, (out,), "positions")
        for ref in op.refs():
            ref.storage.readers.append(op)
        out.storage.maker = op
        self.ops.append(op)

    def run_node(self, n: Node) -> Any:
        self.label = n.name
        try:
            return super().run_node(n)
        except QCompilerError as error:
            raise UnsupportedError(f"{error} ({place(n)})") from error
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UnsupportedError(
                f"no code for '{n.target}' at these sizes: {reason[0][:300]} ({place(n)})"
            ) from error

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = not any(isinstance(t, FakeTensor) for t in tensors)
        if target is ops.dequantize and known and args[0].ndim > 1:
            return self._weight(*args, **kwargs)
        if known:
            return target(*args, **kwargs)
        if target in (aten.conv2d.default, aten.conv1d.default):
            return self._convolution(target, args, kwargs)
        if target in NATIVE:
            with self.mode:
                result = target(*args, **kwargs)
            self.record(target, args, kwargs, result)
            return result
        with self.mode, self.recorder:
            return target(*args, **kwargs)

    def _weight(
        self, q: Tensor, scale: Tensor, zero_point: Tensor, axis: int, group: int
    ) -> Tensor:
        """Keep a quantized constant as integers; the tensor that stands for it is fake."""
        with self.mode:
            fake = torch.empty(q.shape)
        self._know(fake).weight = Weight(q, scale, zero_point, axis, group)
        return fake

    def _convolution(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        """Convolutions run with the channels last."""
        schema = target._schema.arguments
        given = {a.name: a.default_value for a in schema} | dict(kwargs)
        given |= {a.name: v for a, v in zip(schema, args, strict=False)}
        flat = target is aten.conv1d.default
        x, weight = given["input"], given["weight"]
        pair = [
            ([1] if flat and name != "padding" else [0] if flat else [])
            + [*given[name]] * (2 if not flat and len(given[name]) == 1 else 1)
            for name in ("stride", "padding", "dilation")
        ]
        with self.mode, self.recorder:
            x = x.unsqueeze(2) if flat else x
            x = x.contiguous(memory_format=torch.channels_last)
        kernel = [1, weight.shape[2]] if flat else [*weight.shape[2:]]
        rows = [
            (x.shape[2 + i] + 2 * pair[1][i] - pair[2][i] * (kernel[i] - 1) - 1) // pair[0][i] + 1
            for i in range(2)
        ]
        with self.mode:
            shape = (x.shape[0], weight.shape[0], *rows)
            result = torch.empty(shape, memory_format=torch.channels_last)
        self.record(
            aten.conv2d.default,
            (x, weight, given["bias"], *pair, given["groups"]),
            {"kernel": kernel},
            result,
        )
        if flat:
            with self.mode, self.recorder:
                result = result.squeeze(2)
        return result

    def record(self, target: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note an op, unless all that it made are views."""

        def convert(value: Any) -> Any:
            return self.ref(value) if isinstance(value, Tensor) else value

        results = [r for r in pytree.tree_leaves(result) if isinstance(r, Tensor)]
        fresh = [r for r in results if _address(r) not in self.storages]
        if not fresh:
            return
        given = pytree.tree_map(convert, tuple(args))
        named = pytree.tree_map(convert, dict(kwargs))
        for value in fresh:
            self._know(value)
        op = Op(target, given, named, tuple(self.ref(r) for r in results), self.label)
        for ref in op.refs():
            ref.storage.readers.append(op)
        for made in op.outputs:
            made.storage.maker = op
        self.ops.append(op)

    def ref(self, value: Tensor) -> Ref:
        """The tensor as a view of a known storage; constants are taken in."""
        if not isinstance(value, FakeTensor):
            storage = self.storages.get(id(value))
            if storage is None:
                with _disable_current_modes():
                    held = value.detach().contiguous()
                self.kept.append(value)
                storage = self.storages[id(value)] = Storage(value.dtype, value.numel(), held)
            strides = torch.empty(value.shape, device="meta").stride()
            return Ref(storage, value.dtype, 0, tuple(value.shape), tuple(strides))
        storage = self._know(value)
        return Ref(
            storage,
            value.dtype,
            int(value.storage_offset()),
            tuple(value.shape),
            tuple(0 if n == 1 else s for n, s in zip(value.shape, value.stride(), strict=True)),
        )

    def _know(self, value: Tensor) -> Storage:
        address = _address(value)
        if address not in self.storages:
            self.kept.append(value)
            size = value.untyped_storage().nbytes() // value.element_size()
            self.storages[address] = Storage(value.dtype, size)
        return self.storages[address]


def _address(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


class _Recorder(TorchDispatchMode):
    """Records the basic ops that torch reduces an op to."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer
        self.decompositions = torch._decomp.core_aten_decompositions()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if tensors and not any(isinstance(t, FakeTensor) for t in tensors):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func is aten.as_strided_.default:  # only says how the memory is walked
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            raise UnsupportedError(f"'{func}' changes a tensor in place")
        if func is aten.index.Tensor:
            moved = self._moved(args)
            if moved is not None:
                return moved
        if func in (aten.bitwise_and.Tensor, aten.__and__.Tensor):
            kept = self._unmasked(*args)
            if kept is not None:
                return kept
        if func not in BASIC and not _is_view(func):
            decomposition = self.decompositions.get(func)
            if decomposition is not None:
                with self:
                    result = decomposition(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        result = func(*args, **kwargs)
        before = len(self.tracer.ops)
        self.tracer.record(func, args, kwargs, result)
        if len(self.tracer.ops) > before and func not in BASIC and not _copies(func):
            raise UnsupportedError(f"the code generator does not know '{func}'")
        return result

    def _unmasked(self, a: Any, b: Any) -> Tensor | None:
        """The other operand, where one is constant and true throughout."""
        for constant, other in ((a, b), (b, a)):
            if isinstance(constant, Tensor) and not isinstance(constant, FakeTensor):
                with _disable_current_modes():
                    true = constant.dtype == torch.bool and bool(constant.all())
                if true and other.dtype == torch.bool:
                    shape = torch.broadcast_shapes(constant.shape, other.shape)
                    kept: Tensor = other.expand(shape)
                    return kept
        return None

    def _moved(self, args: Any) -> Tensor | None:
        """Indexing by constants that is a strided view after all, or None."""
        source, indices = args
        if any(isinstance(i, FakeTensor) for i in indices if i is not None):
            return None
        with _disable_current_modes():
            places = torch.arange(source.numel()).reshape(source.shape)
            taken = places[tuple(slice(None) if i is None else i for i in indices)]
            strides = []
            first = int(taken.flatten()[0]) if taken.numel() else 0
            for dim, size in enumerate(taken.shape):
                step = 0 if size < 2 else int(taken.select(dim, 1).flatten()[0]) - first
                strides.append(step)
            same = torch.full(taken.shape, first)
            for dim, (size, step) in enumerate(zip(taken.shape, strides, strict=True)):
                shape = [1] * taken.ndim
                shape[dim] = size
                same = same + (torch.arange(size) * step).reshape(shape)
            affine = torch.equal(same, taken) and all(s >= 0 for s in strides)
        if not affine or not source.is_contiguous():
            return None
        moved: Tensor = source.as_strided(taken.shape, strides, source.storage_offset() + first)
        return moved


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None for r in func._schema.returns)


def _copies(func: Any) -> bool:
    return func in (aten.clone.default, aten._to_copy.default)
