"""merge_linears: [x W₁ᵀ ; x W₂ᵀ] = x [W₁ ; W₂]ᵀ."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompiler.passes.merge_linears import merge_linears
from qcompiler.program import Program
from qcompiler.testing import check_contract

X = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))


def merged(program: Program, module: nn.Module) -> Program:
    after = check_contract(merge_linears, program, [(X,)])
    with torch.no_grad():
        expected = copy.deepcopy(module).double()(X.double())
    (got,) = after.run((X,), double=True)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    return after


def linears(program: Program) -> list[torch.fx.Node]:
    return [n for n in program.exported.graph.nodes if str(n.target) == "aten.linear.default"]


@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (True, False, True)])
def test_linears_of_one_input_become_one(
    biases: tuple[bool, ...], formula: Any, captured: Any
) -> None:
    parts = {f"l{i}": nn.Linear(8, 3 + i, bias=bias) for i, bias in enumerate(biases)}
    module = formula(
        lambda m, x: m.l0(x).sum(-1) * m.l1(x).sum(-1) - m.l2(x).tanh().sum(-1), **parts
    )
    after = merged(captured(module, X), module)
    (whole,) = linears(after)
    constants = after.constants()
    weight = constants[whole.args[1].name]
    assert torch.equal(weight, torch.cat([p.weight for p in parts.values()]))
    if any(biases):
        bias = [
            p.bias if p.bias is not None else torch.zeros(len(p.weight)) for p in parts.values()
        ]
        assert torch.equal(constants[whole.args[2].name], torch.cat(bias))
    else:
        assert whole.args[2] is None
    slices = [n for n in after.exported.graph.nodes if str(n.target) == "aten.slice.Tensor"]
    assert [n.args[1:] for n in slices] == [(2, 0, 3), (2, 3, 7), (2, 7, 12)]
    assert after.history[-1].notes == ("3 linears became 1",)


def test_groups_are_told_apart(formula: Any, captured: Any) -> None:
    parts = {name: nn.Linear(8, 8) for name in "abcde"}

    def function(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x) + m.b(x))
        return m.c(h) * m.d(h) + m.e(torch.relu(h))

    module = formula(function, **parts)
    after = merged(captured(module, X), module)
    assert len(linears(after)) == 3
    assert after.history[-1].notes == ("4 linears became 2",)


def test_an_output_may_be_one_of_them(formula: Any, captured: Any) -> None:
    module = formula(lambda m, x: m.a(x) + m.b(x).sum(), a=nn.Linear(8, 5), b=nn.Linear(8, 2))
    assert len(linears(merged(captured(module, X), module))) == 1


def test_a_shared_weight_and_a_computed_bias_are_refused(formula: Any, captured: Any) -> None:
    first, second = nn.Linear(8, 5), nn.Linear(8, 5)
    second.weight = first.weight
    module = formula(lambda m, x: m.a(x) * m.b(x) + m.c(x), a=first, b=second, c=nn.Linear(8, 5))
    program = captured(module, X)
    after = merged(program, module)
    assert after.exported is program.exported
    assert [r.where for r in after.history[-1].refusals] == ["linear (a)", "linear_1 (b)"]
    assert all("has another reader" in r.reason for r in after.history[-1].refusals)

    def computed(m: Any, x: Tensor) -> Tensor:
        bias = torch.tanh(x.sum((0, 1)))[:5]
        return torch.nn.functional.linear(x, m.a.weight, bias) + m.b(x)

    module = formula(computed, a=nn.Linear(8, 5), b=nn.Linear(8, 5))
    program = captured(module, X)
    after = merged(program, module)
    assert after.exported is program.exported
    assert after.history[-1].refusals[0].reason == "its bias is computed"


def test_golden(tiny: Callable[[str], Any], golden_pair: Callable[..., None]) -> None:
    program = tiny("tiny-norm-linear").normalized
    golden_pair("merge_linears", program, merge_linears(program))
