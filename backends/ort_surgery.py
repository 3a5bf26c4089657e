"""Surgery on the exported ONNX graph: forms that ONNX Runtime fuses and runs fast.

They are found by structure. Why each step exists was measured on ONNX Runtime 1.31 (CPU, one
thread):

- `turn_weights`: a weight stored [K, N] under DequantizeLinear fuses with its MatMul; stored [N, K]
  with a Transpose it does not (a hundred times slower for 4 bits).
- `use_integer_matmuls`: MatMul of two dequantized operands plus a bias is one MatMulIntegerToFloat;
  left as Q/DQ, ONNX Runtime fuses the product but leaves the bias as a separate Add.
- `use_sums`: an Add before LayerNormalization becomes SkipLayerNormalization, whose kernel takes
  six times as long as Sum and LayerNormalization apart.
- `merge_pads`: zero padding joins the convolution that reads it, so that DequantizeLinear and Conv
  stand side by side.
- `drop_clips`: a Relu or Clip that the quantizer after it repeats goes, so that Conv and
  QuantizeLinear stand side by side.
- `keep_products`: MatMul and Add of rank 2 become Gemm, which does not fuse with its weight's
  DequantizeLinear; MatMul and Sum do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch

from qcompiler.backends.ort_generated import use_generated, use_generated_on_gpu
from qcompiler.backends.ort_nbits import use_nbits
from qcompiler.backends.ort_split import use_splits
from qcompiler.backends.ort_translate import INTERNAL
from qcompiler.generated import Generate
from qcompiler.qtype import unpack

MICROSOFT = "com.microsoft"


def operate(
    graph: gs.Graph,
    fused: bool,
    layers: Mapping[str, str] | None = None,
    generate: Generate | None = None,
    gpu: bool = False,
) -> bytes:
    """All steps, in order.

    Args:
        graph: changed in place.
        fused: allow operators of ONNX Runtime's own domain.
        layers: the exporter's name of a layer's output → the program's name of the layer.
        generate: compiles linears that ONNX Runtime has no operator for.
        gpu: it compiles for a GPU, also those that read float tensors.

    Returns:
        The library of what was compiled; empty where nothing was.
    """
    lift_constants(graph)
    use_splits(graph)
    bypass_identities(graph)
    trim_outputs(graph)
    unpack_weights(graph)
    library = b""
    if generate is not None:
        name_layers(graph, layers or {})
        library = (use_generated_on_gpu if gpu else use_generated)(graph, generate)
    if fused:
        name_layers(graph, layers or {})
        use_nbits(graph)
    widen_lookups(graph)
    turn_weights(graph)
    merge_pads(graph)
    drop_clips(graph)
    name_layers(graph, layers or {})
    if fused:
        use_integer_matmuls(graph)
        use_sums(graph)
    keep_products(graph)
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    return library


def _maker(tensor: gs.Tensor, *kinds: str) -> gs.Node | None:
    """The node that makes the tensor, if it is of one of the kinds."""
    if not isinstance(tensor, gs.Variable) or len(tensor.inputs) != 1:
        return None
    node = tensor.inputs[0]
    return node if node.op in kinds else None


def _replace(graph: gs.Graph, old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every reader of `old`, and the graph's outputs, take `new`."""
    for reader in list(old.outputs):
        reader.inputs = [new if t is old else t for t in reader.inputs]
    graph.outputs = [new if t is old else t for t in graph.outputs]


def lift_constants(graph: gs.Graph) -> None:
    """Constant nodes become constants of the graph, which the other steps can read."""
    for node in [n for n in graph.nodes if n.op == "Constant"]:
        (kind, value), *_ = node.attrs.items()
        if kind == "value":
            values = np.asarray(value.values)
        elif kind in ("value_float", "value_floats"):
            values = np.asarray(value, np.float32)
        elif kind in ("value_int", "value_ints"):
            values = np.asarray(value, np.int64)
        else:
            continue
        if node.outputs[0] not in graph.outputs:
            _replace(graph, node.outputs[0], gs.Constant(node.outputs[0].name, values))
            node.outputs.clear()


def bypass_identities(graph: gs.Graph) -> None:
    """Remove Identity nodes that no graph output needs."""
    for node in [n for n in graph.nodes if n.op == "Identity"]:
        if node.outputs[0] not in graph.outputs:
            source = node.inputs[0]
            _replace(graph, node.outputs[0], source)
            node.outputs.clear()


def trim_outputs(graph: gs.Graph) -> None:
    """Drop the trailing optional outputs that nothing reads: kernels compute what is asked for."""
    for node in graph.nodes:
        known = not node.domain and onnx.defs.has(node.op)
        least = onnx.defs.get_schema(node.op).min_output if known else 1
        while (
            len(node.outputs) > max(1, least)
            and not node.outputs[-1].outputs
            and node.outputs[-1] not in graph.outputs
        ):
            node.outputs.pop()


