"""Give each reader of an embedding table a copy of its own.

A tied output head and its embedding can take neither the scale of the last norm nor a rotation of
the residual stream, because the two lie on different sides of them; the embeddings of an encoder
and a decoder write different streams. The copies cost memory, which is noted.
"""

from __future__ import annotations

from qcompiler.op_families import EMBEDDING, LINEAR
from qcompiler.rewrite import Draft, operand, rewrite


@rewrite(exact=True)
def untie_weights(draft: Draft) -> None:
    """Untie every linear and embedding from the embedding with which it shares a weight."""
    for node in draft.calls(LINEAR, EMBEDDING):
        position = 0 if node.target is EMBEDDING else 1
        table = operand(node, position)
        if not draft.is_constant(table):
            continue
        if any(user.target is EMBEDDING for user in table.users if user is not node):
            # The tensor itself stays shared until a pass replaces one of the two.
            weight = draft.constant(table)
            draft.set_input(node, position, draft.add_constant(f"{node.name}_weight", weight))
            size = weight.numel() * weight.element_size()
            draft.note(f"{node.name} untied from its embedding: {size / 1e6:.1f} MB more in float")
