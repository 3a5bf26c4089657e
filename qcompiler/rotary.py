"""Rotary embeddings: found by running what computes them, as tables of cosines and sines.

A rotation turns pairs of channels by an angle that depends on the position alone (RoPE, Su 2021,
equation 34), over all or the first channels, in halves or interleaved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler import cached
from qcompiler.op_families import concrete_shape
from qcompiler.probing import Probe
from qcompiler.rewrite import Draft

PROBES = (0, 1, 2, 5, 11)  # positions at which a rotation's matrix is looked at, and the last one


@dataclass(frozen=True)
class Rotation:
    """Tables of a rotary embedding.

    Attributes:
        cos, sin: constants, float32 (positions, pairs).
        positions: the input with the positions.
        interleaved: pairs are neighbours; else one from each half.
    """

    cos: Node
    sin: Node
    positions: Node
    interleaved: bool


Turned = tuple[Node, Node, Rotation]  # query and key before their rotation


def find_rotation(
    probe: Probe, known: list[Rotation], query: Node, key: Node, context: int, multiple: int
) -> Turned | None:
    """The rotation of both, if it is one and the same.

    Args:
        probe: of the program.
        known: rotations found so far; a new one joins them, its tables the program.
        query, key: (batch, heads, positions, size).
        context: positions that the tables hold.
        multiple: channels that are turned are a multiple of this.
    """
    found = [_turned(probe, known, node, context, multiple) for node in (query, key)]
    if found[0] is None or found[1] is None or found[0][1] is not found[1][1]:
        return None
    return found[0][0], found[1][0], found[0][1]


def _turned(
    probe: Probe, known: list[Rotation], node: Node, context: int, multiple: int
) -> tuple[Node, Rotation] | None:
    """The tensor of which `node` is a rotation, the earliest one."""
    shape = concrete_shape(node)
    for start in probe.cone(node, {}):
        value = start.meta.get("val")
        if start is node or not isinstance(value, Tensor) or concrete_shape(start) != shape:
            continue
        rotation = _rotation_of(probe, known, node, start, context, multiple)
        if rotation is not None:
            return start, rotation
    return None


def _rotation_of(
    probe: Probe, known: list[Rotation], node: Node, start: Node, context: int, multiple: int
) -> Rotation | None:
    size, heads = concrete_shape(node)[3], concrete_shape(node)[1]
    probes = torch.tensor([*PROBES, context - 1])
    for candidate in probe.matrices:
        basis = torch.eye(size)[:, None, None].expand(size, heads, len(probes), size)
        given = probe.inputs(size, len(probes), 0)
        given[candidate] = probes.expand(size, -1).to(candidate.meta["val"].dtype)
        turned = probe.compute(node, {**given, start: basis})
        if turned is None or turned.shape != basis.shape:
            continue
        matrices = turned[:, 0].permute(1, 2, 0)  # (probes, out, in)
        form = _form(matrices)
        if form is None or not torch.equal(turned, turned[:, :1].expand_as(turned)):
            continue
        pairs, interleaved = form
        if 2 * pairs % multiple:
            continue
        tables = _tables(probe, node, start, candidate, context, form)
        if tables is None or not _keeps_lengths(*tables):
            continue
        rotation = _shared(probe.draft, known, *tables, candidate, interleaved)
        cos, sin = (probe.draft.constant(t)[probes] for t in (rotation.cos, rotation.sin))
        expected = cached.turn(basis[:, :1], cos, sin, interleaved)
        if pairs == cos.shape[1] and torch.allclose(expected, turned[:, :1], atol=1e-6):
            return rotation
    return None


def _keeps_lengths(cos: Tensor, sin: Tensor) -> bool:
    """Whether each pair is turned, and scaled by at most one number for all positions.

    What is 0 whatever it is given (all of a model that reads a token whose embedding is 0) has the
    form of a rotation too.
    """
    squares = cos.square() + sin.square()
    return bool((squares[0] > 0).all()) and torch.allclose(squares, squares[:1].expand_as(squares))


def _shared(
    draft: Draft, known: list[Rotation], cos: Tensor, sin: Tensor, positions: Node,
    interleaved: bool,
) -> Rotation:  # fmt: skip
    """A rotation by these tables, one for all layers that have the same."""
    for one in known:
        same = (one.positions, one.interleaved) == (positions, interleaved)
        if same and all(
            torch.equal(draft.constant(a), b) for a, b in ((one.cos, cos), (one.sin, sin))
        ):
            return one
    nodes = [draft.add_constant(n, t) for n, t in (("rotary_cos", cos), ("rotary_sin", sin))]
    known.append(Rotation(nodes[0], nodes[1], positions, interleaved))
    return known[-1]


def _form(matrices: Tensor) -> tuple[int, bool] | None:
    """Number of pairs and whether they are interleaved, from (positions, out, in) matrices."""
    size = matrices.shape[-1]
    moved = ~torch.isclose(matrices, torch.eye(size)).all(0)
    channels = moved.any(0) | moved.any(1)
    count = int(channels.sum())
    if not count or count % 2 or not bool(channels[:count].all()):
        return None
    for interleaved in (False, True):
        first, second = _pairs(count // 2, interleaved)
        allowed = torch.eye(size, dtype=torch.bool)
        allowed[first, second] = allowed[second, first] = True
        if bool((matrices[:, ~allowed] == 0).all()):
            return count // 2, interleaved
    return None


def _pairs(count: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """First and second channel of each pair."""
    index = torch.arange(count)
    return (2 * index, 2 * index + 1) if interleaved else (index, index + count)


def _tables(
    probe: Probe, node: Node, start: Node, positions: Node, context: int, form: tuple[int, bool]
) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines over the context: what the first channels of each pair become."""
    first, second = _pairs(*form)
    heads, size = concrete_shape(node)[1], concrete_shape(node)[3]
    one = torch.zeros(1, heads, context, size)
    one[..., first] = 1.0
    given = probe.inputs(1, context, 0)
    given[positions] = torch.arange(context)[None].to(positions.meta["val"].dtype)
    turned = probe.compute(node, {**given, start: one})
    if turned is None:
        return None
    row = turned[0, 0]
    return row[:, first].contiguous(), row[:, second].contiguous()
