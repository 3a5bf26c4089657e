"""Weights that are stored in few bits and multiplied as such: MatMulNBits (com.microsoft).

    MatMul(x, Transpose(DequantizeLinear(W))) → MatMulNBits(x, packed W, scales)

for float x. ONNX Runtime makes the same node of 4-bit weights when a session starts; written into
the model it loads at once, and takes weights of 8 and 2 bits, which it leaves alone otherwise. The
kernel wants [N, blocks, bytes of a block], unsigned, the first weight in the low bits, and a scale
for each block; that of a whole channel is repeated. An embedding that is tied to the product reads
its rows from the same bytes: of a 4-bit table in groups by GatherBlockQuantized, of an 8-bit one by
standard operators.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

MICROSOFT = "com.microsoft"
LEVEL = 4  # activations are quantized to int8 in blocks: ONNX Runtime's own choice as well
BITS = {"int8": 8, "uint8": 8, "int4": 4, "uint4": 4, "int2": 2, "uint2": 2}
BLOCK = 32  # of weights with a scale for each channel: activations are quantized in these blocks
Bytes = NDArray[np.uint8]


def use_nbits(graph: gs.Graph) -> None:
    """Replace each product of a float tensor with a dequantized constant."""
    packed: dict[int, gs.Constant] = {}
    scale_of: dict[int, gs.Constant] = {}
    for node in [n for n in graph.nodes if n.op == "MatMul"]:
        turn = _maker(node.inputs[1], "Transpose")
        pair = _maker(turn.inputs[0], "DequantizeLinear") if turn is not None else None
        if turn is None or pair is None or list(turn.attrs.get("perm", [])) != [1, 0]:
            continue
        if not all(isinstance(t, gs.Constant) for t in pair.inputs):
            continue
        if _maker(node.inputs[0], "DequantizeLinear") is not None:
            continue  # integers on both sides have faster kernels
        weight = pair.inputs[0]
        values = np.asarray(weight.values)
        bits = BITS.get(getattr(weight, "element", str(values.dtype)))
        block = int(pair.attrs.get("block_size", 0)) or _block(values.shape[1])
        if bits is None or values.ndim != 2 or not block or block < 16 or block & (block - 1):
            continue
        if id(weight) not in packed:
            packed[id(weight)] = gs.Constant(
                f"{weight.name}_blocks", blocks(_unsigned(values, bits), block, bits)
            )
            _read_rows(graph, weight, packed[id(weight)])
        count = values.shape[1] // block
        scales = _each_block(np.asarray(pair.inputs[1].values, np.float32), len(values), count)
        scale_of[id(weight)] = gs.Constant(f"{node.name}_scales", scales)
        inputs = [node.inputs[0], packed[id(weight)], scale_of[id(weight)]]
        zero = _zero_points(pair, values, bits, count)
        if zero is not None:
            inputs.append(gs.Constant(f"{node.name}_zero_points", zero))
        attrs = {
            "K": values.shape[1], "N": values.shape[0], "bits": bits, "block_size": block,
            "accuracy_level": LEVEL,
        }  # fmt: skip
        outputs = list(node.outputs)
        node.outputs.clear()
        graph.nodes.remove(node)
        graph.nodes.append(
            gs.Node("MatMulNBits", node.name, attrs, inputs, outputs, domain=MICROSOFT)
        )
    _look_up_blocks(graph, packed, scale_of)


def blocks(values: Bytes, block: int, bits: int) -> Bytes:
    """Pack (N, K) unsigned integers as (N, K / block, block · bits / 8), first in the low bits."""
    per_byte = 8 // bits
    shaped = values.reshape(len(values), -1, block // per_byte, per_byte).astype(np.uint8)
    shifts = (np.arange(per_byte) * bits).astype(np.uint8)
    packed: Bytes = np.bitwise_or.reduce(shaped << shifts, axis=-1)
    return packed


def _maker(tensor: Any, kind: str) -> gs.Node | None:
    if not isinstance(tensor, gs.Variable) or len(tensor.inputs) != 1:
        return None
    node: gs.Node = tensor.inputs[0]
    return node if node.op == kind else None


def _block(features: int) -> int:
    """The block of a weight with one scale for each channel; 0 where none divides it."""
    return next((b for b in (BLOCK, 16) if features % b == 0), 0)


def _each_block(values: NDArray[Any], channels: int, count: int) -> NDArray[Any]:
    """Values of a tensor, of channels or of blocks, as (channels, blocks)."""
    if values.ndim < 2:
        values = values.reshape(-1, 1)
    return np.ascontiguousarray(np.broadcast_to(values, (channels, count)))


def _unsigned(values: NDArray[Any], bits: int) -> Bytes:
    """Signed integers shifted by half of the range, which is the kernel's own zero point."""
    if values.dtype == np.int8:
        return (values.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    return values.astype(np.uint8)


def _zero_points(pair: gs.Node, values: NDArray[Any], bits: int, count: int) -> Bytes | None:
    """Packed zero points (N, ceil(count · bits / 8)); None where all are the kernel's own."""
    zero = np.asarray(pair.inputs[2].values) if len(pair.inputs) > 2 else None
    if zero is None:
        return None
    table = _each_block(_unsigned(zero, bits), len(values), count)
    if bool((table == 1 << (bits - 1)).all()):
        return None
    per_byte = 8 // bits
    table = np.pad(table, ((0, 0), (0, -count % per_byte)))
    return blocks(table, table.shape[1], bits)[:, 0]


def _read_rows(graph: gs.Graph, weight: gs.Constant, packed: gs.Constant) -> None:
    """Let lookups of 8-bit rows take them from the packed weight: the same bytes, plus 128."""
    values = np.asarray(weight.values)
    if values.dtype != np.int8 or hasattr(weight, "element"):
        return
    for gather in [n for n in weight.outputs if n.op == "Gather" and n.inputs[0] is weight]:
        casts = list(gather.outputs[0].outputs)
        if not all(n.op == "Cast" and int(n.attrs["to"]) == 1 for n in casts):
            continue
        name = gather.outputs[0].name
        wide = gs.Variable(f"{name}_blocks", np.uint8)
        rows = gs.Variable(f"{name}_rows", np.uint8)
        floats = gs.Variable(f"{name}_float", np.float32)
        shape = gs.Constant(f"{name}_shape", np.array([0, 0, values.shape[1]], np.int64))
        middle = gs.Constant(f"{name}_middle", np.array(128.0, np.float32))
        graph.nodes += [
            gs.Node("Gather", f"{name}_lookup", {"axis": 0}, [packed, gather.inputs[1]], [wide]),
            gs.Node("Reshape", f"{name}_reshape", {}, [wide, shape], [rows]),
            gs.Node("Cast", f"{name}_cast", {"to": 1}, [rows], [floats]),
        ]
        for cast in casts:
            output = cast.outputs[0]
            cast.outputs.clear()
            graph.nodes.append(gs.Node("Sub", f"{output.name}_sub", {}, [floats, middle], [output]))


def _look_up_blocks(
    graph: gs.Graph, packed: dict[int, gs.Constant], scale_of: dict[int, gs.Constant]
) -> None:
    """DequantizeLinear(Gather(4-bit table), Gather(scales)) → GatherBlockQuantized."""
    for gather in [n for n in graph.nodes if n.op == "Gather"]:
        table, ids = gather.inputs
        readers = list(gather.outputs[0].outputs) if gather.outputs else []
        if getattr(table, "element", "") != "int4" or int(gather.attrs.get("axis", 0)) != 0:
            continue
        if len(readers) != 1 or readers[0].op != "DequantizeLinear":
            continue
        (pair,) = readers
        own = _maker(pair.inputs[1], "Gather")
        if own is None or not isinstance(own.inputs[0], gs.Constant) or own.inputs[1] is not ids:
            continue
        values, block = np.asarray(table.values), int(pair.attrs["block_size"])
        name, output = gather.name, pair.outputs[0]
        if id(table) not in packed:
            packed[id(table)] = gs.Constant(
                f"{table.name}_blocks", blocks(_unsigned(values, 4), block, 4)
            )
            scale_of[id(table)] = own.inputs[0]
        flat = gs.Variable(f"{name}_bytes", np.uint8)
        shape = gs.Constant(f"{name}_bytes_shape", np.array([len(values), -1], np.int64))
        attrs = {"bits": 4, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
        for node in (gather, own, pair):
            node.outputs.clear()
            graph.nodes.remove(node)
        graph.nodes += [
            gs.Node("Reshape", f"{name}_rows", {}, [packed[id(table)], shape], [flat]),
            gs.Node(
                "GatherBlockQuantized", name, attrs, [flat, ids, scale_of[id(table)]], [output],
                domain=MICROSOFT,
            ),
        ]  # fmt: skip
