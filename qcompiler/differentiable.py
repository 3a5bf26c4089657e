"""Run a program in torch so that gradients reach what its values were computed from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils.checkpoint import checkpoint

from qcompiler import ops
from qcompiler.program import Batch, Program
from qcompiler.rewrite import operand

Change = Callable[[Node, list[Any]], list[Any]]


def differentiable(
    program: Program,
    batch: Batch,
    leaves: Mapping[str, Tensor] | None = None,
    change: Change | None = None,
    outputs: int | None = None,
    segments: int = 1,
) -> tuple[Any, ...]:
    """The outputs for one batch, where gradients are enabled with a graph of them behind.

    Args:
        program: in float.
        batch: the inputs.
        leaves: constants' names → tensors that require a gradient, in their place.
        change: a call and its operands' values → the values that it gets instead.
        outputs: how many are wanted; the rest of the program is not run. All when not given.
        segments: parts of the program of which only the ends are kept for the way back, where each
            part is computed again (Chen 2016, "Training Deep Nets with Sublinear Memory Cost").
    """
    values: dict[Node, Any] = {}
    given, leaves = iter(batch), leaves or {}
    constants = program.constants()
    graph = program.exported.graph
    wanted = operand(graph.output_node(), 0)[:outputs]
    for node in graph.nodes:
        if node.op == "placeholder":
            known = node.name in constants
            value = leaves.get(node.name, constants.get(node.name)) if known else next(given)
            values[node] = value
        elif node.op == "get_attr":
            values[node] = getattr(program.exported.graph_module, str(node.target))
    calls = [node for node in graph.nodes if node.op == "call_function"]
    sought = {node for node in wanted if isinstance(node, Node)}
    last = max((i for i, node in enumerate(calls) if node in sought), default=-1)
    calls = calls[: last + 1]
    size = max(1, -(-len(calls) // segments))
    for start in range(0, len(calls), size):
        part = calls[start : start + size]
        later = {s for node in calls[start + size :] for s in node.all_input_nodes} | sought
        kept = [node for node in part if node in later]
        own = {*part}
        reads = [s for s in dict.fromkeys(s for n in part for s in n.all_input_nodes)
                 if s not in own]  # fmt: skip
        run = partial(_part, part, reads, kept, change)
        found = [values[node] for node in reads]
        # The last part would be computed again at once.
        made = run(*found) if start + size >= len(calls) else checkpoint(
            run, *found, use_reentrant=False, preserve_rng_state=False
        )  # fmt: skip
        values = {n: v for n, v in values.items() if n in later}
        values.update(zip(kept, made, strict=True))
    return tuple(values[node] if isinstance(node, Node) else node for node in wanted)


def _part(
    calls: Sequence[Node],
    reads: Sequence[Node],
    kept: Collection[Node],
    change: Change | None,
    *given: Any,
) -> tuple[Any, ...]:
    """Some calls in their order, from what they read to what is still read after them."""
    values = dict(zip(reads, given, strict=True))
    for node in calls:
        function: Any = ops.TRACEABLE.get(node.target, node.target)
        args = list(torch.fx.node.map_arg(node.args, values.__getitem__))
        args = args if change is None else change(node, args)
        kwargs = torch.fx.node.map_arg(node.kwargs, values.__getitem__)
        values[node] = function(*args, **kwargs)
    return tuple(values[node] for node in kept)
