"""Calibration: streaming statistics in bounded memory, and the ranges drawn from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompiler.errors import InputError
from qcompiler.observe import BINS, METHODS, ROWS, Statistics, choose_range, observe, search_norm
from qcompiler.plan import Assignment, Plan, Site
from qcompiler.program import capture
from qcompiler.qtype import QType

UINT8, INT8 = QType.parse("uint8:tensor:affine"), QType.parse("int8:tensor")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def heavy_tailed(count: int = 40_000, seed: int = 0) -> Tensor:
    """Student's t with 3 degrees of freedom: (count / 8, 8), a few values far from the rest."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_t(3, (count // 8, 8)).astype(np.float32))


def gathered(*values: Tensor, axis: int = -1, rows: int = ROWS) -> Statistics:
    stats = Statistics("x", axis, rows)
    for value in values:
        stats.update(value)
    return stats


def same(left: Statistics, right: Statistics) -> bool:
    """Bit for bit, all that is kept."""
    for part in fields(Statistics):
        a, b = getattr(left, part.name), getattr(right, part.name)
        if part.name != "_generator" and not (
            torch.equal(a, b) if isinstance(a, Tensor) else a == b
        ):
            return False
    return True


def test_streaming_equals_one_shot_in_float64() -> None:
    parts = [torch.randn(n, 6, 5, generator=generator(n)) * 10.0**n + n for n in (1, 3, 2)]
    stats = gathered(*parts)
    whole = torch.cat([p.reshape(-1, 5) for p in parts]).double().numpy()
    assert stats.seen == 36
    np.testing.assert_array_equal(stats.low.numpy(), whole.min(0))
    np.testing.assert_array_equal(stats.high.numpy(), whole.max(0))
    np.testing.assert_array_equal(stats.absmax.numpy(), np.abs(whole).max(0))
    np.testing.assert_allclose(stats.mean.numpy(), whole.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.deviation.numpy(), whole.std(0), rtol=1e-9)
    assert stats.low.dtype == stats.mean.dtype == torch.float64


def test_the_channel_axis_of_images() -> None:
    x = torch.randn(2, 3, 4, 5, generator=generator())
    stats = gathered(x, axis=1)
    np.testing.assert_array_equal(stats.low.numpy(), x.double().amin((0, 2, 3)).numpy())
    assert stats.seen == 40
    assert stats.rows.shape == (40, 3)


def test_the_histogram_grows_by_doubling_and_loses_nothing() -> None:
    parts = [torch.randn(50, 4, generator=generator(i)) * 3.0**i for i in range(6)]
    stats = gathered(*parts)
    whole = torch.cat(parts).double().numpy().ravel()
    assert float(stats.counts.sum()) == whole.size
    first = float(parts[0].abs().max())
    doublings = math.log2(stats.span / first)
    assert doublings == round(doublings) > 0
    assert stats.span >= np.abs(whole).max() > stats.span / 2
    # Bins of the last span, filled from the beginning: the same counts but for rounding at edges.
    expected, _ = np.histogram(whole, BINS, (-stats.span, stats.span))
    cumulated = np.abs(np.cumsum(expected) - np.cumsum(stats.counts.numpy()))
    assert cumulated.max() <= 2
    assert len(stats.centres) == BINS
    width = 2 * stats.span / BINS
    np.testing.assert_allclose(np.diff(stats.centres.numpy()), width, rtol=1e-6)


def test_zeros_alone() -> None:
    stats = gathered(torch.zeros(3, 4))
    assert float(stats.counts.sum()) == 12
    for method in METHODS:
        assert choose_range(stats, UINT8, method, 2.4) == (0.0, 0.0)


def held_bytes(stats: Statistics) -> int:
    """Bytes of all tensors that the statistics keep alive, storages counted once."""
    storages = {}
    for part in fields(Statistics):
        value = getattr(stats, part.name)
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("channels", [3, 64])
def test_memory_does_not_grow_with_the_number_of_batches(channels: int) -> None:
    sizes = {}
    for count in (1, 20, 200):
        stats = Statistics("x", -1, 128)
        for index in range(count):
            stats.update(torch.randn(40, channels, generator=generator(index)) * (index + 1))
        sizes[count] = held_bytes(stats)
        assert sizes[count] <= stats.bytes_bound
        assert stats.bytes_bound == 8 * BINS + 32 * channels + 4 * 128 * channels
    assert sizes[200] == sizes[20] == stats.bytes_bound


