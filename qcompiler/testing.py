"""For tests: the contract that every rewrite keeps, a program as short text, random linears.

A rewrite is pure (the program that it is given stays as it was, down to the tensors), leaves a
valid program without dead code, gives the same result each time, changes nothing when it runs on
its own result, adds one entry to the history, and, where it claims to be exact, moves the outputs
by no more than float rounding explains.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler.generated import Linear
from qcompiler.program import Batch, Program
from qcompiler.qtype import QType
from qcompiler.rewrite import Rewrite
from qcompiler.verify import Reference, check_exact


def check_contract(
    rewrite: Rewrite[Any],
    program: Program,
    batches: Iterable[Batch],
    *,
    idempotent: bool = True,
    **settings: Any,
) -> Program:
    """Run a pass and check what every pass promises.

    Args:
        rewrite: the pass.
        program: what it works on.
        batches: inputs on which exact passes are compared with `program`.
        idempotent: whether a second run must change nothing; not so for passes that are told what
            to insert.
        settings: keyword arguments of the pass.

    Returns:
        The rewritten program; for exact passes with the measured residual in its history.

    Raises:
        AssertionError: naming the pass and the broken promise.
        RewriteError: by an exact pass that moved the outputs.
    """
    name, kept = rewrite.__name__, list(batches)

    def require(holds: bool, promise: str) -> None:
        if not holds:
            raise AssertionError(f"{name}: {promise}")

    text, tensors = str(program), _copies(program)
    after = rewrite(program, **settings)
    require(str(program) == text, "the graph of its input changed")
    require(_equal(_copies(program), tensors), "the tensors of its input changed")

    require(after.history[:-1] == program.history, "the history must grow by one entry")
    entry = after.history[-1]
    require(
        (entry.name, entry.exact) == (name, rewrite.exact), f"its entry is that of {entry.name}"
    )
    same = after.exported is program.exported
    require(entry.changed != same, "`changed` must say whether there is a new program")
    alike = str(after) == text and _equal(_copies(after), tensors)
    require(same or not alike, "nothing changed, so the ExportedProgram must be the same object")

    _check_valid(after, require)
    if entry.changed:  # a program that is left alone may be one that was captured with dead code
        _check_alive(after, require)
    second = rewrite(program, **settings)
    require(str(second) == str(after), "two runs give different graphs")
    require(_equal(_copies(second), _copies(after)), "two runs give different tensors")
    require(second.history[-1].notes == entry.notes, "two runs give different notes")
    require(second.history[-1].refusals == entry.refusals, "two runs give different refusals")

    if idempotent:
        again = rewrite(after, **settings)
        require(
            again.exported is after.exported or str(again) == str(after),
            f"its own result is changed again:\n{compact(after)}\n\n→\n\n{compact(again)}",
        )
    if rewrite.exact:
        return check_exact(program, after, Reference.of(program, kept))
    for batch in kept:
        for old, new in zip(program.run(batch), after.run(batch), strict=True):
            require(
                old.shape == new.shape and old.dtype == new.dtype,
                "an output changed shape or dtype",
            )
            require(bool(new.isfinite().all()), "an output has NaN or Inf")
    return after


def _check_valid(program: Program, require: Any) -> None:
    exported = program.exported
    exported.validate()
    exported.graph.lint()
    signature = exported.graph_signature
    placeholders = [n.name for n in exported.graph.nodes if n.op == "placeholder"]
    require(
        placeholders == [spec.arg.name for spec in signature.input_specs],
        "placeholders and signature have different inputs",
    )
    constants = program.constants()
    require(
        set(constants) | set(program.inputs) == set(placeholders),
        "a placeholder is neither an input nor a constant",
    )
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in constants:
            value, fake = constants[node.name], node.meta["val"]
            require(
                tuple(value.shape) == tuple(fake.shape) and value.dtype == fake.dtype,
                f"the constant {node.name} is not as its node says",
            )


def _check_alive(program: Program, require: Any) -> None:
    constants = program.constants()
    for node in program.exported.graph.nodes:
        if node.op == "call_function" or node.name in constants:
            require(bool(node.users) or _asserts(node), f"{node.name} is not read")
    stored = {*program.exported.state_dict, *program.exported.constants}
    named = {spec.target for spec in program.exported.graph_signature.input_specs}
    require(stored <= named, "tensors are stored that the signature does not name")


def _asserts(node: Node) -> bool:
    """Whether the node is one of the assertions that `torch.export` leaves."""
    return "assert" in str(node.target) or "sym_constrain" in str(node.target)


def _copies(program: Program) -> dict[str, Tensor]:
    stores = (program.exported.state_dict, program.exported.constants)
    return {k: v.detach().clone() for s in stores for k, v in s.items() if isinstance(v, Tensor)}


def _equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(value, right[key]) for key, value in left.items()
    )


def compact(program: Program) -> str:
    """A program as text for golden tests: one line a node, `name = op(operands)  # dtype (shape)`.

    Dynamic sizes are written d0, d1, … in order of appearance.
    """
    sizes: dict[str, str] = {}

    def shape(value: Any) -> str:
        if not isinstance(value, Tensor):
            return ""
        shape: Iterable[Any] = value.shape  # symbols where they are dynamic
        parts = [
            str(s) if isinstance(s, int) else sizes.setdefault(str(s), f"d{len(sizes)}")
            for s in shape
        ]
        return f"  # {str(value.dtype).removeprefix('torch.')} ({', '.join(parts)})"

    constants = program.constants()
    lines = []
    for node in program.exported.graph.nodes:
        if node.op == "output":
            lines.append(f"return {_operand(node.args[0])}")
        elif node.op == "placeholder":
            kind = "constant" if node.name in constants else "input"
            lines.append(f"{node.name} = {kind}{shape(node.meta.get('val'))}")
        else:
            operands = [
                *map(_operand, node.args),
                *(f"{key}={_operand(value)}" for key, value in node.kwargs.items()),
            ]
            value = shape(node.meta.get("val"))
            lines.append(f"{node.name} = {_operation(node)}({', '.join(operands)}){value}")
    return "\n".join(lines)


def _operation(node: Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    packet, _, overload = str(node.target).removeprefix("aten.").rpartition(".")
    return packet if overload in ("default", "Tensor", "int") else f"{packet}.{overload}"


def _operand(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_operand, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def random_linear(outputs: int, inputs: int, weights: str, biased: bool) -> Linear:
    """A linear with random weights rounded to nearest; `weights`: their format."""
    weight, kind = torch.randn(outputs, inputs), QType.parse(weights)
    axis = 1 if kind.group else 0
    scale, zero = kind.scale_for(*kind.ranges(weight, axis))
    q = kind.quantize(weight, scale, zero, axis)
    bias = torch.randn(outputs) if biased else None
    return Linear(f"l{outputs}", q, scale, zero, axis, kind.group or 0, bias)
