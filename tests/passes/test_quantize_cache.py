"""Quantized caches, simulated: what is rounded, along which axis, and what stays in float."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompiler import ops
from qcompiler.passes.normalize import normalize
from qcompiler.passes.quantize_cache import quantize_cache
from qcompiler.program import capture
from qcompiler.qtype import QType
from qcompiler.testing import check_contract

TOKEN, GROUPED = QType.parse("uint4:token:affine"), QType.parse("uint4:g4:affine")


class Attend(nn.Module):
    def __init__(self, repeat: int = 1) -> None:
        super().__init__()
        self.repeat = repeat

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t[:, :, None].expand(-1, -1, self.repeat, -1, -1).flatten(1, 2) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def heads(repeat: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2 * repeat, 10, 8, generator=g)
    k, v = (torch.randn(2, 2, 10, 8, generator=g) for _ in range(2))
    k[..., 3] += 6  # keys have an outlier channel
    return q, k, v


def by_hand(x: Tensor, axis: int, tokens: int) -> Tensor:
    """Affine 4-bit rounding with one scale along `axis`, over the first `tokens` tokens."""
    head = x[:, :, :tokens].double()
    low = head.amin(axis, keepdim=True).clamp(max=0)
    high = head.amax(axis, keepdim=True).clamp(min=0)
    scale = (high - low) / 15
    zero = (-low / scale).round()
    rounded = (((head / scale).round() + zero).clamp(0, 15) - zero) * scale
    return torch.cat([rounded.float(), x[:, :, tokens:]], 2)


@pytest.mark.parametrize("repeat", [1, 3])
def test_keys_and_values_are_rounded_before_their_heads_repeat(repeat: int) -> None:
    inputs = heads(repeat)
    program = normalize(capture(Attend(repeat), inputs))
    after = check_contract(
        quantize_cache, program, [inputs], idempotent=False, keys=TOKEN, values=TOKEN
    )
    q, k, v = inputs
    expected = Attend(repeat)(q, by_hand(k, 3, 10), by_hand(v, 3, 10))
    torch.testing.assert_close(after.run(inputs)[0], expected, rtol=1e-4, atol=1e-5)
    assert after.history[-1].notes[0].startswith("1 attentions read keys as uint4:token:affine")


def test_keys_by_channel_over_full_groups_of_tokens() -> None:
    _, k, _ = heads()
    got = ops.cache_round_trip(k, str(GROUPED))
    expected = torch.cat([by_hand(k[:, :, :4], 2, 4), by_hand(k[:, :, 4:8], 2, 4), k[:, :, 8:]], 2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    per_token = ops.cache_round_trip(k, str(TOKEN))
    assert float((got - k).square().sum()) < 0.5 * float((per_token - k).square().sum())


@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize("keys", [TOKEN, None])
def test_each_query_reads_its_newest_tokens_in_float(repeat: int, keys: QType | None) -> None:
    inputs = heads(repeat)
    window = 3
    program = normalize(capture(Attend(repeat), inputs))
    after = check_contract(
        quantize_cache, program, [inputs], idempotent=False,
        keys=keys, values=TOKEN, window=window,
    )  # fmt: skip
    (got,) = after.run(inputs)
    q, k, v = inputs
    old_k = by_hand(k, 3, 10) if keys else k
    for t in range(10):  # one query at a time, with the cache as it stands then
        old = max(0, t + 1 - window)
        mixed = [
            torch.cat([rounded[:, :, :old], plain[:, :, old : t + 1]], 2).repeat_interleave(
                repeat, 1
            )
            for rounded, plain in ((old_k, k), (by_hand(v, 3, 10), v))
        ]
        expected = F.scaled_dot_product_attention(q[:, :, t : t + 1], *mixed)
        torch.testing.assert_close(got[:, :, t : t + 1], expected, rtol=1e-4, atol=1e-5)


def test_a_window_of_everything_is_float(tiny: Callable[[str], Any]) -> None:
    model = tiny("tiny-gqa-decoder")
    after = quantize_cache(model.normalized, TOKEN, TOKEN, window=1000)
    for batch in model.held_out:
        torch.testing.assert_close(
            after.run(batch), model.normalized.run(batch), rtol=1e-4, atol=1e-5
        )


def test_a_mask_is_kept(tiny: Callable[[str], Any]) -> None:
    model = tiny("tiny-attention-block")
    after = quantize_cache(model.normalized, TOKEN, TOKEN, window=1000)
    for batch in model.held_out:
        torch.testing.assert_close(
            after.run(batch), model.normalized.run(batch), rtol=1e-4, atol=1e-5
        )
