"""Run a program in torch so that gradients reach what its values were computed from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler import ops
from qcompiler.program import Batch, Program
from qcompiler.rewrite import operand


def differentiable(
    program: Program,
    batch: Batch,
    leaves: Mapping[str, Tensor] | None = None,
    change: Callable[[Node, list[Any]], list[Any]] | None = None,
    outputs: int | None = None,
) -> tuple[Any, ...]:
    """The outputs for one batch, where gradients are enabled with a graph of them behind.

    Args:
        program: in float.
        batch: the inputs.
        leaves: constants' names → tensors that require a gradient, in their place.
        change: a call and its operands' values → the values that it gets instead.
        outputs: how many are wanted; the rest of the program is not run. All when not given.
    """
    values: dict[Node, Any] = {}
    given, leaves = iter(batch), leaves or {}
    constants = program.constants()
    graph = program.exported.graph
    wanted = operand(graph.output_node(), 0)[:outputs]
    missing = {node for node in wanted if isinstance(node, Node)}
    for node in graph.nodes:
        if node.op == "placeholder":
            known = node.name in constants
            value = leaves.get(node.name, constants.get(node.name)) if known else next(given)
            values[node] = value
        elif node.op == "get_attr":
            values[node] = getattr(program.exported.graph_module, str(node.target))
        elif node.op == "call_function":
            function: Any = ops.TRACEABLE.get(node.target, node.target)
            args = list(torch.fx.node.map_arg(node.args, values.__getitem__))
            args = args if change is None else change(node, args)
            kwargs = torch.fx.node.map_arg(node.kwargs, values.__getitem__)
            values[node] = function(*args, **kwargs)
        missing.discard(node)
        if not missing:
            break
    return tuple(values[node] if isinstance(node, Node) else node for node in wanted)
