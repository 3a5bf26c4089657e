"""Gradients through a program: torch's own, whether its parts are kept or computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qcompiler.differentiable import differentiable
from qcompiler.rewrite import operand


@pytest.mark.parametrize("segments", [1, 3, 1000])
def test_gradients_are_those_of_the_module(tiny: Callable[[str], Any], segments: int) -> None:
    model = tiny("tiny-attention-block")
    program, batch = model.normalized, model.batches[0]
    names = [operand(n, 1).name for n in program.exported.graph.nodes
             if str(n.target) == "aten.linear.default"]  # fmt: skip
    constants = program.constants()

    def gradients(count: int) -> list[torch.Tensor]:
        leaves = {name: constants[name].detach().clone().requires_grad_() for name in names}
        (out,) = differentiable(program, batch, leaves, segments=count)
        assert torch.equal(out.detach(), program.run(batch)[0])
        out.square().sum().backward(retain_graph=True)
        first = [leaf.grad.clone() for leaf in leaves.values() if leaf.grad is not None]
        out.square().sum().backward()  # a second time over the same graph
        for leaf, once in zip(leaves.values(), first, strict=True):
            assert leaf.grad is not None
            assert torch.allclose(leaf.grad, 2 * once, rtol=1e-4, atol=1e-6)
        return first

    for got, want in zip(gradients(segments), gradients(1), strict=True):
        assert torch.equal(got, want)
    module = model.spec.module
    weights = [p for p in module.parameters() if p.ndim == 2]
    expected = torch.autograd.grad(module(*batch).square().sum(), weights, allow_unused=True)
    norms = sorted(float(g.norm()) for g in expected if g is not None)
    found = sorted(float(g.norm()) for g in gradients(segments))
    for norm in found:
        assert any(abs(norm - other) < 1e-3 * other for other in norms)
