"""Choosing options: against exhaustive search, the formula of theorem 8, and by hand."""

from __future__ import annotations

import ctypes
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler import allocation
from qcompiler.allocation import Limit
from qcompiler.errors import InputError
from qcompiler.study import Option, Unit

BITS = (2, 3, 4, 8)


def unit(name: str, weights: int, losses: tuple[float, ...], variance: float = 1.0) -> Unit:
    options = tuple(
        Option(f"int{b}:g32", b, b * weights // 8, {"kl": loss})
        for b, loss in zip(BITS, losses, strict=True)
    )
    return Unit((name,), (name,), weights, ((1, weights),), variance, options)


def falling() -> st.SearchStrategy[tuple[float, ...]]:
    return st.lists(st.floats(1e-6, 10), min_size=4, max_size=4).map(
        lambda values: tuple(sorted(values, reverse=True))
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), falling()), min_size=1, max_size=5),
    st.floats(2.0, 8.0),
)
def test_the_integer_program_finds_the_best(
    drawn: list[tuple[int, tuple[float, ...]]], bits: float
) -> None:
    units = [unit(str(i), w * 32, losses) for i, (w, losses) in enumerate(drawn)]
    total = sum(u.weights for u in units)
    limit = Limit("bits", lambda u, o: o.bits * u.weights / total, bits)
    loss = allocation.measure("kl")
    best = min(
        allocation.total(units, choice, loss)
        for choice in itertools.product(range(4), repeat=len(units))
        if allocation.total(units, choice, limit.cost) <= bits * (1 + 1e-9)
    )
    found = allocation.solve(units, loss, [limit])
    assert allocation.total(units, found, limit.cost) <= bits * (1 + 1e-6)
    assert allocation.total(units, found, loss) == pytest.approx(best, rel=1e-4)
    # Greedy keeps the limit too, and is never better.
    choice = allocation.greedy(units, loss, limit)
    assert allocation.total(units, choice, limit.cost) <= bits * (1 + 1e-9)
    assert allocation.total(units, choice, loss) >= best * (1 - 1e-9)


def test_what_the_solver_prints_is_not_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = allocation.milp

    def talks(*args: Any, **kwargs: Any) -> Any:
        ctypes.CDLL(None).puts(b"the solver talks")
        return real(*args, **kwargs)

    monkeypatch.setattr(allocation, "milp", talks)
    units = [unit("a", 10, (1.0, 0.5, 0.2, 0.1))]
    assert allocation.solve(units, allocation.measure("kl"), []) == (3,)
    print("afterwards")
    written = capfd.readouterr()
    assert written.out == "afterwards\n"
    assert "the solver talks" in written.err


def test_two_limits_at_once() -> None:
    units = [unit("a", 320, (4.0, 2.0, 1.0, 0.1)), unit("b", 320, (4.0, 2.0, 1.0, 0.2))]
    few = Limit("bits", lambda u, o: o.bits / 2, 6.0)
    # Option 3 is forbidden to "a" by a cost of its own.
    slow = Limit("ms", lambda u, o: float(u.nodes[0] == "a" and o.bits == 8), 0.0)
    assert allocation.solve(units, allocation.measure("kl"), [few]) == (3, 2)
    assert allocation.solve(units, allocation.measure("kl"), [few, slow]) == (2, 3)


def test_losses_of_many_orders_of_magnitude() -> None:
    """One unit's losses must not drown in another's."""
    units = [unit("a", 320, (1e3, 1e2, 1e1, 1e0)), unit("b", 320, (1e-4, 5e-5, 2e-5, 1e-5))]
    limit = Limit("bits", lambda u, o: o.bits / 2, 6.0)  # 8 and 4 bits
    assert allocation.solve(units, allocation.measure("kl"), [limit]) == (3, 2)


def test_a_limit_out_of_reach_names_the_nearest() -> None:
    units = [unit("a", 320, (1.0, 0.5, 0.2, 0.1))]
    limit = Limit("bits a weight", lambda u, o: float(o.bits), 1.5)
    for choose in (
        lambda: allocation.solve(units, allocation.measure("kl"), [limit]),
        lambda: allocation.greedy(units, allocation.measure("kl"), limit),
    ):
        with pytest.raises(InputError, match=r"^bits a weight: 1.5 cannot be reached; .* is 2$"):
            choose()


def test_limits_that_exclude_each_other() -> None:
    units = [unit("a", 320, (1.0, 0.5, 0.2, 0.1))]
    few = Limit("bits", lambda u, o: float(o.bits), 3.0)
    good = Limit("loss", allocation.measure("kl"), 0.3)
    with pytest.raises(InputError, match=r"no choice of formats keeps bits ≤ 3, loss ≤ 0.3"):
        allocation.solve(units, allocation.measure("kl"), [few, good])


def test_closed_form_is_theorem_8() -> None:
    """B = ½ log₂(α σ² / λ): units whose α σ² differ by 4^k differ by k bits."""
    units = [
        unit("a", 100, (1.0, 0.5, 0.2, 0.1), variance=1.0),
        unit("b", 100, (1.0, 0.5, 0.2, 0.1), variance=4.0),
        unit("c", 100, (1.0, 0.5, 0.2, 0.1), variance=4.0**5),
    ]
    alpha = {"a": 1.0, "b": 1.0, "c": 1.0}
    limit = Limit("bits", lambda u, o: o.bits / 3, 4.5)
    choice = allocation.closed_form(units, limit, alpha)
    assert [u.options[i].bits for u, i in zip(units, choice, strict=True)] == [2, 3, 8]
    # The same through α, which counts as the variance does.
    flat = [unit(u.name, 100, (1.0, 0.5, 0.2, 0.1)) for u in units]
    assert allocation.closed_form(flat, limit, {"a": 1.0, "b": 4.0, "c": 4.0**5}) == choice


def test_noise_weights_invert_uniform_noise() -> None:
    alpha, variance = 3.0, 0.25
    losses = tuple(alpha * variance * 4.0**-b for b in BITS)
    found = allocation.noise_weights([unit("a", 10, losses, variance)])
    assert math.isclose(found["a"], alpha, rel_tol=1e-9)


def test_neighbours_are_within_the_limits_and_ordered() -> None:
    rng = np.random.default_rng(0)
    units = [
        unit(str(i), 320, tuple(sorted(rng.random(4), reverse=True)))  # type: ignore[arg-type]  # four of them
        for i in range(5)
    ]
    limit = Limit("bits", lambda u, o: o.bits / 5, 4.0)
    loss = allocation.measure("kl")
    choice = allocation.solve(units, loss, [limit])
    near = allocation.neighbours(units, choice, loss, [limit])
    assert near
    assert choice not in near
    assert all(allocation.total(units, c, limit.cost) <= 4.0 * (1 + 1e-9) for c in near)
    assert all(sum(a != b for a, b in zip(c, choice, strict=True)) <= 2 for c in near)
    expected = [allocation.total(units, c, loss) for c in near]
    assert expected == sorted(expected)
