"""Language models whose cache is an input, as code that keeps the cache in place.

The program reads `input_ids`, a mask, positions and the cache (`past_…`) and returns logits and the
cache with the new tokens (`present…`). The code keeps the cache in the model's state; what is left
are two inputs, the tokens and how many were read before, and the logits of the last token. There is
one text and no padding, so the mask says nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qcompiler.backends.edge_ops import Storage
from qcompiler.cached import CACHED
from qcompiler.errors import UnsupportedError
from qcompiler.program import Program

CAPACITY = 1024  # tokens of the cache where none are asked for
TOKENS = (1, 16, 128)  # chunks that there is code for where none are asked for


@dataclass(frozen=True)
class Roles:
    """What the inputs of a language model are.

    Attributes:
        tokens: the input of token numbers.
        positions: the input of positions, or "".
        mask: the input of the attention mask.
        caches: the inputs that are caches.
        context: positions that the tables of positions reach; 0 where there are none.
    """

    tokens: str
    positions: str
    mask: str
    caches: frozenset[str]
    context: int


@dataclass
class Decoding:
    """A language model while its code is generated.

    Attributes:
        capacity: tokens that the cache holds.
        position: memory of the input with the number of tokens read before.
    """

    capacity: int
    position: Storage


def roles(program: Program) -> Roles | None:
    """The inputs' roles; None for programs that are no language models over a cache.

    Raises:
        UnsupportedError: for a language model that the code cannot keep the cache of.
    """
    nodes = list(program.exported.graph.nodes)
    attentions = [n for n in nodes if n.target in CACHED]
    if not attentions:
        past = [n for n in program.inputs if n.startswith("past_")]
        if past:
            raise UnsupportedError(
                "the attention over the cache was not recognised (see the refusals of fuse_cache): "
                "no code keeps such a cache in place"
            )
        return None
    caches = {a.args[i].name for a in attentions for i in (3, 4)}
    masks = {a.args[5].name for a in attentions}
    places = {a.args[8].name for a in attentions if a.args[8] is not None}
    left = [n for n in program.inputs if n not in caches | masks | places]
    if len(masks) != 1 or len(places) > 1 or not caches <= set(program.inputs):
        raise UnsupportedError("the attentions read different masks, positions or caches")
    mask = masks.pop()
    readers = {u.target for u in program.placeholder(mask).users}
    if mask not in program.inputs or not readers <= CACHED:
        raise UnsupportedError(f"'{mask}' is read outside of the attention")
    words = int(_output(program).meta["val"].shape[-1])
    tokens = [n for n in left if words in _tables(program, n)]
    if len(tokens) == 1 and len(left) == 2 and not places:  # positions look up rows of a table
        places = {*left} - {*tokens}
        left = tokens
    if len(left) != 1 or program.placeholder(left[0]).meta["val"].dtype != torch.int64:
        raise UnsupportedError(f"inputs {left}: a language model reads token numbers alone")
    position = places.pop() if places else ""
    tables = [a.args[6] for a in attentions if a.args[6] is not None]
    reach = [int(t.meta["val"].shape[0]) for t in tables]
    reach += _tables(program, position) if position else []
    return Roles(left[0], position, mask, frozenset(caches), min(reach, default=0))


def _output(program: Program) -> Node:
    output = next(n for n in program.exported.graph.nodes if n.op == "output")
    logits: Node = output.args[0][0]
    return logits


def _tables(program: Program, name: str) -> list[int]:
    """Rows of the tables that an input looks up."""
    readers = program.placeholder(name).users
    tables: list[Any] = [
        reader.args[0] for reader in readers if reader.target is torch.ops.aten.embedding.default
    ]
    return [int(table.meta["val"].shape[0]) for table in tables]


def last_token(program: Program) -> GraphModule:
    """The program's graph with logits of the last token alone, and no other output.

    What follows the last attention works on each token by itself, so it is cut before the norm
    that leads to the logits.
    """
    graph = copy.deepcopy(program.exported.graph)
    module = GraphModule(program.exported.graph_module, graph)
    output = next(n for n in graph.nodes if n.op == "output")
    logits = output.args[0][0]
    output.args = ((logits,),)
    graph.eliminate_dead_code()
    source = _residual(logits, set(program.inputs))
    if source is not None:
        with graph.inserting_after(source):
            cut = graph.call_function(
                torch.ops.aten.slice.Tensor, (source, 1, -1, torch.iinfo(torch.int64).max)
            )
        for user in [u for u in source.users if u is not cut]:
            user.replace_input_with(source, cut)
    graph.eliminate_dead_code()
    return module


def _residual(logits: Node, inputs: set[str]) -> Node | None:
    """The last residual sum before the logits, or what is made of it; None where there is none.

    Nothing that is made of the inputs passes it by, numbers of tokens neither.
    """
    nodes: list[Node] = list(logits.graph.nodes)
    order = {node: number for number, node in enumerate(nodes)}
    made: set[Node] = set()
    for node in nodes:
        if node.name in inputs or made & set(node.all_input_nodes):
            made.add(node)
    start = max(number for node, number in order.items() if node.target in CACHED)
    first = None
    for node in nodes[start : order[logits]]:
        added = [n for n in node.all_input_nodes if _rows(n)]
        if node.target is torch.ops.aten.add.Tensor and len(added) == 2 and _rows(node):
            first = node
    if first is None:
        return None
    for number in range(order[first], order[logits]):
        before, later = made & {*nodes[:number]}, nodes[number + 1 :]
        if _rows(nodes[number]) and not any(before & set(n.all_input_nodes) for n in later):
            return nodes[number]
    return None


def _rows(node: Node) -> bool:
    """Whether the node is an activation with a row for each token."""
    value = node.meta.get("val")
    return node.op == "call_function" and isinstance(value, torch.Tensor) and value.ndim == 3


def input_shapes(program: Program, found: Roles, new: int) -> Mapping[str, tuple[int, ...]]:
    """Shapes to trace a chunk of `new` tokens with: one text, nothing in the cache."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in program.inputs:
        value: Any = program.placeholder(name).meta["val"]
        if name in found.caches:
            shapes[name] = (1, int(value.shape[1]), 0, int(value.shape[3]))
        else:
            shapes[name] = (1, new)
    return shapes
