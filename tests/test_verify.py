"""Verification: what may differ, what may not, and what the numbers mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompiler.errors import RewriteError
from qcompiler.program import Program, capture
from qcompiler.rewrite import Draft, rewrite
from qcompiler.verify import (
    EPS,
    INFINITE_DB,
    Reference,
    Sqnr,
    check_exact,
    compare,
    compare_sites,
    relative,
)

aten = torch.ops.aten


def decibels(reference: np.ndarray, got: np.ndarray) -> float:
    """10 log₁₀(‖r‖² / ‖r − g‖²), the survey's formula."""
    return float(10 * np.log10((reference**2).sum() / ((reference - got) ** 2).sum()))


def pair(seed: int, shape: tuple[int, ...], noise: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    r = torch.randn(shape, generator=generator)
    return r, r + noise * torch.randn(shape, generator=generator)


def test_sqnr_is_the_formula_over_all_batches() -> None:
    total, parts = Sqnr(), [pair(i, (i + 2, 5), 0.01 * (i + 1)) for i in range(3)]
    for r, g in parts:
        total.update(r, g)
    r, g = (torch.cat([p[i] for p in parts]).double().numpy() for i in range(2))
    assert total.db == pytest.approx(decibels(r, g), rel=1e-12)
    cosines = (r * g).sum(1) / np.linalg.norm(r, axis=1) / np.linalg.norm(g, axis=1)
    assert total.cosine == pytest.approx(cosines.mean(), rel=1e-9)
    assert total.cosine_low == pytest.approx(cosines.min(), rel=1e-9)


def test_one_percent_of_noise_is_forty_decibels() -> None:
    total = Sqnr()
    total.update(torch.full((4,), 100.0), torch.full((4,), 101.0))
    assert total.db == pytest.approx(40.0)


def test_identical_and_worthless_tensors() -> None:
    x, _ = pair(0, (3, 4), 0)
    total = Sqnr()
    total.update(x, x.clone())
    assert total.db == INFINITE_DB
    assert total.cosine == pytest.approx(1.0)
    for bad in (math.nan, math.inf):
        spoiled = x.clone()
        spoiled[1, 2] = bad
        total = Sqnr()
        total.update(x, spoiled)
        assert total.db == -INFINITE_DB
        assert total.cosine_low == -1.0
    total = Sqnr()
    total.update(torch.zeros(2, 2), torch.ones(2, 2))
    assert total.db < -1000 or total.db == -INFINITE_DB


def test_relative_error() -> None:
    r, g = pair(1, (6, 7), 0.1)
    expected = np.linalg.norm((g - r).double().numpy()) / np.linalg.norm(r.double().numpy())
    assert relative([r], [g]) == pytest.approx(expected)
    ids = torch.tensor([1, 2])
    assert relative([r, ids, r], [r, ids + 1, g]) == pytest.approx(expected)
    assert relative([torch.zeros(3)], [torch.full((3,), 2.0)]) == pytest.approx(math.sqrt(12))
    spoiled = g.clone()
    spoiled[0, 0] = math.nan
    assert relative([r], [spoiled]) == math.inf
    assert relative([spoiled], [spoiled]) == 0.0
    assert relative([spoiled], [g]) == 0.0  # what the reference itself does not know


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.relu(self.first(x)))))


def net() -> tuple[Program, list[tuple[Tensor]]]:
    program = capture(Net(), (torch.randn(4, 8),))
    return program, [
        (torch.randn(4, 8, generator=torch.Generator().manual_seed(i)),) for i in (1, 2)
    ]


@rewrite(exact=True)
def shift_second(draft: Draft, by: float = 1e-3) -> None:
    """Claims to keep the function, and adds a little to the second linear's weight."""
    node = list(draft.calls(aten.linear.default))[1]
    draft.set_constant(node.args[1], draft.constant(node.args[1]) + by)


@rewrite(exact=True)
def reorder_sums(draft: Draft) -> None:
    """Exact in real arithmetic: x Wᵀ = (x P)(W P)ᵀ, the columns in another order."""
    node = list(draft.calls(aten.linear.default))[1]
    order = torch.tensor([3, 1, 7, 0, 2, 6, 4, 5])
    index = draft.add_constant("order", order)
    moved = draft.call(aten.index_select.default, node.args[0], -1, index, before=node)
    draft.set_input(node, 0, moved)
    draft.set_constant(node.args[1], draft.constant(node.args[1])[:, order])


@rewrite(exact=True)
def poison(draft: Draft) -> None:
    node = list(draft.calls(aten.linear.default))[1]
    weight = draft.constant(node.args[1]).clone()
    weight[0, 0] = math.nan
    draft.set_constant(node.args[1], weight)


def test_a_wrong_exact_pass_is_caught_at_the_first_node_that_differs() -> None:
    program, batches = net()
    reference = Reference.of(program, batches)
    with pytest.raises(RewriteError) as caught:
        check_exact(program, shift_second(program), reference)
    message = str(caught.value)
    assert message.startswith("shift_second claims to keep the function, but the outputs moved by")
    assert "the first node that differs is linear_1 (second)" in message
    with pytest.raises(RewriteError, match=r"^poison claims .* moved by inf.*linear_1 \(second\)"):
        check_exact(program, poison(program), reference)


def test_an_exact_pass_is_given_its_residual_and_bound() -> None:
    program, batches = net()
    reference = Reference.of(program, batches)
    after = check_exact(program, reorder_sums(program), reference)
    entry = after.history[-1]
    assert entry.name == "reorder_sums"
    assert entry.residual is not None
    assert 0 < entry.residual <= reference.bound
    assert entry.bound == reference.bound
    expected = max(
        float((after.run(b)[0].double() - program.run(b, double=True)[0]).norm())
        / float(program.run(b, double=True)[0].norm())
        for b in batches
    )
    assert entry.residual == pytest.approx(expected)
    # The claim is a little sharper than any change that could matter.
    with pytest.raises(RewriteError):
        check_exact(program, shift_second(program, by=100 * reference.bound), reference)