def unpack_weights(graph: gs.Graph) -> None:
    """Packed bytes become a constant of integers, marked with its element; see `ort_weights`."""
    for node in [n for n in graph.nodes if n.op == "Unpack" and n.domain == INTERNAL]:
        element, shape = node.attrs["element"], tuple(node.attrs["shape"])
        values = unpack(torch.from_numpy(np.array(node.inputs[0].values)), element, shape).numpy()
        constant = _marked(node.outputs[0].name + "_unpacked", values, element)
        _replace(graph, node.outputs[0], constant)
        for reader in list(constant.outputs):
            if reader.op == "DequantizeLinear" and len(reader.inputs) > 2:
                zero = reader.inputs[2]
                reader.inputs[2] = _marked(
                    f"{zero.name}_{element}", np.asarray(zero.values), element
                )
        node.outputs.clear()


# ONNX Runtime's kernels read 4-bit tensors, not smaller ones; the integers stay the same.
STORED = {
    "int2": "int4", "uint2": "uint4", "int3": "int4", "uint3": "uint4",
    "int6": "int8", "uint6": "uint8",
}  # fmt: skip


def widen_lookups(graph: gs.Graph) -> None:
    """Rows that are still looked up by Gather come from bytes: it reads no 4-bit tensors."""
    for node in [n for n in graph.nodes if n.op == "Gather"]:
        if hasattr(node.inputs[0], "element"):
            table = node.inputs[0]
            node.inputs[0] = gs.Constant(f"{table.name}_bytes", np.asarray(table.values))


def _marked(name: str, values: np.ndarray, element: str) -> gs.Constant:
    constant = gs.Constant(name, values)
    constant.element = STORED.get(element, element)
    return constant


def turn_weights(graph: gs.Graph) -> None:
    """Transpose(DequantizeLinear(constant)) → DequantizeLinear(transposed constant)."""
    for node in [n for n in graph.nodes if n.op == "Transpose"]:
        if list(node.attrs.get("perm", [])) != [1, 0]:
            continue
        source = node.inputs[0]
        if isinstance(source, gs.Constant):
            _replace(graph, node.outputs[0], _turned(source))
            node.outputs.clear()
            continue
        dequantize = _maker(source, "DequantizeLinear")
        if dequantize is None or not all(isinstance(t, gs.Constant) for t in dequantize.inputs):
            continue
        inputs = [_turned(t) if t.values.ndim == 2 else t for t in dequantize.inputs]
        output = node.outputs[0]
        node.outputs.clear()
        attrs = dict(dequantize.attrs)
        attrs["axis"] = 1 - int(attrs.get("axis", 1))
        graph.nodes.append(
            gs.Node("DequantizeLinear", dequantize.name + "_turned", attrs, inputs, [output])
        )


def _turned(constant: gs.Constant) -> gs.Constant:
    """The transposed constant, one for all readers."""
    if not hasattr(constant, "turned"):
        # A view: it is turned when it is written.
        fresh = gs.Constant(constant.name + "_turned", np.asarray(constant.values).T)
        if hasattr(constant, "element"):
            fresh.element = constant.element
        constant.turned = fresh
    return constant.turned


def merge_pads(graph: gs.Graph) -> None:
    """Zero padding over the spatial axes joins the convolutions that alone read it."""
    for node in [n for n in graph.nodes if n.op == "Pad"]:
        readers = list(node.outputs[0].outputs)
        constants = [t for t in node.inputs[1:] if t is not None and not t.is_empty()]
        if node.attrs.get("mode", "constant") != "constant" or not readers:
            continue
        if not all(isinstance(t, gs.Constant) for t in constants) or len(constants) > 2:
            continue
        pads = np.asarray(constants[0].values)
        half = len(pads) // 2
        value = float(np.asarray(constants[1].values).reshape(-1)[0]) if len(constants) > 1 else 0.0
        spatial = half - 2
        outer = np.concatenate([pads[:2], pads[half : half + 2]])
        fits = all(r.op == "Conv" and r.inputs[0] is node.outputs[0] for r in readers)
        if not fits or value != 0 or outer.any() or (pads < 0).any():
            continue
        inner = [int(p) for p in (*pads[2:half], *pads[half + 2 :])]
        for reader in readers:
            own = list(reader.attrs.get("pads", [0] * (2 * spatial)))
            reader.attrs["pads"] = [a + b for a, b in zip(own, inner, strict=True)]
            reader.attrs.pop("auto_pad", None)
            reader.inputs[0] = node.inputs[0]
        node.outputs.clear()


def name_layers(graph: gs.Graph, layers: Mapping[str, str]) -> None:
    """Name each product and convolution after the program's node.

    So the audit can say which layer it is.
    """
    for node in [n for n in graph.nodes if n.op in ("MatMul", "Conv", "Gemm")]:
        output = node.outputs[0]
        add = output.outputs[0] if len(output.outputs) == 1 else None
        biased = (
            add is not None
            and add.op == "Add"
            and any(isinstance(t, gs.Constant) for t in add.inputs)
        )
        name = add.outputs[0].name if add is not None and biased else output.name
        node.name = layers.get(name, name)


