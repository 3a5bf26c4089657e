"""Keep a few input columns of a weight in float, beside the integers of the rest.

    W x = W̄ x + W_J x_J          W̄ = W with the columns J set to zero

Outlier inputs make a few columns of a weight far more sensitive than the others (LLM.int8(),
Dettmers 2022, section 3; OWQ, Lee 2023); see `rounding.outlier_columns` for which. The product with
W_J reads its own inputs and stays in float; it costs what |J| columns cost.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler.op_families import LINEAR
from qcompiler.program import Program
from qcompiler.recipe import Recipe
from qcompiler.rewrite import Draft, module_path, operand, rewrite

aten = torch.ops.aten


def split_layers(program: Program, recipe: Recipe) -> dict[str, int]:
    """The linears whose format keeps columns in float: node → how many."""
    constants = program.constants()
    return {
        node.name: columns
        for node in program.exported.graph.nodes
        if node.target is LINEAR
        and operand(node, 1).name in constants
        and (columns := recipe.format_of(module_path(node), node.name).columns)
    }


@rewrite(exact=True)
def split_columns(draft: Draft, columns: Mapping[str, Tensor]) -> None:
    """Split linears in two.

    Args:
        draft: what is rewritten.
        columns: node → the columns that get a product of their own.
    """
    for node in [n for n in draft.calls(LINEAR) if n.name in columns]:
        kept = columns[node.name]
        source = operand(node, 0)
        assert isinstance(source, Node)
        weight = draft.constant(node.args[1])
        rest = weight.clone()
        rest[:, kept] = 0
        small = weight[:, kept].T.contiguous()
        draft.set_input(node, 1, draft.add_constant(f"{node.name}_rest", rest))
        index = draft.add_constant(f"{node.name}_columns", kept)
        factor = draft.add_constant(f"{node.name}_outliers", small)
        readers = list(node.users)
        after = node.next
        picked = draft.call(aten.index_select.default, source, -1, index, before=after, like=node)
        product = draft.call(aten.matmul.default, picked, factor, before=after, like=node)
        total = draft.call(aten.add.Tensor, node, product, before=after, like=node)
        for reader in readers:
            reader.replace_input_with(node, total)
        draft.note(f"{node.name}: {len(kept)} columns stay in float")
