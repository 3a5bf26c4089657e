"""Rotate hidden tensors by randomized Hadamard matrices, so that no channel stands out.

For an orthogonal R and an RMSNorm whose scale is 1, rms_norm(x R) = rms_norm(x) R, so a residual
stream may be rotated as a whole: what writes into it takes R, what reads it through its norms
takes Rᵀ, and the function stays (QuaRot, Ashkboos 2024, section 4; SliceGPT, Ashkboos 2024).

    R1  residual stream: embedding E R; writers Rᵀ W, R b; readers behind the norms W R
    R2  each value head: value rows Rᵀ W_v, R b_v; the output projection's columns W_o R
    R3  queries and keys, after the rotary embedding: (q R)(k R)ᵀ = q kᵀ, computed when it runs
    R4  before the linears that write the stream and that R2 does not reach: x R computed when it
        runs, W R

The names are those of SpinQuant (Liu 2024, figure 1). R1 and R2 cost nothing when the model runs;
R3 and R4 cost two small products with Kronecker factors (`qc::rotate`).

Run before it: `untie_weights`, `fold_norm(center=True)`. Refused, with the reason: streams that a
norm with a scale of its own writes into (post-norm blocks), whose norms are LayerNorms still, or
that something reads which cannot undo a rotation; values whose channels an op treats one by one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler import ops
from qcompiler.hadamard import Rotation, randomized
from qcompiler.regions import (
    LINEAR,
    MOVES,
    NORMS,
    SDPA,
    Reader,
    Region,
    before_repeat,
    concrete_shape,
    find_regions,
)
from qcompiler.rewrite import Draft, following, operand, place, rewrite

aten = torch.ops.aten
EMBEDDING = aten.embedding.default
RMS_NORM = aten.rms_norm.default
SMALLEST_HEAD = 2  # channels; smaller heads have nothing to spread


@rewrite(exact=True)
def fuse_rotation(draft: Draft, seed: int = 0, inputs: bool = False, keys: bool = False) -> None:
    """Fold R1 and R2 into the weights.

    Args:
        draft: what is rewritten.
        seed: of the signs of the Hadamard matrices.
        inputs: R4 as well, which pays where activations are quantized.
        keys: R3 as well, which pays where keys are quantized.
    """
    regions = find_regions(draft)
    of_writer = {region.writers[0]: region for region in regions}
    streams = [r for r in regions if r.norms]
    rotated: set[Node] = set()  # linears whose input is spread already
    for number, stream in enumerate(streams):
        reason = _stream_obstacle(draft, stream, of_writer)
        if reason:
            draft.refuse(stream.norms[0], f"R1: {reason}")
            continue
        rotation = randomized(stream.size, seed + number)
        rotated |= _rotate_stream(draft, stream, of_writer, rotation)
        _say(draft, "R1", rotation, f"{len(stream.writers)} writers, {len(stream.norms)} norms")
    heads = 0
    for number, region in enumerate(r for r in regions if r.attentions):
        reason = _heads_obstacle(draft, region)
        if reason:
            draft.refuse(region.attentions[0].node, f"R2: {reason}")
            continue
        size = region.attentions[0].heads.shape[1]
        rotation = randomized(size, seed + len(streams) + number)
        rotated |= _rotate_heads(draft, region, rotation)
        heads += 1
        if heads == 1:
            _say(draft, "R2", rotation, "each value head")
    if heads:
        draft.note(f"R2: {heads} attentions")
    reached = {attention.node for region in regions for attention in region.attentions}
    for attention in draft.calls(SDPA):
        if attention not in reached:
            source = _origin(operand(attention, 2))
            draft.refuse(attention, f"R2: {place(source)} gives the values, not a linear alone")
    if inputs:
        _rotate_inputs(draft, streams, rotated)
    if keys:
        _rotate_keys(draft)


def _say(draft: Draft, name: str, rotation: Rotation, what: str) -> None:
    draft.note(f"{name}: {rotation} over {what}")
    if not rotation.hadamard:
        draft.note(f"{name}: no Hadamard matrix of order {rotation.size} is known here")


# R1: the residual stream.


def _stream_obstacle(draft: Draft, stream: Region, of_writer: dict[Node, Region]) -> str | None:
    """Why a residual stream cannot be rotated, or None."""
    for writer in stream.writers:
        if writer.target in NORMS:
            return f"{place(writer)} writes the stream with a scale of its own"
        if writer.target not in (LINEAR, EMBEDDING):
            return f"{place(writer)} writes the stream"
        if _is_shared(_weight(writer), stream.writers):
            return f"the weight of {place(writer)} has another reader"
    for blocker in stream.blockers:
        if blocker.node not in stream.norms:
            return blocker.reason
    if bool(stream.apart.any()):
        return "an op inside treats its channels one by one"
    for norm in stream.norms:
        reason = _norm_obstacle(draft, norm, of_writer)
        if reason:
            return reason
    return _readers_obstacle(stream)


def _norm_obstacle(draft: Draft, norm: Node, of_writer: dict[Node, Region]) -> str | None:
    if norm.target is not RMS_NORM:
        return f"{place(norm)} is a LayerNorm whose mean could not move into the writers"
    gamma = operand(norm, 2)
    if not draft.is_constant(gamma) or not bool((draft.constant(gamma) == 1).all()):
        return f"the scale of {place(norm)} could not move into its readers"
    region = of_writer.get(norm)
    if region is None or len(region.writers) > 1:
        return f"{place(norm)} writes into another stream"
    if region.blockers:
        return region.blockers[0].reason
    if bool(region.apart.any()):
        return f"an op behind {place(norm)} treats its channels one by one"
    return _readers_obstacle(region)


def _readers_obstacle(region: Region) -> str | None:
    members = [reader.node for reader in region.readers]
    for reader in region.readers:
        if reader.node.target is not LINEAR:
            return f"{place(reader.node)} reads it, which is no linear"
        if not torch.equal(reader.channels, torch.arange(region.size)):
            return f"{place(reader.node)} reads its channels in another order"
        if _is_shared(_weight(reader.node), members):
            return f"the weight of {place(reader.node)} has another reader"
    return None


def _weight(node: Node) -> Node:
    weight: Node = operand(node, 0 if node.target is EMBEDDING else 1)
    return weight


def _is_shared(weight: Node, members: list[Node]) -> bool:
    return bool(set(weight.users) - set(members))


def _rotate_stream(
    draft: Draft, stream: Region, of_writer: dict[Node, Region], rotation: Rotation
) -> set[Node]:
    """Rotate a stream; returns the linears that now read rotated inputs."""
    done: set[Node] = set()
    for writer in stream.writers:
        weight = _weight(writer)
        if weight not in done:
            done.add(weight)
            if writer.target is EMBEDDING:
                _change(draft, weight, rotation.apply)
            else:
                _change(draft, weight, lambda w: rotation.apply(w.T).T)
        _rotate_bias(draft, writer, rotation.apply)
    readers = list(stream.readers)
    for norm in stream.norms:
        readers += of_writer[norm].readers
    for reader in readers:
        weight = _weight(reader.node)
        if weight not in done:  # readers may share one weight
            done.add(weight)
            _change(draft, weight, rotation.apply)
    return {reader.node for reader in readers}


def _change(draft: Draft, weight: Node, function: Callable[[Tensor], Tensor]) -> None:
    """Replace a weight by a function of it, computed in float64."""
    draft.set_constant(weight, function(draft.constant(weight).double()).float().contiguous())


def _rotate_bias(draft: Draft, writer: Node, function: Callable[[Tensor], Tensor]) -> None:
    bias = operand(writer, 2) if writer.target is LINEAR else None
    if bias is not None:
        fresh = function(draft.constant(bias).double()).float()
        writer.update_arg(2, draft.add_constant(f"{writer.name}_bias", fresh))


# R2: value heads.


def _heads_obstacle(draft: Draft, region: Region) -> str | None:
    """Why the value heads of a region cannot be rotated, or None."""
    heads = region.attentions[0].heads
    if any(not torch.equal(a.heads, heads) for a in region.attentions):
        return "its attentions split it into different heads"
    if heads.shape[1] < SMALLEST_HEAD:
        return f"a head of {heads.shape[1]} channels has nothing to spread"
    if len(region.writers) > 1 or region.writers[0].target is not LINEAR:
        return "not one linear alone writes the values"
    writer = region.writers[0]
    if _is_shared(_weight(writer), [writer]):
        return f"the weight of {place(writer)} has another reader"
    channels = heads.flatten()
    if len(channels.unique()) < len(channels):
        return "its heads share channels"
    mine = torch.zeros(region.size, dtype=torch.bool)
    mine[channels] = True
    for blocker in region.blockers:
        if bool(mine[blocker.channels].any()):
            return blocker.reason
    if bool(region.apart[mine].any()):
        return "an op between the values and their readers treats channels one by one"
    if not region.readers:
        return "nothing with weights reads the attention"
    members = [reader.node for reader in region.readers]
    for reader in region.readers:
        if reader.node.target is not LINEAR:
            return f"{place(reader.node)} reads it, which is no linear"
        if _is_shared(_weight(reader.node), members):
            return f"the weight of {place(reader.node)} has another reader"
        if not _reads_whole_heads(reader, heads):
            return f"{place(reader.node)} reads parts of heads"
    return None


def _origin(node: Node) -> Node:
    """What a value was before it was moved."""
    while node.target in MOVES:
        node = operand(node, 0)
    return node


def _reads_whole_heads(reader: Reader, heads: Tensor) -> bool:
    size = heads.shape[1]
    if len(reader.channels) % size:
        return False
    known = {tuple(row) for row in heads.tolist()}
    return all(tuple(row) in known for row in reader.channels.reshape(-1, size).tolist())


def _rotate_heads(draft: Draft, region: Region, rotation: Rotation) -> set[Node]:
    heads, writer = region.attentions[0].heads, region.writers[0]

    def rows(value: Tensor) -> Tensor:
        """The rows of the value heads multiplied by Rᵀ; also for a bias."""
        result = value.clone()
        for head in heads:
            result[head] = rotation.apply(value[head].movedim(0, -1)).movedim(-1, 0)
        return result

    def columns(weight: Tensor) -> Tensor:
        blocks = weight.unflatten(1, (-1, heads.shape[1]))
        return rotation.apply(blocks).flatten(1)

    _change(draft, _weight(writer), rows)
    _rotate_bias(draft, writer, rows)
    for weight in {_weight(reader.node): None for reader in region.readers}:
        _change(draft, weight, columns)
    return {reader.node for reader in region.readers}


# R3 and R4: rotations that are computed when the model runs.


class _Factors:
    """The Kronecker factors as constants of the program, one pair for each size."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.known: dict[int, tuple[Rotation, Node, Node]] = {}

    def of(self, size: int) -> tuple[Rotation, Node, Node]:
        if size not in self.known:
            rotation = randomized(size, None)
            left, right = (
                self.draft.add_constant(f"hadamard_{size}_{side}", factor.float())
                for side, factor in (("left", rotation.left), ("right", rotation.right))
            )
            self.known[size] = (rotation, left, right)
        return self.known[size]


