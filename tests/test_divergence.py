"""Divergence against scipy and its definition; sampled gradients as probes of its Hessian."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch import Tensor

from qcompiler.divergence import ROWS, Divergence, sampled_gradient


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_logits_are_compared_as_predictions() -> None:
    r, g = draw(2, 5, 7), draw(2, 5, 7, seed=1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    p, q = (softmax(t[mask != 0].double().numpy(), axis=-1) for t in (r, g))
    want = rel_entr(p, q).sum(-1).mean()
    # Outputs after the first are a state and do not count.
    found = Divergence([(r, draw(3))], [mask], logits=True)([(g, draw(3, seed=2))])
    assert math.isclose(found, want, rel_tol=1e-5)


@pytest.mark.parametrize("logits", [True, False])
def test_padding_has_no_gradient(logits: bool) -> None:
    output, mask = draw(3, 2 * ROWS, 7), torch.ones(3, 2 * ROWS)
    mask[1, 5:], mask[2] = 0, 0
    found = sampled_gradient(output, mask, logits, 1)
    assert (found[mask == 0] == 0).all()
    assert torch.equal(found[mask != 0], sampled_gradient(output[mask != 0], None, logits, 1))


def test_other_outputs_are_compared_by_their_power() -> None:
    r, s = draw(4, 6), draw(4, 2, seed=3)
    g, t = r + 0.1 * draw(4, 6, seed=1), s + 0.3
    want = 0.5 * np.mean([float((a - b).square().sum() / a.square().sum()) for a, b in
                          ((r, g), (s, t))])  # fmt: skip
    reference = Divergence([(r, s)], [None])
    assert math.isclose(reference([(g, t)]), want, rel_tol=1e-5)
    assert reference([(r, s)]) == 0.0
    assert reference([(g * math.nan, t)]) == math.inf


def test_several_batches_count_by_their_rows() -> None:
    r, g = draw(6, 5), draw(6, 5, seed=1)
    whole = Divergence([(r,)], [None], logits=True)([(g,)])
    parts = Divergence([(r[:2],), (r[2:],)], [None, None], logits=True)([(g[:2],), (g[2:],)])
    assert math.isclose(whole, parts, rel_tol=1e-5)


def test_more_rows_than_are_computed_at_a_time() -> None:
    r, g = draw(3 * ROWS + 5, 9), draw(3 * ROWS + 5, 9, seed=1)
    p, q = (t.double().log_softmax(-1) for t in (r, g))
    want = float((p.exp() * (p - q)).sum(1).mean())
    assert math.isclose(Divergence([(r,)], [None], logits=True)([(g,)]), want, rel_tol=1e-5)


def test_outputs_are_read_one_after_the_other() -> None:
    """So that those of all batches need not exist together."""
    most, alive = 0, []

    def outputs() -> Iterator[tuple[Tensor, ...]]:
        nonlocal most
        for seed in range(5):
            value = draw(4, 6, seed=seed)
            alive.append(weakref.ref(value))
            most = max(most, sum(known() is not None for known in alive))
            yield (value,)

    Divergence(outputs(), [None] * 5, logits=True)(outputs())
    assert most <= 2


def probes(output: Tensor, logits: bool, count: int) -> Tensor:
    """Mean of g gᵀ over draws, with respect to a flat output."""
    total = torch.zeros(output.numel(), output.numel(), dtype=torch.float64)
    for seed in range(count):
        g = sampled_gradient(output, None, logits, seed)
        total += torch.outer(g.flatten().double(), g.flatten().double())
    return total / count


def test_the_sampled_gradient_probes_the_hessian_of_the_divergence() -> None:
    """Softmax: diag(p) − p pᵀ. Gaussian: 1 / mean(output²)."""
    logits = draw(1, 4)
    p = logits[0].double().softmax(-1)
    want = torch.diag(p) - torch.outer(p, p)
    assert torch.allclose(probes(logits, True, 4000), want, atol=0.02)
    output = draw(1, 4, seed=5)
    want = torch.eye(4, dtype=torch.float64) / output.double().square().mean()
    found = probes(output, False, 4000)
    assert torch.allclose(found, want, atol=0.12 * float(want.max()))
