"""ONNX Runtime: write a Program as an ONNX model, load it, run it."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompiler.backends import ort_weights
from qcompiler.backends.ort_cache import (
    open_default,
    pack_projections,
    prune_logits,
    use_grouped_attention,
)
from qcompiler.backends.ort_formulas import refuse
from qcompiler.backends.ort_half import halve
from qcompiler.backends.ort_phases import (
    DECODE,
    EVERYWHERE,
    NOWHERE,
    PREFILL,
    widen_products,
)
from qcompiler.backends.ort_session import LIBRARY, MODEL, SHARED, session
from qcompiler.backends.ort_store import KEY, read_metadata, write_metadata
from qcompiler.backends.ort_surgery import MICROSOFT, operate
from qcompiler.backends.ort_translate import INTERNAL, OPSET, translations
from qcompiler.errors import UnsupportedError
from qcompiler.generated import Generate
from qcompiler.op_families import CONVS, LINEAR
from qcompiler.program import Program

__all__ = ["MODEL", "SHARED", "load", "load_model", "lower", "session"]

EXTERNAL_ABOVE = 1 << 30  # bytes of weights; protobuf ends at 2 GiB
IR_VERSION = 11


def lower(
    program: Program,
    folder: Path,
    *,
    input_names: tuple[str, ...] = (),
    output_names: tuple[str, ...] = (),
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None = None,
    fused: bool = True,
    external_above: int = EXTERNAL_ABOVE,
    generate: Generate | None = None,
    half: str = "",
    packed: str = EVERYWHERE,
) -> Path:
    """Write `program` as `folder/model.onnx`.

    Args:
        program: with or without quantization; only ATen and qc ops.
        folder: must exist.
        input_names: names of the flat inputs; those of the program where not given.
        output_names: names of the flat outputs; `output_0`, … where not given.
        dynamic_shapes: names of the dynamic sizes by input and dimension.
        fused: allow operators of ONNX Runtime's own domain (com.microsoft).
        external_above: bytes of weights above which they go to `model.onnx.data`.
        generate: compiles linears whose inputs are quantized by token, and rotations, to a library
            of custom operators beside the model; ONNX Runtime has none. In float16, for a GPU, it
            compiles all linears with quantized weights, and no rotations.
        half: in float16 or bfloat16, by that name; see `ort_half`.
        packed: where MatMulNBits multiplies (`ort_phases`): for decode alone, `prefill.onnx` is
            written beside a language model whose cache is shared; what is no such has it nowhere.

    Returns:
        The path of the model. It passed `onnx.checker` and shape inference.

    Raises:
        UnsupportedError: if an op has no ONNX form.
    """
    model, taken = _export(program, generate is not None and not half)
    graph = gs.import_onnx(model)
    ort_weights.give(graph, taken)
    shared, stores = use_grouped_attention(graph)
    library = operate(graph, fused, _layer_names(model, program), generate, bool(half))
    _rename(graph, input_names or program.inputs, program, output_names, dynamic_shapes or {})
    graph.import_domains = [d for d in graph.import_domains or [] if not d.domain]
    if any(node.domain == MICROSOFT for node in graph.nodes):
        graph.import_domains.append(onnx.helper.make_opsetid(MICROSOFT, 1))
    if library:
        graph.import_domains.append(onnx.helper.make_opsetid(INTERNAL, 1))
        (folder / LIBRARY).write_bytes(library)
    pack_projections(graph)
    pruned = shared and prune_logits(graph)
    result, held = ort_weights.export(graph)
    if pruned:
        open_default(result)
    _tidy(result, program)
    kept = {t.name: stores[id(t)] for t in [*graph.inputs, *graph.outputs] if id(t) in stores}
    properties = ({SHARED: "1"} if shared else {}) | ({KEY: write_metadata(kept)} if kept else {})
    if properties:
        onnx.helper.set_model_props(result, properties)
    if half:
        caches = [n.outputs[1:] for n in graph.nodes if n.op == "GroupQueryAttention"]
        names = {tensor.name for tensors in caches for tensor in tensors}
        halve(result, names, held, onnx.TensorProto.DataType.Value(half.upper()))
    if packed == NOWHERE or (packed == DECODE and not shared):
        widen_products(result, held)
    _save(result, held, folder / MODEL, external_above)
    if packed == DECODE and widen_products(result, held):
        _save(result, held, folder / PREFILL, external_above)
    return folder / MODEL


def _save(
    model: onnx.ModelProto, held: dict[str, NDArray[Any]], path: Path, external_above: int
) -> None:
    size = sum(values.nbytes for values in held.values())
    ort_weights.save(model, held, path, size > external_above)


def _export(program: Program, generated: bool) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]]]:
    refuse(program)
    try:
        with _quiet(), torch.no_grad():
            exported = torch.onnx.export(
                program.exported,
                (),
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=translations(generated),
                optimize=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise UnsupportedError(f"no ONNX form: {_reason(error)}") from error
    assert exported is not None
    taken = ort_weights.take(exported.model)
    return exported.model_proto, taken


def _layer_names(model: onnx.ModelProto, program: Program) -> dict[str, str]:
    """The exporter's names of linears and convolutions → the program's; it traces anew and renames.

    Both are in the order of computation. Empty where their numbers differ.
    """
    kind = re.compile(r"%(\w+) :.*?target=torch\.ops\.aten\.(linear|conv[12]d|convolution)\.")
    found: dict[str, None] = {}
    for node in model.graph.node:
        for entry in node.metadata_props:
            match = kind.match(entry.value) if entry.key == "pkg.torch.onnx.fx_node" else None
            if match:
                found[match[1]] = None
    nodes = [n.name for n in program.exported.graph.nodes if n.target in (LINEAR, *CONVS)]
    return dict(zip(found, nodes, strict=True)) if len(found) == len(nodes) else {}


def _reason(error: BaseException) -> str:
    """The innermost message of the exporter's chain of exceptions, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:400]


