"""Kept batches as code for fixed sizes takes them: in pieces, cut, or as they are."""

from __future__ import annotations

import torch

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
