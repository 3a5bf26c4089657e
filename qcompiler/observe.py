"""Calibration: what the activations looked like, and the range that each method draws from it.

Memory for each observed tensor, whatever the number of batches (`Statistics.bytes_bound`):

    8 · BINS  (histogram)  +  4 · 8 · channels  (extremes, sums)
        +  4 · ROWS · channels  (sampled rows)

The histogram spans [−A, A]; when a value falls outside, A doubles and bins merge in pairs, so
nothing is ever re-read. The sampled rows are a reservoir (Vitter 1985, algorithm R) drawn with a
generator seeded by the tensor's name: the same data give the same statistics, bit for bit.

Methods: min-max; percentile; KL divergence (Migacz 2017, "8-bit inference with TensorRT"); search
over the p-norm of the error ("mse" is p = 2). See "A Survey of Low-bit Large Language Models",
section 2.4 (calibration).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler.errors import InputError, nearest
from qcompiler.program import Batch, Program, unpadded
from qcompiler.qtype import QType

BINS = 8192
ROWS = 1024
METHODS = ("minmax", "percentile", "kl", "mse", "pnorm")


@dataclass
class Statistics:
    """What one tensor looked like over all batches.

    Attributes:
        name: the tensor's node.
        axis: the channel axis; −1 or 1.
        low, high: extremes of each channel, (channels,) float64.
        total, squares: sums of each channel's values and squares, (channels,) float64.
        rows: sampled rows, (at most ROWS, channels) float32.
        counts: (BINS,) float64 over [−span, span]; zeros where `binned` is false.
        seen: rows seen.
    """

    name: str
    axis: int = -1
    limit: int = ROWS
    binned: bool = True
    low: Tensor = field(default_factory=lambda: torch.empty(0))
    high: Tensor = field(default_factory=lambda: torch.empty(0))
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))
    rows: Tensor = field(default_factory=lambda: torch.empty(0))
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    span: float = 0.0
    seen: int = 0
    _generator: torch.Generator = field(default_factory=torch.Generator, repr=False)

    def __post_init__(self) -> None:
        self._generator.manual_seed(zlib.crc32(self.name.encode()))

    def update(self, value: Tensor) -> None:
        """Take in one batch's value, any shape; floats only."""
        rows = (
            value.detach().movedim(self.axis, -1).flatten(0, -2).float()
            if value.ndim > 1
            else value.reshape(1, -1)
        )
        if not len(rows):  # all of it was padding
            return
        low, high = rows.amin(0).double(), rows.amax(0).double()
        if not bool((low.isfinite() & high.isfinite()).all()):  # NaN is kept by both
            raise InputError(
                f"calibration: the value of '{self.name}' has NaN or Inf; "
                "check the inputs and the model"
            )
        self.low = low if self.seen == 0 else torch.minimum(self.low, low)
        self.high = high if self.seen == 0 else torch.maximum(self.high, high)
        self.total = self.total + rows.sum(0, dtype=torch.float64)
        self.squares = self.squares + rows.double().square_().sum(0)
        if self.binned:
            self._count(rows, max(float(high.max()), -float(low.min())))
        if self.limit:
            self._sample(rows)
        self.seen += len(rows)

    def _count(self, rows: Tensor, reach: float) -> None:
        if self.span == 0.0:
            self.span = max(reach, 1e-12)
        while reach > self.span:
            half = BINS // 2
            merged = self.counts.reshape(half, 2).sum(1)
            self.counts = torch.cat(
                [merged.new_zeros(half // 2), merged, merged.new_zeros(half // 2)]
            )
            self.span *= 2
        self.counts += torch.histc(rows, BINS, -self.span, self.span).double()

    def _sample(self, rows: Tensor) -> None:
        take = rows[: max(0, self.limit - self.seen)]
        if len(take):
            self.rows = take.clone() if self.seen == 0 else torch.cat([self.rows, take])
        rest = rows[len(take) :]
        if len(rest):
            ranks = torch.arange(self.seen + len(take), self.seen + len(rows)) + 1
            slots = (
                torch.rand(len(rest), generator=self._generator, dtype=torch.float64) * ranks
            ).long()
            kept = slots < self.limit
            # Later rows win a slot, as if taken one after the other.
            for slot, index in zip(
                slots[kept].tolist(), kept.nonzero()[:, 0].tolist(), strict=True
            ):
                self.rows[slot] = rest[index]

    @property
    def bytes_bound(self) -> int:
        """Upper bound of the memory held, in bytes, for this number of channels."""
        channels = self.low.numel()
        return 8 * BINS + 4 * 8 * channels + 4 * self.limit * channels

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, (channels,) float64."""
        return self.total / self.seen

    @property
    def deviation(self) -> Tensor:
        """Standard deviation of each channel, (channels,) float64."""
        return (self.squares / self.seen - self.mean.square()).clamp(min=0).sqrt()

    @property
    def absmax(self) -> Tensor:
        """Max |x| of each channel, (channels,) float64."""
        return torch.maximum(self.high, -self.low)

    @property
    def centres(self) -> Tensor:
        """Middle of each bin, (BINS,) float64."""
        width = 2 * self.span / BINS
        return -self.span + width * (torch.arange(BINS, dtype=torch.float64) + 0.5)


Observations = Mapping[str, Statistics]


def observe(
    program: Program,
    names: Mapping[str, int],
    batches: Iterable[Batch],
    rows: int = ROWS,
    mask: str = "",
    binned: bool = True,
) -> dict[str, Statistics]:
    """Run the batches and gather statistics of the named nodes.

    Args:
        program: the program that is calibrated.
        names: node → channel axis. Input placeholders are allowed.
        batches: at least one; read once.
        rows: rows sampled for each tensor.
        mask: name of the input that is 0 at padding, which does not count; none if empty.
        binned: count histograms, which `choose_range` needs.

    Raises:
        InputError: for no batches, or values that are not finite.
    """
    found = {name: Statistics(name, axis, rows, binned) for name, axis in names.items()}
    # Nothing behind the last of them needs to run: not the head of a language model, for one.
    last = next((n for n in reversed(program.exported.graph.nodes) if n.name in found), None)
    inside = last is not None and last.op == "call_function"

    present: Tensor | None = None

    def watch(node: Node, value: Any) -> None:
        if node.name in found:
            found[node.name].update(unpadded(value, present))

    count = 0
    for batch in batches:
        inputs = dict(zip(program.inputs, batch, strict=True))
        present = inputs.get(mask)
        for name, value in inputs.items():
            if name in found:
                found[name].update(value)
        if inside:
            program.run(batch, watch, last=last)
        count += 1
    if count == 0:
        raise InputError("calibration: there is no data; give at least one batch")
    return found


def choose_range(
    stats: Statistics, qtype: QType, method: str, parameter: float
) -> tuple[float, float]:
    """The range [low, high] that a static per-tensor scale should cover.

    Args:
        stats: of the tensor.
        qtype: its number format.
        method: one of `METHODS`.
        parameter: the percentile (such as 99.99), or the p of `pnorm`; unused otherwise.
    """
    low, high = min(0.0, float(stats.low.min())), max(0.0, float(stats.high.max()))
    if method == "minmax" or low == high:
        return low, high
    if method == "percentile":
        return _percentile(stats, parameter, low, high)
    if method == "kl":
        return _search_kl(stats, qtype, low, high)
    if method in ("mse", "pnorm"):
        return search_norm(
            stats.centres, stats.counts, qtype, 2.0 if method == "mse" else parameter, low, high
        )
    raise InputError(f"unknown calibration method '{method}': {nearest(method, [*METHODS])}")


def _percentile(stats: Statistics, percent: float, low: float, high: float) -> tuple[float, float]:
    """The central `percent` of the elements: half of the rest is cut on each side."""
    cumulated = stats.counts.cumsum(0) / stats.counts.sum()
    tail = (1 - percent / 100) / 2
    width = 2 * stats.span / BINS
    first = int(torch.searchsorted(cumulated, torch.tensor(tail, dtype=torch.float64), right=True))
    last = int(torch.searchsorted(cumulated, torch.tensor(1 - tail, dtype=torch.float64)))
    edges = stats.centres
    return (
        min(0.0, max(low, float(edges[min(first, BINS - 1)]) - width / 2)),
        max(0.0, min(high, float(edges[min(last, BINS - 1)]) + width / 2)),
    )


def search_norm(
    values: Tensor, counts: Tensor, qtype: QType, p: float, low: float, high: float, steps: int = 48
) -> tuple[float, float]:
    """The range that minimises Σ count · |Q(x) − x|^p, by coordinate descent over shrunken ends.

    Args:
        values, counts: a weighted sample, (n,) float64.
        low, high: the full range; the result lies inside it.
    """
    kept = counts > 0
    values, counts = values[kept].double(), counts[kept].double()

    def error(bottom: float, top: float) -> float:
        scale, zero = qtype.scale_for(torch.tensor(bottom), torch.tensor(top))
        q = qtype.round(values / scale.double()) + zero.double()
        q = q.clamp(qtype.qmin, qtype.qmax)
        return float((counts * ((q - zero.double()) * scale.double() - values).abs().pow(p)).sum())

    shrink = torch.linspace(0.2, 1.0, steps).tolist()
    if qtype.symmetric:
        best = min(shrink, key=lambda s: (error(low * s, high * s), -s))
        return low * best, high * best
    bottom, top = low, high
    for _ in range(3):
        previous = (bottom, top)
        top = min((high * s for s in shrink), key=lambda t: (error(bottom, t), -t))
        bottom = min((low * s for s in shrink), key=lambda b: (error(b, top), b))
        if (bottom, top) == previous:
            break
    return bottom, top


def _search_kl(
    stats: Statistics, qtype: QType, low: float, high: float, steps: int = 96
) -> tuple[float, float]:
    """The range whose quantized histogram is nearest to the clipped one.

    Nearest in Kullback–Leibler divergence; both ends shrink by one factor.
    """
    centres, counts = stats.centres, stats.counts

    def divergence(factor: float) -> float:
        inside = (centres >= low * factor) & (centres <= high * factor)
        if not bool(inside.any()):
            return float("inf")
        reference = counts[inside].clone()
        reference[0] += counts[centres < low * factor].sum()
        reference[-1] += counts[centres > high * factor].sum()
        scale, zero = qtype.scale_for(torch.tensor(low * factor), torch.tensor(high * factor))
        level = qtype.round(centres[inside] / scale.double()) + zero.double()
        found, level = level.clamp(qtype.qmin, qtype.qmax).unique(return_inverse=True)
        # The quantized distribution has no knowledge of the clipped mass: it spreads the inner
        # counts of a level evenly.
        inner = counts[inside]
        occupied = (inner > 0).double()
        mass = torch.zeros_like(found).index_add_(0, level, inner)
        bins = torch.zeros_like(found).index_add_(0, level, occupied)
        spread = (mass / bins.clamp(min=1))[level] * occupied
        p = reference / reference.sum()
        q = spread / spread.sum().clamp(min=1e-30)
        support = p > 0
        return float((p[support] * (p[support] / q[support].clamp(min=1e-9)).log()).sum())

    factors = torch.linspace(0.1, 1.0, steps).tolist()
    best = min(factors, key=lambda f: (divergence(f), -f))
    return low * best, high * best
