"""Invariance regions: tensors that may be scaled, shifted or rotated without changing the function.

Each channel has its own factor. A region starts at a *writer* (a linear, convolution, norm or
embedding whose weights give each output channel its size), follows the value through ops that
commute with per-channel scaling, and ends at *readers* (linears and convolutions whose weights can
undo the scale). Everything else that reads the value is a *blocker*, kept with its reason. At a
residual addition the region grows to both sides.

Channels are followed by running data movement (view, transpose, expand, …) on a tensor of channel
numbers, so that head splits and repeated key/value heads need no rules of their own.

The idea of finding such regions on the graph is that of Brevitas' activation equalization;
SmoothQuant (Xiao 2023), AWQ (Lin 2023) and rotations (QuaRot, Ashkboos 2024) all act on them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler.op_families import (
    ADDS,
    CONVS,
    LINEAR,
    MOVES,
    MULS,
    NORMS,
    SCALE_INVARIANT,
    SDPA,
    SHAPE_KEEPING,
    concrete,
    concrete_shape,
    keeps_last_axis,
)
from qcompiler.rewrite import Draft, evaluate, operand, place

aten = torch.ops.aten


@dataclass(frozen=True)
class Reader:
    """A linear or convolution that reads the region.

    Its input channel j carries the region's channel `channels[j]`.
    """

    node: Node
    channels: Tensor


@dataclass(frozen=True)
class Blocker:
    """A node that reads or writes the region and cannot take part, and why.

    `channels` are those of the region that reach it, sorted.
    """

    node: Node
    reason: str
    channels: Tensor


@dataclass(frozen=True)
class Attention:
    """An attention that takes the region as values.

    Row h of `heads` holds the channels of value head h: (heads, size) int64.
    """

    node: Node
    heads: Tensor


@dataclass
class Region:
    """A set of tensors tied by per-channel invariance.

    Attributes:
        size: number of channels.
        writers: nodes whose output channel i is the region's channel i.
        readers: see `Reader`.
        blockers: what forbids a merged scaling; empty when the region is free.
        only_scale: whether an op inside commutes with scaling but not with shifting (a
            multiplication or ReLU).
        norms: norms over all channels in their order; they are among the blockers as well.
        attentions: see `Attention`.
        apart: channels that an op inside treats one by one (ReLU, a product with another tensor):
            they may be scaled, not mixed; (size,) bool.
    """

    size: int
    writers: list[Node] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    blockers: list[Blocker] = field(default_factory=list)
    only_scale: bool = False
    norms: list[Node] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    apart: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))


def find_regions(draft: Draft) -> list[Region]:
    """All regions of the graph that have a writer, each once, in graph order."""
    seen: set[Node] = set()
    regions = []
    for node in draft.calls():
        if node not in seen and _is_writer(draft, node):
            region = _grow(draft, node)
            seen.update(region.writers)
            regions.append(region)
    return regions


def channel_axis(node: Node) -> int:
    """The axis that holds the channels of a writer's output.

    Before the spatial ones for convolutions, else the last.
    """
    return int(node.meta["val"].ndim) - (_spatial(node) if node.target in CONVS else 0) - 1


def _spatial(conv: Node) -> int:
    """The number of spatial axes."""
    return int(operand(conv, 1).meta["val"].ndim) - 2


def _is_writer(draft: Draft, node: Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is LINEAR or node.target in CONVS:
        return draft.is_constant(node.args[1])
    if node.target in NORMS:
        return draft.is_constant(operand(node, 2)) and len(operand(node, 1)) == 1
    return node.target is aten.embedding.default and draft.is_constant(node.args[0])


class _Walk:
    """One region while it grows.

    `work` holds values and the channel number of each of their elements.
    """

    def __init__(self, draft: Draft, region: Region) -> None:
        self.draft = draft
        self.region = region
        self.work: list[tuple[Node, Tensor]] = []
        self.visited: set[Node] = set()

    def add(self, node: Node, labels: Tensor) -> None:
        if node not in self.visited:
            self.visited.add(node)
            self.work.append((node, labels))

    def block(self, node: Node, reason: str, labels: Tensor) -> None:
        channels = labels.unique().long()
        for index, known in enumerate(self.region.blockers):
            if known.node is node:
                joined = torch.cat([known.channels, channels]).unique()
                self.region.blockers[index] = Blocker(node, known.reason, joined)
                return
        self.region.blockers.append(Blocker(node, reason, channels))

    def separate(self, labels: Tensor) -> None:
        """Note that these channels are treated one by one."""
        self.region.apart[labels.unique().long()] = True


def _grow(draft: Draft, writer: Node) -> Region:
    axis = channel_axis(writer)
    shape = concrete_shape(writer)
    region = Region(shape[axis], [writer], apart=torch.zeros(shape[axis], dtype=torch.bool))
    walk = _Walk(draft, region)
    numbers = torch.arange(shape[axis], dtype=torch.int32)
    numbers = numbers.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    walk.add(writer, numbers.expand(shape))
    while walk.work:
        value, labels = walk.work.pop()
        for user in list(value.users):
            _step(walk, value, labels, user)
    return region


def _step(walk: _Walk, value: Node, labels: Tensor, user: Node) -> None:
    """Follow the value into one of its readers."""
    if user.op == "output":
        return walk.block(user, "it is an output of the model", labels)
    target = user.target
    if target is aten.sym_size.int:
        return None
    if target in MOVES:
        return _move(walk, labels, user)
    if target is LINEAR or target in CONVS:
        return _read(walk, value, labels, user)
    if target in ADDS:
        return _add(walk, value, labels, user)
    if target in SCALE_INVARIANT:
        walk.region.only_scale = True
        walk.separate(labels)
        return walk.add(user, labels)
    if target in MULS or target is aten.div.Tensor:
        return _multiply(walk, value, labels, user)
    if target is SDPA:
        return _attend(walk, value, labels, user)
    if target is aten.matmul.default and user.args[1] is value and user.args[0] is not value:
        constant_rows = bool((labels == labels[..., :1, :]).all()) if labels.ndim > 1 else False
        if constant_rows:
            # Only rows that sum to 1 carry a shift over.
            walk.region.only_scale |= getattr(user.args[0], "target", None) is not aten.softmax.int
            walk.region.attentions.append(Attention(user, _rows(labels)))
            return walk.add(user, labels[..., :1, :].expand(concrete_shape(user)))
    if target in NORMS and _is_plain(walk, labels) and len(operand(user, 1)) == 1:
        walk.region.norms.append(user)
    name = str(target).removeprefix("aten.")
    return walk.block(user, f"{name} reads it, which does not commute with scaling", labels)


def _is_plain(walk: _Walk, labels: Tensor) -> bool:
    """Whether the last axis holds all channels in their order."""
    size = walk.region.size
    return labels.shape[-1] == size and bool((labels == torch.arange(size)).all())


def _rows(labels: Tensor) -> Tensor:
    """The distinct rows along the last axis of labels that are constant along the one before."""
    rows: Tensor = labels.select(-2, 0).flatten(0, -2).unique(dim=0)
    return rows.long()


def _move(walk: _Walk, labels: Tensor, user: Node) -> None:
    rest = concrete(user.args[1:])
    try:
        moved = (
            labels
            if user.target in SHAPE_KEEPING
            else evaluate(user, (labels.contiguous(), *rest), concrete(user.kwargs))
        )
    except RuntimeError as error:
        return walk.block(user, f"{place(user)}: channels lost ({error})", labels)
    if isinstance(moved, (list, tuple)):
        for part in user.users:
            if part.target is getitem:
                walk.add(part, moved[operand(part, 1)])
        return None
    return walk.add(user, moved)


def _read(walk: _Walk, value: Node, labels: Tensor, user: Node) -> None:
    if user.args[0] is not value or any(a is value for a in user.args[1:]):
        return walk.block(user, f"{place(user)} reads it as a weight", labels)
    if not walk.draft.is_constant(user.args[1]):
        return walk.block(user, f"{place(user)} has a weight that is computed", labels)
    if user.target in CONVS and (len(user.args) > 6 and user.args[6] != 1):
        return walk.block(user, f"{place(user)} is a grouped convolution", labels)
    position = axis = labels.ndim - (_spatial(user) if user.target in CONVS else 0) - 1
    row = labels
    for other in range(labels.ndim - 1, -1, -1):
        if other != axis:
            row = row.select(other, 0)
            axis -= other < axis
    view = row.reshape([-1 if i == position else 1 for i in range(labels.ndim)])
    if not bool((labels == view).all()):
        return walk.block(user, f"{place(user)} mixes channels in one input feature", labels)
    walk.region.readers.append(Reader(user, row.long()))
    return None


def _add(walk: _Walk, value: Node, labels: Tensor, user: Node) -> None:
    others = [a for a in user.args[:2] if a is not value]
    plain = _is_plain(walk, labels)
    labels = labels.expand(concrete_shape(user))  # a summand may broadcast
    for other in others:
        if not isinstance(other, Node) or not plain:
            reason = f"{place(user)} adds something that cannot be scaled"
            return walk.block(user, reason, labels)
        if not _claim(walk, other, labels):
            reason = f"{place(user)} adds {place(other)}, which cannot be scaled"
            return walk.block(user, reason, labels)
    return walk.add(user, labels)


def _claim(walk: _Walk, node: Node, labels: Tensor) -> bool:
    """Grow the region upstream to the writer of another summand; false where there is none."""
    if node in walk.visited:
        return True
    shape = concrete_shape(node)
    if shape[-1:] != [labels.shape[-1]]:
        return False
    # It may broadcast over the other axes.
    labels = torch.arange(shape[-1], dtype=torch.int32).expand(shape)
    if _is_writer(walk.draft, node):
        if channel_axis(node) != labels.ndim - 1:
            return False
        walk.region.writers.append(node)
        walk.add(node, labels)
        return True
    if node.target in SHAPE_KEEPING or keeps_last_axis(node):
        walk.add(node, labels)
        return _claim(walk, operand(node, 0), labels)
    if node.target in ADDS and all(isinstance(a, Node) for a in node.args[:2]):
        walk.add(node, labels)
        left, right = (_claim(walk, operand(node, i), labels) for i in (0, 1))
        return left and right
    if node.target in MULS and _is_number(walk, operand(node, 1)):
        walk.region.only_scale = True
        walk.add(node, labels)
        return _claim(walk, operand(node, 0), labels)
    return False


def _is_number(walk: _Walk, factor: Any) -> bool:
    """Whether a factor is one constant number for all channels."""
    if isinstance(factor, Node):
        return walk.draft.is_constant(factor) and walk.draft.constant(factor).numel() == 1
    return isinstance(factor, (int, float))


def _multiply(walk: _Walk, value: Node, labels: Tensor, user: Node) -> None:
    walk.region.only_scale = True
    others = [a for a in user.args[:2] if a is not value]
    if (user.target is aten.div.Tensor and user.args[0] is not value) or not others:
        return walk.block(user, f"{place(user)} is not linear in it", labels)
    if isinstance(others[0], Node) and others[0] in walk.visited:
        return walk.block(user, f"{place(user)} multiplies it by itself", labels)
    if not _is_even(labels, others[0]):
        walk.separate(labels)
    return walk.add(user, labels.expand(concrete_shape(user)))


def _is_even(labels: Tensor, factor: Any) -> bool:
    """Whether a factor is the same for all channels, at each place of the other axes."""
    if not isinstance(factor, Node):
        return True
    value = factor.meta["val"]
    if not isinstance(value, Tensor):
        return True
    sizes = [1] * (labels.ndim - value.ndim) + concrete_shape(factor)
    return len(sizes) == labels.ndim and all(
        size == 1 or bool((labels == labels.narrow(axis, 0, 1)).all())
        for axis, size in enumerate(sizes)
    )


def _attend(walk: _Walk, value: Node, labels: Tensor, user: Node) -> None:
    query, key, values = (operand(user, i) for i in range(3))
    if values is not value or value in (query, key):
        return walk.block(user, f"{place(user)} takes it as query or key", labels)
    if labels.ndim != 4:
        reason = f"{place(user)} does not take it as (batch, heads, sequence, size)"
        return walk.block(user, reason, labels)
    heads, kv_heads = concrete_shape(query)[1], labels.shape[1]
    row = labels[:, :, :1, :].repeat_interleave(heads // kv_heads, 1)
    if not bool((labels == labels[:, :, :1, :]).all()):
        return walk.block(user, f"{place(user)} mixes channels along the sequence", labels)
    walk.region.attentions.append(Attention(user, _rows(labels)))
    return walk.add(user, row.expand(concrete_shape(user)))


def before_repeat(attention: Node, index: int) -> tuple[Node, int]:
    """Where a query, key or value enters the chain that repeats its heads for the attention.

    Args:
        attention: reads four-dimensional heads.
        index: 0, 1 or 2 for query, key and value.

    Returns:
        A reader and the position of its operand; the attention itself where nothing is repeated.
    """
    reader, position = attention, index
    while True:
        source: Any = operand(reader, position)
        before = operand(source, 0) if source.op == "call_function" else None
        if (
            source.target not in MOVES
            or not isinstance(before, Node)
            or concrete_shape(before)[-1:] != concrete_shape(source)[-1:]
            or len(concrete_shape(before)) < 4
            or len(source.users) > 1
        ):
            return reader, position
        reader, position = source, 0
