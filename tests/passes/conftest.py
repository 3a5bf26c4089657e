"""Fixtures of the pass tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from qcompiler.passes.normalize import normalize
from qcompiler.program import Program, capture
from qcompiler.testing import compact


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Weights that a test draws are the same in every run."""
    torch.manual_seed(0)


Captured = Callable[..., Program]


class Formula(nn.Module):
    """A module whose forward is the given function of itself and the inputs."""

    def __init__(self, function: Callable[..., object], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                setattr(self, name, part)
            else:
                setattr(self, name, nn.Parameter(part))

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


@pytest.fixture
def formula() -> type[Formula]:
    """`formula(function, **parts)` is a module that computes `function(self, x)`."""
    return Formula


@pytest.fixture
def captured() -> Captured:
    """`captured(module, *inputs)` is the normalized program of a module in eval mode."""

    def build(module: nn.Module, *inputs: Tensor, normalized: bool = True) -> Program:
        program = capture(module, inputs)
        return normalize(program) if normalized else program

    return build


@pytest.fixture
def golden_pair(golden: Callable[[str, str], None]) -> Callable[[str, Program, Program], None]:
    """`golden_pair(name, before, after)` compares both texts, the notes and the refusals."""

    def check(name: str, before: Program, after: Program) -> None:
        entry = after.history[-1]
        lines = ["before", "", compact(before), "", "after", "", compact(after), ""]
        lines += [f"note: {note}" for note in entry.notes]
        lines += [f"refused: {r.where}: {r.reason}" for r in entry.refusals]
        golden(f"passes/{name}", "\n".join(lines))

    return check


@pytest.fixture
def reasons() -> Callable[[Program], list[str]]:
    """The refusals of the last pass."""

    def read(program: Program) -> list[str]:
        return [f"{r.where}: {r.reason}" for r in program.history[-1].refusals]

    return read


@pytest.fixture
def names() -> Callable[[Program], list[str]]:
    """The operators of a program, in order."""

    def read(program: Program) -> list[str]:
        calls: Sequence[torch.fx.Node] = [
            n for n in program.exported.graph.nodes if n.op == "call_function"
        ]
        return [str(n.target).removeprefix("aten.").partition(".")[0] for n in calls]

    return read
