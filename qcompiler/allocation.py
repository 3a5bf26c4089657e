"""Choose one option for each unit: an exact integer program, and two baselines.

    minimise  Σ loss(u, o) x(u, o)
    subject to  Σ_o x(u, o) = 1 for each u,  Σ cost_r(u, o) x(u, o) ≤ limit_r for each r

x(u, o) ∈ {0, 1} (arXiv 2411.06084, equation 16, with measured losses and costs in place of bits),
solved by HiGHS through scipy's `milp`. The loss is additive; what that leaves out is found by
measuring the plans that come out.

Baselines: greedy (from the cheapest options upwards, each time the step with the most loss removed
for each byte), and the closed form of theorem 8, b = ½ log₂(α σ² / λ), λ found by bisection and b
rounded to the nearest bits that there are.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from qcompiler.errors import InputError
from qcompiler.study import Option, Unit

Choice = tuple[int, ...]  # index of the chosen option, for each unit
Cost = Callable[[Unit, Option], float]


@dataclass(frozen=True)
class Limit:
    """What the sum of a cost over the units may be.

    Attributes:
        name: for people, with its unit: "bits a weight", "MB", "ms".
        cost: of one option of one unit.
        limit: of the sum.
    """

    name: str
    cost: Cost
    limit: float


def total(units: Sequence[Unit], choice: Choice, cost: Cost) -> float:
    """The sum of a cost over the chosen options."""
    return sum(cost(u, u.options[i]) for u, i in zip(units, choice, strict=True))


def measure(name: str) -> Cost:
    """One of the study's measures, as a cost."""
    return lambda unit, option: max(0.0, option.measures.get(name, 0.0))


def bits(unit: Unit, option: Option) -> float:
    """Bits of the unit's weights, scales not counted."""
    return float(option.bits * unit.weights)


def size(unit: Unit, option: Option) -> float:
    """Bytes of the unit's weights, scales included."""
    return float(option.bytes)


def latency(phase: str) -> Cost:
    """Milliseconds of the unit in a phase; only where they were measured."""
    return lambda unit, option: float(option.latency[phase])


def solve(units: Sequence[Unit], objective: Cost, limits: Sequence[Limit]) -> Choice:
    """The options with the least sum of `objective` within the limits.

    Raises:
        InputError: nothing is within the limits; names the nearest limit that can be kept.
    """
    index = [(i, j) for i, unit in enumerate(units) for j in range(len(unit.options))]
    loss = np.array([objective(units[i], units[i].options[j]) for i, j in index])
    loss = np.nan_to_num(loss, posinf=1e30)
    scale = loss[loss > 0].min() if (loss > 0).any() else 1.0
    one = np.zeros((len(units), len(index)))
    for column, (i, _) in enumerate(index):
        one[i, column] = 1
    constraints = [LinearConstraint(one, 1, 1)]
    for limit in limits:
        cost = np.array([limit.cost(units[i], units[i].options[j]) for i, j in index])
        cheapest = sum(
            min(cost[c] for c, (u, _) in enumerate(index) if u == i) for i in range(len(units))
        )
        if cheapest > limit.limit * (1 + 1e-9):
            raise InputError(
                f"{limit.name}: {limit.limit:.4g} cannot be reached; the least that these formats "
                f"allow is {cheapest:.4g}"
            )
        most = max(abs(limit.limit), 1e-12)
        constraints.append(LinearConstraint(cost[None] / most, -np.inf, limit.limit / most))
    # Losses span many orders of magnitude; HiGHS works to 1e-7 of the largest coefficient.
    with _stdout_on_stderr():
        found = milp(
            np.minimum(loss / scale, 1e9),
            constraints=constraints,
            integrality=np.ones(len(index)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 1e-6, "time_limit": 60},
        )
    if found.x is None:
        names = ", ".join(f"{limit.name} ≤ {limit.limit:.4g}" for limit in limits)
        raise InputError(f"no choice of formats keeps {names} together; loosen one of them")
    chosen = [0] * len(units)
    for column, (i, j) in enumerate(index):
        if found.x[column] > 0.5:
            chosen[i] = j
    return tuple(chosen)


