"""Products for many tokens: the same weights in float16, where MatMulNBits takes longer than that.

    MatMulNBits(x, packed W, scales) → MatMul(x, W in the scales' type)

The integers and scales stay as they were: it is the same function. A language model keeps both
forms where that is faster, one for each of its phases; they share nothing but the cache.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qcompiler.backends.ort_weights import Array, content

PREFILL = "prefill.onnx"  # beside a language model: reads pieces of TOKENS tokens and more
TOKENS = 16
# Where MatMulNBits multiplies: everywhere, for single tokens alone (a language model's decode), or
# nowhere.
EVERYWHERE, DECODE, NOWHERE = "everywhere", "decode", "nowhere"


def widen_products(model: onnx.ModelProto, held: dict[str, Array] | None = None) -> list[str]:
    """Replace all MatMulNBits.

    Args:
        model: changed in place.
        held: values of the initializers that have no content in the message; changed too.

    Returns:
        The names of the nodes that they were.
    """
    graph, contents = model.graph, {} if held is None else held
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    made: dict[str, onnx.TensorProto] = {}
    names = []
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            continue
        packed = node.input[1]
        if packed not in made:
            given = [content(tensors[name], contents) for name in node.input[1:4] if name]
            values, name = _dequantized(node, given).T, f"{packed}_floats"
            if held is not None:
                held[name] = values
                kind = helper.np_dtype_to_tensor_dtype(values.dtype)
                made[packed] = onnx.TensorProto(name=name, dims=values.shape, data_type=kind)
            else:
                made[packed] = numpy_helper.from_array(np.ascontiguousarray(values), name)
        wide = helper.make_node(
            "MatMul", [node.input[0], made[packed].name], node.output, node.name
        )
        names.append(node.name)
        node.CopyFrom(wide)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    inputs = {value.name for value in graph.input}
    kept += [t for t in graph.initializer if t.name in inputs and t.name not in used]
    fresh = [*kept, *made.values()]
    del graph.initializer[:]
    graph.initializer.extend(fresh)
    for name in contents.keys() - {tensor.name for tensor in fresh}:
        del contents[name]
    return names


def _dequantized(node: onnx.NodeProto, given: list[Array]) -> Array:
    """The weight, (N, K), in the type of its scales; `given`: as the node reads it."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    bits, depth = int(attributes["bits"]), int(attributes["K"])
    packed, scales = given[:2]
    outputs, blocks = packed.shape[:2]
    values = _unpacked(packed, bits).astype(np.float32).reshape(outputs, blocks, -1)
    zeros: Array = np.full((1, 1, 1), 1 << (bits - 1), np.float32)
    if len(given) > 2:
        table = _unpacked(given[2].reshape(outputs, -1), bits)
        zeros = table.reshape(outputs, -1)[:, :blocks, None].astype(np.float32)
    wide: Array = (values - zeros) * scales.reshape(outputs, blocks, 1).astype(np.float32)
    return wide.reshape(outputs, -1)[:, :depth].astype(scales.dtype)


def _unpacked(values: np.ndarray, bits: int) -> np.ndarray:
    """The integers of packed bytes, the first in the lowest bits."""
    parts = [(values >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, -1)
