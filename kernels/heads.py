"""An attention's sizes and layout, and its two products as the attention kernel asks for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from qcompiler.kernels import code
from qcompiler.kernels.code import LANES
from qcompiler.kernels.expression import NARROW, Access

NEVER = -3.0e38  # the score of a position that is masked
NOWHERE = -3.4e38  # and of lanes past the last key: nothing even where every position is masked


@dataclass(frozen=True)
class Heads:
    """Sizes and layout of an attention.

    Attributes:
        batch, heads, kv_heads: numbers of each.
        queries, keys: sequence lengths.
        size, value_size: of a head.
        q, k, v: accesses over (batch, head, position, element); element by element contiguous.
        mask: over (batch, head, query, key), bool (True: attend) or float (added), or None.
        scale: what scores are multiplied by.
        causal: whether query i sees keys up to i + keys − queries.
        merged: whether the output is (batch, position, head · element), not (batch, head, position,
            element).
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    size: int
    value_size: int
    q: Access
    k: Access
    v: Access
    mask: Access | None
    scale: float
    causal: bool
    merged: bool

    @property
    def narrow(self) -> bool:
        """Whether queries, keys and values are bfloat16."""
        return self.q.dtype == NARROW

    @property
    def width(self) -> int:
        """Of a value, in whole vectors."""
        return -(-self.value_size // LANES) * LANES

    @property
    def padded(self) -> int:
        """Keys, in whole vectors."""
        return -(-self.keys // LANES) * LANES


def place(access: Access, batch: Any, head: Any, position: Any) -> Any:
    """Where an element of q, k or v begins."""
    a, b, c, _ = access.strides
    return access.offset + batch * a + head * b + position * c


class Products(Protocol):
    """The two matrix products of a head, a few rows of queries at a time."""

    def scores(self, scores: Any, start: Any, panel: Any, height: int, count: int) -> None:
        """scores[r][t] = q[r] · k[t] · scale for `count` vectors of keys from a panel on."""

    def weigh(self, scores: Any, height: int) -> None:
        """Take in what the softmax left in the scores."""

    def weighted(self, scores: Any, column: int, height: int, count: int) -> list[Any]:
        """Sums over the keys of scores times `count` vectors of the values, row by row."""


def write_scores(
    heads: Heads, scores: Any, sums: list[Any], panel: Any, height: int, count: int
) -> None:
    """Sums of products, scaled."""
    for r in range(height):
        for v in range(count):
            result = code.load(sums[r * count + v], 0) * code.number(heads.scale)
            code.store(scores, r * heads.padded + (panel + v) * LANES, result)
