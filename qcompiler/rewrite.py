"""Rewrites: functions from Program to Program, written as edits of a private draft."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, Protocol, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node

from qcompiler.errors import QCompilerError, RewriteError
from qcompiler.history import Entry, Refusal
from qcompiler.program import Program

P = ParamSpec("P")


class Rewrite(Protocol[P]):
    """A pass: `program → program`.

    `exact` says whether it claims the same function in real arithmetic.
    """

    __name__: str
    exact: bool

    def __call__(self, program: Program, *args: P.args, **kwargs: P.kwargs) -> Program:
        """The program after the pass, with one more entry in its history."""
        ...


class Draft:
    """A private, mutable copy of a program's graph.

    Tensors are shared with the program until they are replaced.
    """

    def __init__(self, program: Program) -> None:
        source = program.exported
        module = torch.fx.GraphModule(source.graph_module, copy.deepcopy(source.graph))
        # The copy renames nodes that are called like a builtin ("input"); the signature does not.
        for old, new in zip(source.graph.nodes, module.graph.nodes, strict=True):
            new.name = old.name
        self.exported = ExportedProgram(
            root=module,
            graph=module.graph,
            graph_signature=copy.deepcopy(source.graph_signature),
            state_dict=dict(source.state_dict),
            range_constraints=source.range_constraints,
            module_call_graph=source.module_call_graph,
            example_inputs=source.example_inputs,
            constants=dict(source.constants),
            verifiers=source.verifiers,
        )
        signature = self.exported.graph_signature
        # The signature builds its tables anew each time that it is asked.
        self._keys: dict[str, str] = {
            **signature.inputs_to_lifted_tensor_constants,
            **signature.inputs_to_buffers,
            **signature.inputs_to_parameters,
        }
        self.changed = False
        self.refusals: list[Refusal] = []
        self.notes: list[str] = []

    @property
    def graph(self) -> torch.fx.Graph:
        """The private graph."""
        graph: torch.fx.Graph = self.exported.graph
        return graph

    def calls(self, *ops: Any) -> Iterator[Node]:
        """The calls of any of `ops`, in order; all calls when none is given.

        Safe against edits while iterating.
        """
        for node in list(self.graph.nodes):
            if node.op == "call_function" and (not ops or node.target in ops) and not node._erased:
                yield node

    def is_constant(self, node: Any) -> bool:
        """Whether `node` is a parameter, buffer or constant tensor."""
        return isinstance(node, Node) and node.op == "placeholder" and self._key(node) is not None

    def constant(self, node: Any) -> Tensor:
        """The value of a parameter, buffer or constant. Not to be written to."""
        key = self._key(node)
        if key is None:
            raise RewriteError(f"'{node.name}' is not a constant")
        value: Tensor = self._store(key)[key].detach()
        return value

    def set_constant(self, node: Any, value: Tensor) -> Node:
        """Give every reader of the placeholder another value.

        Returns a node with the new shape and dtype.
        """
        key = self._key(node)
        assert key is not None
        old = self._store(key)[key]
        if old.shape == value.shape and old.dtype == value.dtype:
            # Two placeholders may share one tensor (tied weights): the key is set, not the storage.
            parameter = isinstance(old, torch.nn.Parameter)
            self._store(key)[key] = (
                torch.nn.Parameter(value, requires_grad=False) if parameter else value
            )
            self.changed = True
            return cast(Node, node)
        fresh = self.add_constant(node.name, value)
        node.replace_all_uses_with(fresh)
        return fresh

    def add_constant(self, name: str, value: Tensor) -> Node:
        """A new buffer. The name is made unique."""
        specs = self.exported.graph_signature.input_specs
        place = next(
            (
                i
                for i, s in enumerate(specs)
                if s.kind not in (InputKind.PARAMETER, InputKind.BUFFER)
            ),
            len(specs),
        )
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        following = placeholders[place] if place < len(placeholders) else None
        if following is None:
            following = next(n for n in self.graph.nodes if n.op != "placeholder")
        with self.graph.inserting_before(following):
            node = self.graph.placeholder(name)
        node.target = node.name  # the argument's name in the generated code: unique as well
        key = node.name
        while key in self.exported.state_dict or key in self.exported.constants:
            key += "_"
        node.meta["val"] = self._fake_mode().from_tensor(value, static_shapes=True)
        spec = InputSpec(InputKind.BUFFER, TensorArgument(name=node.name), key, persistent=True)
        specs.insert(place, spec)
        self.exported.state_dict[key] = value
        self._keys[node.name] = key
        self.changed = True
        return node

    def call(
        self, op: Any, *args: Any, before: Node, like: Node | None = None, **kwargs: Any
    ) -> Node:
        """Insert a call before a node; shape, dtype and source line are filled in.

        Args:
            op: an ATen or qc overload.
            before: the node that the call precedes.
            like: the node whose module path and source line the call inherits; left out, `before`.
        """
        origin = like or before
        with self.graph.inserting_before(before):
            node = self.graph.call_function(op, args, kwargs)
        for field in ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn"):
            if field in origin.meta:
                node.meta[field] = origin.meta[field]
        self.infer(node)
        self.changed = True
        return node

    def infer(self, node: Node) -> None:
        """Recompute the fake value of a call from those of its inputs."""

        def fake(source: Node) -> Any:
            return source.meta["val"]

        with self._fake_mode(), torch.no_grad():
            args = torch.fx.node.map_arg(node.args, fake)
            kwargs = torch.fx.node.map_arg(node.kwargs, fake)
            node.meta["val"] = evaluate(node, args, kwargs)

    def swap(self, old: Node, new: Node) -> None:
        """Let all readers of `old` read `new` instead."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.changed = True

    def set_input(self, reader: Node, operand: int, source: Node) -> None:
        """Let one operand of one reader read `source`."""
        reader.update_arg(operand, source)
        self.changed = True

    def refuse(self, node: Node, reason: str) -> None:
        """Record that the pass leaves `node` alone, and why."""
        refusal = Refusal(place(node), reason)
        if refusal not in self.refusals:
            self.refusals.append(refusal)

    def note(self, text: str) -> None:
        """Record what the pass did."""
        self.notes.append(text)

    def finish(self) -> ExportedProgram:
        """Remove dead nodes and unread constants, repair the signature, validate."""
        graph = self.graph
        graph.eliminate_dead_code(is_impure_node=_has_effect)
        signature = self.exported.graph_signature
        kept = []
        placeholders = {n.name: n for n in graph.nodes if n.op == "placeholder"}
        for spec in signature.input_specs:
            node = placeholders[spec.arg.name]
            if (
                spec.kind != InputKind.USER_INPUT
                and not node.users
                and not _is_mutated(signature, spec)
            ):
                graph.erase_node(node)
            else:
                kept.append(spec)
        signature.input_specs[:] = kept
        used = {spec.target for spec in kept}
        for store in (self.exported.state_dict, self.exported.constants):
            for key in [key for key in store if key not in used]:
                del store[key]
        outputs = operand(graph.output_node(), 0)
        for node, spec in zip(outputs, signature.output_specs, strict=True):
            if isinstance(node, Node) and isinstance(spec.arg, TensorArgument):
                spec.arg = TensorArgument(name=node.name)
        graph.lint()
        self.exported.graph_module.recompile()
        self.exported.validate()
        return self.exported

    def _key(self, node: Node) -> str | None:
        return self._keys.get(node.name)

    def _store(self, key: str) -> dict[str, Any]:
        exported = self.exported
        store: dict[str, Any] = exported.state_dict
        return store if key in store else exported.constants

    def _fake_mode(self) -> FakeTensorMode:
        for node in self.graph.nodes:
            if isinstance(node.meta.get("val"), FakeTensor):
                mode: FakeTensorMode = node.meta["val"].fake_mode
                return mode
        return FakeTensorMode()


