"""The fusion audit: what ONNX Runtime really does with the model that it is given.

The graph that a session runs is written out and read back; every product of matrices and every
convolution is listed with the kernel that computes it. A layer that the plan made integer and that
runs in float is a broken promise.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qcompiler.audit import Audit, Layer
from qcompiler.backends.ort_cache import JOINED
from qcompiler.backends.ort_session import MODEL, open_session, session, session_options
from qcompiler.backends.ort_store import read_metadata
from qcompiler.backends.ort_translate import INTERNAL

INTEGER = {
    "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "MatMulInteger",
    "QLinearConv", "ConvInteger", "QAttention",
}  # fmt: skip
WEIGHTS = {"MatMulNBits"}
FLOAT = {"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Conv", "FusedConv", "NhwcFusedConv"}
HALF = "its input is float16"
PAIRS = ("QuantizeLinear", "DequantizeLinear")


def audit(
    folder: Path, planned: Mapping[str, str], integer: Collection[str], written: bool = False
) -> Audit:
    """Read the optimised graph of `folder/model.onnx`.

    Args:
        folder: the artifact.
        planned: the layers (linears and convolutions) with quantized weights in the plan: node →
            module path.
        integer: those of them whose inputs are quantized too, so that integer kernels are promised.
        written: read the graph as it was written instead, for a GPU that this machine may not have.
    """
    graph = _graph(folder / MODEL, written)
    makers = {name: node for node in graph.node for name in node.output}
    constants = {i.name for i in graph.initializer}
    layers, stray = [], 0
    for node in graph.node:
        node.name = _program_name(node.name)
        path = planned.get(node.name, "")
        if node.domain == INTERNAL:
            floats = any(a.name == "activation" and a.s == b"float16" for a in node.attribute)
            how = ("weights only", HALF) if floats else ("integer", "")
            layers += [
                Layer(name, planned[name], f"{INTERNAL}.{node.op_type}", *how)
                for name in node.name.split(JOINED)
                if name in planned
            ]
        elif node.op_type in INTEGER:
            layers.append(Layer(node.name, path, node.op_type, "integer"))
        elif node.op_type in WEIGHTS:
            reason = (
                HALF
                if written
                else "ONNX Runtime quantizes what it reads to 8 bits in blocks (accuracy level 4)"
            )
            layers += [
                Layer(name, planned.get(name, ""), node.op_type, "weights only", reason)
                for name in node.name.split(JOINED)
            ]
        elif node.op_type in FLOAT:
            reason, loose = _why_float(node, makers, constants)
            stray += loose
            layers.append(Layer(node.name, path, node.op_type, "float", reason))
        elif node.op_type == "QuantizeLinear":
            source = makers.get(node.input[0])
            stray += source is not None and source.op_type == "DequantizeLinear"
    broken = []
    for promise, good, names in (
        ("integer kernels", {"integer"}, [n for n in planned if n in integer]),
        (
            "kernels that read the integer weights",
            {"integer", "weights only"},
            [n for n in planned if n not in integer],
        ),
    ):
        kept = {layer.name for layer in layers if layer.kernel in good}
        lost = [name for name in names if name not in kept]
        if lost:
            named = ", ".join(planned[name] or name for name in lost[:5])
            broken.append(
                f"{len(names)} layers were planned for {promise}, {len(names) - len(lost)} run so "
                f"(not: {named})"
            )
    counts = Counter(node.op_type for node in graph.node)
    return Audit(tuple(layers), dict(counts.most_common()), stray, tuple(broken))


def _graph(path: Path, written: bool) -> onnx.GraphProto:
    if written:
        return onnx.load(path, load_external_data=False).graph
    with tempfile.TemporaryDirectory() as scratch:
        optimised = Path(scratch) / "optimised.onnx"
        session(path, 1, optimised)
        return onnx.load(optimised, load_external_data=False).graph


def _program_name(name: str) -> str:
    """The program's name of a layer, without what ONNX Runtime's optimiser adds to it."""
    return re.sub(r"(_token_\d+|/\w+)+$", "", name.removeprefix("fused "))


def _why_float(
    node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], constants: set[str]
) -> tuple[str, int]:
    """The reason why a layer runs in float, and how many Q/DQ nodes it reads from."""
    sources = [makers[name].op_type if name in makers else None for name in node.input[:2]]
    loose = sum(op == "DequantizeLinear" for op in sources)
    if loose:
        return "DequantizeLinear stayed before it: ONNX Runtime did not fuse the pattern", loose
    if all(name not in constants for name in node.input[:2]):
        return "both operands are activations", 0
    return "its weight was left in float by the plan", 0


def profile(
    folder: Path, inputs: Mapping[str, np.ndarray[Any, Any]], runs: int = 20
) -> list[tuple[str, float]]:
    """Share of the kernels' time by operator, largest first.

    Measured by ONNX Runtime's own profiler, on one thread.
    """
    with tempfile.TemporaryDirectory() as scratch:
        options = session_options(folder / MODEL)
        options.intra_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(scratch) / "profile")
        running = open_session(folder / MODEL, options)
        stores = read_metadata(running.get_modelmeta().custom_metadata_map)
        feed = {n: stores[n].write(x) if n in stores else x for n, x in inputs.items()}
        for _ in range(runs):
            running.run(None, feed)
        events = json.loads(Path(running.end_profiling()).read_text())
    totals: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            totals[event["args"]["op_name"]] += int(event["dur"])
    whole = sum(totals.values()) or 1
    return [(name, time / whole) for name, time in totals.most_common()]
