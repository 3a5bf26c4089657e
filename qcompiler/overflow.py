"""Numbers that float16 has not: found before a model is written in it.

float16 ends at 65504. Language models have single activations beyond (Sun 2024, Massive
Activations in Large Language Models), which become infinite, and then NaN in the next norm. What a
mask adds is beyond float16 too, on purpose: it may become infinite.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.fx import Node

from qcompiler import ops
from qcompiler.op_families import LINEAR
from qcompiler.program import Batch, Program
from qcompiler.rewrite import module_path, operand

LARGEST = 65504.0
HIDING = 1e30  # magnitudes from here on are those of masks


def peak(
    program: Program, batch: Batch, among: Collection[Node] | None = None
) -> tuple[Node, float] | None:
    """The node with the largest number beyond float16, and its magnitude; None where none is.

    Args:
        program: float or quantized; what it computes in float32 is looked at.
        batch: one tensor for each input.
        among: the nodes that matter; all when not given.
    """
    found: list[tuple[Node, float]] = []

    def watch(node: Node, result: Any) -> None:
        if among is not None and node not in among:
            return
        for x in result if isinstance(result, tuple) else (result,):
            if not isinstance(x, torch.Tensor) or not x.is_floating_point() or not x.numel():
                continue
            size = x.abs()
            top = float(size.max())
            if top >= HIDING:
                top = float(torch.where(size < HIDING, size, 0.0).max())
            if top > LARGEST:
                found.append((node, top))

    program.run(batch, watch)
    return max(found, key=lambda entry: entry[1], default=None)


def warning(program: Program, batch: Batch, generated: bool = False) -> str | None:
    """What to tell a user whose model is about to be written in float16; None where it fits.

    Args:
        program, batch: as for `peak`.
        generated: whether kernels that know no bfloat16 multiply the weights.
    """
    most = peak(program, batch)
    if most is None:
        return None
    node, value = most
    where = f"'{node.name}', {module_path(node) or 'the model'}"
    return (
        f"numbers reach {value:.3g} ({where}) on held-out data and float16 ends at 65504: outputs "
        f"may be infinite or NaN; use --set products=bfloat16{', without --kernels' * generated}"
    )


def warning_of_products(program: Program, batch: Batch) -> str | None:
    """As `warning`, where float16 is only what linears with quantized weights read."""
    readers: dict[Node, list[str]] = {}
    for node in program.exported.graph.nodes:
        given = node.target is LINEAR and operand(node, 1).target is ops.dequantize
        if given and operand(node, 0).target is not ops.dequantize:
            readers.setdefault(operand(node, 0), []).append(module_path(node))
    most = peak(program, batch, readers)
    if most is None:
        return None
    paths = readers[most[0]]
    return (
        f"'{paths[0]}' reads numbers up to {most[1]:.3g} on held-out data, rounded to float16, "
        "which ends at 65504: outputs may be infinite or NaN; use --set "
        f"keep_float={','.join(dict.fromkeys(paths))}"
    )
