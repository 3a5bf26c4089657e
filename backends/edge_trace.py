"""A Program at fixed sizes, as a list of ops on memory: what the code generator works from.

The graph is interpreted with fake tensors of the sizes asked for. Whatever depends on constants and
sizes alone is computed here and becomes a constant; views (slices, transpositions, reshapes that
copy nothing) become offsets and strides; ops that the generator does not know are decomposed by
torch into ops that it does. What is left is one `Op` after another, each writing memory of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from qcompiler import ops
from qcompiler.backends.edge_decompose import Recorder
from qcompiler.backends.edge_formulas import RECURRENT, transposed_convolution
from qcompiler.backends.edge_ops import Op, Ref, Storage, Trace, Weight
from qcompiler.backends.edge_steps import SPARSE
from qcompiler.cached import CACHED
from qcompiler.errors import QCompilerError, UnsupportedError
from qcompiler.program import Program
from qcompiler.rewrite import place

aten = torch.ops.aten


OVERWRITE = "overwrite"  # the target of an op that writes a tensor into part of a copy of another
TRANSPOSED = frozenset({aten.conv_transpose1d.default, aten.conv_transpose2d.input})
MATRICES = frozenset({aten.linear.default, aten.matmul.default})  # of integers: decomposed too
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
        *CACHED,
    }
)


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
    known: dict[str, Any] | None = None,
) -> Trace:
    """The program at the sizes given.

    Args:
        program: with only ATen and qc ops.
        sizes: shape of each input, by name.
        module: a graph to trace in place of the program's own, with the same inputs.
        counted: inputs that are not given but counted: from the int64 number in the storage on,
            along their last dimension.
        known: values by node that depend on constants alone, such as unpacked weights: taken from
            there and put there, for the same graph at other sizes.

    Raises:
        UnsupportedError: names the op and the model's source line.
    """
    return _Tracer(program, module, {} if known is None else known).run_at(sizes, counted or {})


class _Tracer(Interpreter):
    def __init__(
        self, program: Program, module: torch.fx.GraphModule | None, known: dict[str, Any]
    ) -> None:
        run = module or program.exported.graph_module
        super().__init__(run, garbage_collect_values=False)
        self.extra_traceback = False  # errors say where already
        self.program = program
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.recorder = Recorder(self)
        self.storages: dict[int, Storage] = {}
        self.kept: list[Any] = []  # tensors whose storages are known by address
        self.ops: list[Op] = []
        self.label, self.constant = "", False  # of the node that is run
        self.known = known
        self.fixed: set[Node] = set()  # nodes that depend on constants alone
        constants = program.constants()
        for node in run.graph.nodes:
            sources = node.all_input_nodes
            given = node.op == "get_attr" or node.name in constants
            if given or (sources and all(source in self.fixed for source in sources)):
                self.fixed.add(node)

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
        self.label, self.constant = n.name, n in self.fixed
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
            if not self.constant:
                return target(*args, **kwargs)
            if self.label not in self.known:
                self.known[self.label] = target(*args, **kwargs)
            return self.known[self.label]
        if target in (aten.conv2d.default, aten.conv1d.default):
            return self._convolution(target, args, kwargs)
        if target in TRANSPOSED:
            return self._transposed(target, args, kwargs)
        if target is aten.softmax.int and args[1] % args[0].ndim != args[0].ndim - 1:
            moved = args[0].movedim(args[1], -1)
            found = self.call_function(target, (moved, -1, *args[2:]), kwargs)
            return found.movedim(-1, args[1])
        if target is aten.matmul.default and min(args[0].ndim, args[1].ndim) == 1:
            return self._vector_product(*args)
        if target is aten.scaled_dot_product_attention.default and args[0].ndim < 4:
            wide = [x[None] if isinstance(x, Tensor) else x for x in args]
            mask = kwargs.get("attn_mask")
            more = kwargs if mask is None else {**kwargs, "attn_mask": mask[None]}
            return self.call_function(target, tuple(wide), more)[0]
        if target is aten.layer_norm.default and len(args[1]) > 1:
            return self._wide_norm(*args, **kwargs)
        if target is ops.sparse_linear:
            return self._sparse(*args, **kwargs)
        whole = target in MATRICES and not tensors[0].is_floating_point()
        if target in NATIVE and not whole:
            with self.mode:
                result = target(*args, **kwargs)
            self.record(target, args, kwargs, result)
            return result
        if target is aten.view.default:  # the strides here may not be those of eager execution
            target = aten.reshape.default
        target = RECURRENT.get(target, target)
        with self.mode, self.recorder:
            return target(*args, **kwargs)

    def _vector_product(self, a: Tensor, b: Tensor) -> Tensor:
        """A product with a vector, as one of matrices of one row or column."""
        rows, columns = a.ndim > 1, b.ndim > 1
        with self.mode, self.recorder:
            a, b = a if rows else a[None], b if columns else b[:, None]
        made = self.call_function(aten.matmul.default, (a, b), {})
        made = made if columns else made[..., 0]
        found: Tensor = made if rows else made[..., 0] if not columns else made[..., 0, :]
        return found

    def _weight(
        self, q: Tensor, scale: Tensor, zero_point: Tensor, axis: int, group: int
    ) -> Tensor:
        """Keep a quantized constant as integers; the tensor that stands for it is fake."""
        with self.mode:
            fake = torch.empty(q.shape)
        self._know(fake).weight = Weight(q, scale, zero_point, axis, group)
        return fake

    def _sparse(self, x: Tensor, values: Tensor, columns: Tensor) -> Tensor:
        """Single weights, on the transposed input: what is looked up then lies side by side."""
        with self.mode, self.recorder:
            table = x.reshape(-1, x.shape[-1]).t().contiguous()
        with self.mode:
            made = torch.empty(len(columns), table.shape[1])
        self.record(SPARSE, (table, values.float(), columns), {}, made)
        with self.mode, self.recorder:
            return made.t().reshape(*x.shape[:-1], len(columns))

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

    def _transposed(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        """A transposed convolution as a convolution of an input with gaps."""
        schema = target._schema.arguments
        given = {a.name: a.default_value for a in schema} | dict(kwargs)
        given |= {a.name: v for a, v in zip(schema, args, strict=False)}
        x, weight = given["input"], given["weight"]
        flat = target is aten.conv_transpose1d.default
        names = ("stride", "padding", "output_padding", "dilation")
        pairs = []
        for name, least in zip(names, (1, 0, 0, 1), strict=True):
            sizes = [*given[name]]
            pairs.append([least, *sizes] if flat else sizes * (2 // len(sizes)))
        stride, padding, output_padding, dilation = pairs
        if isinstance(weight, FakeTensor):
            raise UnsupportedError("a transposed convolution whose weight is computed or quantized")
        with self.mode, self.recorder:
            if flat:
                x, weight = x.unsqueeze(2), weight.unsqueeze(2)
            x, weight = transposed_convolution(
                x, weight, stride, padding, output_padding, given["groups"], dilation
            )
        result = self._convolution(
            aten.conv2d.default,
            (x, weight, given["bias"], [1, 1], [0, 0], dilation, given["groups"]), {},
        )  # fmt: skip
        with self.mode, self.recorder:
            return result.squeeze(2) if flat else result

    def _wide_norm(
        self, x: Tensor, shape: Sequence[int], weight: Tensor | None = None,
        bias: Tensor | None = None, eps: float = 1e-5, cudnn: bool = False,
    ) -> Tensor:  # fmt: skip
        """A LayerNorm over several dimensions as one over their product."""
        size, first = 1, x.ndim - len(shape)
        for length in shape:
            size *= length
        with self.mode, self.recorder:
            flat = x.flatten(first)
            scale, shift = (None if p is None else p.reshape(size) for p in (weight, bias))
        found = self.call_function(
            aten.layer_norm.default, (flat, [size], scale, shift, eps, cudnn), {}
        )
        with self.mode, self.recorder:
            whole: Tensor = found.reshape(x.shape)
        return whole

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

    def assign(self, target: Tensor, value: Tensor) -> None:
        """From now on the memory of `target` holds `value` there; what was read before stays."""
        at, new = self.ref(target), self.ref(value)
        address = _address(target)
        full = at.numel == at.storage.size and new.numel == new.storage.size and not new.offset
        if full and at.strides == new.strides and new.storage.constant is None:
            self.storages[address] = new.storage
            return
        old = at.storage
        made = Storage(old.dtype, old.size)
        before, after = (Ref(s, s.dtype, 0, (s.size,), (1,)) for s in (old, made))
        place_of = Ref(made, at.dtype, at.offset, at.shape, at.strides)
        op = Op(OVERWRITE, (before, new), {"to": place_of}, (after,), self.label)
        for ref in (before, new):
            ref.storage.readers.append(op)
        made.maker = op
        self.ops.append(op)
        self.storages[address] = made

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
