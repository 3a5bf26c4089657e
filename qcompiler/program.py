"""The Program: a captured graph as a frozen value, and how to run it node by node."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from qcompiler.acceptance import demand_tensors, demand_whole_floats, forget_strides
from qcompiler.errors import CaptureError, InputError, first_line
from qcompiler.export_errors import explain_export
from qcompiler.history import Entry

Batch = tuple[Tensor, ...]
Watch = Callable[[Node, Any], None]
Visit = Callable[[Node, dict[Node, list[Any]], Callable[[int], Any]], list[Any] | None]


@dataclass(frozen=True)
class Program:
    """A captured model and the record of the passes it went through. Never changed in place."""

    exported: ExportedProgram
    history: tuple[Entry, ...] = field(default=())

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs in the order of the forward signature, nested arguments flattened."""
        return tuple(str(name) for name in self.exported.graph_signature.user_inputs)

    def with_entry(self, entry: Entry) -> Program:
        """This program with one more line of history."""
        return replace(self, history=(*self.history, entry))

    def __str__(self) -> str:
        return str(self.exported.graph).strip()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the arguments of the captured module; returns what the module returned."""
        flat = pytree.arg_tree_leaves(*args, **reorder(self.exported, kwargs))
        outputs = self.run(tuple(flat))
        spec = self.exported.call_spec.out_spec
        assert spec is not None
        return pytree.tree_unflatten(list(outputs), spec)

    def placeholder(self, name: str) -> Node:
        """The input node of that name."""
        nodes: Iterable[Node] = self.exported.graph.nodes
        return next(n for n in nodes if n.op == "placeholder" and n.name == name)

    def check_batch(self, batch: Batch, where: str = "inputs") -> None:
        """Raise an `InputError` if `batch` has not the inputs' number, dtypes and static sizes."""
        if len(batch) != len(self.inputs):
            raise InputError(
                f"{where}: {len(batch)} tensors given, the model takes {len(self.inputs)}: "
                f"{', '.join(self.inputs)}"
            )
        for name, value in zip(self.inputs, batch, strict=True):
            expected = self.placeholder(name).meta.get("val")
            if not isinstance(expected, Tensor):
                continue
            if not isinstance(value, Tensor):
                raise InputError(f"{where}: '{name}' is a {type(value).__name__}, not a tensor")
            if value.dtype != expected.dtype:
                raise InputError(
                    f"{where}: '{name}' is {value.dtype}, the model takes {expected.dtype}"
                )
            sizes: Iterable[Any] = expected.shape  # symbols where they are dynamic
            wanted = [str(s) if isinstance(s, int) else "*" for s in sizes]
            fits = len(wanted) == value.ndim and all(
                w in ("*", str(s)) for w, s in zip(wanted, value.shape, strict=True)
            )
            if not fits:
                shape = ", ".join(wanted)
                raise InputError(
                    f"{where}: '{name}' has the shape {tuple(value.shape)}, "
                    f"the model takes ({shape})"
                )

    @torch.no_grad()
    def run(
        self,
        batch: Batch,
        watch: Watch | None = None,
        double: bool = False,
        last: Node | None = None,
    ) -> tuple[Any, ...]:
        """Run the graph node by node; a value is dropped after its last reader.

        Args:
            batch: one tensor for each input.
            watch: called with every computed node and its value.
            double: compute in float64 what the program computes in float32 (the reference for
                rounding bounds).
            last: stop after this node and return nothing; the whole graph when not given.

        Returns:
            The flat outputs: tensors, and whatever else the model returns.
        """
        graph = self.exported.graph
        last_use: dict[Node, Node] = {}
        for node in graph.nodes:
            for source in node.all_input_nodes:
                last_use[source] = node
        dying: dict[Node, list[Node]] = {}
        for source, reader in last_use.items():
            dying.setdefault(reader, []).append(source)
        values: dict[Node, Any] = {}
        writes = any(
            getattr(getattr(n.target, "_schema", None), "is_mutable", False) for n in graph.nodes
        )
        given = (x.clone() for x in batch) if writes else iter(batch)  # the caller's stay
        constants = self.constants()

        def value(source: Node) -> Any:
            known = values[source]
            # Weights are widened where they are read: all at once they would take twice the model.
            return known.double() if double and is_float32(known) else known

        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = constants[node.name] if node.name in constants else next(given)
                continue
            if node.op == "output":
                return tuple(value(n) if isinstance(n, Node) else n for n in node.args[0])
            if node.op == "get_attr":
                values[node] = getattr(self.exported.graph_module, str(node.target))
                continue
            args = torch.fx.node.map_arg(node.args, value)
            kwargs = torch.fx.node.map_arg(node.kwargs, value)
            if double:
                args, kwargs = pytree.tree_map(_double_dtype, (args, kwargs))
            result = node.target(*args, **kwargs)
            if double:
                result = pytree.tree_map(lambda v: v.double() if is_float32(v) else v, result)
            values[node] = result
            if watch is not None:
                watch(node, result)
            if node is last:
                return ()
            for source in dying.get(node, ()):
                del values[source]
        raise AssertionError("a graph without an output node")

    @torch.no_grad()
    def lockstep(self, batches: Sequence[Batch], visit: Visit, last: Node | None = None) -> None:
        """Run all batches side by side, node by node, so that a node's values can be changed.

        Memory: the values alive at one node, for all batches.

        Args:
            batches: the inputs.
            visit: called with each call node, the values of the nodes before it (a list with one
                entry for each batch), and a function that computes the node for one batch. What it
                returns become the node's values; None: they are computed as they are.
            last: stop after this node; the whole graph when not given.
        """
        nodes = list(self.exported.graph.nodes)
        last_use = {source: node for node in nodes for source in node.all_input_nodes}
        constants = self.constants()
        values: dict[Node, list[Any]] = {}
        given = iter(zip(*batches, strict=True))
        for node in nodes:
            if node.op == "output":
                return
            if node.op == "placeholder":
                known = node.name in constants
                values[node] = [constants[node.name]] * len(batches) if known else list(next(given))
                continue
            if node.op == "get_attr":
                held = getattr(self.exported.graph_module, str(node.target))
                values[node] = [held] * len(batches)
                continue

            compute = partial(_compute, node, values)
            changed = visit(node, values, compute)
            values[node] = [compute(i) for i in range(len(batches))] if changed is None else changed
            for source in node.all_input_nodes:
                if last_use[source] is node:
                    values.pop(source, None)
            if node is last:
                return

    def constants(self) -> dict[str, Any]:
        """Parameters, buffers and constant tensors by the name of their placeholder."""
        signature, program = self.exported.graph_signature, self.exported
        found: dict[str, Any] = {}
        for name, key in signature.inputs_to_parameters.items():
            found[name] = program.state_dict[key].detach()
        for name, key in signature.inputs_to_buffers.items():
            store = program.state_dict if key in program.state_dict else program.constants
            found[name] = store[key]
        for name, key in signature.inputs_to_lifted_tensor_constants.items():
            found[name] = program.constants[key]
        return found


