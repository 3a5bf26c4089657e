"""Linears that read tokens quantized on their own → operators of a generated library.

    MatMul(DequantizeToken(QuantizeToken(x)), Transpose(DequantizeLinear(W))) + bias
        → qcompiler::QuantizedMatMul(constants, x)

ONNX has no quantization with a range for each token, and ONNX Runtime no fast product with 4-bit
weights for more than a few rows. All linears that read one quantized tensor are one operator, with
the steps before that (`ort_steps`). A rotation that leads to no linear is an operator of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from qcompiler.backends.ort_cache import JOINED
from qcompiler.backends.ort_steps import rotation, take_steps
from qcompiler.backends.ort_translate import INTERNAL
from qcompiler.errors import UnsupportedError
from qcompiler.generated import Generate, Linear, Operator, Step

PRODUCT, ROTATION, TABLE = "QuantizedMatMul", "Rotate", "LookUp"  # of edge_ort.c


def use_generated(graph: gs.Graph, generate: Generate) -> bytes:
    """Replace what `generate` makes kernels for; the library's content, empty where it is nothing.

    Raises:
        UnsupportedError: where something other than a linear reads a tensor quantized by token.
    """
    found: list[tuple[gs.Node, Operator]] = []
    sources: dict[int, gs.Tensor] = {}  # linear → the graph's integers of its weight
    for node in [n for n in graph.nodes if n.domain == INTERNAL and n.op == "QuantizeToken"]:
        found.append(_linears(graph, node, sources))
    for node in [n for n in graph.nodes if n.domain == INTERNAL and n.op == "Rotate"]:
        if node.outputs and (node.outputs[0].outputs or node.outputs[0] in graph.outputs):
            found.append(_rotation(graph, node))
    if not found:
        return b""
    library = generate([operator for _, operator in found])
    for number, ((node, operator), weights, table) in enumerate(
        zip(found, library.weights, library.tables, strict=True)
    ):
        node.attrs |= {"number": number, "library": library.number}
        packed = gs.Constant(f"{node.name}_weights", np.frombuffer(weights, np.uint8))
        node.inputs.insert(0, packed)
        if table:
            _look_up(graph, sources[id(operator.linears[0])], packed, node.attrs)
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    return library.content


def _linears(
    graph: gs.Graph, quantize: gs.Node, sources: dict[int, gs.Tensor]
) -> tuple[gs.Node, Operator]:
    """The operator of everything that reads the quantized tensor."""
    source = quantize.inputs[0]
    linears, outputs = [], []
    for dequantize in list(quantize.outputs[0].outputs):
        for product in list(dequantize.outputs[0].outputs):
            if dequantize.op != "DequantizeToken" or not _is_linear(product, dequantize):
                raise UnsupportedError(
                    f"'{product.name or product.op}' reads a tensor that is quantized by token, "
                    "and generated kernels compute linears with constant weights alone; keep it "
                    "in float (--set keep_float=…)"
                )
            linear, output, source_of = _linear(graph, product)
            sources[id(linear)] = source_of
            linears.append(linear)
            outputs.append(output)
    name = JOINED.join(linear.name for linear in linears)
    depth = int(linears[0].q.shape[1])
    quantize.outputs.clear()
    before = take_steps(graph, source, depth, quantize)
    outputs += before.outputs
    node = gs.Node(PRODUCT, name, {}, before.inputs, outputs, domain=INTERNAL)
    graph.nodes.append(node)
    return node, Operator(
        name, depth, quantize.attrs["qtype"], tuple(linears), len(before.inputs),
        tuple(before.steps), tuple(before.kept),
    )  # fmt: skip


def _rotation(graph: gs.Graph, rotate: gs.Node) -> tuple[gs.Node, Operator]:
    """The operator of a rotation on its own, with the steps before it."""
    output, name = rotate.outputs[0], rotate.outputs[0].name
    part = rotation(rotate)
    if part is None:
        raise UnsupportedError(f"'{rotate.name}' rotates by computed matrices")
    depth = len(part[0]) * len(part[1])
    rotate.outputs.clear()
    before = take_steps(graph, rotate.inputs[0], depth, rotate)
    last = before.steps and len(before.inputs) + len(before.steps) - 1
    steps = (*before.steps, Step("rotate", (last or 0,), part))
    node = gs.Node(ROTATION, name, {}, before.inputs, [output, *before.outputs], domain=INTERNAL)
    graph.nodes.append(node)
    return node, Operator(name, depth, "", (), len(before.inputs), steps, tuple(before.kept))


def _is_linear(product: gs.Node, source: gs.Node) -> bool:
    if product.op != "MatMul" or product.inputs[0] is not source.outputs[0]:
        return False
    turn = _maker(product.inputs[1], "Transpose")
    pair = _maker(turn.inputs[0], "DequantizeLinear") if turn is not None else None
    turned = turn is not None and list(turn.attrs.get("perm", [])) == [1, 0]
    return turned and pair is not None and _constants(pair.inputs)


def _look_up(graph: gs.Graph, table: gs.Tensor, packed: gs.Constant, attrs: dict[str, Any]) -> None:
    """Let lookups of the weight's rows take them from where the operator has them packed."""
    for gather in [n for n in table.outputs if n.op == "Gather" and n.inputs[0] is table]:
        readers = list(gather.outputs[0].outputs)
        if int(gather.attrs.get("axis", 0)) != 0 or len(readers) != 1:
            continue
        (cast,) = readers
        if cast.op != "Cast" or int(cast.attrs["to"]) != 1 or gather.outputs[0] in graph.outputs:
            continue
        output = cast.outputs[0]
        cast.outputs.clear()
        given = [packed, gather.inputs[1]]
        node = gs.Node(TABLE, gather.name, dict(attrs), given, [output], domain=INTERNAL)
        graph.nodes.append(node)


def _linear(graph: gs.Graph, product: gs.Node) -> tuple[Linear, gs.Tensor, gs.Tensor]:
    """The linear, with its bias where one is added, what it writes, and its weight's integers."""
    pair = product.inputs[1].inputs[0].inputs[0].inputs[0]
    q, scale = _tensor(pair.inputs[0]), _tensor(pair.inputs[1])
    zero = torch.zeros_like(scale, dtype=q.dtype)
    if len(pair.inputs) > 2:
        zero = _tensor(pair.inputs[2])
    output, bias = product.outputs[0], None
    readers = list(output.outputs)
    if len(readers) == 1 and readers[0].op == "Add" and output not in graph.outputs:
        other = readers[0].inputs[1 if readers[0].inputs[0] is output else 0]
        if isinstance(other, gs.Constant) and np.asarray(other.values).shape == (len(q),):
            bias, output = _tensor(other), readers[0].outputs[0]
            readers[0].outputs.clear()
    product.outputs.clear()
    axis, group = int(pair.attrs.get("axis", 1)), int(pair.attrs.get("block_size", 0))
    return Linear(product.name, q, scale, zero, axis, group, bias), output, pair.inputs[0]


def _maker(tensor: Any, kind: str) -> gs.Node | None:
    """The node that makes the tensor, if it is of that kind."""
    if not isinstance(tensor, gs.Variable) or len(tensor.inputs) != 1:
        return None
    node: gs.Node = tensor.inputs[0]
    return node if node.op == kind else None


def _constants(tensors: Any) -> bool:
    return all(isinstance(t, gs.Constant) for t in tensors)


def _tensor(constant: gs.Constant) -> Tensor:
    return torch.from_numpy(np.array(constant.values))
