"""Measure what each format's error costs to first and second order: an analysis of a study's units.

One backward pass for each batch and draw of the output (`divergence.sampled_gradient`) gives the
gradient g of every weight; with Ŵ − W of each format, as the study rounded it,

    first  = mean |gᵀ(Ŵ − W)|                 (LLM-MQ, Li 2023)
    second = ½ E‖g‖²/n · ‖Ŵ − W‖²            E‖g‖² estimates the trace of the Fisher information,
                                              the Hessian of the divergence at zero error (HAWQ,
                                              Dong 2019; APTQ, Guan 2024)

Memory: of the activations of one batch those of about √n of the n calls, the rest being computed
again; and the gradient of one weight, used and dropped as soon as the backward pass has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from qcompiler.differentiable import differentiable
from qcompiler.divergence import counting, sampled_gradient
from qcompiler.program import Batch, Program, unpadded
from qcompiler.rewrite import operand
from qcompiler.study import Findings, Settings, Unit, with_options


def measure_gradients(
    program: Program,
    units: Mapping[int, Unit],
    batches: Sequence[Batch],
    settings: Settings,
    findings: Findings,
    probes: int = 2,
) -> dict[int, Unit]:
    """The units with `first` and `second` on every option.

    Args:
        program: as for `measure_sensitivity`.
        units: measured.
        batches: real data; the last `settings.trials` are used, one at a time.
        settings: as for `measure_sensitivity`.
        findings: with the rounded weights.
        probes: draws of the output for each batch.
    """
    constants = program.constants()
    nodes = {n.name: n for n in program.exported.graph.nodes}
    leaves = {
        operand(nodes[name], 1).name: constants[operand(nodes[name], 1).name]
        .detach()
        .requires_grad_()
        for unit in units.values()
        for name in unit.nodes
    }

    @lru_cache(maxsize=1)  # a unit's layers come one after the other
    def moved(index: int) -> dict[str, list[Tensor]]:
        """Ŵ − W of a unit's layers, by format."""
        exact = [constants[operand(nodes[name], 1).name] for name in units[index].nodes]
        return {
            text: [make() - w for make, w in zip(makers, exact, strict=True)]
            for text, makers in findings.weights(index).items()
        }

    segments = max(1, math.isqrt(len(nodes)))
    squares = dict.fromkeys(units, 0.0)
    products: dict[tuple[int, str], float] = {}
    signed: dict[tuple[int, str], float] = {}  # gᵀ(Ŵ − W) of one probe, layer after layer
    total, count = 0, 0

    readers: dict[str, list[tuple[int, int]]] = {}  # by weight: units, and which of their layers
    for index, unit in units.items():
        for place, name in enumerate(unit.nodes):
            readers.setdefault(operand(nodes[name], 1).name, []).append((index, place))

    def take(places: Sequence[tuple[int, int]], leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        with torch.no_grad():
            for index, place in places:
                squares[index] += float(gradient.double().square().sum())
                for text, errors in moved(index).items():
                    part = float((gradient * errors[place]).sum(dtype=torch.float64))
                    signed[index, text] = signed.get((index, text), 0.0) + part

    for name, places in readers.items():
        leaves[name].register_post_accumulate_grad_hook(partial(take, places))
    for number, batch in enumerate(batches[-settings.trials :]):
        mask = dict(zip(program.inputs, batch, strict=True)).get(settings.mask)
        with torch.enable_grad():
            made = differentiable(program, batch, leaves, None, counting(settings.logits), segments)
        used = [t for t in made if t.requires_grad]
        rows = unpadded(used[0].detach()[..., :1], mask).numel()
        count += rows if settings.logits else rows * used[0].shape[-1]
        for probe in range(probes):
            seed = number * probes + probe
            drawn = [sampled_gradient(t, mask, settings.logits, seed) for t in used]
            last = probe == probes - 1
            torch.autograd.backward(used, drawn, retain_graph=not last, inputs=[*leaves.values()])
            for key, value in signed.items():
                products[key] = products.get(key, 0.0) + abs(value)
            signed.clear()
            total += 1
    measured = {}
    for index, unit in units.items():
        mean = squares[index] / max(1, count * probes)  # tr(F) for each row
        distances = {
            text: sum(float(e.double().square().sum()) for e in errors)
            for text, errors in moved(index).items()
        }
        options = []
        for option in unit.options:
            measures = {
                **option.measures,
                "first": products.get((index, option.format), 0.0) / max(1, total),
                "second": 0.5 * mean / unit.weights * distances.get(option.format, 0.0),
            }
            options.append(replace(option, measures=measures))
        measured[index] = with_options(unit, options)
    return measured
