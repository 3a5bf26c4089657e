"""A float32 graph in float16 or bfloat16, as ONNX Runtime's CUDA provider runs it fast.

Every float32 tensor becomes float16, but for what operators want in float32, for the angles of
positions (`ort_angles`) and for the outputs that are no caches: a Cast makes them float32 again.
bfloat16 reaches as far as float32, with 8 bits where float16 has 11: for models whose activations
exceed 65504. Operators without a kernel for it stay float32, between Casts.

Norms sum in float32 on their own (their `stash_type`); so do products and attention. Other counts
than positions are rounded above 2048.

Constants beyond ±65504 (masks are as low as float32 goes) become the largest finite numbers. Single
numbers that would become 0 (what keeps a division from 0 / 0: 1e-12) become ±2⁻¹⁴, the smallest
normal number: of smaller ones, which may be flushed to 0, the reciprocal overflows. In tensors of
several numbers those become 0, as rounding has it.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qcompiler.backends.ort_angles import keep_wide
from qcompiler.backends.ort_weights import Array

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
BFLOAT16_MAX = np.float32(2.0**128 - 2.0**120)
# Operator → its inputs that stay float32.
WIDE = {"GroupQueryAttention": (12, 13), "Resize": (1, 2)}


def halve(
    model: onnx.ModelProto,
    kept: Collection[str] = (),
    held: dict[str, Array] | None = None,
    kind: int = HALF,
) -> None:
    """Change the model in place.

    Args:
        model: with float32 as its only float type.
        kept: the outputs that become narrow (caches); the others stay float32. Float inputs all
            become narrow.
        held: values of the initializers that have no content in the message; changed too.
        kind: what floats become, float16 or bfloat16 (of `TensorProto`).
    """
    graph, contents = model.graph, {} if held is None else held
    angles, constants = keep_wide(model, contents, kind)
    made = {name for i in angles for name in graph.node[i].output}
    wide = constants | {
        node.input[i]
        for node in graph.node
        for i in WIDE.get(node.op_type, ())
        if i < len(node.input) and node.input[i]
    }
    for tensor in graph.initializer:
        if tensor.data_type != FLOAT or tensor.name in wide:
            continue
        if tensor.name in contents:
            contents[tensor.name], tensor.data_type = _clipped(contents[tensor.name], kind), kind
        else:
            tensor.CopyFrom(_half(tensor, kind))
    for value in graph.input:
        if value.type.tensor_type.elem_type == FLOAT:
            value.type.tensor_type.elem_type = kind
    for i, node in enumerate(graph.node):
        for attribute in node.attribute:
            if i in angles:
                continue
            if attribute.name == "to" and attribute.i == FLOAT:
                attribute.i = kind
            elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == FLOAT:
                attribute.t.CopyFrom(_half(attribute.t, kind))
            elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                values = attribute.floats if attribute.name == "value_floats" else attribute.f
                half = numpy_helper.from_array(_clipped(np.array(values, np.float32), kind))
                attribute.CopyFrom(helper.make_attribute("value", half))
    for value in graph.output:
        if value.type.tensor_type.elem_type != FLOAT or value.name in made:
            continue
        if value.name in kept:
            value.type.tensor_type.elem_type = kind
        else:
            _widen(graph, value.name)


def _half(tensor: onnx.TensorProto, kind: int) -> onnx.TensorProto:
    return numpy_helper.from_array(_clipped(numpy_helper.to_array(tensor), kind), tensor.name)


def _clipped(values: np.ndarray, kind: int) -> np.ndarray:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    limits = np.finfo(np.float16) if kind == HALF else np.finfo(np.float32)
    low, high = (limits.min, limits.max) if kind == HALF else (-BFLOAT16_MAX, BFLOAT16_MAX)
    finite = np.where(np.isfinite(values), np.clip(values, low, high), values)
    half = finite.astype(dtype)
    if values.size == 1:
        half = np.where((half == 0) & (values != 0), np.copysign(limits.tiny, values), half)
    return half.astype(dtype)


def _widen(graph: onnx.GraphProto, name: str) -> None:
    """Let a Cast give the output; what made it, and who reads it, keeps the float16 tensor."""
    inner = f"{name}_half"
    for node in graph.node:
        for names in (node.input, node.output):
            for i, used in enumerate(names):
                if used == name:
                    names[i] = inner
    graph.node.append(helper.make_node("Cast", [inner], [name], f"{name}_float", to=FLOAT))
