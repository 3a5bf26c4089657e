"""Factors and shifts of channels, merged into the weights around a region."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler.op_families import NORMS
from qcompiler.regions import Region
from qcompiler.rewrite import Draft, operand, place

aten = torch.ops.aten


def merge_obstacle(draft: Draft, region: Region) -> str | None:
    """Why the writers and readers of a region cannot take a per-channel factor, or None."""
    if region.blockers:
        return region.blockers[0].reason
    obstacle = reader_obstacle(region)
    if obstacle:
        return obstacle
    for writer in region.writers:
        position = (
            0 if writer.target is aten.embedding.default else 2 if writer.target in NORMS else 1
        )
        if set(operand(writer, position).users) - {writer}:
            return f"the weight of {place(writer)} has another reader"
    return None


def reader_obstacle(region: Region) -> str | None:
    """Why the readers of a region cannot take a factor into their weights, or None."""
    if not region.readers:
        return "nothing with weights reads it"
    members = {r.node for r in region.readers}
    for reader in region.readers:
        if set(operand(reader.node, 1).users) - members:
            return f"the weight of {place(reader.node)} has another reader"
    return None


def scale_writer(draft: Draft, writer: Node, scale: Tensor, shift: Tensor) -> None:
    """Let a writer produce (y − shift) / scale for its output y; both (channels,) float64."""
    if writer.target is aten.embedding.default:
        table = draft.constant(writer.args[0]).double()
        draft.set_constant(writer.args[0], ((table - shift) / scale).float())
        return
    position = 2 if writer.target in NORMS else 1
    weight = draft.constant(writer.args[position]).double()
    shaped = scale.reshape([-1] + [1] * (weight.ndim - 1))
    draft.set_constant(writer.args[position], (weight / shaped).float())
    position += 1
    if writer.target is aten.rms_norm.default:
        assert not bool((shift != 0).any()), "an RMSNorm has no bias that could take a shift"
        return
    bias = writer.args[position] if len(writer.args) > position else None
    if bias is None and not bool((shift != 0).any()):
        return
    old = draft.constant(bias).double() if isinstance(bias, Node) else torch.zeros_like(scale)
    fresh = draft.add_constant(f"{writer.name}_bias", ((old - shift) / scale).float())
    args = list(writer.args)
    args[position : position + 1] = [fresh]
    writer.args = tuple(args)