@contextmanager
def _quiet() -> Any:
    """The exporter prints progress and warnings that say nothing to a user of this package."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _rename(
    graph: gs.Graph,
    input_names: tuple[str, ...],
    program: Program,
    output_names: tuple[str, ...],
    dynamic_shapes: Mapping[str, Mapping[int, str]],
) -> None:
    """Inputs, outputs and dynamic sizes get the model's names."""
    _part_outputs(graph)
    symbols: dict[str, str] = {}
    for tensor, name, given in zip(graph.inputs, program.inputs, input_names, strict=True):
        tensor.name = given
        for dim, size in dynamic_shapes.get(name, {}).items():
            symbols[str(tensor.shape[dim])] = size
    taken = {t.name for t in graph.inputs}
    for index, tensor in enumerate(graph.outputs):
        name = output_names[index] if index < len(output_names) else f"output_{index}"
        if name in taken:
            raise UnsupportedError(
                f"the output name '{name}' is the name of an input; choose another"
            )
        tensor.name = name
    for tensor in [*graph.inputs, *graph.outputs]:
        if isinstance(tensor, gs.Variable) and tensor.shape is not None:
            tensor.shape = [symbols.get(str(s), s) for s in tensor.shape]


def _part_outputs(graph: gs.Graph) -> None:
    """An input that is returned as it is, or a tensor returned twice, gets a copy: names differ."""
    seen = [*graph.inputs]
    for index, tensor in enumerate(graph.outputs):
        if any(tensor is other for other in seen):
            copy = gs.Variable(f"{tensor.name}_copy_{index}", tensor.dtype, tensor.shape)
            graph.nodes.append(gs.Node("Identity", copy.name, {}, [tensor], [copy]))
            graph.outputs[index] = copy
        seen.append(tensor)


def _tidy(model: onnx.ModelProto, program: Program) -> None:
    from qcompiler import __version__

    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "qcompiler", __version__
    model.graph.name = "main"
    model.graph.doc_string = ""
    del model.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]


def load(folder: Path, threads: int | None = None) -> Callable[..., tuple[Tensor, ...]]:
    """The artifact's model as a function of flat inputs, returning flat outputs."""
    return load_model(folder / MODEL, threads)


def load_model(
    path: Path, threads: int | None = None, rest: bool = False
) -> Callable[..., tuple[Tensor, ...]]:
    """An ONNX model as a function of flat inputs, returning flat outputs; see `session`.

    Caches that it keeps as integers are given and returned as floats, as the captured model has
    them.
    """
    running = session(path, threads, rest=rest)
    names = [i.name for i in running.get_inputs()]
    results = [o.name for o in running.get_outputs()]
    stores = read_metadata(running.get_modelmeta().custom_metadata_map)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        given = zip(names, (x.detach().numpy() for x in inputs), strict=True)
        feed = {n: np.ascontiguousarray(stores[n].write(x) if n in stores else x) for n, x in given}
        found = zip(results, running.run(None, feed), strict=True)
        return tuple(
            torch.from_numpy(np.asarray(stores[n].read(y) if n in stores else y)) for n, y in found
        )

    return run
