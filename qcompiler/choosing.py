"""Plans that are tried end to end: within limits, beside baselines, along the Pareto fronts.

The integer program proposes on each measure of the study; what is kept was measured (`mixer`).
"""

from __future__ import annotations

from collections.abc import Sequence

from qcompiler import allocation
from qcompiler.allocation import Choice, Limit
from qcompiler.errors import InputError
from qcompiler.mixer import Mixer, Point
from qcompiler.study import MEASURES

POINTS = 13  # budgets of the Pareto front
TRIALS = 10  # neighbours of a chosen plan that are measured as well, at each descent
DESCENTS = 3  # at most, from the best plan to a better neighbour
SEARCH = 6  # plans that are measured to find the cheapest within a loss


def propose(mixer: Mixer, limits: Sequence[Limit]) -> dict[str, Choice]:
    """Plans within the limits: one for each measure, and the two baselines for the first."""
    found: dict[str, Choice] = {}
    for name in MEASURES:
        found[f"integer program on {name}"] = allocation.solve(
            mixer.units, allocation.measure(name), limits
        )
    for label, choice in uniform_choices(mixer).items():
        kept = (
            allocation.total(mixer.units, choice, x.cost) <= x.limit * (1 + 1e-9) for x in limits
        )
        if all(kept):
            found[label] = choice
    if len(limits) == 1:
        found["greedy"] = allocation.greedy(mixer.units, allocation.measure("kl"), limits[0])
        noise = allocation.noise_weights(mixer.units)
        found["closed form"] = allocation.closed_form(mixer.units, limits[0], noise)
    return found


def best(mixer: Mixer, limits: Sequence[Limit]) -> tuple[Point, list[Point]]:
    """The plan with the least measured loss within the limits, and all that were measured."""
    mixer.say("measure plans")
    points = mixer.measure(propose(mixer, limits))
    best = min(points, key=lambda p: p.loss)
    for _ in range(DESCENTS):
        tried = {p.choice for p in points}
        near = allocation.neighbours(mixer.units, best.choice, allocation.measure("kl"), limits)
        fresh = [choice for choice in near if choice not in tried][:TRIALS]
        points += mixer.measure({f"{best.label}, changed ({i})": c for i, c in enumerate(fresh)})
        better = min(points, key=lambda p: p.loss)
        if better.loss >= best.loss:
            break
        best = better
    return best, points


def within(mixer: Mixer, loss: float, cost: allocation.Cost) -> tuple[Point, list[Point]]:
    """The cheapest plan whose measured loss is at most `loss`.

    The additive model proposes; where its plan loses more than it says, it is asked for less.

    Raises:
        InputError: no plan loses so little; says what the finest formats lose.
    """
    mixer.say("measure plans")
    points: list[Point] = []
    best: Point | None = None
    low, high = 0.0, loss * 4  # of the additive model
    asked = loss
    for step in range(SEARCH):
        limit = Limit("loss", allocation.measure("kl"), asked)
        choice = allocation.solve(mixer.units, cost, [limit])
        (point,) = mixer.measure({f"additive loss {asked:.3g}": choice})
        points.append(point)
        if point.loss <= loss:
            low = asked
            cheaper = best is None or allocation.total(
                mixer.units, choice, cost
            ) < allocation.total(mixer.units, best.choice, cost)
            best = point if cheaper else best
        else:
            high = asked
        asked = min(asked * loss / max(point.loss, 1e-30), high) if step == 0 else 0.0
        if not low < asked < high:
            asked = (low + high) / 2
    if best is None:
        raise InputError(
            f"max_loss: {loss:.3g} cannot be kept; the closest plan that was measured loses "
            f"{min(p.loss for p in points):.3g}: allow more, or add finer --set candidates="
        )
    return best, points


def uniform_choices(mixer: Mixer) -> dict[str, Choice]:
    """Every format for all units; those that do not have it stay float."""
    found: dict[str, Choice] = {}
    for wanted in map(str, mixer.formats):
        texts = [[o.format for o in unit.options] for unit in mixer.units]
        found[f"all {wanted}"] = tuple(t.index(wanted if wanted in t else "float") for t in texts)
    return found


def front(mixer: Mixer) -> list[Point]:
    """Measured plans between the fewest and the most bits, evenly spaced."""
    mixer.say("Pareto front")
    least = min(o.bits for u in mixer.units for o in u.options)
    most = max(o.bits for u in mixer.units for o in u.options if o.format != "float")
    choices: dict[str, Choice] = {}
    for step in range(POINTS):
        wanted = least + (most - least) * step / (POINTS - 1)
        choices[f"{wanted:.2f} bits"] = allocation.solve(
            mixer.units, allocation.measure("kl"), [mixer.bits_limit(wanted)]
        )
    return mixer.measure(choices)


def front_of_time(mixer: Mixer) -> list[Point]:
    """Measured plans between the fastest and the slowest, evenly spaced in time."""
    mixer.say("Pareto front of time")
    cost = mixer.latency_limit(1.0).cost
    ends = [[cost(u, o) for o in u.options] for u in mixer.units]
    least, most = sum(map(min, ends)), sum(map(max, ends))
    choices: dict[str, Choice] = {}
    for step in range(POINTS):
        wanted = least + (most - least) * step / (POINTS - 1)
        choices[f"{wanted:.2f} of the time"] = allocation.solve(
            mixer.units, allocation.measure("kl"), [mixer.latency_limit(wanted * (1 + 1e-9))]
        )
    return mixer.measure(choices)
