"""Move each norm's scale and shift into the layers that read it, its mean into those that write it.

    linear(norm(x) · γ + β, W, b) = linear(norm(x), W · diag(γ), b + W β)

With `center=True` the mean subtraction of LayerNorm moves as well: it is the linear map
C = I − 11ᵀ/n, so the writers of the stream take W' = C W and b' = C b, and LayerNorm becomes
RMSNorm (QuaRot, Ashkboos 2024, section 4.1; SliceGPT, Ashkboos 2024, section 3.2).

Refused: a norm whose value something else reads as well (the residual of a post-norm block), a
reader whose weight has other readers, convolutions as readers of a shift (padding is zero before
the shift, not after it).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler.op_families import ADDS, LINEAR, MULS, NORMS, SHAPE_KEEPING, keeps_last_axis
from qcompiler.regions import Reader, Region, find_regions
from qcompiler.rewrite import Draft, operand, place, rewrite
from qcompiler.scaling import reader_obstacle

aten = torch.ops.aten


@rewrite(exact=True)
def fold_norm(draft: Draft, center: bool = False) -> None:
    """Fold γ and β of LayerNorm and RMSNorm into their readers.

    With `center`, the mean into the writers.
    """
    folded = 0
    for region in find_regions(draft):
        norm = region.writers[0]
        if norm.target not in NORMS or _is_plain(draft, norm):
            continue
        reason = _obstacle(draft, region)
        if reason:
            draft.refuse(norm, reason)
            continue
        _fold(draft, norm, region)
        folded += 1
    if folded:
        draft.note(f"{folded} norms folded into their readers")
    if center:
        _center(draft)


def _affine(draft: Draft, norm: Node) -> tuple[Tensor, Tensor | None]:
    gamma = draft.constant(norm.args[2])
    shift = operand(norm, 3) if norm.target is aten.layer_norm.default else None
    return gamma, draft.constant(shift) if shift is not None else None


def _is_plain(draft: Draft, norm: Node) -> bool:
    gamma, beta = _affine(draft, norm)
    return bool((gamma == 1).all()) and (beta is None or bool((beta == 0).all()))


def _obstacle(draft: Draft, region: Region) -> str | None:
    """Why a norm's region cannot take its scale and shift, or None."""
    if region.blockers:
        return region.blockers[0].reason
    if len(region.writers) > 1:
        return f"{place(region.writers[1])} writes into the same stream"
    obstacle = reader_obstacle(region)
    if obstacle:
        return obstacle
    gamma, beta = _affine(draft, region.writers[0])
    if region.only_scale and bool((gamma <= 0).any()):
        return "an op between the norm and its reader commutes with positive factors only"
    shifts = beta is not None and bool((beta != 0).any())
    if shifts and region.only_scale:
        return "an op between the norm and its reader commutes with scaling but not with the shift"
    if shifts and any(reader.node.target is not LINEAR for reader in region.readers):
        return "a convolution reads it: its padding is zero before the shift, not after it"
    return None


def _fold(draft: Draft, norm: Node, region: Region) -> None:
    gamma, beta = (None if t is None else t.double() for t in _affine(draft, norm))
    assert gamma is not None
    nodes = [operand(reader.node, 1) for reader in region.readers]
    weights = {node: draft.constant(node).double() for node in nodes}
    scaled: set[Node] = set()
    for reader in region.readers:
        weight_node = operand(reader.node, 1)
        weight = weights[weight_node]
        if beta is not None and reader.node.target is LINEAR:
            _add_bias(draft, reader, weight @ beta[reader.channels])
        if weight_node not in scaled:  # readers may share one weight
            scaled.add(weight_node)
            factor = gamma[reader.channels].reshape([1, -1] + [1] * (weight.ndim - 2))
            draft.set_constant(weight_node, (weight * factor).float())
    # Norms may share parameters: give this one its own.
    norm.update_arg(2, draft.add_constant(f"{norm.name}_ones", torch.ones_like(gamma).float()))
    if beta is not None:
        norm.update_arg(3, draft.add_constant(f"{norm.name}_zeros", torch.zeros_like(beta).float()))