def _has_effect(node: Node) -> bool:
    """Whether a node must stay even if nothing reads it.

    Random ops need not: a captured program is in eval mode.
    """
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or bool(schema is not None and schema.is_mutable)


def _is_mutated(signature: Any, spec: InputSpec) -> bool:
    return spec.target in set(signature.buffers_to_mutate.values())


def operand(node: Node, index: int) -> Any:
    """One positional operand of a call, or None where it was left out.

    `Any`, because `torch.fx` types an operand as a union of twenty types, and which one it is
    follows from the op.
    """
    return node.args[index] if index < len(node.args) else None


def following(source: Node) -> Node:
    """The node before which a call that reads `source` may stand."""
    node: Node = source.next
    while node.op == "placeholder":
        node = node.next
    return node


def evaluate(node: Node, args: Any, kwargs: Any) -> Any:
    """What the op of a call gives for other operands."""
    op: Any = node.target
    return op(*args, **kwargs)


def module_path(node: Node) -> str:
    """The dotted path of the module that made the node, for people.

    Such as `encoder.layer.0.attention.self.query`; empty where it is not known.
    """
    stack = node.meta.get("nn_module_stack") or {}
    return next((path for path, _ in reversed(stack.values()) if path), "")


def place(node: Node) -> str:
    """A node as reports name it: its name, and its module path where known."""
    path = module_path(node)
    return f"{node.name} ({path})" if path else node.name


def rewrite(*, exact: bool) -> Callable[[Callable[Concatenate[Draft, P], None]], Rewrite[P]]:
    """Turn an edit of a draft into a pass.

    The pass is pure: it works on a private draft and returns a new Program with one more `Entry`,
    valid and without dead code. When the edit changed nothing, the ExportedProgram is the same
    object. `exact=True` is a claim that the driver checks on real batches.
    """

    def wrap(edit: Callable[Concatenate[Draft, P], None]) -> Rewrite[P]:
        @functools.wraps(edit)
        def apply(program: Program, *args: P.args, **kwargs: P.kwargs) -> Program:
            draft = Draft(program)
            start = time.perf_counter()
            name = edit.__name__
            try:
                edit(draft, *args, **kwargs)
                exported = draft.finish() if draft.changed else program.exported
            except QCompilerError as error:
                raise type(error)(f"{name}: {error}") from error
            except Exception as error:
                raise RewriteError(f"{name} failed: {type(error).__name__}: {error}") from error
            entry = Entry(
                name,
                exact,
                draft.changed,
                notes=tuple(draft.notes),
                refusals=tuple(draft.refusals),
                seconds=time.perf_counter() - start,
            )
            return Program(exported, (*program.history, entry))

        made = cast("Rewrite[P]", apply)
        made.exact = exact
        return made

    return wrap
