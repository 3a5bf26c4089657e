"""The attention kernels that `gpu.py` checks and times; as `gpu_cases`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from gpu_cases import Trial

QUERIES = 64.0  # `cuda_cache.QUERIES`


@dataclass(frozen=True)
class Attention:
    """An attention over a cache at one size.

    Attributes:
        kind: prompt (many queries, tensor cores) or few (keys shared out among blocks).
        new: queries.
        heads, kv_heads, size: of the attention.
        position: tokens in the cache before.
        capacity: of the cache.
        bits: of a number in the cache.
        window: tokens that a query sees; −1: all.
        timed: whether it is measured, or only checked.
    """

    kind: str
    new: int
    heads: int
    kv_heads: int
    size: int
    position: int
    capacity: int
    bits: int = 16
    window: int = -1
    timed: bool = False

    @property
    def name(self) -> str:
        """Of the kernel."""
        window = self.window if self.window > 0 else "all"
        return (
            f"{self.kind}_{self.new}_{self.heads}_{self.kv_heads}_{self.size}_{self.position}_"
            f"{self.capacity}_{self.bits}_{window}"
        )

    @property
    def seen(self) -> int:
        """Pairs of a query and a key."""
        ends = range(self.position + 1, self.position + self.new + 1)
        return sum(min(end, self.window) if self.window > 0 else end for end in ends)


ATTENTIONS = (
    *(
        Attention("prompt", new, heads, kv_heads, size, at, 2048, timed=True)
        for heads, kv_heads, size in ((9, 3, 64), (32, 32, 128), (32, 8, 128))
        for new, at in ((64, 960), (512, 0), (512, 512))
    ),
    Attention("prompt", 2048, 32, 32, 128, 0, 2048, timed=True),
    Attention("prompt", 512, 9, 3, 64, 0, 2048, 8, timed=True),
    Attention("prompt", 512, 32, 8, 128, 512, 2048, 4, timed=True),
    Attention("few", 1, 32, 32, 128, 1023, 2048, timed=True),
    Attention("few", 1, 32, 8, 128, 1023, 2048, 8, timed=True),
    # Tails of every kind.
    Attention("prompt", 17, 4, 2, 16, 0, 64), Attention("prompt", 70, 2, 1, 48, 5, 80),
    Attention("prompt", 33, 3, 1, 64, 100, 140, window=20),
    Attention("prompt", 100, 4, 2, 16, 17, 128, window=5),
    Attention("prompt", 90, 2, 2, 128, 37, 200, window=64),
    Attention("prompt", 40, 2, 2, 256, 70, 128), Attention("prompt", 40, 1, 1, 80, 30, 128),
    Attention("prompt", 20, 4, 2, 16, 3, 64, 8), Attention("prompt", 90, 4, 2, 32, 3, 128, 4),
    Attention("prompt", 33, 2, 1, 256, 70, 120, 8, 40), Attention("prompt", 20, 3, 1, 48, 9, 65, 4),
    Attention("prompt", 20, 4, 2, 16, 3, 64, 4),
    *(
        Attention("few", new, heads, kv_heads, size, at, 160, bits, window)
        for new, heads, kv_heads, size, at, bits, window in (
            (1, 4, 2, 16, 0, 16, -1), (3, 9, 3, 64, 130, 16, -1), (1, 4, 1, 128, 150, 8, -1),
            (5, 2, 2, 32, 70, 4, 24),
        )
    ),
)  # fmt: skip


def kernel(case: Attention) -> tuple[Any, dict[str, int]]:
    """The kernel and the elements of its workspace and counters; needs TVM, no GPU."""
    from qcompiler.kernels import cuda_decode, cuda_prompt
    from qcompiler.kernels.cuda_cache import Decode, Source
    from qcompiler.kernels.cuda_flash import choose_tiles

    c = case
    sizes = Decode(c.heads, c.kv_heads, c.new, c.size, c.capacity, c.size**-0.5, c.window, c.bits)
    count = c.kv_heads * c.capacity * c.size
    held = ("float16", count) if c.bits == 16 else ("uint8", count * c.bits // 8)
    rows = c.new * c.heads * c.size
    given: list[tuple[str, str, int]] = [("keys", *held), ("values", *held), ("place", "int64", 1)]
    few = c.kind == "few"
    extra = {"workspace": sizes.workspace, "counters": sizes.counters} if few else {}
    if few:
        given += [("workspace", "float32", extra["workspace"]),
                  ("counters", "int32", extra["counters"])]  # fmt: skip
    given.append(("q", "float32" if few else "float16", rows))
    q = _rows(len(given) - 1, c.heads, c.size)
    sources = []
    for name in ("k", "v"):
        if few:
            given.append((name, "float32", c.new * c.kv_heads * c.size))
        x, scale = _rows(len(given) - 1, c.kv_heads, c.size), None
        if c.bits < 16 and (few or name == "v"):
            given.append((f"{name}_scale", "float32", c.kv_heads * c.size))
            scale = _access(len(given) - 1, (c.size, 1))
        sources.append(Source(x, scale))
    given.append(("out", "float32", rows))
    write = _stored((1, c.new, c.heads * c.size), len(given) - 1)
    made = _arguments(given)
    if few:
        found = cuda_decode.attend(c.name, made, sizes, q, *sources, None, write)
    else:
        tiles = choose_tiles(c.new, c.size, c.bits)
        found = cuda_prompt.prompt_attention(c.name, made, sizes, tiles, sources[1], write)
    return found, extra


def _arguments(given: list[tuple[str, str, int]]) -> list[Any]:
    from qcompiler.kernels.code import Argument

    return [Argument(*argument) for argument in given]


def _access(argument: int, strides: tuple[int, ...]) -> Any:
    from qcompiler.kernels.expression import Access

    return Access(argument, "float32", 0, strides)


def _rows(argument: int, heads: int, size: int) -> Any:
    return _access(argument, (heads * size, size, 1))


def _stored(shape: tuple[int, ...], out: int) -> Any:
    """The result as it is, float32."""
    from qcompiler.kernels.expression import Expression, Step

    strides, step = [], 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    return Expression(shape, (Step("anchor", "float32"),), ((0, _access(out, tuple(strides))),))


def trial(case: Attention, extra: dict[str, int], device: str = "cuda") -> Trial:
    """Fresh random inputs; what lies in the cache behind the last token must not matter."""
    c, last = case, case.position + case.new
    q = torch.randn(c.new, c.heads, c.size, device=device)
    whole = [torch.randn(c.kv_heads, c.capacity, c.size, device=device) for _ in range(2)]
    steps = [torch.rand(c.kv_heads, 1, c.size, device=device) * 0.02 + 0.02 for _ in range(2)]
    integers = c.bits < 16
    held, seen = [], []
    for x, step in zip(whole, steps, strict=True):
        half = 1 << (c.bits - 1)
        stored = (x / step).round().clamp(-half, half - 1) if integers else x.half()
        seen.append((stored.double() * step.double() if integers else stored.double())[:, :last])
        # Few queries bring the new tokens along; behind the last one there is nonsense.
        stored[:, c.position if c.kind == "few" else last :] = half - 1 if integers else 6e4
        if integers:
            stored = (stored + half).to(torch.uint8)
            if c.bits == 4:
                stored = stored[..., 0::2] | stored[..., 1::2] << 4
        held.append(stored.contiguous())
    place = torch.tensor([c.position], device=device)
    out = torch.full((c.new, c.heads * c.size), float("nan"), device=device)
    given = [*held, place]
    if extra:
        given += [torch.full((extra["workspace"],), float("nan"), device=device),
                  torch.zeros(extra["counters"], device=device, dtype=torch.int32)]  # fmt: skip
    group = c.heads // c.kv_heads
    if c.kind == "few":
        given.append(q)
    else:
        wide = steps[0].repeat_interleave(group, 0).transpose(0, 1) * QUERIES if integers else 1.0
        given.append((q * wide).half())
        q = given[-1].float() / wide
    for i, (x, step) in enumerate(zip(whole, steps, strict=True)):
        if c.kind == "few":
            given.append(x[:, c.position : last].transpose(0, 1).contiguous())
        if integers and (c.kind == "few" or i):
            given.append(step.reshape(-1))
    given.append(out)
    ends = torch.arange(c.position, last, device=device)[:, None]
    at = torch.arange(last, device=device)[None]
    hidden = (at > ends) | ((at <= ends - c.window) if c.window > 0 else at < 0)

    def error() -> float:
        wrong, norm = 0.0, 0.0
        for head in range(c.heads):
            k, v = (x[head // group] for x in seen)
            scores = (q[:, head].double() @ k.T * c.size**-0.5).masked_fill(hidden, -torch.inf)
            want = scores.softmax(-1) @ v
            found = out.view(c.new, c.heads, c.size)[:, head].double()
            wrong += float((found - want).square().sum())
            norm += float(want.square().sum())
        return (wrong / norm) ** 0.5

    k16, v16 = (x.half().repeat_interleave(group, 0)[None] for x in seen)
    q16, mask = q.half().transpose(0, 1)[None], ~hidden

    def peer() -> Any:
        call = torch.nn.functional.scaled_dot_product_attention
        if c.position == 0 and c.window < 0:
            return call(q16, k16, v16, is_causal=True)
        return call(q16, k16, v16, attn_mask=mask)

    moved = 2 * c.kv_heads * last * c.size * c.bits // 8 + 2 * q.numel() * 4
    return Trial(given, -1, (len(given) - 1,), error, moved, 4 * c.heads * c.size * c.seen, peer)