def _add_bias(draft: Draft, reader: Reader, addition: Tensor) -> None:
    """Give the linear a bias of its own, larger by `addition` (float64, one for each output)."""
    node = reader.node
    bias = node.args[2] if len(node.args) > 2 else None
    old = draft.constant(bias).double() if isinstance(bias, Node) else torch.zeros_like(addition)
    fresh = draft.add_constant(f"{node.name}_bias", (old + addition).float())
    node.args = (node.args[0], node.args[1], fresh)


def _center(draft: Draft) -> None:
    """Fold the mean subtraction of LayerNorms into the writers of the stream that they read."""
    reached: set[Node] = set()
    for region in find_regions(draft):
        norms = [b.node for b in region.blockers if b.node.target is aten.layer_norm.default]
        if not norms or region.writers[0].target in NORMS:
            continue
        reached.update(norms)
        reason = _centre_obstacle(region, norms)
        if reason:
            for norm in norms:
                draft.refuse(norm, f"its mean cannot move into the writers: {reason}")
            continue
        shared = [w for w in region.writers if _weight_is_shared(w, region)]
        if shared:
            draft.refuse(
                norms[0],
                f"the weight of {place(shared[0])}, which writes the stream, has another reader",
            )
            continue
        for writer in region.writers:
            _center_writer(draft, writer)
        for norm in norms:
            _to_rms_norm(draft, norm)
        draft.note(f"{len(norms)} mean subtractions folded into {len(region.writers)} writers")
    for norm in draft.calls(aten.layer_norm.default):
        if norm.users and norm not in reached:
            draft.refuse(
                norm,
                "its mean cannot move into the writers: not all that it reads is written by "
                "weights",
            )


def _centre_obstacle(region: Region, norms: list[Node]) -> str | None:
    """Why the writers cannot take the mean subtraction of the norms that read them, or None."""
    others = [b for b in region.blockers if b.node not in norms]
    if others:
        return others[0].reason
    if region.readers:
        return f"{place(region.readers[0].node)} reads the stream"
    if bool(region.apart.any()):
        return "an op between the writers and the norm does not commute with it"
    for writer in region.writers:
        if writer.target not in (LINEAR, aten.embedding.default):
            return f"{place(writer)} writes into the stream"
    if not all(_is_sum_of(norm.args[0], region.writers) for norm in norms):
        return "channels move between the writers and the norm"
    return None


def _is_sum_of(value: Any, writers: list[Node]) -> bool:
    """Whether the value is a sum of the writers' outputs, channel by channel.

    Each may be multiplied by one number for all channels.
    """
    if not isinstance(value, Node):
        return False
    if value in writers:
        return True
    if keeps_last_axis(value):
        return _is_sum_of(value.args[0], writers)
    sources = value.args[:2] if value.target in ADDS else value.args[:1]
    return value.target in (*ADDS, *MULS, *SHAPE_KEEPING) and all(
        _is_sum_of(s, writers) for s in sources
    )


def _weight_is_shared(writer: Node, region: Region) -> bool:
    weight = operand(writer, 0 if writer.target is aten.embedding.default else 1)
    return bool(set(weight.users) - set(region.writers))


def _center_writer(draft: Draft, writer: Node) -> None:
    embedding = writer.target is aten.embedding.default
    weight_node = writer.args[0] if embedding else writer.args[1]
    weight = draft.constant(weight_node).double()
    centred = weight - weight.mean(1 if embedding else 0, keepdim=True)
    draft.set_constant(weight_node, centred.float())
    bias = writer.args[2] if not embedding and len(writer.args) > 2 else None
    if isinstance(bias, Node):
        old = draft.constant(bias).double()
        writer.update_arg(2, draft.add_constant(f"{writer.name}_bias", (old - old.mean()).float()))


def _to_rms_norm(draft: Draft, norm: Node) -> None:
    x, shape, gamma = (*norm.args, None)[:3]
    eps = norm.args[4] if len(norm.args) > 4 else 1e-5
    fused = draft.call(aten.rms_norm.default, x, shape, gamma, eps, before=norm)
    beta = norm.args[3] if len(norm.args) > 3 else None
    if isinstance(beta, Node) and bool((draft.constant(beta) != 0).any()):
        fused = draft.call(ADDS[0], fused, beta, before=norm)
    draft.swap(norm, fused)
