"""Apply smoothing factors: divide a tensor by them, and multiply what reads it.

    x Wᵀ + b = ((x − z)/s) (W diag(s))ᵀ + (b + W z)

SmoothQuant (Xiao 2023, eq. 3); the shift is Outlier Suppression+'s (Wei 2023, eq. 3). Where the
layers that write x can take the factor it costs nothing when the model runs; otherwise one
multiplication by 1/s is inserted between x and its linears, and x itself, which something else
reads as well, stays.

Refused, with the reason: tensors whose writers cannot take the factor when no multiplication may
be inserted.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler.op_families import LINEAR
from qcompiler.plan import Factor
from qcompiler.regions import Region, find_regions
from qcompiler.rewrite import Draft, rewrite
from qcompiler.scaling import merge_obstacle, scale_writer

aten = torch.ops.aten


@rewrite(exact=True)
def smooth(draft: Draft, factors: Mapping[str, Factor], insert: bool = True) -> None:
    """Smooth the named tensors."""
    nodes = {n.name: n for n in draft.graph.nodes}
    regions = {reader.node: region for region in find_regions(draft) for reader in region.readers}
    merged = inserted = 0
    for name, factor in factors.items():
        source = nodes[name]
        readers = [u for u in source.users if u.target is LINEAR and u.args[0] is source]
        region = regions.get(readers[0])
        reason = "nothing that writes it has weights"
        if region is not None:
            reason = merge_obstacle(draft, region) or ""
        if factor.merged and region is not None and not reason:
            _merge(draft, region, factor)
            merged += 1
        elif insert:
            _insert(draft, source, readers, factor)
            inserted += 1
        else:
            draft.refuse(source, reason)
    if merged:
        draft.note(f"{merged} factors merged into the layers before")
    if inserted:
        draft.note(f"{inserted} multiplications inserted")


def _scale_reader(draft: Draft, reader: Node, scale: Tensor, shift: Tensor) -> None:
    weight = draft.constant(reader.args[1]).double()
    if bool((shift != 0).any()):
        bias = reader.args[2] if len(reader.args) > 2 else None
        old = (
            draft.constant(bias).double()
            if isinstance(bias, Node)
            else torch.zeros(len(weight)).double()
        )
        fresh = draft.add_constant(f"{reader.name}_bias", (old + weight @ shift).float())
        reader.args = (reader.args[0], reader.args[1], fresh)
    draft.set_constant(reader.args[1], (weight * scale).float())


def _merge(draft: Draft, region: Region, factor: Factor) -> None:
    scale = torch.ones(region.size, dtype=torch.float64)
    shift = torch.zeros(region.size, dtype=torch.float64)
    for reader in region.readers:
        scale[reader.channels] = factor.scale.double()
        shift[reader.channels] = factor.shift.double()
    for writer in region.writers:
        scale_writer(draft, writer, scale, shift)
    for reader in region.readers:
        _scale_reader(draft, reader.node, scale[reader.channels], shift[reader.channels])


def _insert(draft: Draft, source: Node, readers: list[Node], factor: Factor) -> None:
    reciprocal = draft.add_constant(f"{source.name}_smoothing", (1 / factor.scale.double()).float())
    scaled = draft.call(aten.mul.Tensor, source, reciprocal, before=readers[0], like=source)
    for reader in readers:
        draft.set_input(reader, 0, scaled)
        # The weight takes the inverse of what the float32 multiplication really does.
        _scale_reader(
            draft, reader, 1 / draft.constant(reciprocal).double(), torch.zeros(1).double()
        )
