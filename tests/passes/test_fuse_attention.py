"""fuse_attention: split heads, attention and merged heads become one op."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompiler import ops
from qcompiler.passes.fuse_attention import fuse_attention
from qcompiler.passes.normalize import normalize
from qcompiler.program import Program, capture
from qcompiler.testing import check_contract

BATCH, LENGTH, HEADS, SIZE = 2, 5, 4, 3
WIDTH = HEADS * SIZE
X = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))

sdpa = F.scaled_dot_product_attention


def split(x: Tensor, heads: int = HEADS) -> Tensor:
    return x.view(BATCH, LENGTH, heads, -1).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(BATCH, LENGTH, -1)


def repeat_by_expand(x: Tensor, count: int) -> Tensor:
    batch, heads, length, size = x.shape
    wide = x[:, :, None, :, :].expand(batch, heads, count, length, size)
    return wide.reshape(batch, heads * count, length, size)


def grouped(m: Any, x: Tensor, repeat: Callable[[Tensor, int], Tensor] | None) -> Tensor:
    q, k, v = split(m.q(x)), split(m.k(x), 2), split(m.v(x), 2)
    if repeat is None:
        return m.o(merge(sdpa(q, k, v, enable_gqa=True)))
    return m.o(merge(sdpa(q, repeat(k, 2), repeat(v, 2))))


def permuted(m: Any, x: Tensor) -> Tensor:
    q, k, v = (
        f(x).reshape(BATCH, LENGTH, HEADS, SIZE).permute(0, 2, 1, 3) for f in (m.q, m.k, m.v)
    )
    return m.o(sdpa(q, k, v).permute(0, 2, 1, 3).contiguous().flatten(2))


def unflattened(m: Any, x: Tensor) -> Tensor:
    q, k, v = (f(x).unflatten(-1, (HEADS, SIZE)).transpose(-2, -3) for f in (m.q, m.k, m.v))
    return m.o(sdpa(q, k, v).transpose(-3, -2).flatten(-2))


def fused_projection(m: Any, x: Tensor) -> Tensor:
    """GPT-2 and ViT: one linear for query, key and value, then chunks."""
    q, k, v = (split(part) for part in m.qkv(x).chunk(3, -1))
    return m.o(merge(sdpa(q, k, v)))


MASK = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
FORMS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "plain": (lambda m, x: m.o(merge(sdpa(split(m.q(x)), split(m.k(x)), split(m.v(x))))), HEADS),
    "causal": (
        lambda m, x: m.o(merge(sdpa(split(m.q(x)), split(m.k(x)), split(m.v(x)), is_causal=True))),
        HEADS,
    ),
    "scale": (
        lambda m, x: m.o(merge(sdpa(split(m.q(x)), split(m.k(x)), split(m.v(x)), scale=0.1))),
        HEADS,
    ),
    "mask": (
        lambda m, x: m.o(merge(sdpa(split(m.q(x)), split(m.k(x)), split(m.v(x)), MASK))),
        HEADS,
    ),
    "permute": (permuted, HEADS),
    "unflatten": (unflattened, HEADS),
    "one projection": (fused_projection, HEADS),
    "gqa by torch": (lambda m, x: grouped(m, x, None), 2),
    "gqa by expand": (lambda m, x: grouped(m, x, repeat_by_expand), 2),
    "gqa by repeat_interleave": (
        lambda m, x: grouped(m, x, lambda y, n: y.repeat_interleave(n, dim=1)),
        2,
    ),
}


def parts(kv_heads: int) -> dict[str, nn.Module]:
    narrow = kv_heads * SIZE
    return {
        "q": nn.Linear(WIDTH, WIDTH),
        "k": nn.Linear(WIDTH, narrow),
        "v": nn.Linear(WIDTH, narrow),
        "o": nn.Linear(WIDTH, 7),
        "qkv": nn.Linear(WIDTH, 3 * WIDTH),
    }


def fused(program: Program, module: nn.Module) -> Program:
    after = check_contract(fuse_attention, program, [(X,)])
    with torch.no_grad():
        expected = copy.deepcopy(module).double()(X.double())
    (got,) = after.run((X,), double=True)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    return after


def attentions(program: Program) -> list[torch.fx.Node]:
    return [n for n in program.exported.graph.nodes if n.target is ops.attention]


@pytest.mark.parametrize("form", FORMS)
def test_attention_is_fused(
    form: str, formula: Any, captured: Any, names: Callable[[Program], list[str]]
) -> None:
    function, kv_heads = FORMS[form]
    module = formula(function, **parts(kv_heads))
    after = fused(captured(module, X), module)
    (node,) = attentions(after)
    assert node.args[4:6] == (HEADS, kv_heads)
    assert node.args[6] == pytest.approx(0.1 if form == "scale" else 1 / math.sqrt(SIZE))
    assert node.args[7] == (form == "causal")
    assert not {"transpose", "permute", "expand", "scaled_dot_product_attention"} & set(
        names(after)
    )
    assert after.history[-1].notes == ("1 attentions fused",)


def test_the_op_is_the_formula() -> None:
    """softmax(q kᵀ · scale) v for each head, key/value heads repeated, in numpy."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 5, 12, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, 6, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    got = ops.attention(q, k, v, None, 4, 2, 0.3, False).numpy()
    for batch in range(2):
        for head in range(4):
            kv = slice(head // 2 * 3, head // 2 * 3 + 3)
            mine = slice(head * 3, head * 3 + 3)
            scores = q[batch, :, mine].numpy() @ k[batch, :, kv].numpy().T * 0.3
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            expected = weights @ v[batch, :, kv].numpy()
            np.testing.assert_allclose(got[batch, :, mine], expected, rtol=1e-10)


def test_dynamic_sizes_stay_dynamic(tiny: Callable[[str], Any]) -> None:
    for name in ("tiny-attention-block", "tiny-post-norm-block"):
        model = tiny(name)
        after = fuse_attention(model.normalized)
        assert len(attentions(after)) == 1
        shapes = set()
        for batch in (*model.held_out, tuple(t[:1, :3] for t in model.held_out[0])):
            shapes.add(batch[0].shape)
            (got,) = after.run(batch)
            (want,) = model.eager(batch)
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
        assert len(shapes) >= 2


def test_rotary_positions_are_in_the_way(tiny: Callable[[str], Any]) -> None:
    """Query and key are rotated after the split: the op takes them before it."""
    program = tiny("tiny-gqa-decoder").normalized
    after = fuse_attention(program)
    assert after.exported is program.exported
    assert [r.reason for r in after.history[-1].refusals] == [
        "the query is not the split of a (batch, sequence, channels) tensor into heads"
    ]


def seen_on_the_way(m: Any, x: Tensor) -> Tensor:
    heads = sdpa(split(m.q(x)), split(m.k(x)), split(m.v(x)))
    return m.o(merge(heads)) + heads.sum()


def interleaved(m: Any, x: Tensor) -> Tensor:
    """Head h has the channels h, h + HEADS, …"""

    def by_columns(y: Tensor) -> Tensor:
        return y.view(BATCH, LENGTH, SIZE, HEADS).permute(0, 3, 1, 2)

    return m.o(merge(sdpa(by_columns(m.q(x)), by_columns(m.k(x)), by_columns(m.v(x)))))


def repeated_in_blocks(m: Any, x: Tensor) -> Tensor:
    """Heads a b a b, not a a b b: not what grouped attention means."""

    def tiled(y: Tensor) -> Tensor:
        wide = y[:, None].expand(BATCH, 2, 2, LENGTH, SIZE)
        return wide.reshape(BATCH, 4, LENGTH, SIZE)

    return grouped(m, x, lambda y, n: tiled(y))


def cut_after_repeat(m: Any, x: Tensor) -> Tensor:
    """A slice between the unsqueeze and the expansion takes half of the keys."""

    def half(y: Tensor, count: int) -> Tensor:
        wide = y[:, :, None, ::2].expand(BATCH, 2, count, 3, SIZE)
        return wide.reshape(BATCH, 2 * count, 3, SIZE)

    return grouped(m, x, half)


def rotated(m: Any, x: Tensor) -> Tensor:
    return m.o(merge(sdpa(split(m.q(x)).flip(-1), split(m.k(x)), split(m.v(x)))))


def unmerged(m: Any, x: Tensor) -> Tensor:
    """The merge forgets the transpose: sequence and heads are mixed."""
    return m.o(sdpa(split(m.q(x)), split(m.k(x)), split(m.v(x))).reshape(BATCH, LENGTH, WIDTH))


@pytest.mark.parametrize(
    ("function", "kv_heads", "reason"),
    [
        (seen_on_the_way, HEADS, "its heads are read by something else than their merge"),
        (interleaved, HEADS, "the query, key, value is not the split"),
        (repeated_in_blocks, 2, "is not the split"),
        (cut_after_repeat, 2, "is not the split"),
        (rotated, HEADS, "the query is not the split of a (batch, sequence, channels) tensor"),
        (unmerged, HEADS, "its heads are read by something else than their merge"),
    ],
)
def test_refusals(function: Any, kv_heads: int, reason: str, formula: Any, captured: Any) -> None:
    module = formula(function, **parts(kv_heads))
    program = captured(module, X)
    after = fused(program, module)
    assert attentions(after) == []
    (refusal,) = after.history[-1].refusals
    assert reason.split(", ", maxsplit=1)[0].removesuffix(" is not the split") in refusal.reason


def test_dropout_is_refused(formula: Any, captured: Any) -> None:
    module = formula(
        lambda m, x: merge(sdpa(split(x), split(x), split(x), dropout_p=0.1)) + m.b,
        b=torch.zeros(1),
    )
    program = captured(module, X)
    after = fuse_attention(program)
    assert after.exported is program.exported
    assert after.history[-1].refusals[0].reason == "it has dropout"


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 12), nn.Linear(12, 6), nn.Linear(12, 6)
        self.o = nn.Linear(12, 12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, 4, 3).transpose(1, 2)
        k, v = (f(x).view(batch, length, 2, 3).transpose(1, 2) for f in (self.k, self.v))
        y = sdpa(q, repeat_by_expand(k, 2), repeat_by_expand(v, 2), mask[:, None, None].bool())
        return self.o(y.transpose(1, 2).reshape(batch, length, 12))


def test_golden(golden_pair: Callable[[str, Program, Program], None]) -> None:
    x, mask = torch.randn(2, 5, 12), torch.ones(2, 5, dtype=torch.int64)
    sizes = {0: "batch", 1: "sequence"}
    program = normalize(capture(Decoder(), (x, mask), {"x": sizes, "mask": sizes}))
    golden_pair("fuse_attention", program, fuse_attention(program))
