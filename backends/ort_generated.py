"""Linears that read tokens quantized on their own → operators of a generated library.

    MatMul(DequantizeToken(QuantizeToken(x)), Transpose(DequantizeLinear(W))) + bias
        → qcompiler::QuantizedMatMul(constants, x)

ONNX has no quantization with a range for each token, and ONNX Runtime no fast product with 4-bit
weights for more than a few rows. All linears that read one quantized tensor are one operator, with
the steps before that (`ort_steps`). A rotation that leads to no linear is an operator of its own.

On a GPU it is linears with quantized weights that read float tensors as well:

    MatMul(x, Transpose(DequantizeLinear(W))) + bias → qcompiler::QuantizedMatMul(constants, x)

All that read one tensor are one operator, with the steps before; queries, keys and values that
attention alone reads are one linear, whose result the attention takes as it is (packed QKV).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from qcompiler.backends.ort_cache import JOINED
from qcompiler.backends.ort_steps import Before, rotation, take_steps
from qcompiler.backends.ort_translate import INTERNAL
from qcompiler.errors import UnsupportedError
from qcompiler.generated import Generate, Linear, Operator, Step

PRODUCT, ROTATION, TABLE = "QuantizedMatMul", "Rotate", "LookUp"  # of edge_ort.c
WIDEST = 32768  # numbers of a row that a block of a GPU holds: kernels/cuda_steps.py


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
    return _generated(graph, found, sources, generate)


def use_generated_on_gpu(graph: gs.Graph, generate: Generate) -> bytes:
    """Likewise for a GPU: linears with quantized weights, whatever they read.

    Raises:
        UnsupportedError: as above.
    """
    found: list[tuple[gs.Node, Operator]] = []
    for node in [n for n in graph.nodes if n.domain == INTERNAL and n.op == "QuantizeToken"]:
        products, data = _readers_by_token(node), node.inputs[0]
        node.outputs.clear()
        found.append(_on_gpu(graph, data, products, node.attrs["qtype"]))
    read: dict[int, list[gs.Node]] = {}  # by the tensor that they read
    for node in graph.nodes:
        if node.outputs and node.op == "MatMul" and _is_linear(node, node.inputs[0]):
            read.setdefault(id(node.inputs[0]), []).append(node)
    for products in read.values():
        found.append(_on_gpu(graph, products[0].inputs[0], products, ""))
    return _generated(graph, found, {}, generate)


def _generated(
    graph: gs.Graph, found: Sequence[tuple[gs.Node, Operator]], sources: dict[int, gs.Tensor],
    generate: Generate,
) -> bytes:  # fmt: skip
    """Compile the operators and tell their nodes; the library's content."""
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
    for product in _readers_by_token(quantize):
        linear, output, source_of = _linear(graph, product)
        sources[id(linear)] = source_of
        linears.append(linear)
        outputs.append(output)
    name = JOINED.join(linear.name for linear in linears)
    depth = int(linears[0].q.shape[1])
    quantize.outputs.clear()
    before = take_steps(graph, source, depth)
    outputs += before.outputs
    node = gs.Node(PRODUCT, name, {}, before.inputs, outputs, domain=INTERNAL)
    graph.nodes.append(node)
    return node, Operator(
        name, depth, quantize.attrs["qtype"], tuple(linears), len(before.inputs),
        tuple(before.steps), tuple(before.kept),
    )  # fmt: skip


def _readers_by_token(quantize: gs.Node) -> list[gs.Node]:
    """The linears that read a quantized tensor.

    Raises:
        UnsupportedError: if something else does.
    """
    found = []
    for dequantize in quantize.outputs[0].outputs:
        for product in dequantize.outputs[0].outputs:
            if dequantize.op != "DequantizeToken" or not _is_linear(product, dequantize.outputs[0]):
                raise UnsupportedError(
                    f"'{product.name or product.op}' reads a tensor that is quantized by token, "
                    "and generated kernels compute linears with constant weights alone; keep it "
                    "in float (--set keep_float=…)"
                )
            found.append(product)
    return found


def _rotation(graph: gs.Graph, rotate: gs.Node) -> tuple[gs.Node, Operator]:
    """The operator of a rotation on its own, with the steps before it."""
    output, name = rotate.outputs[0], rotate.outputs[0].name
    part = rotation(rotate)
    if part is None:
        raise UnsupportedError(f"'{rotate.name}' rotates by computed matrices")
    depth = len(part[0]) * len(part[1])
    rotate.outputs.clear()
    before = take_steps(graph, rotate.inputs[0], depth)
    last = before.steps and len(before.inputs) + len(before.steps) - 1
    steps = (*before.steps, Step("rotate", (last or 0,), part))
    node = gs.Node(ROTATION, name, {}, before.inputs, [output, *before.outputs], domain=INTERNAL)
    graph.nodes.append(node)
    return node, Operator(name, depth, "", (), len(before.inputs), steps, tuple(before.kept))


