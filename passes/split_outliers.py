"""Keep single weights of each output row beside the integers of the rest.

    W x = W̄ x + S x          S: k weights of each row; W̄ = W − S

Which, and their values, are what rounding the weights found (`qcompiler.outliers`; SpQR, Dettmers
2023): W̄ is what GPTQ's later columns had added to them, or 0. S x is one `qc::sparse_linear`, which
reads the layer's float input; each output row has equally many, so the shapes are fixed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler import ops
from qcompiler.op_families import LINEAR
from qcompiler.program import Program
from qcompiler.recipe import Recipe
from qcompiler.rewrite import Draft, module_path, operand, rewrite

aten = torch.ops.aten


def outlier_layers(program: Program, recipe: Recipe) -> dict[str, int]:
    """The linears whose format keeps single weights: node → how many of each row.

    A weight that others read as well keeps none (`allocate` says so).
    """
    constants = program.constants()
    return {
        node.name: count
        for node in program.exported.graph.nodes
        if node.target is LINEAR
        and operand(node, 1).name in constants
        and len(operand(node, 1).users) == 1
        and (count := recipe.format_of(module_path(node), node.name).outliers)
    }


@rewrite(exact=True)
def split_outliers(draft: Draft, outliers: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Split linears in two.

    Args:
        draft: what is rewritten.
        outliers: node → columns (outputs, k) and values (outputs, k), float16.
    """
    for node in [n for n in draft.calls(LINEAR) if n.name in outliers]:
        columns, values = outliers[node.name]
        source = operand(node, 0)
        assert isinstance(source, Node)
        weight = draft.constant(node.args[1])
        rest = weight.scatter_add(1, columns.long(), -values.float())
        draft.set_input(node, 1, draft.add_constant(f"{node.name}_rest", rest))
        factor = draft.add_constant(f"{node.name}_outliers", values)
        index = draft.add_constant(f"{node.name}_outlier_columns", columns)
        readers = list(node.users)
        product = draft.call(ops.sparse_linear, source, factor, index, before=node, like=node)
        after = node.next
        total = draft.call(aten.add.Tensor, node, product, before=after, like=node)
        for reader in readers:
            reader.replace_input_with(node, total)
        draft.note(f"{node.name}: {columns.shape[1]} weights of each row stay in float")