class Cancelling(nn.Module):
    """(x + size) − size loses bits: the larger the size, the more rounding explains."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.size) - self.size


def test_the_bound_follows_the_rounding_of_the_model() -> None:
    x = torch.rand(100, generator=torch.Generator().manual_seed(0)) + 0.5
    bounds = {}
    for size in (0.0, 1e2, 1e4):
        module = Cancelling(size)
        reference = Reference.of(capture(module, (x,)), [(x,)])
        exact = x.double().numpy()
        rounding = np.linalg.norm(module(x).double().numpy() - exact) / np.linalg.norm(exact)
        assert reference.rounding == pytest.approx(rounding, rel=1e-6, abs=1e-12)
        bounds[size] = reference.bound
        assert reference.bound == max(16 * reference.rounding, 64 * EPS)
    assert bounds[0.0] == 64 * EPS
    assert 50 < bounds[1e4] / bounds[1e2] < 200


def test_the_reference_is_computed_in_float64() -> None:
    program, batches = net()
    reference = Reference.of(program, batches)
    wide = Net().double()
    with torch.no_grad():
        for (x,), (out,) in zip(batches, reference.outputs, strict=True):
            assert out.dtype == torch.float64
            torch.testing.assert_close(out, wide(x.double()), rtol=1e-12, atol=1e-12)
    assert 0 < reference.rounding < 1e-6


def test_compare_sums_each_output_over_batches() -> None:
    parts = [(pair(i, (2, 4, 3), 0.01), pair(9 - i, (2, 3), 0.1)) for i in range(3)]
    reference = [(a[0], b[0], torch.ones(2, dtype=torch.int64)) for a, b in parts]
    got = [(a[1], b[1], torch.zeros(2, dtype=torch.int64)) for a, b in parts]
    rows = compare(reference, got, ["hidden", "pooled", "ids"], "held-out")
    assert [(row.output, row.data) for row in rows] == [
        ("hidden", "held-out"),
        ("pooled", "held-out"),
    ]
    for index, row in enumerate(rows):
        r, g = (torch.cat([b[index] for b in s]).double().numpy() for s in (reference, got))
        assert row.sqnr_db == pytest.approx(decibels(r, g), rel=1e-9)
        assert row.lowest_cosine < row.cosine < 1
    with pytest.raises(ValueError, match="zip"):
        compare(reference, got[:2], ["hidden", "pooled", "ids"], "held-out")


def test_compare_ignores_padding() -> None:
    r, g = pair(0, (3, 4, 5), 0.01)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    spoiled = g.clone()
    spoiled[mask == 0] = 1e6
    (row,) = compare([(r,)], [(spoiled,)], ["hidden"], "held-out", [mask])
    kept = mask.numpy().astype(bool)
    expected = decibels(r.double().numpy()[kept], g.double().numpy()[kept])
    assert row.sqnr_db == pytest.approx(expected, rel=1e-9)
    (row,) = compare([(r,)], [(spoiled,)], ["hidden"], "held-out")
    assert row.sqnr_db < 0
    # An output of another shape, such as a pooled one, has no padding.
    r, g = pair(1, (3, 5), 0.01)
    (row,) = compare([(r,)], [(g,)], ["pooled"], "held-out", [mask])
    assert row.sqnr_db == pytest.approx(decibels(r.double().numpy(), g.double().numpy()))


def test_compare_sites_names_where_the_error_begins() -> None:
    program, batches = net()
    after = shift_second(program)
    sites = compare_sites(program, after, ["linear", "linear_1", "linear_2"], batches)
    assert list(sites) == ["linear", "linear_1", "linear_2"]
    assert sites["linear"] == INFINITE_DB
    assert sites["linear_1"] < 80
    values: dict[str, list[Tensor]] = {}
    for candidate in (program, after):
        kept: list[Tensor] = []
        for batch in batches:
            candidate.run(batch, lambda n, v, k=kept: k.append(v) if n.name == "linear_1" else None)
        values[str(len(values))] = kept
    r, g = (torch.cat(v).double().numpy() for v in values.values())
    assert sites["linear_1"] == pytest.approx(decibels(r, g), rel=1e-9)


def test_compare_sites_ignores_padding(tiny: Callable[[str], Any]) -> None:
    program = tiny("tiny-post-norm-block").normalized

    @rewrite(exact=False)
    def spoil_padding(draft: Draft) -> None:
        """Adds to the embedding where the mask is 0."""
        node = next(draft.calls(aten.embedding.default))
        mask = next(n for n in draft.graph.nodes if n.name == "attention_mask")
        wide = draft.call(aten.unsqueeze.default, mask, -1, before=node)
        inverse = draft.call(aten.rsub.Scalar, wide, 1, before=node)
        table = draft.call(aten.embedding.default, *node.args, before=node)
        draft.swap(node, draft.call(aten.add.Tensor, table, inverse, before=node))

    after = spoil_padding(program)
    name = next(n.name for n in program.exported.graph.nodes if "linear" in str(n.target))
    batches = tiny("tiny-post-norm-block").held_out
    assert any(bool((mask == 0).any()) for _, mask in batches)
    masked = compare_sites(program, after, [name], batches, "attention_mask")
    plain = compare_sites(program, after, [name], batches)
    assert masked[name] == INFINITE_DB
    assert plain[name] < 30
