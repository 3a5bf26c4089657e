"""Sizes as formulas: what a program's code is for any size, from what it is for a few.

The code generator works at fixed sizes. Here the same program, taken at several, is compared number
by number: what stays is a constant, what moves is a polynomial in the sizes, found from some of the
probes and checked on all the others. Anything else is refused: another list of kernels at another
size, a constant whose contents change, a number that is no polynomial (a window, a remainder).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from fractions import Fraction
from typing import Any

from qcompiler.errors import UnsupportedError

DEGREES = (1, 2)  # of each size in a formula, tried in this order


@dataclass(frozen=True)
class Formula:
    """Σ coefficient · Π size^power.

    Attributes:
        names: of the sizes.
        terms: powers of the sizes, and their coefficient.
    """

    names: tuple[str, ...]
    terms: tuple[tuple[tuple[int, ...], int], ...]

    def at(self, sizes: Mapping[str, Any]) -> Any:
        """Its value, or its expression where the sizes are expressions."""
        total: Any = 0
        for powers, coefficient in self.terms:
            part: Any = coefficient
            for name, power in zip(self.names, powers, strict=True):
                for _ in range(power):
                    part = part * sizes[name]
            total = total + part
        return total


def probes(limits: Mapping[str, int]) -> list[dict[str, int]]:
    """Sizes to take a program at.

    A grid of three values of each size, from which formulas come, and the largest sizes and two
    more, on which they are checked. A size whose limit leaves fewer than four values of that has
    four between 2 and its limit in the grid, or all; 1, where a dimension's stride vanishes from
    the kernels, is among them only where that leaves fewer than three.
    """
    spread = [_spread(i, most) for i, most in enumerate(limits.values())]
    grid = [dict(zip(limits, values, strict=True)) for values in itertools.product(*spread)]
    more = [dict(limits), {n: min(32, most) for n, most in limits.items()}]
    odd = {n: min(21 - 4 * i, most) for i, (n, most) in enumerate(limits.items())}
    return [*grid, odd, *more]


def _spread(number: int, most: int) -> list[int]:
    """The values of a size in the grid: `number` of the size, `most` its limit."""
    wide = [n + 14 * number for n in (3, 5, 10)]
    if most > wide[-1]:
        return wide
    least = max(2, min(3, most - 3)) if most > 3 else 1
    return sorted({least + (most - least) * i // 3 for i in range(4)})


def formula(values: Sequence[int], points: Sequence[Mapping[str, int]]) -> Formula | None:
    """The polynomial of the least degree that has these values at these points, or None.

    A size's degree in it is so low that one of the size's values at least is left for a check.
    """
    names = tuple(points[0])
    most = _degrees(points)
    for degree in DEGREES:
        powers = list(itertools.product(*(range(min(degree, most[n]) + 1) for n in names)))
        solved = _solve(values, points, names, powers)
        if solved is None or any(c.denominator != 1 for c in solved):
            continue
        terms = tuple((p, int(c)) for p, c in zip(powers, solved, strict=True) if c)
        found = Formula(names, terms)
        if all(found.at(point) == value for point, value in zip(points, values, strict=True)):
            return found
    return None


def _degrees(points: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The largest degree of each size for which there are more distinct values than its degree + 1.

    None of the degrees is below 0: a size of one or two values may have no effect.
    """
    distinct = {name: len({point[name] for point in points}) for name in points[0]}
    return {name: max(0, min(DEGREES[-1], n - 2)) for name, n in distinct.items()}


def _solve(
    values: Sequence[int], points: Sequence[Mapping[str, int]], names: Sequence[str],
    powers: Sequence[tuple[int, ...]],
) -> list[Fraction] | None:  # fmt: skip
    """Exact elimination on the first points that suffice."""
    rows: list[list[Fraction]] = []
    pivots: list[int] = []
    for point, value in zip(points, values, strict=True):
        row = [Fraction(1)] * len(powers) + [Fraction(value)]
        for i, power in enumerate(powers):
            for name, exponent in zip(names, power, strict=True):
                row[i] *= point[name] ** exponent
        for known, pivot in zip(rows, pivots, strict=True):
            row = [a - row[pivot] * b for a, b in zip(row, known, strict=True)]
        at = next((i for i, a in enumerate(row[:-1]) if a), None)
        if at is None:
            continue
        row = [a / row[at] for a in row]
        rows = [[a - known[at] * b for a, b in zip(known, row, strict=True)] for known in rows]
        rows.append(row)
        pivots.append(at)
    if len(rows) < len(powers):
        return None
    return [row[-1] for _, row in sorted(zip(pivots, rows, strict=True))]


def generalized(taken: Sequence[Any], points: Sequence[Mapping[str, int]]) -> Any:
    """The same structure with a `Formula` wherever a number depends on the sizes.

    Args:
        taken: for each point nested tuples, lists and dataclasses.
        points: sizes by name.

    Raises:
        UnsupportedError: where the structures differ by more than such numbers.
    """
    first = taken[0]
    if all(type(other) is type(first) and other == first for other in taken):
        return first
    if any(type(other) is not type(first) for other in taken):
        raise UnsupportedError("its kernels are of other kinds at other sizes")
    if is_dataclass(first) and not isinstance(first, type):
        changed = {
            f.name: generalized([getattr(other, f.name) for other in taken], points)
            for f in fields(first)
        }
        return replace(first, **changed)
    if isinstance(first, tuple | list):
        if len({len(other) for other in taken}) > 1:
            raise UnsupportedError("its kernels are more or fewer at other sizes")
        return type(first)(generalized(parts, points) for parts in zip(*taken, strict=True))
    if isinstance(first, int) and not isinstance(first, bool):
        found = formula(taken, points)
        if found is not None:
            return found
        few = [name for name, most in _degrees(points).items() if most < DEGREES[-1]]
        few = [name for name in few if len({point[name] for point in points}) > 1]
        if few:
            largest = max(point[few[0]] for point in points)
            raise UnsupportedError(
                f"the limit {largest} of the size '{few[0]}' is too small to tell how a number of "
                f"it ({first}, {taken[-1]}) depends on the size: name 5 or more (--bucket "
                f"{few[0]}=…), or fix the size in the model"
            )
        raise UnsupportedError(f"a number of it ({first}, {taken[-1]}) is no polynomial in them")
    raise UnsupportedError(f"it computes with a value that depends on them ({first})")


def bound(value: Any, sizes: Mapping[str, Any]) -> Any:
    """The structure with each `Formula` evaluated."""
    if isinstance(value, Formula):
        return value.at(sizes)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: bound(getattr(value, f.name), sizes) for f in fields(value)}
        same = all(changed[f.name] is getattr(value, f.name) for f in fields(value))
        return value if same else replace(value, **changed)
    if isinstance(value, tuple | list):
        made = type(value)(bound(part, sizes) for part in value)
        return value if all(a is b for a, b in zip(made, value, strict=True)) else made
    return value
