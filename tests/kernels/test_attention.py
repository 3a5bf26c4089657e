"""Attention over heads against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompiler import ops
from qcompiler.kernels import isa as isas
from qcompiler.kernels.attention import attention, reference
from qcompiler.kernels.code import Kernel
from qcompiler.kernels.heads import Heads
from qcompiler.kernels.isa import Isa

Run = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    size: int
    value_size: int = 0
    mask: str = ""  # "float" and "bool" (B, 1, 1, T), "full" (B, H, S, T) float
    causal: bool = False
    merged: bool = True


CASES = {
    "as in BERT": Case(2, 24, 24, 3, 3, 16, mask="float"),
    "grouped, causal": Case(1, 20, 20, 4, 2, 32, causal=True),
    "one query": Case(2, 1, 37, 4, 1, 24, mask="bool"),
    "after a cache": Case(1, 5, 37, 4, 2, 16, causal=True),
    "sizes with tails": Case(2, 7, 19, 4, 2, 20, 12, mask="full"),
    "heads first": Case(2, 7, 33, 2, 2, 8, merged=False, mask="bool", causal=True),
    "few keys": Case(1, 3, 2, 1, 1, 5, 3, merged=False),
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(
    writer: Any, c: Case, isa: Isa, name: str = "a", dtype: torch.dtype = torch.float32
) -> tuple[Kernel, Any, Tensor]:
    """The kernel, its tensors, and what it should give."""
    value_size = c.value_size or c.size
    q = normal(c.batch, c.queries, c.heads * c.size, seed=1).to(dtype)
    k = normal(c.batch, c.keys, c.kv_heads * c.size, seed=2).to(dtype)
    v = normal(c.batch, c.keys, c.kv_heads * value_size, seed=3).to(dtype)
    shape = (c.batch, c.queries, c.heads * value_size)
    if not c.merged:
        shape = (c.batch, c.heads, c.queries, value_size)
    e = writer(shape, q, k, v)
    access = [
        e.access(x, (length * count * size, size, count * size, 1))
        for x, length, count, size in (
            (q, c.queries, c.heads, c.size), (k, c.keys, c.kv_heads, c.size),
            (v, c.keys, c.kv_heads, value_size),
        )
    ]  # fmt: skip
    mask, hidden = None, None
    if c.mask == "full":
        mask = normal(c.batch, c.heads, c.queries, c.keys, seed=4)
        strides = (c.heads * c.queries * c.keys, c.queries * c.keys, c.keys, 1)
        hidden = e.access(mask, strides)
    elif c.mask:
        kept = torch.arange(c.keys) < torch.tensor([[c.keys - 3], [c.keys]])[: c.batch]
        mask = kept[:, None, None]
        if c.mask == "float":
            lowest = torch.finfo(torch.float32).min
            mask = torch.where(mask, 0.0, lowest)
        hidden = e.access(mask, (c.keys, 0, 0, 1))
    e.store(e.step("anchor", "float32"))
    heads = Heads(
        c.batch, c.heads, c.kv_heads, c.queries, c.keys, c.size, value_size, *access, hidden,
        c.size**-0.5, c.causal, c.merged,
    )  # fmt: skip
    split = [
        x.unflatten(-1, (count, -1)).transpose(1, 2)
        for x, count in ((q, c.heads), (k, c.kv_heads), (v, c.kv_heads))
    ]
    want = reference(*split, mask, c.size**-0.5, c.causal)
    if c.merged:
        want = want.transpose(1, 2).flatten(2)
    return attention(name, e.arguments, heads, e.expression, isa), e, want


def close(found: Tensor, want: Tensor) -> None:
    # Scores of order 4 in float32, exponentials to 2e-7: weighted means to a few 1e-7.
    torch.testing.assert_close(found.reshape(want.shape).double(), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("isa", [isas.VNNI, isas.AVX2, isas.SCALAR], ids=lambda isa: isa.name)
@pytest.mark.parametrize("case", CASES)
def test_cases(writer: Any, run: Run, case: str, isa: Isa) -> None:
    kernel, given, want = made(writer, CASES[case], isa)
    close(run(kernel, given, isa)[0], want)


def test_a_query_that_sees_nothing(writer: Any, run: Run) -> None:
    """With the lowest float as mask, all keys weigh the same; lanes past the last key nothing."""
    q, k, v = (normal(1, 5, 16, seed=i) for i in range(3))
    mask = torch.full((1, 1, 1, 5), torch.finfo(torch.float32).min)
    e = writer((1, 5, 16), q, k, v)
    access = [e.access(x, (80, 16, 16, 1)) for x in (q, k, v)]
    hidden = e.access(mask, (5, 0, 0, 1))
    e.store(e.step("anchor", "float32"))
    heads = Heads(1, 1, 1, 5, 5, 16, 16, *access, hidden, 0.25, False, True)
    (found,) = run(attention("a", e.arguments, heads, e.expression, isas.VNNI), e, isas.VNNI)
    close(found, v.double().mean(1, keepdim=True).expand(1, 5, 16))


def test_an_epilogue(writer: Any, run: Run) -> None:
    """What follows is computed on the sums before they are stored: here requantization."""
    c = CASES["as in BERT"]
    kernel, plain, _ = made(writer, c, isas.VNNI)
    (real,) = run(kernel, plain, isas.VNNI)
    scale, zero = torch.tensor([0.01]), torch.tensor([128], dtype=torch.uint8)
    _, e, _ = made(writer, c, isas.VNNI)
    q, k, v, mask = e.tensors[:4]
    e = writer(e.shape, q, k, v, mask)
    access = [e.access(x, (24 * 48, 16, 48, 1)) for x in (q, k, v)]
    hidden = e.access(mask, (24, 0, 0, 1))
    level = e.step(
        "quantize", "uint8", e.step("anchor", "float32"), e.load(scale, (0, 0, 0)),
        e.load(zero, (0, 0, 0)), numbers=(0, 255),
    )  # fmt: skip
    e.store(level, torch.uint8)
    heads = Heads(2, 3, 3, 24, 24, 16, 16, *access, hidden, 0.25, False, True)
    made_ = attention("a", e.arguments, heads, e.expression, isas.VNNI)
    (found,) = run(made_, e, isas.VNNI)
    want = (real / 0.01).round().add(128).clamp(0, 255).to(torch.uint8)
    assert torch.equal(found, want)


NARROW = [name for name, c in CASES.items() if c.size % 4 == 0]


def narrow_close(found: Tensor, given: Any, case: Case, want: Tensor) -> None:
    """Exponentials rounded to bfloat16 (2⁻⁹ of each), so weighted means to 2⁻⁹ of the values."""
    bound = 2**-9 * float(given.tensors[2].float().abs().max()) + 2e-6
    torch.testing.assert_close(found.reshape(want.shape).double(), want, rtol=0, atol=bound)


@pytest.mark.parametrize("case", NARROW)
def test_bfloat16(writer: Any, run: Run, case: str) -> None:
    isa = isas.VNNI_BF16
    kernel, given, want = made(writer, CASES[case], isa, dtype=torch.bfloat16)
    (found,) = run(kernel, given, isa)
    narrow_close(found, given, CASES[case], want)
    if CASES[case].merged:  # and as the dialect defines it, but for the order of sums
        c = CASES[case]
        q, k, v, *rest = given.tensors
        mask = (
            rest[0].reshape(c.batch, -1, c.queries if c.mask == "full" else 1, c.keys)
            if c.mask
            else None
        )
        if c.causal and c.queries != c.keys:
            return
        exact = ops.attention(q, k, v, mask, c.heads, c.kv_heads, c.size**-0.5, c.causal)
        torch.testing.assert_close(found.reshape(exact.shape), exact, rtol=0, atol=2e-3)


def test_bfloat16_on_arm(writer: Any, emulate: Run) -> None:
    isa = isas.I8MM_BF16
    built = [
        made(writer, CASES[name], isa, f"a{i}", torch.bfloat16) for i, name in enumerate(NARROW)
    ]
    results = emulate("tvm:aarch64:bf16", [(kernel, given) for kernel, given, _ in built])
    for name, (found,), (_, given, want) in zip(NARROW, results, built, strict=True):
        narrow_close(found, given, CASES[name], want)


@pytest.mark.parametrize(
    ("target", "isa"),
    [("tvm:aarch64:dotprod", isas.DOTPROD), ("tvm:armv7", isas.ARMV7)],
)
def test_other_machines(writer: Any, emulate: Run, target: str, isa: Isa) -> None:
    chosen = ["as in BERT", "grouped, causal", "sizes with tails"]
    built = [made(writer, CASES[name], isa, f"a{i}") for i, name in enumerate(chosen)]
    results = emulate(target, [(kernel, given) for kernel, given, _ in built])
    for (found,), (_, _, want) in zip(results, built, strict=True):
        close(found, want)
