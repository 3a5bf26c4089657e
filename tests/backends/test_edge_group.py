"""Which ops become one kernel: the calls of tiny models as text, and what must not be joined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from qcompiler.backends.edge_calls import Calls
from qcompiler.backends.edge_group import Constants
from qcompiler.backends.edge_trace import trace
from qcompiler.compiler import quantize
from qcompiler.data import Data
from qcompiler.kernels import isa as isas
from qcompiler.program import Program, capture
from qcompiler.recipe import load_recipe
from qcompiler.target import Target


def made(program: Program, *shapes: tuple[int, ...]) -> Calls:
    return Calls(
        trace(program, dict(zip(program.inputs, shapes, strict=True))), isas.VNNI, Constants()
    )


def text(calls: Calls) -> str:
    """A line for each group: the anchor, what joined it, and which of them others read."""
    lines = []
    for group in calls.grouping.groups:
        everything = ([group.anchor] if group.anchor else []) + group.members
        names = [
            op.label + ("*" if id(op.out.storage) in calls.stored else "") for op in everything
        ]
        lines.append(" + ".join(names))
    kinds = " ".join(call.kind for call in calls.calls)
    return "\n".join([*lines, "", kinds])


@pytest.mark.parametrize("name", ["tiny-attention-block", "tiny-depthwise", "tiny-gqa-decoder"])
def test_groups(tiny: Callable[[str], Any], golden: Callable[[str, str], None], name: str) -> None:
    it = tiny(name)
    recipe = load_recipe("w8a8")
    data = Data(it.captured, it.spec, recipe)
    target = Target.parse("tvm:x86-64:avx512vnni")
    program = quantize(it.captured, data, recipe, target, lambda step: None).quantized
    batch = tuple(x[:1] for x in it.held_out[0])
    golden(f"edge-groups-{name}", text(made(program, *(tuple(x.shape) for x in batch))))


class Formula(nn.Module):
    def __init__(self, formula: Callable[..., Any]) -> None:
        super().__init__()
        self.formula, self.layer = formula, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        return self.formula(self.layer, x)


def kinds(formula: Callable[..., Any], *shape: int) -> list[str]:
    program = capture(Formula(formula).eval(), (torch.ones(*shape),), {})
    return [call.kind for call in made(program, tuple(shape)).calls]


@pytest.mark.parametrize(
    ("formula", "want"),
    [
        # what follows joins, the residual too
        (lambda f, x: torch.relu(f(x)) + x, ["matmul_float"]),
        # another arrangement of the product does not
        (lambda f, x: f(x).transpose(0, 1) + x, ["matmul_float", "elementwise"]),
        # nor what needs a later kernel's result
        (lambda f, x: f(f(x)) + f(x), ["matmul_float"] * 3),
        # the same value read as it is and as a reduction
        (
            lambda f, x: f(x) / f(x).sum(-1, keepdim=True),
            ["matmul_float", "matmul_float", "reduce", "elementwise"],
        ),
    ],
    ids=["joins", "transposed", "later", "reduced"],
)  # fmt: skip
def test_what_joins(formula: Any, want: list[str]) -> None:
    assert sorted(kinds(formula, 8, 8)) == sorted(want)


def test_equal_constants_are_one() -> None:
    """The packed weight of a layer that runs twice is there once."""
    program = capture(Formula(lambda f, x: f(f(x))).eval(), (torch.ones(3, 8),), {})
    first, second = made(program, (3, 8)).calls
    assert first.arguments[1] is second.arguments[1]
    assert first.key == second.key  # and so is the code
