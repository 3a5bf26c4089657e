"""Kept batches as code for fixed sizes takes them: in pieces, cut, or as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import qcompiler
from qcompiler.fitting import fitted

BATCHES = [(torch.arange(n)[:, None],) for n in (6, 12, 5)]


def sizes(**limits: object) -> list[int]:
    known = {"inputs": [["n", 1]], "entries": [{"n": 4}, {"n": 6}], "padded": [], "exact": {}}
    return [len(x) for (x,) in fitted(BATCHES, known | limits, None)]


def test_batches_are_run_in_pieces() -> None:
    assert sizes() == [6, 6, 6, 4]


def test_sequences_that_are_padded_are_cut() -> None:
    assert sizes(padded=["n"]) == [6, 6, 5]


def test_what_must_be_met_as_it_is_stays_whole_where_it_can() -> None:
    assert sizes(exact={"n": "why"}) == [6]
    assert sizes(exact={"n": "why"}, entries=[{"n": 3}]) == [3] * 7


class Neighbours(torch.nn.Module):
    """Sums over the edges of a graph."""

    def forward(self, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        return x + torch.zeros_like(x).index_add(0, target, x[source])


def test_a_part_of_a_graph_is_no_graph(tmp_path: Path) -> None:
    """No data of a compiled size, and edges of the parts lead to nodes that are gone."""
    pytest.importorskip("tvm", reason="the extra tvm is not installed")
    inputs = torch.randn(10, 4), *torch.randint(0, 10, (2, 30))
    made = qcompiler.compile(
        Neighbours(), inputs, calibration=[inputs] * 2, target="tvm:native", recipe="fp32",
        dynamic_shapes={"x": {0: "nodes"}, "source": {0: "edges"}, "target": {0: "edges"}},
        buckets={"nodes": [5], "edges": [20]}, out=tmp_path / "graph",
    )  # fmt: skip
    unverified, *_, left_out = made.manifest["warnings"]
    assert unverified.startswith("not verified: no batch of the data has a size")
    assert left_out.startswith("verified without ")
    assert "out of bounds" in left_out
    nodes, edges = torch.randn(5, 4), torch.randint(0, 5, (2, 20))
    torch.testing.assert_close(made.load()(nodes, *edges), Neighbours()(nodes, *edges))
