"""Parts of a language model run on small inputs, to find out what they compute.

How a model spells its mask and its rotary embedding is not matched but evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler.op_families import concrete_shape
from qcompiler.rewrite import Draft, evaluate


@dataclass
class Probe:
    """The program's inputs, given values of chosen sizes.

    Attributes:
        draft: the program.
        pasts: the inputs that are caches, (batch, heads, past, size) each.
    """

    draft: Draft
    pasts: set[Node] = field(default_factory=set)

    def inputs(self, batch: int, new: int, past: int) -> dict[Node, Tensor]:
        """Values for the inputs: zeros for integer matrices, NaN for all that is float.

        So that a mask or a rotation which reads an activation is noticed.
        """
        found: dict[Node, Tensor] = {}
        for node in self.draft.graph.nodes:
            if node.op != "placeholder" or self.draft.is_constant(node):
                continue
            value = node.meta["val"]
            if node in self.pasts:
                heads, size = concrete_shape(node)[1], concrete_shape(node)[3]
                # One number seen as many: a far past of all layers would take gigabytes.
                found[node] = torch.full((1, 1, 1, 1), math.nan).expand(batch, heads, past, size)
            elif isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point():
                found[node] = torch.zeros(batch, new, dtype=value.dtype)
            elif isinstance(value, Tensor) and value.ndim == 3:
                found[node] = torch.full((batch, new, concrete_shape(node)[2]), math.nan)
        return found

    @property
    def matrices(self) -> list[Node]:
        """The inputs that are integer matrices: tokens, their mask, their positions."""
        found = self.inputs(1, 1, 1)
        return [n for n, value in found.items() if value.ndim == 2]

    def compute(self, target: Node, given: Mapping[Node, Tensor]) -> Tensor | None:
        """The value of a node from given ones; None where it depends on something else."""
        values: dict[Node, Any] = dict(given)
        for node in self.cone(target, given):
            if node.op == "placeholder":
                if not self.draft.is_constant(node):
                    return None
                values[node] = self.draft.constant(node)
                continue
            if node.op != "call_function":
                return None
            args = torch.fx.node.map_arg(node.args, values.__getitem__)
            kwargs = torch.fx.node.map_arg(node.kwargs, values.__getitem__)
            try:
                values[node] = evaluate(node, args, kwargs)
            except (RuntimeError, ValueError, TypeError, IndexError):
                return None  # sizes that do not go together
        result = values[target]
        return result if isinstance(result, Tensor) else None

    def cone(self, target: Node, given: Mapping[Node, Tensor]) -> list[Node]:
        """What a node depends on, up to what is given, in order of computation."""
        seen: set[Node] = set()
        queue = [target]
        while queue:
            node = queue.pop()
            if node in seen or node in given:
                continue
            seen.add(node)
            queue += node.all_input_nodes
        return sorted(seen)
