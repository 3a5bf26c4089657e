"""Timing: several callables side by side.

They are interleaved, so that a noisy machine disturbs all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

ROUND = 0.02  # seconds that one callable runs before the next has its turn


@dataclass(frozen=True)
class Timing:
    """One callable's time beside the first one's.

    Attributes:
        name: of the callable.
        ms: median time of one call, in milliseconds.
        ratio: median over the rounds of its time divided by the first callable's in the same round.
        low, high: quartiles of that ratio.
        rounds: how many rounds.
    """

    name: str
    ms: float
    ratio: float
    low: float
    high: float
    rounds: int


def interleave(runs: Mapping[str, Callable[[], object]], seconds: float = 3.0) -> list[Timing]:
    """Time the callables in rounds; the first is the reference of all ratios.

    Each has two warm-up calls. A round runs each callable for about `ROUND` seconds (at least
    once), in an order that alternates.
    """
    calls: dict[str, int] = {}
    for name, run in runs.items():
        run()
        start = time.perf_counter()
        run()
        calls[name] = max(1, round(ROUND / max(time.perf_counter() - start, 1e-7)))

    def sample(name: str) -> float:
        run, count = runs[name], calls[name]
        start = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - start) / count

    return take_turns({name: partial(sample, name) for name in runs}, seconds)


def take_turns(samplers: Mapping[str, Callable[[], float]], seconds: float) -> list[Timing]:
    """Let each in turn give a time in seconds, in an order that alternates, at least five times.

    The first is the reference of all ratios.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    order = list(samplers)
    deadline = time.perf_counter() + seconds
    while len(samples[order[0]]) < 5 or time.perf_counter() < deadline:
        for name in order:
            samples[name].append(samplers[name]())
        order.reverse()
    base = samples[next(iter(samplers))]
    results = []
    for name, times in samples.items():
        ratios = [t / b for t, b in zip(times, base, strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        results.append(
            Timing(
                name,
                statistics.median(times) * 1e3,
                statistics.median(ratios),
                quartiles[0],
                quartiles[2],
                len(ratios),
            )
        )
    return results
