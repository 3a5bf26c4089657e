"""`fuse_cache`: masks and rotations are recognised by what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompiler import cached
from qcompiler.passes.fuse_cache import fuse_cache
from qcompiler.passes.normalize import normalize
from qcompiler.program import Program, capture
from qcompiler.verify import Reference, check_exact

HEADS, KV_HEADS, SIZE, CONTEXT = 4, 2, 8, 40
MULTIPLE = 4
WIDTH = HEADS * SIZE


class Block(nn.Module):
    """Attention over a cache; how mask and rotation are spelled is chosen."""

    def __init__(self, mask: str, rotation: str) -> None:
        super().__init__()
        self.mask, self.rotation = mask, rotation
        self.query, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.key, self.value = (nn.Linear(WIDTH, KV_HEADS * SIZE) for _ in range(2))

    def visible(self, attention_mask: Tensor, new: int) -> Tensor:
        total = attention_mask.shape[1]
        key, place = torch.arange(total)[None], torch.arange(new)[:, None] + (total - new)
        causal = key <= place
        if self.mask == "window":
            causal = causal & (place - key < 3)
        both = causal & attention_mask[:, None, None].bool()
        if self.mask == "additive":
            return torch.where(both, 0.0, -1e9)
        if self.mask == "alibi":
            return torch.where(both, 0.1 * (key - place).float(), -1e9)
        return both

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.rotation == "none":
            return x
        if self.rotation == "normed":
            x = nn.functional.rms_norm(x, (SIZE,))
        pairs = 2 if self.rotation == "partial" else SIZE // 2
        angles = positions[:, None, :, None].float() * 0.5 ** torch.arange(pairs)
        cos, sin = angles.cos(), angles.sin()
        if self.rotation == "interleaved":
            a, b = x[..., ::2], x[..., 1::2]
            return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
        head, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
        a, b = head.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)
        if self.rotation == "hadamard":
            return turned.unflatten(-1, (4, 2)).flip(-1).flatten(-2)
        return turned

    def forward(
        self, x: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key: Tensor,
        past_value: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        batch, new, _ = x.shape

        def split(y: Tensor, heads: int) -> Tensor:
            return y.view(batch, new, heads, SIZE).transpose(1, 2)

        q = self.turn(split(self.query(x), HEADS), position_ids)
        k = torch.cat((past_key, self.turn(split(self.key(x), KV_HEADS), position_ids)), 2)
        v = torch.cat((past_value, split(self.value(x), KV_HEADS)), 2)
        mixed = nn.functional.scaled_dot_product_attention(
            q,
            k.repeat_interleave(2, 1),
            v.repeat_interleave(2, 1),
            attn_mask=self.visible(attention_mask, new),
        )
        return self.out(mixed.transpose(1, 2).reshape(batch, new, WIDTH)), k, v


def inputs(batch: int, new: int, past: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(batch, past + new, dtype=torch.int64)
    mask[0, :2] = 0
    return {
        "x": torch.randn(batch, new, WIDTH, generator=generator),
        "attention_mask": mask,
        "position_ids": torch.arange(past, past + new).repeat(batch, 1),
        "past_key": torch.randn(batch, KV_HEADS, past, SIZE, generator=generator),
        "past_value": torch.randn(batch, KV_HEADS, past, SIZE, generator=generator),
    }


def build(mask: str = "plain", rotation: str = "none") -> Program:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = Block(mask, rotation)
    shapes = {name: {0: "batch", 1: "new"} for name in ("x", "position_ids")}
    shapes |= {name: {0: "batch", 2: "past"} for name in ("past_key", "past_value")}
    shapes["attention_mask"] = {0: "batch", 1: "total"}
    return normalize(capture(block, inputs(2, 3, 5), shapes))


def fuse(program: Program, **options: Any) -> Program:
    """Fused, and shown to be the same function for a prefill and for a continuation."""
    batches = [tuple(inputs(*sizes).values()) for sizes in ((2, 3, 5), (2, 9, 0), (3, 1, 12))]
    fused = fuse_cache(program, CONTEXT, **{"multiple": MULTIPLE, **options})
    return check_exact(program, fused, Reference.of(program, batches))


def fused_node(program: Program) -> Any:
    nodes = [n for n in program.exported.graph.nodes if n.target is cached.cached_attention]
    assert len(nodes) == 1
    return nodes[0]


@pytest.mark.parametrize(("mask", "window"), [("plain", -1), ("window", 3), ("additive", -1)])
def test_masks_are_known_by_what_they_hide(mask: str, window: int) -> None:
    node = fused_node(fuse(build(mask)))
    assert node.args[5].name == "attention_mask"
    assert node.args[12] == window


@pytest.mark.parametrize(
    ("rotation", "pairs", "interleaved"),
    [("halves", 4, False), ("interleaved", 4, True), ("partial", 2, False)],
)
def test_rotations_become_tables(rotation: str, pairs: int, interleaved: bool) -> None:
    program = fuse(build(rotation=rotation))
    node = fused_node(program)
    assert [str(n) for n in node.args[:3]] == ["linear", "linear_1", "linear_2"]
    assert node.args[13] is interleaved
    cos, sin = (program.constants()[n.name] for n in node.args[6:8])
    angles = torch.arange(CONTEXT)[:, None].double() * 0.5 ** torch.arange(pairs)
    torch.testing.assert_close(cos.double(), angles.cos(), rtol=0, atol=2e-6)
    torch.testing.assert_close(sin.double(), angles.sin(), rtol=0, atol=2e-6)


class Twice(nn.Module):
    """Two blocks, the first of which reads embeddings; token 0 has a row of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, WIDTH, padding_idx=0)
        self.first, self.second = (Block("plain", "normed") for _ in range(2))
        for linear in (self.first.value, self.first.out, self.second.query, self.second.key):
            nn.init.zeros_(linear.bias)

    def forward(
        self, tokens: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key: Tensor,
        past_value: Tensor, later_key: Tensor, later_value: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        given = (attention_mask, position_ids)
        x, *caches = self.first(self.table(tokens), *given, past_key, past_value)
        x, *later = self.second(x, *given, later_key, later_value)
        return (x, *caches, *later)


def test_what_is_always_zero_is_no_rotation() -> None:
    """Of tokens that are 0 the second block's queries are, whatever the first one's were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = Twice()

    def given(batch: int, new: int, past: int) -> dict[str, Tensor]:
        found = inputs(batch, new, past)
        tokens = found.pop("x")[..., 0].abs().long() + 1
        later = {f"later_{n}": found[f"past_{n}"] for n in ("key", "value")}
        return {"tokens": tokens, **found, **later}

    example = given(2, 3, 5)
    shapes = {
        n: {0: "batch", 2 if x.ndim == 4 else 1: "past" if x.ndim == 4 else "new"}
        for n, x in example.items()
    } | {"attention_mask": {0: "batch", 1: "total"}}
    program = normalize(capture(block, example, shapes))
    batches = [tuple(given(*sizes).values()) for sizes in ((2, 3, 5), (3, 1, 12))]
    fused = check_exact(
        program, fuse_cache(program, CONTEXT, multiple=MULTIPLE), Reference.of(program, batches)
    )
    nodes = [n for n in fused.exported.graph.nodes if n.target is cached.cached_attention]
    assert [n.args[8].name for n in nodes] == ["position_ids"] * 2
    assert nodes[0].args[6] is nodes[1].args[6]


def test_what_follows_the_rotation_stays_outside() -> None:
    node = fused_node(fuse(build(rotation="hadamard")))
    assert node.args[6:9] == (None, None, None)


def test_the_outputs_are_the_joined_caches() -> None:
    program = fuse(build(rotation="halves"))
    names = [str(n.target) for n in program.exported.graph.nodes if n.op == "call_function"]
    assert not any("cat" in name or "scaled_dot" in name or "arange" in name for name in names)


@pytest.mark.parametrize(
    ("mask", "options", "reason"),
    [
        ("alibi", {}, "its mask is not that of a causal language model with padding"),
        ("plain", {"multiple": 16}, "its head size 8 is no multiple of 16"),
    ],
)
def test_what_is_left_has_a_reason(mask: str, options: dict[str, Any], reason: str) -> None:
    program = build(mask)
    left = fuse_cache(program, CONTEXT, **{"multiple": MULTIPLE, **options})
    assert left.exported is program.exported
    assert [r.reason for r in left.history[-1].refusals] == [reason]


def test_attention_without_a_cache_is_left() -> None:
    class Plain(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, k)

    q = torch.randn(2, 2, 4, 8)
    left = fuse_cache(capture(Plain(), (q, q)), CONTEXT)
    assert [r.reason for r in left.history[-1].refusals] == [
        "its keys and values are no cache joined with new ones"
    ]