def _compute(node: Node, values: Mapping[Node, list[Any]], index: int) -> Any:
    """A call node for one of several batches."""

    def value(source: Node) -> Any:
        return values[source][index]

    op: Any = node.target
    args = torch.fx.node.map_arg(node.args, value)
    return op(*args, **torch.fx.node.map_arg(node.kwargs, value))


def unpadded(value: Tensor, mask: Tensor | None) -> Tensor:
    """The positions of `value` that are not padding, as rows.

    All of `value` where the mask does not apply.

    Args:
        value: any tensor.
        mask: 0 at padding; applies to tensors with more dimensions that begin with its shape.
    """
    if mask is None or value.ndim <= mask.ndim or value.shape[: mask.ndim] != mask.shape:
        return value
    return value[mask != 0]


def is_float32(value: Any) -> bool:
    """Whether `value` is a float32 tensor."""
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _double_dtype(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def reorder(exported: ExportedProgram, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments in the order in which they were captured."""
    spec = exported.call_spec.in_spec
    if spec is None or not kwargs:
        return dict(kwargs)
    keys = spec.children()[1].context or []
    names = exported.module_call_graph[0].signature
    order = list(names.forward_arg_names) if names and names.forward_arg_names else list(keys)
    return {
        key: kwargs[key]
        for key in sorted(kwargs, key=lambda k: order.index(k) if k in order else 99)
    }


DynamicShapes = Mapping[str, Mapping[int, str]]


def capture(
    module: torch.nn.Module,
    example_inputs: Sequence[Tensor] | Mapping[str, Tensor],
    dynamic_shapes: DynamicShapes | None = None,
) -> Program:
    """Capture a module with `torch.export` as pre-dispatch ATen; parameters are shared, not copied.

    Args:
        module: any module that `torch.export` accepts; put into eval mode here.
        example_inputs: positional (a tuple) or by name (a mapping).
        dynamic_shapes: input name → {dimension: name}, such as
            `{"input_ids": {0: "batch", 1: "sequence"}}`. A dimension that is 1 in the example is
            doubled for the capture, because `torch.export` takes 0 and 1 as constants.

    Raises:
        CaptureError: with the line of the model at fault and the known remedy.
        InputError: for example inputs that are not tensors, for dynamic shapes of unknown inputs or
            not by name.
    """
    names = _forward_names(module)
    args: tuple[Tensor, ...] = ()
    kwargs: dict[str, Tensor] = {}
    if isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
        keys = list(kwargs)
    else:
        args = tuple(example_inputs)
        keys = names[: len(args)]
        if len(keys) < len(args):
            raise InputError(
                f"{len(args)} example inputs given, forward takes {len(names)}: {', '.join(names)}"
            )
    dynamic_shapes = dynamic_shapes or {}
    unknown = set(dynamic_shapes) - set(keys)
    if unknown:
        raise InputError(
            f"dynamic shapes of unknown inputs {sorted(unknown)}; the inputs are {keys}"
        )
    sizes: Any  # torch's own forms are met, too
    for key, sizes in dynamic_shapes.items():
        given = sizes.items() if isinstance(sizes, Mapping) else [("", sizes)]
        if any(type(dim) is not int or not isinstance(size, str) for dim, size in given):
            raise InputError(
                f"dynamic shapes of '{key}' are {sizes}; give each dynamic dimension's number and "
                'the name of its size, as {0: "batch"}: one name is one size'
            )
    widened = [
        _widen(value, dynamic_shapes.get(key, {}), key)
        for key, value in zip(keys, args or kwargs.values(), strict=True)
    ]
    args = tuple(widened) if args else ()
    kwargs = dict(zip(keys, widened, strict=True)) if kwargs else {}
    shapes: Any = None
    if dynamic_shapes:
        marks = [
            dict.fromkeys(dynamic_shapes.get(key, {}), torch.export.Dim.DYNAMIC) for key in keys
        ]
        shapes = tuple(marks) if args else dict(zip(keys, marks, strict=True))
    module.eval()
    try:
        # torch prints the whole graph to stderr when it fails; the error says what matters of it.
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
            module(*args, **kwargs)  # export does not look at dtypes everywhere
            exported = torch.export.export(
                module, args, kwargs or None, dynamic_shapes=shapes, strict=False
            )
    except Exception as error:
        raise CaptureError(explain_export(error, module)) from error
    demand_whole_floats(exported)
    demand_tensors(exported)
    return Program(exported)


def load_pt2(path: Path) -> Program:
    """A program saved by `torch.export.save`."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        exported = torch.export.load(path)
        forget_strides(exported)
    except Exception as error:
        raise InputError(
            f"{path}: not a program that torch {torch.__version__} can read "
            f"({first_line(error)}); save it again with torch.export.save of this or an older "
            "version"
        ) from error
    demand_whole_floats(exported)
    demand_tensors(exported)
    return Program(exported)


def _forward_names(module: torch.nn.Module) -> list[str]:
    import inspect

    return list(inspect.signature(module.forward).parameters)


def _widen(value: Any, dynamic: Mapping[int, str], name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise InputError(f"example input '{name}' is a {type(value).__name__}, not a tensor")
    widened: Tensor = value
    for dim in dynamic:
        if dim >= value.ndim:
            raise InputError(
                f"example input '{name}' has no dimension {dim}: its shape is {tuple(value.shape)}"
            )
        if value.shape[dim] == 1:
            widened = widened.repeat_interleave(2, dim)
    # torch marks the tensor itself as dynamic, and leaves it so; of a part of a tensor it would
    # keep the strides.
    return widened.detach().contiguous()
