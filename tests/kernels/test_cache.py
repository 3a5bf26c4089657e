"""Attention over a cache in place: against the op's definition, token by token and in chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompiler.cached import cached_attention as definition
from qcompiler.kernels import isa as isas
from qcompiler.kernels.cache import Cached, cache_elements, cached_attention, write_cache
from qcompiler.kernels.code import LANES
from qcompiler.kernels.expression import Access
from qcompiler.kernels.isa import Isa

Run = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    size: int
    past: int
    new: int
    window: int = -1


CASES = {
    "first token": Case(4, 2, 16, 0, 1),
    "one more": Case(6, 2, 32, 37, 1),
    "a prompt": Case(4, 4, 16, 0, 21),
    "a chunk after others": Case(6, 3, 48, 19, 13),
    "a window": Case(4, 2, 16, 30, 5, 7),
    "full": Case(2, 1, 16, 63, 1),
}
CAPACITY = 64


def tensors(c: Case) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(c.past + c.new)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return (
        normal(1, c.new, c.heads * c.size), normal(1, c.new, c.kv_heads * c.size),
        normal(1, c.new, c.kv_heads * c.size), normal(1, c.kv_heads, c.past, c.size),
        normal(1, c.kv_heads, c.past, c.size),
    )  # fmt: skip


def caches(c: Case, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The caches with the tokens given, (1, kv_heads, tokens, size), and rubbish behind them."""
    count = keys.shape[2]
    held = torch.full((c.kv_heads, CAPACITY, c.size), 9.0)
    held[:, :count] = keys[0]
    panels = held.reshape(c.kv_heads, -1, LANES, c.size).transpose(2, 3)
    rows = torch.full((c.kv_heads, CAPACITY, c.size), 9.0)
    rows[:, :count] = values[0]
    return panels.contiguous().reshape(-1), rows.reshape(-1)


def sizes(c: Case, argument: int) -> Cached:
    access = Access(argument, "float32", 0, (c.heads * c.size, c.size, 1))
    return Cached(c.heads, c.kv_heads, c.new, c.size, CAPACITY, c.size**-0.5, c.window, access)


@pytest.mark.parametrize("isa", [isas.VNNI, isas.AVX2, isas.NEON], ids=lambda isa: isa.name)
@pytest.mark.parametrize("case", CASES)
def test_attention(writer: Any, run: Run, case: str, isa: Isa) -> None:
    c = CASES[case]
    q, k, v, past_k, past_v = tensors(c)
    mask = torch.ones(1, c.past + c.new, dtype=torch.int64)
    want, keys, values = definition(
        q, k, v, past_k, past_v, mask, None, None, None, c.heads, c.kv_heads, c.size**-0.5,
        c.window, False,
    )  # fmt: skip
    held_k, held_v = caches(c, keys, values)
    e = writer((1, c.new, c.heads * c.size), held_k, held_v, torch.tensor([c.past]), q.reshape(-1))
    e.store(e.step("anchor", "float32"))
    kernel = cached_attention("a", e.arguments, sizes(c, 3), e.expression, isa)
    (found,) = run(kernel, e, isa)
    torch.testing.assert_close(found.reshape(want.shape), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_writing(writer: Any, run: Run, case: str) -> None:
    c = CASES[case]
    _, k, v, past_k, past_v = tensors(c)
    held_k, held_v = caches(c, past_k, past_v)
    e = writer((1,), held_k.clone(), held_v.clone(), torch.tensor([c.past]), k.reshape(-1),
               v.reshape(-1))  # fmt: skip
    places = [Access(i, "float32", 0, (c.kv_heads * c.size, c.size, 1)) for i in (3, 4)]
    kernel = write_cache("w", e.arguments, sizes(c, 3), *places)
    e.outputs = [0, 1]
    found_k, found_v = run(kernel, e, isas.VNNI)

    def joined(past: Tensor, new: Tensor) -> Tensor:
        heads = new.reshape(1, c.new, c.kv_heads, c.size).transpose(1, 2)
        return torch.cat([past, heads], 2)

    want_k, want_v = caches(c, joined(past_k, k), joined(past_v, v))
    assert torch.equal(found_k, want_k)
    assert torch.equal(found_v, want_v)


def test_no_position_leaves_the_cache(writer: Any, run: Run) -> None:
    """Positions outside are moved to the nearest inside: memory is safe, whatever is passed."""
    c = Case(2, 1, 16, 0, 1)
    _, k, v, _, _ = tensors(c)
    count = cache_elements(1, CAPACITY, 16)
    for position in (-5, CAPACITY, 1 << 40):
        guarded = torch.full((2 * count,), 5.0)
        e = writer((1,), guarded[:count].clone(), guarded[count:].clone(),
                   torch.tensor([position]), k.reshape(-1), v.reshape(-1))  # fmt: skip
        places = [Access(i, "float32", 0, (16, 16, 1)) for i in (3, 4)]
        e.outputs = [0, 1]
        kernel = write_cache("w", e.arguments, sizes(c, 3), *places)
        found_k, found_v = run(kernel, e, isas.VNNI)
        assert int((found_k != 5).sum()) == int((found_v != 5).sum()) == 16