def test_sampled_rows_are_rows_and_evenly_drawn() -> None:
    """Row i holds i: which rows were kept can be read off."""
    values = torch.arange(20_000, dtype=torch.float32)[:, None].expand(-1, 2)
    stats = Statistics("x", -1, 400)
    for part in values.split(900):
        stats.update(part)
    kept = stats.rows[:, 0].numpy()
    assert stats.rows.shape == (400, 2)
    assert len(set(kept)) == 400
    assert np.all(kept == stats.rows[:, 1].numpy())
    # Uniform over 0…20000: mean 10000 ± 5774/√400, four standard errors; each quarter is hit.
    assert abs(kept.mean() - 10_000) < 4 * 5774 / 20
    quarters, _ = np.histogram(kept, 4, (0, 20_000))
    assert quarters.min() > 60
    first = gathered(values[:100], rows=400)
    assert torch.equal(first.rows, values[:100])


def test_the_same_data_twice_give_the_same_statistics_and_plan(
    tiny: Callable[[str], Any],
) -> None:
    model = tiny("tiny-attention-block")
    names = {"layer_norm": -1, "gelu": -1, "linear": -1}
    first, second = (
        observe(model.normalized, names, model.batches, rows=40, mask="attention_mask")
        for _ in range(2)
    )
    assert all(same(first[name], second[name]) for name in names)
    for method in METHODS:
        plans = [
            Plan(
                {
                    Site(name, 0): Assignment(UINT8, *choose_range(seen[name], UINT8, method, 99.9))
                    for name in names
                }
            ).to_json()
            for seen in (first, second)
        ]
        assert plans[0] == plans[1]
    # And another seed of rows for another tensor: the sampling is not one and the same for all.
    assert not same(first["layer_norm"], first["linear"])