def _rotate_inputs(draft: Draft, streams: list[Region], rotated: set[Node]) -> None:
    """R4: before the linears that write a stream from inputs that nothing has spread."""
    factors = _Factors(draft)
    shared: dict[Node, Node] = {}
    writers = {w: None for s in streams for w in s.writers if w.target is LINEAR}
    for writer in writers:
        source = operand(writer, 0)
        if writer in rotated or source.target is ops.rotate:
            continue
        if _is_shared(_weight(writer), [writer]):
            draft.refuse(writer, f"R4: the weight of {place(writer)} has another reader")
            continue
        rotation, left, right = factors.of(concrete_shape(source)[-1])
        if source not in shared:
            shared[source] = draft.call(
                ops.rotate, source, left, right, before=following(source), like=source
            )
        draft.set_input(writer, 0, shared[source])
        _change(draft, _weight(writer), rotation.apply)
    for size, (rotation, _, _) in factors.known.items():
        _say(draft, "R4", rotation, f"inputs of {size} channels, computed when it runs")


def _rotate_keys(draft: Draft) -> None:
    """R3: queries and keys of every attention, before grouped keys are repeated."""
    factors = _Factors(draft)
    shared: dict[Node, Node] = {}
    for attention in draft.calls(SDPA):
        for index in (0, 1):
            reader, position = before_repeat(attention, index)
            source = operand(reader, position)
            if source.target is ops.rotate:
                continue
            size = concrete_shape(source)[-1]
            if size < SMALLEST_HEAD:
                draft.refuse(attention, f"R3: a head of {size} channels has nothing to spread")
                break
            _, left, right = factors.of(size)
            if source not in shared:
                shared[source] = draft.call(
                    ops.rotate, source, left, right, before=following(source), like=source
                )
            draft.set_input(reader, position, shared[source])
    for size, (rotation, _, _) in factors.known.items():
        _say(draft, "R3", rotation, f"query and key heads of {size} channels, when it runs")
