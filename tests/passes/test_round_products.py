"""round_products: operands in bfloat16, sums in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qcompiler import ops
from qcompiler.passes.fuse_attention import fuse_attention
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.passes.pack_weights import pack_weights
from qcompiler.passes.round_products import round_products
from qcompiler.plan import Assignment, Plan, Site
from qcompiler.program import Program
from qcompiler.qtype import QType
from qcompiler.testing import check_contract

X = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))


def rounded(x: Tensor) -> Tensor:
    """In float64: a product of two of these numbers is exact in float32 already."""
    return x.detach().bfloat16().double()


def applied(program: Program) -> tuple[Tensor, Program]:
    after = check_contract(round_products, program, [(X,)])
    (got,) = after.run((X,))
    return got.double(), after


def test_linears_and_products(formula: Any, captured: Any) -> None:
    parts = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 5, bias=False)}
    module = formula(lambda m, x: m.a(x).transpose(1, 2) @ m.b(x), **parts)
    got, after = applied(captured(module, X))
    a, b = parts["a"], parts["b"]
    left = rounded(X) @ rounded(a.weight).T + a.bias.detach().double()
    right = rounded(X) @ rounded(b.weight).T
    want = rounded(left.float()).transpose(1, 2) @ rounded(right.float())
    # A sum in another order may round to the other neighbour: one step of bfloat16 in 2⁸.
    torch.testing.assert_close(got, want, rtol=2**-8, atol=2**-8 * float(want.abs().max()))
    assert after.history[-1].notes == ("2 linears, 1 products in bfloat16",)
    held = {k: v.dtype for k, v in after.constants().items()}
    assert sorted(map(str, held.values())) == ["torch.bfloat16"] * 2 + ["torch.float32"]


def test_one_rounding_for_all_readers(formula: Any, captured: Any) -> None:
    module = formula(lambda m, x: m.a(x) * m.b(x), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    _, after = applied(captured(module, X))
    casts = [n for n in after.exported.graph.nodes if str(n.target) == "aten.to.dtype"]
    assert len(casts) == 2 + 2  # x down and up, two weights up


def test_attention_is_that_of_the_dialect(tiny: Callable[[str], Any]) -> None:
    made = tiny("tiny-attention-block")
    program = fuse_attention(made.normalized)
    after = round_products(program)
    (node,) = [n for n in after.exported.graph.nodes if n.target is ops.attention]
    assert all(n.meta["val"].dtype == torch.bfloat16 for n in node.args[:3])
    assert node.meta["val"].dtype == torch.float32
    q, k, v = (torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = torch.tensor([True, True, True, False, True]).reshape(1, 1, 1, 5)
    for causal in (False, True):
        narrow = [x.bfloat16() for x in (q, k, v)]
        got = ops.attention(*narrow, mask, 2, 2, 0.5, causal)
        exact = ops.attention(*(x.double() for x in narrow), mask, 2, 2, 0.5, causal)
        assert got.dtype == torch.float32
        # Each exponential is rounded to bfloat16, to 2⁻⁹ of itself.
        assert float((got - exact).abs().max()) <= 2**-9 * float(v.abs().max()) + 1e-6


def test_what_stays_float32_says_why(formula: Any, captured: Any) -> None:
    module = formula(lambda m, x: m.a(x) + torch.nn.functional.linear(x, m.b(x)[0] * 1),
                     a=nn.Linear(8, 4), b=nn.Linear(8, 8))  # fmt: skip
    program = captured(module, X)
    plan = Plan({Site("linear", 1, "a"): Assignment(QType.parse("int8:channel"))})
    after = round_products(pack_weights(insert_qdq(program, plan)))
    reasons = {r.where: r.reason for r in after.history[-1].refusals}
    assert reasons["linear (a)"] == "stays float32: its weight is quantized"
    assert "stays float32: its weight is computed" in reasons.values()

    module = formula(lambda m, x: m.c(x.transpose(1, 2)), c=nn.Conv1d(8, 8, 1))
    after = round_products(captured(module, X))
    assert after.history[-1].refusals[0].reason == (
        "stays float32: no convolution multiplies bfloat16"
    )


def test_golden(tiny: Callable[[str], Any], golden_pair: Callable[..., None]) -> None:
    program = fuse_attention(tiny("tiny-attention-block").normalized)
    golden_pair("round_products", program, round_products(program))
