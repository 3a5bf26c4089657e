"""What was made of each layer: the audit of generated code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from qcompiler.audit import Audit, Layer
from qcompiler.backends.edge_calls import Calls
from qcompiler.backends.edge_group import CONV
from qcompiler.backends.edge_ops import Op
from qcompiler.op_families import LINEAR

PRODUCTS = (
    "matmul",
    "skinny",
    "gemm",
    "depthwise",
)  # what the names of products' kernels begin with
AS_STORED = ("integer", "float8")  # kernels that multiply both operands as they are stored


def audited(calls: Calls, planned: Mapping[str, str], integer: Collection[str]) -> Audit:
    """Each layer with the kernel that computes it; what was promised as integer and is not."""
    layers: list[Layer] = []
    kernels = dict(Counter(call.kind for call in calls.calls))
    computed = {
        g.anchor.label: g.anchor for g in calls.grouping.groups if g.anchor is not None
        and g.anchor.target in (LINEAR, CONV)
    }  # fmt: skip
    by_label = {call.label: call for call in calls.calls if call.kind.startswith(PRODUCTS)}
    for label, op in computed.items():
        made = by_label.get(label)
        name = made.kind if made is not None else str(op.target)
        kind, reason = _kernel(op, calls)
        layers.append(Layer(label, planned.get(label, ""), name, kind, reason))
    broken = [
        f"{layer.path or layer.name} was planned as integer and runs in float: {layer.reason}"
        for layer in layers
        if layer.name in planned
        and (layer.kernel == "float" or (layer.kernel not in AS_STORED and layer.name in integer))
    ]
    return Audit(tuple(layers), kernels, 0, tuple(broken))


def _kernel(op: Op, calls: Calls) -> tuple[str, str]:
    """Which kind of kernel computes a layer, and why it is not integer."""
    if op in calls.integer:
        return "float8" if calls.integer[op].ref.dtype.is_floating_point else "integer", ""
    if op in calls.narrow:
        return "bfloat16", ""
    if op in calls.packings:
        bits = calls.packings[op].bits
        return "weights only", f"its input is float; {bits}-bit weights are unpacked in registers"
    if op.args[1].storage.weight is not None:
        return "float", "no kernel multiplies its input by this format: stored as float32"
    return "float", "its weight is not quantized"
