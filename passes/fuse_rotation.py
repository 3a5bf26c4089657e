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

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler import ops
from qcompiler.hadamard import Rotation, randomized
from qcompiler.op_families import EMBEDDING, LINEAR, MOVES, SDPA, concrete_shape
from qcompiler.regions import Region, before_repeat, find_regions
from qcompiler.rewrite import Draft, following, operand, place, rewrite
from qcompiler.rotatable import (
    SMALLEST_HEAD,
    heads_obstacle,
    is_shared,
    matrix,
    stream_obstacle,
    stream_readers,
)


@rewrite(exact=True)
def fuse_rotation(
    draft: Draft,
    seed: int = 0,
    inputs: bool = False,
    keys: bool = False,
    learned: Mapping[str, Tensor] | None = None,
) -> None:
    """Fold R1 and R2 into the weights.

    Args:
        draft: what is rewritten.
        seed: of the signs of the Hadamard matrices.
        learned: matrices instead of those: "R1.0" for the first stream, "R2.3" for the fourth
            attention's value heads, each (n, n) float64 and orthogonal. What it leaves out is left
            as it is.
        inputs: R4 as well, which pays where activations are quantized.
        keys: R3 as well, which pays where keys are quantized.
    """
    regions = find_regions(draft)
    of_writer = {region.writers[0]: region for region in regions}
    streams = [r for r in regions if r.norms]
    rotated: set[Node] = set()  # linears whose input is spread already
    for number, stream in enumerate(streams):
        reason = stream_obstacle(draft, stream, of_writer)
        if reason:
            draft.refuse(stream.norms[0], f"R1: {reason}")
            continue
        rotation = (
            randomized(stream.size, seed + number) if learned is None
            else _given(learned, f"R1.{number}")
        )  # fmt: skip
        if rotation is None:
            continue
        rotated |= _rotate_stream(draft, stream, of_writer, rotation)
        _say(draft, "R1", rotation, f"{len(stream.writers)} writers, {len(stream.norms)} norms")
    heads = 0
    for number, region in enumerate(r for r in regions if r.attentions):
        reason = heads_obstacle(draft, region)
        if reason:
            draft.refuse(region.attentions[0].node, f"R2: {reason}")
            continue
        size = region.attentions[0].heads.shape[1]
        rotation = (
            randomized(size, seed + len(streams) + number) if learned is None
            else _given(learned, f"R2.{number}")
        )  # fmt: skip
        if rotation is None:
            continue
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


def _given(learned: Mapping[str, Tensor], name: str) -> Rotation | None:
    if name not in learned:
        return None
    right = learned[name].double()
    one = torch.ones(1, 1, dtype=torch.float64)
    return Rotation(one, right, torch.ones(len(right), dtype=torch.float64), False)


def _say(draft: Draft, name: str, rotation: Rotation, what: str) -> None:
    if len(rotation.left) == 1 and not rotation.hadamard:
        draft.note(f"{name}: learned, over {what}")
        return
    draft.note(f"{name}: {rotation} over {what}")
    if not rotation.hadamard:
        draft.note(f"{name}: no Hadamard matrix of order {rotation.size} is known here")


# R1: the residual stream.


def _rotate_stream(
    draft: Draft, stream: Region, of_writer: dict[Node, Region], rotation: Rotation
) -> set[Node]:
    """Rotate a stream; returns the linears that now read rotated inputs."""
    done: set[Node] = set()
    for writer in stream.writers:
        weight = matrix(writer)
        if weight not in done:
            done.add(weight)
            if writer.target is EMBEDDING:
                _change(draft, weight, rotation.apply)
            else:
                _change(draft, weight, lambda w: rotation.apply(w.T).T)
        _rotate_bias(draft, writer, rotation.apply)
    readers = stream_readers(stream, of_writer)
    for reader in readers:
        weight = matrix(reader.node)
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


def _origin(node: Node) -> Node:
    """What a value was before it was moved."""
    while node.target in MOVES:
        node = operand(node, 0)
    return node


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

    _change(draft, matrix(writer), rows)
    _rotate_bias(draft, writer, rows)
    for weight in {matrix(reader.node): None for reader in region.readers}:
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
        if is_shared(matrix(writer), [writer]):
            draft.refuse(writer, f"R4: the weight of {place(writer)} has another reader")
            continue
        rotation, left, right = factors.of(concrete_shape(source)[-1])
        if source not in shared:
            shared[source] = draft.call(
                ops.rotate, source, left, right, before=following(source), like=source
            )
        draft.set_input(writer, 0, shared[source])
        _change(draft, matrix(writer), rotation.apply)
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
