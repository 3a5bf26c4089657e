"""Choose AWQ's factors: scale up the weight columns that large activations meet.

An analysis, Program × Observations → factors, which `smooth` applies. Rounding errors of a column
are multiplied by what the column reads, so columns with large inputs are scaled up before rounding
and their inputs down by as much (Lin 2023, "AWQ", section 3.2, eq. 5):

    s_c = (E|x_c|)^α,   α = argmin ‖Q(W diag(s)) diag(s)⁻¹ X − W X‖²

over a grid of α from 0 (no scaling) to 1, on the sampled rows. Only where the layers that write the
tensor can take 1/s: a multiplication at run time would cost more than it gains.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler.observe import Observations
from qcompiler.op_families import LINEAR
from qcompiler.plan import Factor, Plan
from qcompiler.program import Program
from qcompiler.qtype import QType
from qcompiler.regions import Region, find_regions
from qcompiler.rewrite import Draft, operand
from qcompiler.rounding import weight_axis
from qcompiler.scaling import merge_obstacle

ALPHAS = tuple(step / 20 for step in range(1, 20))


def awq_sites(program: Program) -> dict[str, int]:
    """The tensors to observe before `search_awq`: node → channel axis."""
    return {source.name: -1 for source, _ in _candidates(Draft(program))}


def search_awq(program: Program, observations: Observations, plan: Plan) -> dict[str, Factor]:
    """Factors by the name of the tensor; tensors that gain nothing are left out.

    Args:
        program: before Q/DQ.
        observations: of `awq_sites`.
        plan: the formats of the weights.
    """
    draft = Draft(program)
    formats = {site.node: assignment.qtype for site, assignment in plan.items()}
    found = {}
    for source, region in _candidates(draft):
        readers = [reader.node for reader in region.readers]
        kinds = [formats.get(node.name) for node in readers]
        if any(kind is None or kind.bits >= 8 for kind in kinds):
            continue
        weights = [draft.constant(node.args[1]) for node in readers]
        rows = observations[source.name].rows
        factor = _search(weights, [k for k in kinds if k], rows, region.readers[0].channels)
        if factor.gain > 0:
            found[source.name] = factor
    return found


def _candidates(draft: Draft) -> list[tuple[Node, Region]]:
    """Tensors that linears read and whose writers can take a factor, each with its region."""
    found = []
    for region in find_regions(draft):
        sources = {operand(reader.node, 0) for reader in region.readers}
        if merge_obstacle(draft, region) or len(sources) != 1:
            continue
        if all(reader.node.target is LINEAR for reader in region.readers):
            found.append((sources.pop(), region))
    return found


def _search(weights: list[Tensor], kinds: list[QType], rows: Tensor, tie: Tensor) -> Factor:
    power = rows.T @ rows
    mean = _tied(rows.abs().mean(0), tie).clamp(min=1e-8)
    ones = torch.ones_like(mean)
    base = _loss(weights, kinds, power, ones)
    best, scale, method = base, ones, "none"
    for alpha in ALPHAS:
        trial = mean.pow(alpha)
        trial = trial / (trial.max() * trial.min()).sqrt()
        loss = _loss(weights, kinds, power, trial)
        if loss < best:
            best, scale, method = loss, trial, f"AWQ {alpha:g}"
    gain = 10 * math.log10(max(base, 1e-300) / max(best, 1e-300))
    return Factor(scale, torch.zeros_like(scale), True, method, gain)


def _loss(weights: list[Tensor], kinds: list[QType], power: Tensor, scale: Tensor) -> float:
    """Σ ‖(Q(W s)/s − W) X‖² over the readers."""
    total = 0.0
    for weight, kind in zip(weights, kinds, strict=True):
        delta = kind.round_trip(weight * scale, weight_axis(kind)) / scale - weight
        total += float(((delta @ power) * delta).sum(dtype=torch.float64))
    return total


def _tied(value: Tensor, tie: Tensor) -> Tensor:
    """One value, the mean, for all inputs that carry one channel of the writer."""
    count = int(tie.max()) + 1
    sums = torch.zeros(count).index_add_(0, tie, value)
    sizes = torch.zeros(count).index_add_(0, tie, torch.ones_like(value))
    return (sums / sizes.clamp(min=1))[tie]
