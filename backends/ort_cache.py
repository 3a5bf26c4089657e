"""Attention over a cache in ONNX Runtime: GroupQueryAttention (com.microsoft).

The kernel turns queries and keys, appends keys and values to the cache, in place where past and
present are one buffer, and attends causally. It counts tokens itself:

    seqlens_k[b] = Σ attention_mask[b] − 1       total_sequence_length = length of the mask

so padding must stand behind the text, and positions are those counts; `position_ids` stays an input
of the model, as runtimes expect it, but is not read.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from qcompiler.backends.ort_translate import INTERNAL

MICROSOFT = "com.microsoft"


def use_grouped_attention(graph: gs.Graph) -> bool:
    """CachedAttention → GroupQueryAttention.

    Returns:
        Whether all caches of the graph may be shared between past and present.
    """
    lengths: dict[str, tuple[gs.Variable, gs.Variable]] = {}
    replaced: set[str] = set()
    for node in [n for n in graph.nodes if (n.op, n.domain) == ("CachedAttention", INTERNAL)]:
        q, k, v, past_key, past_value, mask, *rest = node.inputs
        tables = [t for t in rest[:2] if not t.is_empty()]
        if mask.name not in lengths:
            lengths[mask.name] = _lengths(graph, mask)
        attrs = {
            "num_heads": int(node.attrs["heads"]),
            "kv_num_heads": int(node.attrs["kv_heads"]),
            "scale": float(node.attrs["scale"]),
            "local_window_size": int(node.attrs["window"]),
            "do_rotary": int(bool(tables)),
            "rotary_interleaved": int(node.attrs["interleaved"]),
        }
        inputs = [q, k, v, past_key, past_value, *lengths[mask.name], *tables]
        outputs = list(node.outputs)
        node.outputs.clear()
        graph.nodes.append(
            gs.Node("GroupQueryAttention", node.name, attrs, inputs, outputs, domain=MICROSOFT)
        )
        replaced |= {past_key.name, past_value.name}
    caches = {t.name for t in graph.inputs if len(t.shape or ()) == 4}
    return bool(replaced) and caches == replaced


def _lengths(graph: gs.Graph, mask: gs.Variable) -> tuple[gs.Variable, gs.Variable]:
    """Tokens of each text less one, int32 (batch,), and the length of the longest, int32 ()."""

    def node(op: str, *inputs: gs.Tensor, dtype: type, name: str, **attrs: object) -> gs.Variable:
        output = gs.Variable(f"{mask.name}_{name}", dtype)
        graph.nodes.append(gs.Node(op, output.name, attrs, list(inputs), [output]))
        return output

    def constant(name: str, *values: int) -> gs.Constant:
        return gs.Constant(f"{mask.name}_{name}", np.array(values, np.int64))

    counts = node("ReduceSum", mask, constant("axis", 1), dtype=np.int64, name="counts", keepdims=0)
    last = node("Sub", counts, constant("one", 1), dtype=np.int64, name="last")
    seqlens = node("Cast", last, dtype=np.int32, name="seqlens", to=6)
    shape = node("Shape", mask, dtype=np.int64, name="shape")
    length = node(
        "Gather", shape, gs.Constant(f"{mask.name}_second", np.array(1, np.int64)),
        dtype=np.int64, name="length", axis=0,
    )  # fmt: skip
    return seqlens, node("Cast", length, dtype=np.int32, name="total", to=6)
