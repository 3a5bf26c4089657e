"""Families of ATen ops that passes look for, and the shapes of the values that they make."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from qcompiler.rewrite import operand

aten = torch.ops.aten

NORMS = (aten.layer_norm.default, aten.rms_norm.default)
LINEAR = aten.linear.default
EMBEDDING = aten.embedding.default
CONVS = (aten.conv2d.default, aten.conv1d.default, aten.conv2d.padding, aten.conv1d.padding)
ADDS = (aten.add.Tensor, aten.add_.Tensor)
MULS = (aten.mul.Tensor, aten.mul_.Tensor)
# Ops that only move elements (or keep them): run on channel numbers to follow the channels.
MOVES = (
    aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default,
    aten.contiguous.default, aten.clone.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.default, aten.expand.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.slice.Tensor, aten.select.int, aten.alias.default, aten.repeat_interleave.self_int,
    aten.dropout.default, aten.detach.default, aten.t.default, aten._unsafe_view.default,
    aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default,
)  # fmt: skip
PADS = (aten.pad.default, aten.constant_pad_nd.default)
SCALE_INVARIANT = (aten.relu.default, aten.relu_.default, aten.leaky_relu.default)
SHAPE_KEEPING = (
    aten.dropout.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
)
RESHAPES = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default,
    aten.flatten.using_ints, aten.unflatten.int,
)  # fmt: skip
SDPA = aten.scaled_dot_product_attention.default


def concrete(value: Any) -> Any:
    """A node argument with sizes as plain integers (the example's, for dynamic ones)."""

    def size(node: Node) -> Any:
        found = node.meta["val"]
        return _hint(found) if isinstance(found, torch.SymInt) else found

    value = torch.fx.node.map_arg(value, size)
    return torch.utils._pytree.tree_map(
        lambda v: _hint(v) if isinstance(v, torch.SymInt) else v, value
    )


def _hint(size: Any) -> int:
    return (
        int(size.node.hint)
        if isinstance(size, torch.SymInt) and size.node.hint is not None
        else int(size)
    )


def keeps_last_axis(node: Node) -> bool:
    """Whether a node is a reshape that leaves the rows along the last axis whole."""
    if node.target not in RESHAPES:
        return False
    before: list[int] = concrete_shape(operand(node, 0))
    return before[-1:] == concrete_shape(node)[-1:]


def concrete_shape(node: Node) -> list[int]:
    """The example's shape of a node's value."""
    return [_hint(s) for s in node.meta["val"].shape]
