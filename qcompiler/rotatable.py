"""Which residual streams and value heads may be rotated, and who reads them.

An orthogonal matrix mixes all channels, so more stands in its way than in that of a factor for each
channel: norms with a scale, elementwise products, readers that see the channels in another order.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler.op_families import EMBEDDING, LINEAR, NORMS
from qcompiler.regions import Reader, Region
from qcompiler.rewrite import Draft, operand, place

aten = torch.ops.aten
RMS_NORM = aten.rms_norm.default
SMALLEST_HEAD = 2  # channels; smaller heads have nothing to spread


def stream_readers(stream: Region, of_writer: Mapping[Node, Region]) -> list[Reader]:
    """What reads a stream, itself or behind one of its norms."""
    return [
        *stream.readers, *(r for norm in stream.norms for r in of_writer[norm].readers)
    ]  # fmt: skip


def stream_obstacle(draft: Draft, stream: Region, of_writer: Mapping[Node, Region]) -> str | None:
    """Why a residual stream cannot be rotated, or None."""
    for writer in stream.writers:
        if writer.target in NORMS:
            return f"{place(writer)} writes the stream with a scale of its own"
        if writer.target not in (LINEAR, EMBEDDING):
            return f"{place(writer)} writes the stream"
        if is_shared(matrix(writer), stream.writers):
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


def _norm_obstacle(draft: Draft, norm: Node, of_writer: Mapping[Node, Region]) -> str | None:
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
        if is_shared(matrix(reader.node), members):
            return f"the weight of {place(reader.node)} has another reader"
    return None


def matrix(node: Node) -> Node:
    """The weight of a linear or the table of an embedding."""
    weight: Node = operand(node, 0 if node.target is EMBEDDING else 1)
    return weight


def is_shared(weight: Node, members: list[Node]) -> bool:
    """Whether something else than these reads a weight."""
    return bool(set(weight.users) - set(members))


def heads_obstacle(draft: Draft, region: Region) -> str | None:
    """Why the value heads of a region cannot be rotated, or None."""
    heads = region.attentions[0].heads
    if any(not torch.equal(a.heads, heads) for a in region.attentions):
        return "its attentions split it into different heads"
    if heads.shape[1] < SMALLEST_HEAD:
        return f"a head of {heads.shape[1]} channels has nothing to spread"
    if len(region.writers) > 1 or region.writers[0].target is not LINEAR:
        return "not one linear alone writes the values"
    writer = region.writers[0]
    if is_shared(matrix(writer), [writer]):
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
        if is_shared(matrix(reader.node), members):
            return f"the weight of {place(reader.node)} has another reader"
        if not _reads_whole_heads(reader, heads):
            return f"{place(reader.node)} reads parts of heads"
    return None


def _reads_whole_heads(reader: Reader, heads: Tensor) -> bool:
    size = heads.shape[1]
    if len(reader.channels) % size:
        return False
    known = {tuple(row) for row in heads.tolist()}
    return all(tuple(row) in known for row in reader.channels.reshape(-1, size).tolist())
