"""Attention over a cache in ONNX Runtime: GroupQueryAttention (com.microsoft).

The kernel turns queries and keys, appends keys and values to the cache, in place where past and
present are one buffer, and attends causally. It counts tokens itself:

    seqlens_k[b] = Σ attention_mask[b] − 1       total_sequence_length = length of the mask

so padding must stand behind the text, and positions are those counts; `position_ids` stays an input
of the model, as runtimes expect it, but is not read. It keeps the cache in float, or in 8 or 4 bits
with scales that are constants (`ort_store`).

Queries, keys and values that are products of one tensor with low-bit weights become one product of
their stacked weights, which the kernel takes as it is (packed QKV).

The output head is a fifth of a small model's work, and a prompt needs its last row alone: an input
with a default, `logits_from`, says from which new token on logits are wanted. Runtimes that do not
know of it compute them all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from qcompiler.backends.ort_session import FIRST
from qcompiler.backends.ort_store import Store, narrow
from qcompiler.backends.ort_translate import INTERNAL

MICROSOFT = "com.microsoft"
JOINED = " + "  # between the names of layers that one node computes
PRODUCTS = (
    "MatMulNBits", "MatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QuantizedMatMul",
)  # fmt: skip
SCALES = 12  # inputs of GroupQueryAttention before the scales of its cache
ROWWISE = ("Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Identity")  # what may follow the head


def use_grouped_attention(graph: gs.Graph) -> tuple[bool, dict[int, Store]]:
    """CachedAttention, StoredAttention → GroupQueryAttention.

    Returns:
        Whether all caches of the graph may be shared between past and present; how those inputs and
        outputs are kept that are integers, by their `id`.
    """
    lengths: dict[str, tuple[gs.Variable, gs.Variable]] = {}
    replaced: set[str] = set()
    stores: dict[int, Store] = {}
    kinds = ("CachedAttention", "StoredAttention")
    for node in [n for n in graph.nodes if n.op in kinds and n.domain == INTERNAL]:
        q, k, v, past_key, past_value, mask, *rest = node.inputs
        tables = [t for t in rest[:2] if not t.is_empty()]
        if mask.name not in lengths:
            lengths[mask.name] = _lengths(graph, mask)
        attrs: dict[str, Any] = {
            "num_heads": int(node.attrs["heads"]),
            "kv_num_heads": int(node.attrs["kv_heads"]),
            "scale": float(node.attrs["scale"]),
            "local_window_size": int(node.attrs["window"]),
            "do_rotary": int(bool(tables)),
            "rotary_interleaved": int(node.attrs["interleaved"]),
        }
        inputs = [q, k, v, past_key, past_value, *lengths[mask.name], *tables]
        outputs = list(node.outputs)
        if node.op == "StoredAttention":
            inputs += [gs.Variable.empty() for _ in range(SCALES - len(inputs))] + rest[3:5]
            bits = attrs["kv_cache_bit_width"] = int(node.attrs["bits"])
            for kind, scale, *tensors in (
                ("k_quant_type", rest[3], past_key, outputs[1]),
                ("v_quant_type", rest[4], past_value, outputs[2]),
            ):
                values = np.asarray(scale.values, np.float32)
                attrs[kind] = "PER_TENSOR" if values.size == 1 else "PER_CHANNEL"
                for tensor in tensors:
                    stores[id(tensor)] = Store(bits, values)
                    narrow(tensor, bits)
        node.outputs.clear()
        graph.nodes.append(
            gs.Node("GroupQueryAttention", node.name, attrs, inputs, outputs, domain=MICROSOFT)
        )
        replaced |= {past_key.name, past_value.name}
    caches = {t.name for t in graph.inputs if len(t.shape or ()) == 4}
    return bool(replaced) and caches == replaced, stores


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


def pack_projections(graph: gs.Graph) -> None:
    """Three MatMulNBits of one tensor that a GroupQueryAttention alone reads → one."""
    for node in [n for n in graph.nodes if n.op == "GroupQueryAttention"]:
        products = [t.inputs[0] for t in node.inputs[:3] if len(t.inputs) == 1]
        if len(products) < 3 or not all(_stacks(p, products[0], node) for p in products):
            continue
        first = products[0]
        stacked = [
            gs.Constant(
                f"{p.name}_packed_qkv",
                np.concatenate([np.asarray(n.inputs[i].values) for n in products]),
            )
            for i, p in enumerate(first.inputs)
            if i > 0
        ]
        packed = gs.Variable(f"{first.outputs[0].name}_packed_qkv", np.float32)
        attrs = {**first.attrs, "N": sum(int(p.attrs["N"]) for p in products)}
        name = JOINED.join(p.name for p in products)
        data = first.inputs[0]
        for product in products:
            product.outputs.clear()
            graph.nodes.remove(product)
        graph.nodes.append(
            gs.Node("MatMulNBits", name, attrs, [data, *stacked], [packed], domain=MICROSOFT)
        )
        empty = gs.Variable.empty()
        node.inputs = [packed, empty, empty, *node.inputs[3:]]
    graph.cleanup(remove_unused_graph_inputs=False).toposort()


def _stacks(product: gs.Node, first: gs.Node, reader: gs.Node) -> bool:
    """Whether a projection's weight may stand below the first one's."""

    def kind(node: gs.Node) -> object:
        return {k: v for k, v in node.attrs.items() if k != "N"}, len(node.inputs)

    return (
        product.op == "MatMulNBits"
        and product.inputs[0] is first.inputs[0]
        and kind(product) == kind(first)
        and all(isinstance(t, gs.Constant) for t in product.inputs[1:])
        and list(product.outputs[0].outputs) == [reader]
    )


def prune_logits(graph: gs.Graph) -> bool:
    """Let the product that makes the first output read from `logits_from` on.

    Returns:
        Whether it was found: a product followed by elementwise operators alone.
    """
    tensor = graph.outputs[0]
    while len(tensor.inputs) == 1 and tensor.inputs[0].op in ROWWISE:
        computed = [t for t in tensor.inputs[0].inputs if isinstance(t, gs.Variable)]
        if len(computed) != 1:
            return False
        tensor = computed[0]
    if len(tensor.inputs) != 1 or tensor.inputs[0].op not in PRODUCTS:
        return False
    head = tensor.inputs[0]
    read = [t for t in head.outputs if t.outputs or t in graph.outputs]
    if len(read) != 1:  # what it reads is another layer's too
        return False
    bounds = [
        gs.Constant(FIRST, np.array([0], np.int64)),
        gs.Constant(f"{FIRST}_end", np.array([np.iinfo(np.int64).max], np.int64)),
        gs.Constant(f"{FIRST}_axis", np.array([1], np.int64)),
    ]
    # A generated operator reads its constants first, then one or more tensors of rows.
    generated = head.op == "QuantizedMatMul"
    places = range(1, len(head.inputs)) if generated else range(1)
    for place in places:
        data = head.inputs[place]
        kept = gs.Variable(f"{data.name}_kept", data.dtype)
        name = f"{head.name}_rows_{place}"
        graph.nodes.append(gs.Node("Slice", name, {}, [data, *bounds], [kept]))
        head.inputs[place] = kept
    graph.toposort()
    return True


def open_default(model: onnx.ModelProto) -> None:
    """Make `logits_from` an input whose default is its initializer."""
    value = onnx.helper.make_tensor_value_info(FIRST, onnx.TensorProto.INT64, [1])
    model.graph.input.append(value)
