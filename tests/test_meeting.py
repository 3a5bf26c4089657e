"""What must not be run in pieces or padded is found by trying, in modules known to be either."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qcompiler.meeting import exact_sizes
from qcompiler.program import capture

ROWS = {
    "linear": (nn.Linear(6, 6), False),
    "batch norm": (nn.BatchNorm1d(6), False),
    "attention between rows": (lambda x: (x @ x.T).softmax(-1) @ x, True),
    "less the batch's mean": (lambda x: x - x.mean(0), True),
    "running sum": (lambda x: x.cumsum(0), True),
    "the row before": (lambda x: torch.cat([x[:1], x[:-1]]), True),
    "one number for all": (lambda x: x.square().mean(), True),
    "places of the largest": (lambda x: x.argmax(-1), False),
    "place of the largest row": (lambda x: x.argmax(0), True),
}


class Called(nn.Module):
    """A function as a module of one or two inputs."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function


class One(Called):
    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Two(Called):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.function(x, mask)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", ROWS)
def test_rows_that_meet(name: str, rows: int) -> None:
    function, meet = ROWS[name]
    program = capture(One(function).eval(), (torch.randn(5, 6),), {"x": {0: "n"}})
    found = exact_sizes(program, (torch.randn(rows, 6),), [("n", 6)], None)
    assert [*found] == (["n"] if meet else [])


@pytest.mark.parametrize("rows", [1, 4])
def test_columns_that_are_rows_of_several_tables(rows: int) -> None:
    tables = nn.ModuleList([nn.Embedding(size, 4) for size in (50, 3)])
    one = One(lambda x: tables[0](x[:, 0]) - tables[1](x[:, 1]))
    mixing = One(lambda x: (tables[0](x[:, 0]) - tables[1](x[:, 1])).softmax(0))
    batch = torch.stack([torch.randint(30, 50, (4,)), torch.randint(0, 3, (4,))], 1)
    for module, meet in ((one, False), (mixing, True)):
        program = capture(module, (batch,), {"x": {0: "n"}})
        found = exact_sizes(program, (batch[:rows],), [("n", 2)], None)
        assert [*found] == (["n"] if meet else [])


def test_rows_that_others_name() -> None:
    """Two rows are no graph: their edges name others."""
    program = capture(
        Two(lambda x, edges: x.index_add(0, edges[1], x[edges[0]])),
        (torch.randn(5, 6), torch.arange(4).repeat(2, 1)),
        {"x": {0: "n"}, "mask": {1: "edges"}},
    )
    batch = torch.randn(5, 6), torch.tensor([[0, 4, 3], [1, 2, 4]])
    assert [*exact_sizes(program, batch, [("n", 6), (2, "edges")], None)] == ["n"]


def hidden(x: Tensor, mask: Tensor) -> Tensor:
    return torch.einsum("blc,bl->bc", x, mask.float()) / mask.sum(1, keepdim=True)


def behind(x: Tensor, mask: Tensor) -> Tensor:
    """Each position reads the one behind it: padding where x is not 0."""
    return torch.cat([x[:, 1:] + 1, x[:, :1]], 1) * mask[..., None]


PADDED = {
    "masked mean": (hidden, False),
    "each position alone": (lambda x, mask: x.exp() * mask[..., None], False),
    "the mean of all": (lambda x, mask: (x + 1).mean(1) * mask[:, :1], True),
    "the position behind": (behind, True),
}


@pytest.mark.parametrize("name", PADDED)
def test_padding_that_shows(name: str) -> None:
    function, shows = PADDED[name]
    x, mask = torch.randn(2, 7, 3), torch.ones(2, 7).long()
    mask[0, 3:] = 0
    shapes = {"x": {0: "batch", 1: "length"}, "mask": {0: "batch", 1: "length"}}
    program = capture(Two(function), {"x": x, "mask": mask}, shapes)
    named = [("batch", "length", 3), ("batch", "length")]
    assert [*exact_sizes(program, (x, mask), named, 1)] == (["length"] if shows else [])


def attend(x: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    scores = x @ x.transpose(-1, -2) + bias
    return scores.masked_fill(mask[..., None, :] == 0, -torch.inf).softmax(-1) @ x


@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("shows", [False, True])
def test_padding_of_sequences_alone_and_of_so_many(rows: int, shows: bool) -> None:
    """No rows: sequences without a batch. Four rows, and no other number of them."""

    class Attention(nn.Module):
        def forward(self, x: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
            found = attend(x, bias, torch.ones_like(mask) if shows else mask)
            return found.reshape(*([rows] if rows else []), -1, 3)

    lead = (rows,) if rows else ()
    x, mask = torch.randn(*lead, 7, 3), torch.ones(*lead, 7).long()
    batch, at = (x, torch.randn(7, 7), mask), len(lead)
    shapes = {"x": {at: "length"}, "bias": {0: "length", 1: "length"}, "mask": {at: "length"}}
    named = [(*lead, "length", 3), ("length", "length"), (*lead, "length")]
    program = capture(Attention(), batch, shapes)
    assert [*exact_sizes(program, batch, named, 2)] == (["length"] if shows else [])
