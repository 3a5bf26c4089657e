"""Round the weights of linears: an analysis, Program × Plan × batches → rounded weights.

Layer by layer, each seeing what those before it really give: the program stands still at the first
of the linears that read one tensor, H = 2 X Xᵀ is summed over the batches, their weights are
rounded, and the program goes on with them (Frantar 2022, "GPTQ"; see `qcompiler.rounding`). With
method "rtn" the weights are rounded to nearest, which with `clip` needs H as well.

Memory: what `Stages` holds, one H (inputs² float64), and the integers of what was rounded; their
floats exist while a stage runs through them. With a journal each rounded weight is kept in a file,
and a later run with the same program, plan, settings and data takes it from there; it runs the
batches again, with the same weights, so the rest gets the same bits.

A singular H is damped more until it can be inverted, a channel that never fires keeps its nearest
rounding, and rows (tokens) with a NaN or infinity are left out of H: all three are noted. A layer
that would lose too many rows is refused. Activations are not quantized on the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from qcompiler.errors import InputError
from qcompiler.hessian import Hessian
from qcompiler.journal import Journal
from qcompiler.op_families import LINEAR
from qcompiler.outliers import round_weight
from qcompiler.plan import Plan, Rounded, Site
from qcompiler.program import Batch, Program
from qcompiler.rewrite import operand, place
from qcompiler.rounding import DAMPING, Factor, keep_moment, memory_needed
from qcompiler.stages import BUDGET, Stages


@torch.no_grad()
def round_weights(
    program: Program,
    plan: Plan,
    batches: Iterable[Batch],
    mask: str = "",
    *,
    method: str = "gptq",
    clip: bool = False,
    moment: bool = False,
    journal: Journal | None = None,
    outliers: Mapping[str, int] | None = None,
) -> dict[Site, Rounded]:
    """Round the weights of the plan's linears.

    Args:
        program: before `insert_qdq`.
        plan: the formats; convolutions and embeddings are left to nearest rounding.
        batches: calibration data; read once.
        mask: name of the input that is 0 at padding.
        method: "gptq" or "rtn" (to nearest).
        clip: search how far each scale's range may be cut.
        moment: correct the scales so that the weights' second moment is kept.
        journal: where rounded weights are kept and taken from.
        outliers: node → weights of each row that stay beside the grid.

    Returns:
        For each linear's weight site the weight on its grid, with scale and zero point.

    Raises:
        InputError: NaN or infinity in too many rows of a layer's inputs, or values whose squares
            overflow, the layer named; or too little memory, which is foreseen.
    """
    sites = {site.node: site for site in plan if site.operand == 1}
    wanted = [n for n in program.exported.graph.nodes if n.target is LINEAR and n.name in sites]
    found: dict[Site, Rounded] = {}
    if not wanted:
        return found
    constants = program.constants()
    if method == "gptq":
        _foresee([tuple(constants[operand(n, 1).name].shape) for n in wanted])
    data = list(batches)
    masks = [dict(zip(program.inputs, b, strict=True)).get(mask) for b in data]
    with Stages(program, data, outputs=0) as stages:
        for first in wanted:
            if sites[first.name] in found:
                continue
            stages.advance(first)
            # Query, key and value read one tensor: one H and its factor for all.
            x = operand(first, 0)
            seen: Hessian | None = None
            factor: Factor | None = None
            for node in (n for n in wanted if operand(n, 0) is x):
                rounded = journal.get(node.name) if journal is not None else None
                if rounded is None:
                    kind = plan[sites[node.name]].qtype
                    weight = constants[operand(node, 1).name]
                    try:
                        seen = seen or Hessian.of(stages.values(x), masks)
                        if method == "gptq":
                            factor = factor or Factor.of(seen.matrix)
                        count = (outliers or {}).get(node.name, 0)
                        rounded = round_weight(weight, kind, seen.matrix, factor, clip, count)
                    except InputError as error:
                        raise InputError(f"{place(node)}: {error}") from error
                    rounded = replace(rounded, rows=seen.rows, left_out=seen.left_out)
                    if moment:
                        rounded = keep_moment(weight, rounded, kind)
                    if journal is not None:
                        journal.put(node.name, rounded)
                found[sites[node.name]] = rounded
                stages.replaced[node] = partial(getattr, rounded, "whole")
    return found


def _foresee(shapes: list[tuple[int, ...]]) -> None:
    """Stop before it starts what would run out of memory."""
    rounded = sum(math.prod(shape) for shape in shapes)  # int8, and few scales
    need = BUDGET + rounded + max(memory_needed(*shape) for shape in shapes)
    free = free_memory()
    if free is not None and need > free:
        raise InputError(
            f"GPTQ needs about {need / 1e9:.1f} GB beside the model, and {free / 1e9:.1f} GB are "
            "free: free some memory, or round to nearest (--set rounding=rtn)"
        )


def free_memory() -> int | None:
    """Bytes that a process can still get without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def rounding_notes(rounded: Mapping[Site, Rounded]) -> list[str]:
    """What the report should know: layers whose Hessian was singular, inputs that never fired."""
    raised = {site: r.damping for site, r in rounded.items() if r.damping > DAMPING}
    silent = {site: r.silent for site, r in rounded.items() if r.silent}
    spoiled = {site: r for site, r in rounded.items() if r.left_out}
    notes = [f"{len(rounded)} weights rounded"] if rounded else []
    if raised:
        worst = max(raised, key=raised.__getitem__)
        notes.append(
            f"singular Hessian in {len(raised)} layers: damping raised, up to {raised[worst]:g} of "
            f"the mean diagonal in {worst.path or worst.node}"
        )
    if spoiled:
        first = next(iter(spoiled))
        worst = max(spoiled, key=lambda site: spoiled[site].left_out)
        notes.append(
            f"NaN or Inf in the inputs of {len(spoiled)} layers, the first of them "
            f"{first.path or first.node}; these tokens were left out, most in "
            f"{worst.path or worst.node} ({spoiled[worst].left_out} of {spoiled[worst].rows})"
        )
    if silent:
        most = max(silent, key=silent.__getitem__)
        notes.append(
            f"{sum(silent.values())} inputs of {len(silent)} layers never fired in calibration and "
            f"keep nearest rounding, most in {most.path or most.node} ({silent[most]})"
        )
    return notes
