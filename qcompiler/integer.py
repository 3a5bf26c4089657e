"""The integer reference: a quantized program computed as the machines compute it.

A linear or convolution whose input and weight are both quantized is

    accumulator = Σ_k (q_x − z_x) · q_w              exact, in int32
    y = accumulator · (s_x · s_w) + bias             float32, rounded once (fused multiply-add)

where running the program as it stands multiplies the dequantized floats and rounds each sum. For
weights in groups the scales are applied group by group, in order. Everything else is the program's.
Where q_x and q_w are 8-bit floats, products are multiples of 2⁻¹⁸ of at most 2¹⁸, so that float64
sums are exact up to 2¹⁷ of them; the accumulator is float32, the exact sum rounded once.
Backends define the same integers, so what still differs from them is the rounding of float ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from qcompiler import ops, qtype
from qcompiler.op_families import LINEAR
from qcompiler.program import Batch, Program
from qcompiler.rewrite import operand

aten = torch.ops.aten
CONVS = {aten.conv1d.default, aten.conv2d.default}
INT32 = float(1 << 31)


class _Values(dict[Node, Any]):
    """Values by node; a dequantized tensor is computed when a float op asks for it."""

    def __missing__(self, node: Node) -> Any:
        if node.target is not ops.dequantize:
            raise KeyError(node)
        self[node] = ops.dequantize(*map_arg(node.args, self.__getitem__))
        return self[node]


@torch.no_grad()
def run(program: Program, batch: Batch, known: dict[Node, Any] | None = None) -> tuple[Any, ...]:
    """The flat outputs of a quantized program, its layers computed with integers.

    Args:
        program: with `qc::quantize` and `qc::dequantize`.
        batch: one tensor for each input.
        known: what depends on constants alone, such as unpacked weights: taken from there and put
            there, for further batches of the same program.

    Raises:
        OverflowError: if an accumulator does not fit into int32.
    """
    graph = program.exported.graph
    last_use = {source: node for node in graph.nodes for source in node.all_input_nodes}
    constants, given = program.constants(), iter(batch)
    known = {} if known is None else known
    fixed: set[Node] = set()  # nodes that depend on constants alone
    values = _Values()
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = constants[node.name] if node.name in constants else next(given)
            fixed |= {node} if node.name in constants else set()
        elif node.op == "get_attr":
            values[node] = getattr(program.exported.graph_module, str(node.target))
            fixed.add(node)
        elif node.op == "output":
            return tuple(values[n] if isinstance(n, Node) else n for n in node.args[0])
        elif node in known:
            values[node] = known[node]
            fixed.add(node)
        elif node.target is not ops.dequantize:
            found = _layer(node, values)
            values[node] = found if found is not None else node.target(
                *map_arg(node.args, values.__getitem__), **map_arg(node.kwargs, values.__getitem__)
            )  # fmt: skip
            if all(source in fixed for source in node.all_input_nodes):
                known[node] = values[node]
                fixed.add(node)
        for source in node.all_input_nodes:
            if last_use[source] is node and not _feeds_layer(source):
                values.pop(source, None)
    raise AssertionError("a graph without an output node")


def _feeds_layer(node: Node) -> bool:
    """Whether a layer may still want this node, as the integers behind its input or weight."""
    return any(user.target is ops.dequantize for user in node.users) or node.op == "placeholder"


def _quantized(
    node: Any, values: dict[Node, Any]
) -> tuple[Tensor, Tensor, Tensor, int, int] | None:
    """Integers, scale, zero point, axis and group of a dequantized tensor, or None."""
    if not isinstance(node, Node) or node.target is not ops.dequantize:
        return None
    found: list[Any] = [values[a] if isinstance(a, Node) else a for a in node.args]
    q, scale, zero, axis, group = found
    return q, scale, zero, axis, group


def _layer(node: Node, values: dict[Node, Any]) -> Tensor | None:
    """The node's value by integers, or None where it is no layer with two quantized operands."""
    if node.target is not LINEAR and node.target not in CONVS:
        return None
    left = _quantized(operand(node, 0), values)
    right = _quantized(operand(node, 1), values)
    if left is None or right is None:
        return None
    q, scale, zero, _, group = left
    weight, steps, weight_zero, weight_axis, weight_group = right
    rows = scale.numel() == 1 or scale.shape == (*q.shape[:-1], 1)
    if group or not rows or (bool(weight_zero.any()) and not weight_group):
        return None
    integers = not (q.is_floating_point() or weight.is_floating_point())
    centred = q.double() - zero.double()
    bias = operand(node, 2)
    bias = values[bias] if isinstance(bias, Node) else None
    if node.target is LINEAR and weight_group:
        if weight_axis % 2 != 1 or weight.shape[1] % weight_group:
            return None
        zeros = qtype.broadcast(weight_zero, weight, weight_axis, weight_group)
        whole = weight.float() - zeros.float()
        total, factor = _grouped(centred, whole, steps, weight_group, integers), scale
    elif weight_group or (steps.numel() > 1 and weight_axis != 0):
        return None
    elif node.target is LINEAR:
        total = _accumulated(torch.nn.functional.linear(centred, weight.double()), integers)
        factor = scale * steps.reshape(-1)
    else:
        if scale.numel() != 1:
            return None
        rest = [values[a] if isinstance(a, Node) else a for a in node.args[3:]]
        sums = node.target(centred, weight.double(), None, *rest)
        total = _accumulated(sums, integers)
        shape = (1, -1, *[1] * (weight.ndim - 2))
        factor = (scale.reshape(-1) * steps.reshape(-1)).expand(len(weight)).reshape(shape)
        bias = bias.reshape(shape) if bias is not None else None
    return total * factor if bias is None else _fma(total, factor, bias)


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The sum a · b + c, rounded once: the product of two float32 is exact in float64."""
    return (a.double() * b.double() + c.double()).float()


def _accumulated(total: Tensor, integers: bool) -> Tensor:
    """Exact sums as float32, rounded once; those of integers fit into int32."""
    if integers and total.numel() and float(total.abs().max()) >= INT32:
        raise OverflowError("an accumulator does not fit into int32")
    return total.float()


def _grouped(x: Tensor, weight: Tensor, steps: Tensor, group: int, integers: bool) -> Tensor:
    scales = steps.reshape(weight.shape[0], -1)
    total = x.new_zeros((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)
    for g in range(scales.shape[1]):
        part = slice(g * group, (g + 1) * group)
        sums = torch.nn.functional.linear(x[..., part], weight[:, part].double())
        sums = _accumulated(sums, integers)
        total = _fma(sums, scales[:, g], total)
    return total
