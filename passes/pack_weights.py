"""Compute the integers of quantized constants, and store those below 8 bits packed.

    quantize(constant, …)  →  a constant of integers;  for 2, 3 and 4 bits:  unpack(packed bytes)

The float weight leaves the program. Weights that were rounded before are such constants already.
Exact: the same integers that the program computed before.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler import ops
from qcompiler.qtype import QType, pack
from qcompiler.rewrite import Draft, rewrite


@rewrite(exact=True)
def pack_weights(draft: Draft) -> None:
    """Replace each quantized constant by its integers."""
    before = after = 0
    for node in draft.calls(ops.quantize):
        source, scale, zero = node.args[:3]
        if not draft.is_constant(source):
            continue
        weight = draft.constant(source)
        args = [draft.constant(scale), draft.constant(zero), *node.args[3:]]
        with torch.no_grad():
            q = ops.quantize(weight, *args)
        before += weight.nbytes
        after += _store(draft, node, q, node)
    readers = {source: n for n in reversed(draft.graph.nodes) for source in n.all_input_nodes}
    for node in [n for n in readers if draft.is_constant(n) and "qtype" in n.meta]:
        q = draft.constant(node)
        before += 4 * q.numel()
        after += _store(draft, node, q, readers[node])
    if before:
        draft.note(f"{before / 1e6:.1f} MB of weights became {after / 1e6:.1f} MB")


def _store(draft: Draft, node: Node, q: Tensor, before: Node) -> int:
    """Let the integers `q`, packed where they are narrow, stand for `node`; returns their bytes.

    What unpacks them is called before the node `before`.
    """
    element = QType.parse(node.meta["qtype"]).element if "qtype" in node.meta else None
    name = f"{node.name}_{element or 'integers'}"
    if element is None or QType(element).bits >= 8:
        draft.swap(node, draft.add_constant(name, q))
        return q.nbytes
    packed = pack(q, element)
    constant = draft.add_constant(name, packed)
    draft.swap(node, draft.call(ops.unpack, constant, element, list(q.shape), before=before))
    return packed.nbytes