def keep_products(graph: gs.Graph) -> None:
    """Add after a MatMul of rank 2 whose weight is quantized → Sum.

    ONNX Runtime leaves a Sum alone.
    """
    for node in [n for n in graph.nodes if n.op == "MatMul"]:
        if node.outputs and _maker(node.inputs[1], "DequantizeLinear") is not None:
            for reader in node.outputs[0].outputs:
                if reader.op == "Add" and len(reader.outputs[0].shape or ()) == 2:
                    reader.op = "Sum"


def drop_clips(graph: gs.Graph) -> None:
    """Clip or Relu before a QuantizeLinear that saturates no later → nothing.

    The same integers come out.
    """
    for node in [n for n in graph.nodes if n.op in ("Clip", "Relu")]:
        readers = list(node.outputs[0].outputs)
        low, high = _bounds(node)
        if node.outputs[0] in graph.outputs or not readers:
            continue
        if all(r.op == "QuantizeLinear" and _covers(low, high, r) for r in readers):
            _replace(graph, node.outputs[0], node.inputs[0])
            node.outputs.clear()


def _bounds(node: gs.Node) -> tuple[float, float]:
    """What the node clips to; an empty interval where that is computed."""
    bounds = [0.0, math.inf] if node.op == "Relu" else [-math.inf, math.inf]
    for index, tensor in enumerate(node.inputs[1:3]):
        if isinstance(tensor, gs.Constant):
            bounds[index] = float(np.asarray(tensor.values).reshape(-1)[0])
        elif not tensor.is_empty():
            return 0.0, 0.0
    return bounds[0], bounds[1]


def _covers(low: float, high: float, quantize: gs.Node) -> bool:
    """Whether every value outside [low, high] rounds to the same integer as the nearer bound."""
    if len(quantize.inputs) < 3 or not all(
        isinstance(t, gs.Constant) for t in quantize.inputs[1:3]
    ):
        return False
    scale, zero = (np.asarray(t.values) for t in quantize.inputs[1:3])
    if scale.ndim:
        return False
    info = np.iinfo(zero.dtype)

    def integer(bound: float, edge: int) -> bool:
        ratio = (
            np.float32(bound) / np.float32(scale)
            if math.isfinite(bound)
            else math.copysign(math.inf, bound)
        )
        q = np.rint(ratio) + float(zero)
        return bool(q <= edge if edge == info.min else q >= edge)

    return integer(low, int(info.min)) and integer(high, int(info.max))


def use_integer_matmuls(graph: gs.Graph) -> None:
    """MatMul of two dequantized operands, plus a bias → MatMulIntegerToFloat.

    MatMul(DequantizeLinear(a), DequantizeLinear(W)) + bias → MatMulIntegerToFloat(a, W, …, bias).
    """
    for node in [n for n in graph.nodes if n.op == "MatMul"]:
        data, weight = (_maker(t, "DequantizeLinear") for t in node.inputs)
        if data is None or weight is None or weight.attrs.get("block_size"):
            continue
        if (
            not isinstance(weight.inputs[0], gs.Constant)
            or np.asarray(weight.inputs[0].values).dtype != np.int8
        ):
            continue
        if isinstance(data.inputs[0], gs.Constant) or data.inputs[1].shape not in ((), [], None):
            continue
        output, bias = node.outputs[0], None
        add = (
            output.outputs[0] if len(output.outputs) == 1 and output not in graph.outputs else None
        )
        if add is not None and add.op == "Add":
            other = add.inputs[1] if add.inputs[0] is output else add.inputs[0]
            if isinstance(other, gs.Constant) and np.asarray(other.values).ndim == 1:
                bias, output = other, add.outputs[0]
                add.outputs.clear()
        inputs = [
            data.inputs[0], weight.inputs[0], data.inputs[1], weight.inputs[1], data.inputs[2],
            weight.inputs[2] if np.asarray(weight.inputs[2].values).any() else gs.Variable.empty(),
            *([bias] if bias is not None else []),
        ]  # fmt: skip
        if inputs[-1].is_empty():
            inputs.pop()
        node.outputs.clear()
        graph.nodes.append(
            gs.Node("MatMulIntegerToFloat", node.name, {}, inputs, [output], domain=MICROSOFT)
        )


def use_sums(graph: gs.Graph) -> None:
    """Add of two computed tensors read by a LayerNormalization → Sum.

    ONNX Runtime leaves a Sum alone.
    """
    for node in graph.nodes:
        if node.op != "Add" or any(isinstance(t, gs.Constant) for t in node.inputs):
            continue
        if any(r.op == "LayerNormalization" for r in node.outputs[0].outputs):
            node.op = "Sum"
