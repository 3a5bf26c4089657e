"""Large constants of an ONNX model, from the program's tensors to the file without a copy.

Protobuf holds a message, and what it serializes, in memory: a model would take several times its
weights to write. So they leave the exporter's model before it becomes a message (`take`), stand in
the graph as arrays that share the program's memory (`give`), leave it again as messages without
content (`store`), and their content is written between the serialized fields, piece by piece, in
the form that `onnx.save` writes (`save`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray
from onnx_graphsurgeon.ir.tensor import LazyValues

from qcompiler.errors import UnsupportedError, first_line
from qcompiler.qtype import pack

Array = NDArray[Any]
LARGE = 1024  # bytes
PIECE = 1 << 24  # bytes that are made contiguous at a time
NOTHING: Array = np.empty(0, np.uint8)


def take(model: Any) -> dict[str, Array]:
    """Replace the large initializers of an `onnx_ir.Model` by references to nothing.

    Returns:
        Their values by name, in the memory of the torch tensors that they were exported from.
    """
    import onnx_ir

    taken = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        source = getattr(tensor, "raw", None)
        if not isinstance(source, torch.Tensor) or source.nbytes < LARGE:
            continue
        try:
            array = source.detach().numpy()
        except (TypeError, RuntimeError):  # a type that numpy has not
            continue
        array.flags.writeable = False  # it is the program's
        taken[name] = array
        value.const_value = onnx_ir.ExternalTensor(
            "taken", None, None, tensor.dtype, shape=tensor.shape, name=tensor.name
        )
    return taken


def give(graph: gs.Graph, taken: Mapping[str, Array]) -> None:
    """Let the constants of the imported graph have the values that were taken from the model."""
    for part in (graph, *graph.subgraphs(recursive=True)):
        for tensor in part.tensors().values():
            if isinstance(tensor, gs.Constant) and tensor.name in taken:
                tensor.values, tensor.data_location = taken[tensor.name], None


def export(graph: gs.Graph) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """The graph as a message whose large initializers have no content, and that by name.

    Constants with an `element` (of 4 or 2 bits; onnx-graphsurgeon 0.6 knows none) are packed.
    """
    held = {}
    elements = {}
    for tensor in graph.tensors().values():
        if not isinstance(tensor, gs.Constant):
            continue
        values = tensor._values
        if isinstance(values, LazyValues) and not hasattr(tensor, "element"):
            continue  # small, or of a type that numpy has not
        values = np.asarray(tensor.values)
        if hasattr(tensor, "element"):
            elements[tensor.name] = tensor.element
        if values.nbytes >= LARGE or tensor.name in elements:
            kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
            empty = onnx.TensorProto(name=tensor.name, dims=values.shape, data_type=kind)
            tensor.values = LazyValues(empty)
            held[tensor.name] = values
    model = gs.export_onnx(graph, do_type_check=False)
    for tensor in model.graph.initializer:
        if tensor.name in elements:
            element = elements[tensor.name]
            held[tensor.name] = pack(torch.from_numpy(held[tensor.name].copy()), element).numpy()
            tensor.data_type = onnx.TensorProto.DataType.Value(element.upper())
    return model, held


def content(tensor: onnx.TensorProto, held: Mapping[str, Array]) -> Array:
    """Values of an initializer, which may be held outside of the message."""
    return held[tensor.name] if tensor.name in held else onnx.numpy_helper.to_array(tensor)


def save(model: onnx.ModelProto, held: Mapping[str, Array], path: Path, external: bool) -> None:
    """Write the model and check it.

    Args:
        model: its initializers that are `held` have no content.
        held: that content.
        path: of the file.
        external: write large initializers to `<path>.data`.

    Raises:
        UnsupportedError: if an operator does not take the types that it is given.
    """
    place = path.with_name(f"{path.name}.data") if external else path
    with place.open("wb") as file:
        offsets = _contents(model, held, file) if external else _whole(model, held, file)
    described = copy.deepcopy(model)
    for tensor in described.graph.initializer:
        if tensor.name in held:
            tensor.data_location = onnx.TensorProto.EXTERNAL
            where = {"location": place.name, "offset": offsets[tensor.name]}
            for key, value in (where | {"length": held[tensor.name].nbytes}).items():
                tensor.external_data.add(key=key, value=str(value))
    # The checker reads a whole file into memory: where the weights are in it, it is given one that
    # refers to them.
    checked = path if external else path.with_name(f"{path.name}.check")
    checked.write_bytes(described.SerializeToString())
    try:
        onnx.checker.check_model(checked, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UnsupportedError(f"no ONNX form: {first_line(error)}") from error
    finally:
        if not external:
            checked.unlink()


def _contents(model: onnx.ModelProto, held: Mapping[str, Array], file: BinaryIO) -> dict[str, int]:
    """Write what is held in the order of the initializers; returns where each begins."""
    offsets = {}
    for tensor in model.graph.initializer:
        if tensor.name in held:
            offsets[tensor.name] = file.tell()
            _write(held[tensor.name], file)
    return offsets


def _whole(model: onnx.ModelProto, held: Mapping[str, Array], file: BinaryIO) -> dict[str, int]:
    """Write the message with its content, fields in the order of their numbers.

    Returns:
        Where the content of each initializer begins.
    """
    graph = model.graph
    parts = []
    for tensor in graph.initializer:
        values = held.get(tensor.name, NOTHING)
        if tensor.name in held:
            before, after = _around(tensor, "raw_data")
            before += _begin(tensor, "raw_data", values.nbytes)
        else:
            before, after = tensor.SerializeToString(), b""
        size = len(before) + values.nbytes + len(after)
        parts.append((tensor.name, _begin(graph, "initializer", size) + before, values, after))
    first, last = _around(graph, "initializer")
    size = len(first) + sum(len(b) + v.nbytes + len(a) for _, b, v, a in parts) + len(last)
    head, tail = _around(model, "graph")
    file.write(head + _begin(model, "graph", size) + first)
    offsets = {}
    for name, before, values, after in parts:
        file.write(before)
        offsets[name] = file.tell()
        _write(values, file)
        file.write(after)
    file.write(last + tail)
    return offsets


def _around(message: Any, field: str) -> tuple[bytes, bytes]:
    """The serialized fields of a message before and after one of them, by their numbers."""
    number = message.DESCRIPTOR.fields_by_name[field].number
    parts = []
    for kept in (range(number), range(number + 1, 1 << 29)):
        part = copy.deepcopy(message)
        for other, _ in message.ListFields():
            if other.number not in kept:
                part.ClearField(other.name)
        parts.append(part.SerializeToString())
    return parts[0], parts[1]


def _begin(message: Any, field: str, length: int) -> bytes:
    """What stands before a field of that many bytes: its number and kind, and the length."""
    number = message.DESCRIPTOR.fields_by_name[field].number
    return _varint(number << 3 | 2) + _varint(length)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    groups = []
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes([*groups, value])


def _write(values: Array, file: BinaryIO) -> None:
    rows = max(1, PIECE * max(1, len(values) if values.ndim else 1) // max(1, values.nbytes))
    shaped = values if values.ndim else values.reshape(1)
    for start in range(0, len(shaped), rows):
        # As bytes: Python has no buffers of bfloat16.
        file.write(np.ascontiguousarray(shaped[start : start + rows]).view(np.uint8).data)
