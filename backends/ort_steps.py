"""What is computed on rows before they are quantized or multiplied → steps of an operator.

    QuantizeToken(RMSNormalization(Add(x_0, x_1)))  →  one operator that reads x_0 and x_1

At one row ONNX Runtime spends about as long on a small operator as on its arithmetic, so sums,
norms and activation functions on the way to a product belong to the product's operator. What others
read of them becomes an output. Left outside: an op whose inputs are not all of the row's size, and
whatever would make the operator wait for itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from qcompiler.backends.ort_translate import INTERNAL
from qcompiler.generated import Step

MAX_INPUTS, MAX_STEPS = 8, 8  # the first of edge_ort.h
MAX_KEPT = 8
NORMS = {"RMSNormalization": "rms_norm", "LayerNormalization": "layer_norm"}


@dataclass
class Before:
    """What an operator computes before its quantization.

    Attributes:
        inputs: the tensors that it reads.
        steps: on them.
        kept: numbers of the values that others read too.
        outputs: the tensors that they were.
    """

    inputs: list[gs.Tensor]
    steps: list[Step] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    outputs: list[gs.Tensor] = field(default_factory=list)


@dataclass
class _Part:
    """A step as the graph has it: the nodes that it replaces, the last first."""

    kind: str
    operands: list[gs.Tensor]
    nodes: list[gs.Node]
    constants: tuple[Tensor, ...] = ()
    epsilon: float = 0.0


def take_steps(graph: gs.Graph, data: gs.Tensor, depth: int) -> Before:
    """Cut the steps that lead to `data` out of the graph.

    Args:
        graph: changed where steps are found.
        data: what the operator rotates, quantizes or multiplies; the nodes that do so now are
            without outputs already.
        depth: its last size.
    """
    parts: dict[int, tuple[gs.Tensor, _Part]] = {}  # in the order in which they run
    leaves: dict[int, gs.Tensor] = {}
    begun: set[int] = set()
    final = {id(tensor) for tensor in graph.outputs}

    def visit(tensor: gs.Tensor) -> None:
        if id(tensor) in begun or id(tensor) in leaves:
            return
        part = _part(tensor, depth) if len(begun) < MAX_STEPS else None
        made = {id(t) for node in part.nodes for t in node.outputs} if part is not None else set()
        if part is None or made & final:
            leaves[id(tensor)] = tensor
            return
        begun.add(id(tensor))
        for operand in part.operands:
            visit(operand)
        parts[id(tensor)] = (tensor, part)

    visit(data)
    taken = [node for _, part in parts.values() for node in part.nodes]
    if not taken or len(leaves) > MAX_INPUTS or _waits([*leaves.values()], taken):
        return Before([data])
    inside = {id(node) for node in taken}
    numbers = {key: number for number, key in enumerate([*leaves, *parts])}
    before = Before([*leaves.values()])
    for key, (tensor, part) in parts.items():
        operands = tuple(numbers[id(operand)] for operand in part.operands)
        before.steps.append(Step(part.kind, operands, part.constants, part.epsilon))
        if any(node.outputs and id(node) not in inside for node in tensor.outputs):
            before.kept.append(numbers[key])
            before.outputs.append(tensor)
    if len(before.kept) > MAX_KEPT:
        return Before([data])
    for node in taken:
        node.outputs.clear()
    return before


def _part(tensor: gs.Tensor, depth: int) -> _Part | None:
    """The step that makes a tensor, or None."""
    if not isinstance(tensor, gs.Variable) or len(tensor.inputs) != 1:
        return None
    node = tensor.inputs[0]
    shape = tensor.shape
    if shape is None or not shape or shape[-1] != depth or len(node.outputs) != 1:
        return None

    def of_rows(*tensors: Any) -> bool:
        return all(isinstance(t, gs.Variable) and t.shape == shape for t in tensors)

    if node.op in NORMS and int(node.attrs.get("axis", -1)) in (-1, len(shape) - 1):
        constants = [_row(t, depth) for t in node.inputs[1:]]
        if of_rows(node.inputs[0]) and all(c is not None and c.numel() == depth for c in constants):
            found = tuple(c for c in constants if c is not None)
            epsilon = float(node.attrs.get("epsilon", 1e-5))
            return _Part(NORMS[node.op], [node.inputs[0]], [node], found, epsilon)
    if node.op == "Gelu" and of_rows(node.inputs[0]):
        tanh = node.attrs.get("approximate", "none") == "tanh"
        return _Part("gelu_tanh" if tanh else "gelu", [node.inputs[0]], [node])
    if node.op in ("Add", "Mul"):
        return _of_two(node, of_rows, depth)
    factors = rotation(node)
    if factors is not None and of_rows(node.inputs[0]):
        return _Part("rotate", [node.inputs[0]], [node], factors)
    return None


def rotation(node: gs.Node) -> tuple[Tensor, Tensor] | None:
    """The factors of `qc::rotate`, or None for other nodes and computed factors."""
    if (node.domain, node.op) != (INTERNAL, "Rotate"):
        return None
    if not all(isinstance(t, gs.Constant) for t in node.inputs[1:]):
        return None
    left, right = (torch.from_numpy(np.array(t.values)) for t in node.inputs[1:])
    return left, right


def _of_two(node: gs.Node, of_rows: Any, depth: int) -> _Part | None:
    """A sum or product of two rows, or of one and a constant; x · sigmoid(x) is SiLU."""
    kind, (a, b) = node.op.lower(), node.inputs
    if kind == "mul":
        for x, other in ((a, b), (b, a)):
            gate = other.inputs[0] if isinstance(other, gs.Variable) and other.inputs else None
            if (
                gate is not None
                and gate.op == "Sigmoid"
                and gate.inputs[0] is x
                and list(other.outputs) == [node]
                and of_rows(x)
            ):
                return _Part("silu", [x], [node, gate])
    for x, other in ((a, b), (b, a)):
        constant = _row(other, depth)
        if constant is not None and of_rows(x):
            return _Part(kind, [x], [node], (constant,))
    return _Part(kind, [a, b], [node]) if of_rows(a, b) else None


def _row(tensor: gs.Tensor, depth: int) -> Tensor | None:
    """A constant of one number, or of one for each column."""
    if not isinstance(tensor, gs.Constant):
        return None
    values = np.asarray(tensor.values)
    if values.dtype != np.float32 or values.size not in (1, depth):
        return None
    if values.size > 1 and values.shape[-1] != depth:
        return None
    return torch.from_numpy(np.array(values.reshape(-1)))


def _waits(leaves: list[gs.Tensor], taken: list[gs.Node]) -> bool:
    """Whether a leaf is computed from what the operator would compute."""
    inside = {id(node) for node in taken}
    seen: set[int] = set()
    open_ = [node for leaf in leaves for node in leaf.inputs]
    while open_:
        node = open_.pop()
        if id(node) in inside:
            return True
        if id(node) in seen:
            continue
        seen.add(id(node))
        open_ += [maker for tensor in node.inputs for maker in tensor.inputs]
    return False
