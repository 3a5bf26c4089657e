"""Histograms of values before and after they are quantized, and how the report shows them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import qcompiler
from qcompiler import charts
from qcompiler import distributions as module
from qcompiler.distributions import BINS, described, distributions
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.passes.normalize import normalize
from qcompiler.passes.pack_weights import pack_weights
from qcompiler.plan import Assignment, Plan, Site
from qcompiler.program import capture
from qcompiler.qtype import QType
from qcompiler.spec import ModelSpec


def test_counts_are_those_of_numpy() -> None:
    """A clipped activation moves what lies beyond its range, and a weight is on its grid."""
    torch.manual_seed(0)
    module, x = nn.Linear(32, 48), torch.randn(20, 32) * 3
    program = normalize(capture(module, (x,)))
    weight, value = Site("linear", 1, "layer"), Site("linear", 0, "layer")
    kind, narrow = QType.parse("int4:g16"), QType.parse("uint8:tensor:affine")
    plan = Plan({weight: Assignment(kind), value: Assignment(narrow, -1.5, 1.5)})
    quantized = pack_weights(insert_qdq(program, plan))
    found = distributions(program, quantized, plan, (x,))
    matrix = module.weight.detach()
    for site, before, after in (
        (weight, matrix, kind.round_trip(matrix, 1)),
        (value, x, x.clamp(-1.5, 1.5)),
    ):
        one = found[site]
        ends = (float(before.min()), float(before.max()))
        assert (one.low, one.high) == ends
        want, _ = np.histogram(before.numpy(), BINS, ends)
        assert np.abs(np.array(one.before) - want).sum() <= 4  # at edges of bins
        got, _ = np.histogram(after.numpy(), BINS, ends)
        near = 40 if site == value else 8  # 8 bits move a few over an edge
        assert np.abs(np.array(one.after) - got).sum() <= near
        assert sum(one.before) == sum(one.after) == before.numel()
    half = (x.max() - x.min()) / BINS / 2
    assert found[value].moved == pytest.approx(
        float(((x - x.clamp(-1.5, 1.5)).abs() > half).float().mean()), abs=0.02
    )
    rows = described(found, program, plan)
    assert [row["kind"] for row in rows] == ["activation", "weight"]


def test_samples_of_weights_take_no_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(40, 50)
    assert module._sample(weight, None).data_ptr() == weight.data_ptr()
    monkeypatch.setattr(module, "SAMPLE", 64)
    few = module._sample(weight, None)
    assert few.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    assert torch.equal(few, weight.flatten()[::32])
    assert not module._sample(weight[:0], None).numel()


def test_the_report_draws_them(tmp_path: Path) -> None:
    data = [(torch.randn(8, 32),) for _ in range(4)]
    spec = ModelSpec("two", nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)),
                     data[0], {}, lambda: data)  # fmt: skip
    artifact = qcompiler.compile(spec, recipe="w8a8", out=tmp_path / "a")
    rows = artifact.manifest["distributions"]
    assert sorted(row["kind"] for row in rows) == ["activation"] * 2 + ["weight"] * 2
    page = (tmp_path / "a" / "report.html").read_text()
    assert "Values before and after" in page
    assert page.count('moved by more than half a bin"') == len(rows)


def test_many_are_folded() -> None:
    row = {"path": "a<b", "kind": "weight", "qtype": "int4:g32", "low": -1.0, "high": 1.0,
           "before": [0, 5, 1], "after": [0, 6, 0], "moved": 0.1}  # fmt: skip
    drawn = charts.histograms([row] * (charts.HISTOGRAMS + 3))
    assert drawn.count("<svg") == charts.HISTOGRAMS + 3
    assert "3 sites more" in drawn
    assert "a&lt;b" in drawn
    assert drawn.count('class="mark"') == charts.HISTOGRAMS + 3
