"""Give a linear its own copy of a weight that an embedding reads as well.

A tied output head and its embedding can take neither the scale of the last norm nor a rotation of
the residual stream, because the two lie on different sides of them. The copy costs memory, which is
noted.
"""

from __future__ import annotations

import torch

from qcompiler.regions import LINEAR
from qcompiler.rewrite import Draft, operand, rewrite

aten = torch.ops.aten


@rewrite(exact=True)
def untie_weights(draft: Draft) -> None:
    """Untie every linear from the embedding with which it shares a weight."""
    for node in draft.calls(LINEAR):
        table = operand(node, 1)
        if not draft.is_constant(table):
            continue
        if any(user.target is aten.embedding.default for user in table.users):
            # The tensor itself stays shared until a pass replaces one of the two.
            weight = draft.constant(table)
            draft.set_input(node, 1, draft.add_constant(f"{node.name}_weight", weight))
            size = weight.numel() * weight.element_size()
            draft.note(f"{node.name} untied from its embedding: {size / 1e6:.1f} MB more in float")