def _on_gpu(
    graph: gs.Graph, data: gs.Tensor, products: list[gs.Node], activation: str
) -> tuple[gs.Node, Operator]:
    """The operator of products of one tensor; ONNX Runtime gives it memory to work in.

    `activation`: the format to which the tensor is quantized by token; empty where it stays float.
    """
    together = _queries_keys_values(products)
    parts = [_linear(graph, product)[:2] for product in products]
    if together is not None:
        attention, three = together
        stacked = [parts[products.index(product)] for product in three]
        # What is added may be more than a bias: then the sum is not the linear's.
        read = zip(attention.inputs[:3], (output for _, output in stacked), strict=True)
        whole = all(tensor is output for tensor, output in read)
        if whole and _alike([linear for linear, _ in stacked]):
            parts = [part for part in parts if part not in stacked]
            linear = _stacked([linear for linear, _ in stacked])
            packed = gs.Variable(f"{stacked[0][1].name}_packed_qkv", np.float32)
            parts.append((linear, packed))
            empty = gs.Variable.empty()
            attention.inputs = [packed, empty, empty, *attention.inputs[3:]]
    name = JOINED.join(linear.name for linear, _ in parts)
    scratch = gs.Variable(f"{parts[0][1].name}_scratch", np.float32)
    linears = tuple(linear for linear, _ in parts)
    depth = int(linears[0].q.shape[1])
    steps = activation or depth <= WIDEST
    before = take_steps(graph, data, depth) if steps else Before([data])
    outputs = [*(output for _, output in parts), *before.outputs, scratch]
    attrs = {"activation": activation or "float16"}
    node = gs.Node(PRODUCT, name, attrs, before.inputs, outputs, domain=INTERNAL)
    graph.nodes.append(node)
    return node, Operator(
        name, depth, activation, linears, len(before.inputs), tuple(before.steps),
        tuple(before.kept),
    )  # fmt: skip


def _queries_keys_values(products: list[gs.Node]) -> tuple[gs.Node, list[gs.Node]] | None:
    """An attention that reads three of the products and is all that reads them, and the three."""
    made: dict[int, gs.Node] = {}  # by what is read of them: their sum with a bias, if there is one
    for product in products:
        output = product.outputs[0]
        readers = _readers(output)
        biased = len(readers) == 1 and readers[0].op == "Add"
        made[id(readers[0].outputs[0] if biased else output)] = product
    for product in products:
        for reader in _readers(product.outputs[0]):
            ends = [reader, *(n for t in reader.outputs for n in _readers(t))]
            for attention in (n for n in ends if n.op == "GroupQueryAttention"):
                three = attention.inputs[:3]
                alone = all(id(t) in made and len(_readers(t)) == 1 for t in three)
                if alone and len({id(t) for t in three}) == 3:
                    return attention, [made[id(t)] for t in three]
    return None


def _readers(tensor: gs.Tensor) -> list[gs.Node]:
    """Those that were not replaced."""
    return [node for node in tensor.outputs if node.outputs]


def _alike(linears: Sequence[Linear]) -> bool:
    """Whether the weights may stand below one another."""
    first = linears[0]
    return all(
        (x.q.dtype, x.axis, x.group, x.scale.shape[1:], x.bias is None, x.scale.numel() > 1)
        == (first.q.dtype, first.axis, first.group, first.scale.shape[1:], first.bias is None, True)
        and x.zero_point.shape[1:] == first.zero_point.shape[1:]
        for x in linears
    )


def _stacked(linears: Sequence[Linear]) -> Linear:
    first = linears[0]
    q, scale = (torch.cat(parts) for parts in zip(*((x.q, x.scale) for x in linears), strict=True))
    zeros = [x.zero_point for x in linears]
    zero = torch.cat(zeros) if first.zero_point.ndim else first.zero_point
    biases = [x.bias for x in linears if x.bias is not None]
    name = JOINED.join(x.name for x in linears)
    bias = torch.cat(biases) if biases else None
    return Linear(name, q, scale, zero, first.axis, first.group, bias)


def _is_linear(product: gs.Node, source: gs.Tensor) -> bool:
    """Whether it multiplies that tensor with a constant quantized weight."""
    if product.op != "MatMul" or product.inputs[0] is not source:
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