@contextlib.contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    """HiGHS prints a line now and then, whatever its options say, and stdout may be JSON."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is no stdout
        yield
        return
    try:
        os.dup2(2, 1)
        yield
        ctypes.CDLL(None).fflush(None)  # what C code holds back goes where it was written to
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def greedy(units: Sequence[Unit], objective: Cost, limit: Limit) -> Choice:
    """From the cheapest options upwards, by the loss removed for each unit of cost.

    Raises:
        InputError: even the cheapest options exceed the limit.
    """

    def cheapest(unit: Unit) -> int:
        return min(range(len(unit.options)), key=lambda j: limit.cost(unit, unit.options[j]))

    chosen = [cheapest(unit) for unit in units]
    spent = total(units, tuple(chosen), limit.cost)
    if spent > limit.limit * (1 + 1e-9):
        raise InputError(
            f"{limit.name}: {limit.limit:.4g} cannot be reached; the least that these formats "
            f"allow is {spent:.4g}"
        )
    while True:
        best: tuple[float, int, int, float] | None = None
        for i, unit in enumerate(units):
            now = unit.options[chosen[i]]
            for j, option in enumerate(unit.options):
                more = limit.cost(unit, option) - limit.cost(unit, now)
                gain = objective(unit, now) - objective(unit, option)
                if gain <= 0 or spent + more > limit.limit * (1 + 1e-9):
                    continue
                rate = gain / more if more > 0 else math.inf
                if best is None or rate > best[0]:
                    best = (rate, i, j, more)
        if best is None:
            return tuple(chosen)
        _, i, j, more = best
        chosen[i], spent = j, spent + more


def closed_form(units: Sequence[Unit], limit: Limit, inputs: Mapping[str, float]) -> Choice:
    """Theorem 8 of arXiv 2411.06084: b = ½ log₂(α σ² / λ) for every unit.

    Args:
        units: with the variance σ² of their weights.
        limit: on a cost that grows with the bits.
        inputs: unit's name → α, how much the model's output feels a unit of noise on its weights.

    Returns:
        The choice with the smallest λ that keeps the limit, each b rounded to the nearest option.
    """
    ideal = np.array([math.log2(max(inputs[u.name] * u.variance, 1e-300)) / 2 for u in units])

    def rounded(shift: float) -> Choice:
        return tuple(
            min(range(len(u.options)), key=lambda j: abs(u.options[j].bits - (b - shift)))
            for u, b in zip(units, ideal, strict=True)
        )

    low, high = float(ideal.min()) - 64, float(ideal.max()) + 1
    for _ in range(80):
        middle = (low + high) / 2
        if total(units, rounded(middle), limit.cost) > limit.limit * (1 + 1e-9):
            low = middle
        else:
            high = middle
    return rounded(high)


def noise_weights(units: Sequence[Unit]) -> dict[str, float]:
    """α of each unit: its loss for each unit of noise on its weights, from its coarsest option.

    Uniform noise of b bits has the power σ² · 2^(−2b) up to a constant (theorem 8's assumption), so
    α = loss · 2^(2b) / σ².
    """
    found = {}
    for unit in units:
        option = unit.options[0]
        loss = max(option.measures.get("kl", 0.0), 1e-30)
        found[unit.name] = loss * 4.0**option.bits / max(unit.variance, 1e-30)
    return found


def neighbours(
    units: Sequence[Unit], choice: Choice, objective: Cost, limits: Sequence[Limit]
) -> list[Choice]:
    """Choices that differ in two units, one made finer and one coarser, within the limits.

    Those come first of which the additive model expects the most.
    """
    found: dict[Choice, float] = {}
    base = {limit.name: total(units, choice, limit.cost) for limit in limits}
    steps = [
        (i, j)
        for i, unit in enumerate(units)
        for j in (choice[i] - 1, choice[i] + 1)
        if 0 <= j < len(unit.options)
    ]

    def change(cost: Cost, i: int, j: int) -> float:
        unit = units[i]
        return cost(unit, unit.options[j]) - cost(unit, unit.options[choice[i]])

    for i, j in steps:
        for k, m in [(i, j), *steps]:
            pair = {(i, j), (k, m)}
            if (i == k and j != m) or any(
                base[x.name] + sum(change(x.cost, *s) for s in pair) > x.limit * (1 + 1e-9)
                for x in limits
            ):
                continue
            changed = list(choice)
            changed[i], changed[k] = j, m
            found[tuple(changed)] = sum(change(objective, *s) for s in pair)
    return sorted(found, key=found.__getitem__)
