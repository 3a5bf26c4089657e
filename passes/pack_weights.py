"""Compute the integers of quantized constants, and store those below 8 bits packed.

    quantize(constant, …)  →  a constant of integers;  for 2, 3 and 4 bits:  unpack(packed bytes)

The float weight leaves the program. Exact: the same integers that the program computed before.
"""

from __future__ import annotations

import torch

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
        element = QType.parse(node.meta["qtype"]).element if "qtype" in node.meta else None
        before += weight.numel() * weight.element_size()
        name = f"{node.name}_{element or 'integers'}"
        if element is not None and QType(element).bits < 8:
            packed = pack(q, element)
            after += packed.numel()
            constant = draft.add_constant(name, packed)
            fresh = draft.call(ops.unpack, constant, element, list(q.shape), before=node)
        else:
            after += q.numel() * q.element_size()
            fresh = draft.add_constant(name, q)
        draft.swap(node, fresh)
    if before:
        draft.note(f"{before / 1e6:.1f} MB of weights became {after / 1e6:.1f} MB")
