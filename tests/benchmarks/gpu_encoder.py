"""Attention over tensors, as encoders have it, which `gpu.py` checks and times; as `gpu_cases`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from gpu_cases import Trial
from torch import Tensor

Strides = tuple[int, int, int, int]


@dataclass(frozen=True)
class Encoder:
    """An attention over tensors at one size.

    Attributes:
        batch, queries, keys: texts and their lengths.
        heads, kv_heads, size: of the attention.
        mask: "" none; padding: bool, of keys; added: float, of queries and keys, the smallest
            number where keys are hidden; hidden: bool, and one query sees nothing.
        causal: whether a query sees no later keys.
        merged: tensors are (batch, position, head · element), not (batch, head, position, element).
        timed: whether it is measured, or only checked.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    size: int
    mask: str = ""
    causal: bool = False
    merged: bool = True
    timed: bool = False

    @property
    def name(self) -> str:
        """Of the kernel."""
        numbers = (self.batch, self.queries, self.keys, self.heads, self.kv_heads, self.size)
        tail = [self.mask or "all", *(["causal"] if self.causal else [])]
        tail += ["merged"] if self.merged else []
        return "_".join(["encoder", *map(str, numbers), *tail])

    @property
    def shapes(self) -> list[tuple[tuple[int, ...], Strides]]:
        """Shape and strides over (batch, head, position, element) of q, k, v and the result."""
        found: list[tuple[tuple[int, ...], Strides]] = []
        h, g, s = self.heads, self.kv_heads, self.size
        for n, count in ((self.queries, h), (self.keys, g), (self.keys, g), (self.queries, h)):
            if self.merged:
                found.append(((self.batch, n, count * s), (n * count * s, s, count * s, 1)))
            else:
                found.append(((self.batch, count, n, s), (count * n * s, n * s, s, 1)))
        return found


ENCODERS = (
    *(
        Encoder(batch, length, length, heads, heads, size, mask, timed=True)
        for batch, length, heads, size in ((1, 128, 12, 32), (8, 128, 12, 32), (8, 512, 12, 64))
        for mask in ("", "padding")
    ),
    Encoder(1, 197, 197, 12, 12, 64, timed=True), Encoder(8, 512, 512, 16, 16, 64, timed=True),
    # Tails of every kind.
    Encoder(2, 17, 17, 2, 2, 16, "padding"), Encoder(2, 70, 33, 4, 2, 32, "added"),
    Encoder(1, 64, 64, 2, 2, 48, causal=True), Encoder(1, 40, 90, 2, 1, 64, causal=True),
    Encoder(2, 50, 130, 2, 2, 64, "hidden", merged=False), Encoder(1, 100, 65, 1, 1, 256, "added"),
    Encoder(3, 33, 200, 3, 3, 80, merged=False), Encoder(1, 64, 130, 2, 2, 128, "padding", True),
)  # fmt: skip


def kernel(case: Encoder) -> tuple[Any, dict[str, int]]:
    """The kernel; needs TVM, no GPU."""
    from qcompiler.kernels.code import Argument
    from qcompiler.kernels.cuda_attention_flash import flash_attention
    from qcompiler.kernels.cuda_flash import choose_tiles
    from qcompiler.kernels.expression import Access, Expression, Step
    from qcompiler.kernels.heads import Heads

    c = case
    given, accesses = [], []
    for i, (name, (shape, strides)) in enumerate(zip("qkv", c.shapes, strict=False)):
        given.append(Argument(name, "float16", torch.Size(shape).numel()))
        accesses.append(Access(i, "float16", 0, strides))
    mask = None
    if c.mask:
        rows = 1 if c.mask == "padding" else c.queries
        kind = "float32" if c.mask == "added" else "bool"
        given.append(Argument("mask", kind, c.batch * rows * c.keys))
        steps = (rows * c.keys, 0, 0 if rows == 1 else c.keys, 1)
        mask = Access(3, kind, 0, steps)
    shape, _ = c.shapes[3]
    given.append(Argument("out", "float32", torch.Size(shape).numel()))
    steps_out, step = [], 1
    for n in reversed(shape):
        steps_out.insert(0, step)
        step *= n
    write = Expression(shape, (Step("anchor", "float32"),),
                       ((0, Access(len(given) - 1, "float32", 0, tuple(steps_out))),))  # fmt: skip
    heads = Heads(c.batch, c.heads, c.kv_heads, c.queries, c.keys, c.size, c.size, *accesses, mask,
                  c.size**-0.5, c.causal, c.merged)  # fmt: skip
    tiles = choose_tiles(c.queries, c.size)
    return flash_attention(c.name, given, heads, tiles, write), {}


def trial(case: Encoder, extra: dict[str, int], device: str = "cuda") -> Trial:
    """Fresh random inputs."""
    c = case
    q, k, v = (torch.randn(shape, device=device).half() for shape, _ in c.shapes[:3])
    shape = c.shapes[3][0]
    out = torch.full(shape, float("nan"), device=device)
    seen = torch.ones(c.batch, 1, 1 if c.mask == "padding" else c.queries, c.keys,
                      dtype=torch.bool, device=device)  # fmt: skip
    if c.mask == "padding":
        for member in range(c.batch):
            seen[member, ..., c.keys - c.keys * member // (2 * c.batch) :] = False
    elif c.mask:
        seen = torch.rand(seen.shape, device=device) < 0.7
        seen[..., 0] = True
        if c.mask == "hidden":
            seen[0, 0, c.queries // 2] = False
    bias = torch.randn(seen.shape, device=device)
    least = torch.finfo(torch.float32).min
    mask = torch.where(seen, bias, least) if c.mask == "added" else seen
    given = [q, k, v, *([mask] if c.mask else []), out]

    def by_head(x: Tensor, count: int) -> Tensor:
        wide = x.reshape(c.batch, -1, count, c.size).transpose(1, 2) if c.merged else x
        return wide.repeat_interleave(c.heads // count, 1)

    def error() -> float:
        q64, k64, v64 = (by_head(x.double(), n) for x, n in
                         ((q, c.heads), (k, c.kv_heads), (v, c.kv_heads)))  # fmt: skip
        scores = q64 @ k64.transpose(-1, -2) * c.size**-0.5
        if c.mask:
            added = mask.double() if c.mask == "added" else 0.0
            scores = (scores + added).masked_fill(~seen, -1e30)
        if c.causal:
            late = torch.ones(c.queries, c.keys, dtype=torch.bool, device=device)
            scores = scores.masked_fill(~late.tril(c.keys - c.queries), -1e30)
        want = scores.softmax(-1) @ v64
        found = by_head(out.double(), c.heads)
        return float((found - want).norm() / want.norm())

    q16, k16, v16 = (by_head(x, n).contiguous() for x, n in
                     ((q, c.heads), (k, c.kv_heads), (v, c.kv_heads)))  # fmt: skip

    def peer() -> Any:
        call = torch.nn.functional.scaled_dot_product_attention
        given = mask.half() if c.mask == "added" else mask
        return call(q16, k16, v16, attn_mask=given if c.mask else None, is_causal=c.causal)

    moved = sum(x.numel() * x.element_size() for x in (q, k, v, out))
    count = 4 * c.batch * c.heads * c.queries * c.keys * c.size
    return Trial(given, -1, (len(given) - 1,), error, moved, count, peer)
