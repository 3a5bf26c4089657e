"""A float32 graph in float16, as ONNX Runtime's CUDA provider runs it fast.

Every float32 tensor becomes float16, but for what operators want in float32 and for the outputs
that are no caches: a Cast makes them float32 again. Norms sum in float32 on their own (their
`stash_type`); so do products and attention. Constants beyond ±65504 (masks are as low as float32
goes) become the largest finite numbers.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
# Operator → its inputs that stay float32.
WIDE = {"GroupQueryAttention": (12, 13), "Resize": (1, 2)}


def halve(model: onnx.ModelProto, kept: Collection[str] = ()) -> None:
    """Change the model in place.

    Args:
        model: with float32 as its only float type.
        kept: the outputs that become float16 (caches); the others stay float32. Float inputs all
            become float16.
    """
    graph = model.graph
    wide = {
        node.input[i]
        for node in graph.node
        for i in WIDE.get(node.op_type, ())
        if i < len(node.input) and node.input[i]
    }
    for tensor in graph.initializer:
        if tensor.data_type == FLOAT and tensor.name not in wide:
            tensor.CopyFrom(_half(tensor))
    for value in graph.input:
        if value.type.tensor_type.elem_type == FLOAT:
            value.type.tensor_type.elem_type = HALF
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == FLOAT:
                attribute.i = HALF
            elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == FLOAT:
                attribute.t.CopyFrom(_half(attribute.t))
            elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                values = attribute.floats if attribute.name == "value_floats" else attribute.f
                made = numpy_helper.from_array(_clipped(np.array(values, np.float32)))
                attribute.CopyFrom(helper.make_attribute("value", made))
    for value in graph.output:
        if value.type.tensor_type.elem_type != FLOAT:
            continue
        if value.name in kept:
            value.type.tensor_type.elem_type = HALF
        else:
            _widen(graph, value.name)


def _half(tensor: onnx.TensorProto) -> onnx.TensorProto:
    return numpy_helper.from_array(_clipped(numpy_helper.to_array(tensor)), tensor.name)


def _clipped(values: np.ndarray) -> np.ndarray:
    most = np.finfo(np.float16).max
    return np.where(np.isfinite(values), np.clip(values, -most, most), values).astype(np.float16)


def _widen(graph: onnx.GraphProto, name: str) -> None:
    """Let a Cast give the output; what made it, and who reads it, keeps the float16 tensor."""
    inner = f"{name}_half"
    for node in graph.node:
        for names in (node.input, node.output):
            for i, used in enumerate(names):
                if used == name:
                    names[i] = inner
    graph.node.append(helper.make_node("Cast", [inner], [name], f"{name}_float", to=FLOAT))