def test_observing_reads_values_of_the_program(tiny: Callable[[str], Any]) -> None:
    """Against torch's own forward hook; inputs can be observed as well."""
    model = tiny("tiny-mlp")
    seen: list[Tensor] = []
    hook = model.spec.module.first.register_forward_hook(lambda m, i, o: seen.append(o.detach()))
    with torch.no_grad():
        for (x,) in model.batches:
            model.spec.module(x)
    hook.remove()
    stats = observe(model.normalized, {"linear": -1, "x": -1}, model.batches)
    whole = torch.cat(seen).double()
    torch.testing.assert_close(stats["linear"].high, whole.amax(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats["linear"].mean, whole.mean(0), rtol=1e-6, atol=1e-6)
    inputs = torch.cat([x for (x,) in model.batches]).double()
    torch.testing.assert_close(stats["x"].low, inputs.amin(0), rtol=0, atol=0)


def test_padding_does_not_count(tiny: Callable[[str], Any]) -> None:
    model = tiny("tiny-attention-block")
    names = {"embedding": -1}
    masked = observe(model.normalized, names, model.batches, mask="attention_mask")["embedding"]
    plain = observe(model.normalized, names, model.batches)["embedding"]
    table = model.spec.module.embedding.weight.detach()
    rows = torch.cat([table[ids[mask != 0]] for ids, mask in model.batches]).double()
    assert masked.seen == len(rows) < plain.seen == sum(ids.numel() for ids, _ in model.batches)
    torch.testing.assert_close(masked.mean, rows.mean(0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(masked.low, rows.amin(0), rtol=0, atol=0)
    assert not torch.equal(masked.mean, plain.mean)
    # A batch that is all padding adds nothing.
    ids, mask = model.batches[0]
    batches = [(ids, mask), (ids, torch.zeros_like(mask))]
    alone = observe(model.normalized, names, batches[:1], mask="attention_mask")["embedding"]
    both = observe(model.normalized, names, batches, mask="attention_mask")["embedding"]
    assert same(alone, both)


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(x) + 1


def test_values_that_are_not_finite_are_an_input_error() -> None:
    program = capture(Root(), (torch.ones(2, 3),))
    for bad in (-1.0, math.inf, math.nan):
        batch = (torch.tensor([[1.0, 2.0, 3.0], [1.0, bad, 3.0]]),)
        with pytest.raises(InputError, match=r"the value of 'sqrt' has NaN or Inf"):
            observe(program, {"sqrt": -1}, [batch])


def test_no_data_is_an_input_error() -> None:
    program = capture(Root(), (torch.ones(2, 3),))
    with pytest.raises(InputError, match=r"calibration: there is no data; give at least one batch"):
        observe(program, {"sqrt": -1}, [])


def test_batches_are_read_lazily_and_once() -> None:
    program = capture(Root(), (torch.ones(2, 3),))
    alive = 0

    def batches() -> Iterator[tuple[Tensor]]:
        nonlocal alive
        for _ in range(3):
            alive += 1
            yield (torch.ones(2, 3),)

    observe(program, {"sqrt": -1}, batches())
    assert alive == 3


def test_nothing_runs_behind_the_last_tensor_that_is_observed() -> None:
    program = capture(Root(), (torch.ones(2, 3),))
    sqrt = next(n for n in program.exported.graph.nodes if n.name == "sqrt")
    seen: list[str] = []
    assert program.run((torch.ones(2, 3),), lambda n, v: seen.append(n.name), last=sqrt) == ()
    assert seen == ["sqrt"]
    assert observe(program, {"x": -1}, [(torch.full((2, 3), -1.0),)])["x"].seen == 2


def test_without_rows_and_bins_the_rest_is_the_same() -> None:
    program = capture(Root(), (torch.ones(2, 3),))
    batches = [(torch.rand(5, 3, generator=torch.Generator().manual_seed(i)),) for i in range(3)]
    whole = observe(program, {"sqrt": -1}, batches)["sqrt"]
    bare = observe(program, {"sqrt": -1}, batches, rows=0, binned=False)["sqrt"]
    for name in ("low", "high", "total", "squares"):
        assert torch.equal(getattr(whole, name), getattr(bare, name))
    assert bare.seen == whole.seen == 15
    assert not len(bare.rows)
    assert not bool(bare.counts.any())


def width_of(stats: Statistics) -> float:
    return 2 * stats.span / BINS


@pytest.mark.parametrize("percent", [99.0, 99.9, 99.99, 99.999])
def test_percentiles_are_those_of_numpy_within_a_bin(percent: float) -> None:
    x = heavy_tailed()
    stats = gathered(*x.split(700))
    low, high = choose_range(stats, UINT8, "percentile", percent)
    tail = (100 - percent) / 2
    # Where it falls between two values of the sample, either will do.
    bounds = np.percentile(x.numpy(), [tail, 100 - tail], method="lower")
    upper = np.percentile(x.numpy(), [tail, 100 - tail], method="higher")
    width = width_of(stats)
    assert bounds[0] - width <= low <= upper[0] + width
    assert bounds[1] - width <= high <= upper[1] + width


def test_ranges_contain_zero_and_lie_inside_the_extremes() -> None:
    for x in (heavy_tailed() + 30, -heavy_tailed().abs() - 5, heavy_tailed()):
        stats = gathered(x)
        for method in METHODS:
            parameter = 99.9 if method == "percentile" else 2.4
            low, high = choose_range(stats, UINT8, method, parameter)
            assert min(0.0, float(x.min())) <= low <= 0 <= high <= max(0.0, float(x.max()))
            assert high - low > 0


def test_min_max() -> None:
    x = heavy_tailed()
    assert choose_range(gathered(x), INT8, "minmax", 0) == (float(x.min()), float(x.max()))
    x = x.abs() + 1
    assert choose_range(gathered(x), UINT8, "minmax", 0) == (0.0, float(x.max()))


def noise(
    x: Tensor, low: float, high: float, p: float = 2.0, symmetric: bool = False, levels: int = 255
) -> float:
    """Σ |x̂ − x|^p in numpy float64, rounded as the type says."""
    v = x.double().numpy().ravel()
    if symmetric:
        scale = max(-low, high) / 127
        back = np.clip(np.rint(v / scale), -127, 127) * scale
    else:
        scale = (high - low) / levels
        zero = np.rint(-low / scale)
        back = (np.clip(np.rint(v / scale) + zero, 0, levels) - zero) * scale
    return float((np.abs(back - v) ** p).sum())


@pytest.mark.parametrize("kind", [UINT8, INT8], ids=str)
@pytest.mark.parametrize(("method", "p"), [("mse", 2.0), ("pnorm", 2.4), ("pnorm", 4.0)])
def test_the_p_norm_search_finds_the_minimum(kind: QType, method: str, p: float) -> None:
    """On the data itself, no grid of shrunken ranges does clearly better: brute force in numpy."""
    x = heavy_tailed(16_000)
    stats = gathered(x)
    low, high = choose_range(stats, kind, method, p)
    full = choose_range(stats, kind, "minmax", 0)
    found = noise(x, low, high, p, kind.symmetric)
    if p < 3:  # the fourth power weighs the cut tail so much that the full range may be best
        assert (low, high) != full
        assert found < noise(x, *full, p, kind.symmetric)
    grid = np.linspace(0.05, 1.0, 60)
    pairs = [(a, a) for a in grid] if kind.symmetric else [(a, b) for a in grid for b in grid]
    best = min(noise(x, full[0] * a, full[1] * b, p, kind.symmetric) for a, b in pairs)
    assert found <= 1.03 * best


def test_the_mse_search_lowers_the_noise_by_decibels() -> None:
    """What a calibrator is for: more signal over noise than min-max on heavy tails."""
    kind = QType.parse("uint4:tensor:affine")
    x = heavy_tailed()
    stats = gathered(x)
    gains = {}
    for method in ("mse", "kl", "percentile"):
        ranges = [choose_range(stats, kind, m, 99.99) for m in ("minmax", method)]
        before, after = (noise(x, *r, levels=15) for r in ranges)
        gains[method] = 10 * math.log10(before / after)
    assert gains["mse"] > 6
    assert gains["mse"] >= max(gains.values()) - 0.2


def test_data_without_a_tail_keep_their_range() -> None:
    x = torch.rand(5000, 8, generator=generator()) * 2 - 1
    stats = gathered(x)
    full = choose_range(stats, UINT8, "minmax", 0)
    for method in ("mse", "kl"):
        low, high = choose_range(stats, UINT8, method, 0)
        assert high - low > 0.95 * (full[1] - full[0])


def divergence(x: np.ndarray, low: float, high: float, span: float, levels: int = 256) -> float:
    """Migacz' procedure on the bins of [−span, span], written as loops.

    P: the histogram inside the range, what was cut off added to its ends. Q: the inner counts of
    each level, spread over its occupied bins.
    """
    counts, edges = np.histogram(x, BINS, (-span, span))
    centres = (edges[:-1] + edges[1:]) / 2
    inside = (centres >= low) & (centres <= high)
    p = counts[inside].astype(float)
    p[0] += counts[centres < low].sum()
    p[-1] += counts[centres > high].sum()
    scale = np.float64(np.float32((high - low) / (levels - 1)))
    zero = np.rint(-low / scale)
    level = np.clip(np.rint(centres[inside] / scale) + zero, 0, levels - 1).astype(int)
    inner, q = counts[inside].astype(float), np.zeros(int(inside.sum()))
    for k in range(levels):
        members = (level == k) & (inner > 0)
        if members.any():
            q[members] = inner[level == k].sum() / members.sum()
    p, q = p / p.sum(), q / q.sum()
    kept = p > 0
    return float((p[kept] * np.log(p[kept] / np.maximum(q[kept], 1e-9))).sum())


def test_kl_really_calibrates() -> None:
    """The range differs from min-max, and no other shrink factor has a smaller divergence."""
    x = heavy_tailed(16_000)
    stats = gathered(x)
    full = choose_range(stats, UINT8, "minmax", 0)
    low, high = choose_range(stats, UINT8, "kl", 0)
    assert high - low < 0.9 * (full[1] - full[0])
    assert low / full[0] == pytest.approx(high / full[1], rel=1e-6)
    values = x.double().numpy().ravel()
    found = divergence(values, low, high, stats.span)
    grid = np.linspace(0.1, 1.0, 96)
    each = [divergence(values, full[0] * f, full[1] * f, stats.span) for f in grid]
    assert found <= min(each) * 1.001
    assert found < each[-1]


def test_the_search_on_weighted_samples() -> None:
    """Counts are weights: three times the sample or the count 3, the same range."""
    x = heavy_tailed(800).double().flatten()
    low, high = float(x.min()), float(x.max())
    tripled = search_norm(x.repeat(3), torch.ones(2400), UINT8, 2.0, low, high)
    weighted = search_norm(x, torch.full((800,), 3.0), UINT8, 2.0, low, high)
    assert tripled == weighted
    outlier = torch.tensor([high * 100], dtype=torch.float64)
    with_zero = search_norm(
        torch.cat([x, outlier]),
        torch.cat([torch.ones(800), torch.zeros(1)]),
        UINT8,
        2.0,
        low,
        high,
    )
    assert with_zero == search_norm(x, torch.ones(800), UINT8, 2.0, low, high)


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"calibration method 'percentil': did you mean"):
        choose_range(gathered(heavy_tailed(800)), UINT8, "percentil", 99.9)
