"""Splits as operators of their own.

    SplitToSequence → SequenceAt, one for each part      becomes      Split

The exporter writes torch's splits as sequences of tensors. ONNX Runtime's CUDA provider has no
kernel for those: the tensor would go to the CPU and back, which no CUDA graph can hold.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs


def use_splits(graph: gs.Graph) -> None:
    """Replace the splits whose sizes are fixed and whose parts are read one by one.

    Args:
        graph: changed in place; its constants are no nodes (`lift_constants`).
    """
    for node in [n for n in graph.nodes if n.op == "SplitToSequence"]:
        readers, sizes = list(node.outputs[0].outputs), _sizes(node)
        places = [r.inputs[1] for r in readers if r.op == "SequenceAt"]
        fixed = all(isinstance(place, gs.Constant) for place in places)
        if (
            sizes is None
            or not fixed
            or len(places) < len(readers)
            or not node.attrs.get("keepdims", 1)
        ):
            continue
        name = node.outputs[0].name  # the next one's may be this one's with _1
        parts = [gs.Variable(f"{name}.{i}", node.inputs[0].dtype) for i in range(len(sizes))]
        for reader, place in zip(readers, places, strict=True):
            graph.nodes.append(
                gs.Node("Identity", inputs=[parts[int(place.values)]], outputs=[*reader.outputs])
            )
            reader.outputs.clear()
        node.outputs.clear()
        given = [node.inputs[0], gs.Constant(f"{name}.sizes", sizes)]
        graph.nodes.append(
            gs.Node("Split", node.name, {"axis": node.attrs.get("axis", 0)}, given, parts)
        )


def _sizes(node: gs.Node) -> np.ndarray | None:
    """The sizes of the parts, int64; None where they are not fixed."""
    source, given = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    if not isinstance(given, gs.Constant) or source.shape is None:
        return None
    if given.values.ndim:
        return np.asarray(given.values, np.int64)
    total, step = source.shape[node.attrs.get("axis", 0)], int(given.values)
    if not isinstance(total, int):
        return None
    return np.array([min(step, total - i) for i in range(0, total, step)], np.int64)
