"""Weights of few bits stay in few bits, and the layers compute what the program says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from qcompiler import integer
from qcompiler.backends import edge
from qcompiler.compiler import quantize
from qcompiler.data import Data
from qcompiler.program import Program, capture
from qcompiler.recipe import load_recipe
from qcompiler.spec import ModelSpec
from qcompiler.target import Target
from qcompiler.verify import Sqnr

TARGET = Target.parse("tvm:native")
EXACT_DB = 100.0  # rounding of float32 alone


class Layers(nn.Module):
    """A convolution and linears of 64 × 96 and 96 × 40 weights, over 7 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 64, (1, 4), stride=(1, 4))
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        y: Tensor = self.down(nn.functional.silu(self.up(x)))
        return y


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[..., tuple[Program, Any, Any, int]]:
    """`compiled(recipe, settings)`: program, function, audit, bytes of the weights."""
    if shutil.which("cc") is None:
        pytest.skip("cc is not installed")

    def make(recipe: str, settings: dict[str, Any]) -> tuple[Program, Any, Any, int]:
        torch.manual_seed(0)
        example = torch.randn(1, 3, 1, 28)
        batches = [(torch.randn(1, 3, 1, 28),) for _ in range(2)]
        program = capture(Layers().eval(), (example,))
        spec = ModelSpec("layers", nn.Identity(), (example,), {}, lambda: batches)
        chosen = load_recipe(recipe, {"rounding": "rtn", **settings})
        made = quantize(program, Data(program, spec, chosen), chosen, TARGET, lambda step: None)
        layers = {n.name: n.name for n in made.quantized.exported.graph.nodes
                  if str(n.target) in ("aten.linear.default", "aten.conv2d.default")}  # fmt: skip
        folder = tmp_path / "a"
        folder.mkdir()
        audit = edge.lower(made.quantized, TARGET, folder, planned=layers)
        held = (folder / "weights.bin").stat().st_size
        return made.quantized, edge.load(folder, 1), audit, held

    return make


LINEARS = 64 * 96 + 96 * 40
FILTERS = 64 * 12


@pytest.mark.parametrize(
    ("recipe", "settings", "bits"),
    [
        ("w8", {}, 8),
        ("w8a16", {}, 8),
        ("w8a16", {"weights": "uint8:channel:affine"}, 8),
        ("w8a16", {"weights": "int8:g32"}, 8),
        ("w4a16", {}, 4),
        ("w3a16", {}, 3),
        ("w2a16", {}, 2),
        ("w3a16", {"weights": "int3:g16"}, 4),  # too short for blocks of 32: in 4 bits
    ],
)
def test_weights_alone(compiled: Any, recipe: str, settings: dict[str, Any], bits: int) -> None:
    program, run, audit, held = compiled(recipe, settings)
    x = torch.randn(1, 3, 1, 28, generator=torch.Generator().manual_seed(1))
    total = Sqnr()
    total.update(program.run((x,))[0], run(x)[0])
    assert total.db >= EXACT_DB
    stored = LINEARS * bits // 8 + FILTERS
    scales = LINEARS // 16 * 5  # at most: one scale and zero point for 16 weights
    assert stored <= held <= stored + scales + 2048
    assert not audit.broken
    assert [layer.kernel for layer in audit.layers] == ["weights only"] * 3


@pytest.mark.parametrize(
    "weights",
    [
        "int4:g32",
        "int3:g32:affine",
        "int2:g32:affine",
        "int4:channel",
        "int8:g32",
        "uint4:g16:affine",
    ],
)
def test_integers_with_quantized_rows(compiled: Any, weights: str) -> None:
    settings = {"weights": weights, "smooth": False, "correct_bias": False}
    program, run, audit, _ = compiled("w4a8", settings)
    x = torch.randn(1, 3, 1, 28, generator=torch.Generator().manual_seed(1))
    total = Sqnr()
    total.update(integer.run(program, (x,))[0], run(x)[0])
    assert total.db >= EXACT_DB
    kernels = {layer.kernel for layer in audit.layers if layer.op == "matmul_packed"}
    assert kernels == {"integer"}
