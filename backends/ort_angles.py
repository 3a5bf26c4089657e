"""What of a graph stays in float32 where the rest does not.

The angles of positions:

    position (integer) → Cast → · frequency → Sin, Cos → Cast to float16

float16 has 11 bits: above 2048 it knows no odd position, and of an angle not the radian; bfloat16
has 8. And operators that ONNX Runtime's CUDA provider has no bfloat16 kernel for (1.31):

    Cast to float32 → Round → Cast to bfloat16
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from onnx import TensorProto, helper

from qcompiler.backends.ort_weights import Array

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
INTEGERS = (
    TensorProto.INT64, TensorProto.INT32, TensorProto.INT16,
    TensorProto.UINT64, TensorProto.UINT32, TensorProto.UINT16,
)  # fmt: skip
TURNS = ("Sin", "Cos")
# Operators with bfloat16 kernels there, or for which it makes no difference.
BFLOAT16 = {
    "Abs", "Add", "Attention", "AveragePool", "Cast", "CastLike", "Compress", "Concat",
    "Constant", "ConstantOfShape", "Conv", "Div", "Erf", "Exp", "Expand", "FastGelu",
    "Flatten", "FusedMatMul", "Gather", "GatherBlockQuantized", "GatherElements", "GatherND",
    "Gelu", "Gemm", "GroupQueryAttention", "HardSigmoid", "HardSwish", "Identity", "IsInf",
    "IsNaN", "LayerNormalization", "MatMul", "MatMulNBits", "Max", "Min", "Mul", "Neg", "Pow",
    "RMSNormalization", "ReduceSum", "Relu", "Reshape", "RotaryEmbedding", "ScatterElements",
    "ScatterND", "Shape", "Sigmoid", "Sign", "Size", "Slice", "Softmax", "Split", "Sqrt",
    "Squeeze", "Sub", "Sum", "Tanh", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where",
}  # fmt: skip
NO_FLOAT16 = {"Range"}  # operators that ONNX has not in float16
LOOK_UPS = ("Gather", "GatherElements", "GatherND")


def keep_wide(
    model: onnx.ModelProto, contents: dict[str, Array], kind: int = HALF
) -> tuple[set[int], set[str]]:
    """Prepare a float32 graph whose other nodes will read and make float16 or bfloat16.

    Results that those read go through a Cast, as does what they make; constants that both read are
    doubled.

    Args:
        model: changed in place.
        contents: values of the initializers that have none in the message; changed too.
        kind: the type of the others.

    Returns:
        The indices of the nodes that stay as they are, and the initializers that stay float32.
    """
    graph, types = model.graph, _types(model)
    angles = _angles(model, types)
    kept = angles | {
        i
        for i, node in enumerate(graph.node)
        if (node.op_type in NO_FLOAT16 if kind == HALF else node.op_type not in BFLOAT16)
        and _floats((*node.input, *node.output), types)
    }
    if not kept:
        return set(), set()
    floats = {name for i in kept for name in _floats(graph.node[i].output, types)}
    inside = {name for i in kept for name in graph.node[i].output}
    read = {name for i in kept for name in graph.node[i].input}
    outside = {n for i, node in enumerate(graph.node) if i not in kept for n in node.input}
    held = {t.name: t for t in graph.initializer if t.name in read and t.data_type == FLOAT}
    renamed = {name: f"{name}_float32" for name in held if name in outside}
    for name, other in renamed.items():
        made = graph.initializer.add()
        made.CopyFrom(held[name])
        made.name = other
        if name in contents:
            contents[other] = contents[name]
    narrow = {name: f"{name}_narrow" for name in inside & outside & floats}
    # Angles read no floats but one another's and constants.
    given = {n for i in kept - angles for n in _floats(graph.node[i].input, types)}
    wide = {name: f"{name}_wide" for name in sorted(given - inside - held.keys())}
    nodes: list[onnx.NodeProto] = []
    indices, widened = set(), set()
    for i, node in enumerate(graph.node):
        names = renamed | wide if i in kept else narrow
        for name in dict.fromkeys(node.input) if i in kept else ():
            if name in wide and name not in widened:
                widened.add(name)
                indices.add(len(nodes))
                nodes.append(helper.make_node("Cast", [name], [wide[name]], wide[name], to=FLOAT))
        for at, name in enumerate(node.input):
            node.input[at] = names.get(name, name)
        if i in kept:
            indices.add(len(nodes))
        nodes.append(node)
        for name in node.output:
            if name in narrow:
                indices.add(len(nodes))
                nodes.append(
                    helper.make_node("Cast", [name], [narrow[name]], narrow[name], to=kind)
                )
    fresh = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(fresh)
    return indices, {renamed.get(name, name) for name in held}


def _floats(names: Iterable[str], types: dict[str, int]) -> list[str]:
    """Those of floats; ONNX knows no types of what ONNX Runtime's own operators make: floats."""
    return [name for name in names if name and types.get(name, FLOAT) == FLOAT]


def _angles(model: onnx.ModelProto, types: dict[str, int]) -> set[int]:
    """Indices of the nodes from casts of integers to Sin and Cos.

    They read floats from one another and from constants alone: what is computed from data (float
    inputs, rows looked up in a table) is not among them.
    """
    graph = model.graph
    if not any(node.op_type in TURNS for node in graph.node):
        return set()

    def floats(names: Iterable[str]) -> list[str]:
        return _floats(names, types)

    fixed = {tensor.name for tensor in graph.initializer} - {value.name for value in graph.input}
    pure = {*fixed}  # of integers and constants alone
    counted: set[str] = set()  # and of a position
    makers: dict[str, int] = {}
    ends = []
    for i, node in enumerate(graph.node):
        makers |= dict.fromkeys(node.output, i)
        sources = floats(node.input)
        if node.op_type == "Constant":
            fixed.update(node.output)
        looked_up = node.op_type in LOOK_UPS and sources and node.input[1] not in fixed
        if looked_up or not pure.issuperset(sources):
            continue
        pure.update(node.output)
        if node.op_type in TURNS:
            ends += [i] * (node.input[0] in counted)
        elif not counted.isdisjoint(sources) or _counts(node, types):
            counted.update(floats(node.output))
    found: set[int] = set()
    while ends:
        i = ends.pop()
        if i not in found:
            found.add(i)
            ends += [makers[name] for name in floats(graph.node[i].input) if name in makers]
    return found


def _counts(node: onnx.NodeProto, types: dict[str, int]) -> bool:
    """Whether the node makes floats of integers."""
    return (
        node.op_type == "Cast"
        and types.get(node.input[0]) in INTEGERS
        and any(a.name == "to" and a.i == FLOAT for a in node.attribute)
    )


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element types, as far as ONNX infers them."""
    graph = model.graph
    given = {value.name for value in graph.input}
    # Without weights: there may be more of them than shape inference reads.
    weights = [
        helper.make_tensor_value_info(t.name, t.data_type, t.dims)
        for t in graph.initializer
        if t.name not in given
    ]
    bare = helper.make_graph(graph.node, "types", [*graph.input, *weights], graph.output)
    made = helper.make_model(bare, opset_imports=model.opset_import, ir_version=model.ir_version)
    inferred = onnx.shape_inference.infer_shapes(made).graph
    values = (*inferred.input, *inferred.output, *inferred.value_info)
    return {value.name: value.type.tensor_type.elem_type for value in values}
