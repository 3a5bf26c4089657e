"""Rotations as machine code: the factors are found in the constants, and the result is torch's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from qcompiler import ops
from qcompiler.backends import edge
from qcompiler.backends.edge_rotate import split
from qcompiler.errors import UnsupportedError
from qcompiler.hadamard import paley, randomized, sylvester
from qcompiler.program import capture
from qcompiler.target import Target
from qcompiler.verify import Sqnr


def test_walsh_hadamard_factors_are_found() -> None:
    core, order = split(sylvester(64))
    assert (order, core.tolist()) == (64, [[1.0]])
    twelve = paley(12)
    assert twelve is not None
    twelve = twelve / 12**0.5
    core, order = split(torch.kron(twelve, sylvester(8)).float())
    assert order == 8
    torch.testing.assert_close(core.double(), twelve, rtol=0, atol=1e-6)
    other = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))).Q
    core, order = split(other)
    assert order == 1
    assert core is other


class Rotated(nn.Module):
    """After an activation that joins no kernel before it, and before one that joins this one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        rotation = randomized(size, None)
        self.register_buffer("left", rotation.left.float())
        self.register_buffer("right", rotation.right.float())

    def forward(self, x: Tensor) -> Tensor:
        turned: Tensor = ops.rotate(torch.tanh(x), self.left, self.right)
        return torch.relu(turned) + x


@pytest.mark.parametrize("size", [12, 24, 64, 96, 1536, 7, 72])
def test_rotations(tmp_path: Path, size: int) -> None:
    """Powers of two, Paley's orders, and those that have no Hadamard matrix."""
    if shutil.which("cc") is None:
        pytest.skip("cc is not installed")
    x = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(0))
    program = capture(Rotated(size), (x,))
    folder = tmp_path / "a"
    folder.mkdir()
    audit = edge.lower(program, Target.parse("tvm:native"), folder)
    assert audit.kernels == {"elementwise": 1, "rotate": 1}
    (want,), (got,) = program.run((x,), double=True), edge.load(folder)(x)
    total = Sqnr()
    total.update(want, got)
    assert total.db > 120


def test_a_rotation_by_a_computed_matrix_is_refused(tmp_path: Path) -> None:
    def turned(x: Tensor, y: Tensor) -> Any:
        return ops.rotate(x, y.softmax(-1), torch.ones(1, 1))

    class Module(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            return turned(x, y)

    x, y = torch.randn(2, 4), torch.randn(4, 4)
    with pytest.raises(UnsupportedError, match="by computed matrices"):
        edge.lower(capture(Module(), (x, y)), Target.parse("tvm:native"), tmp_path)
