"""Weights of few bits stay in few bits, and the layers compute what the program says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from qcompiler import integer
from qcompiler.verify import Sqnr

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


SHAPE = (1, 3, 1, 28)
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
    program, run, audit, held = compiled(Layers(), SHAPE, recipe, settings)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
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
    program, run, audit, _ = compiled(Layers(), SHAPE, "w4a8", settings)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    total = Sqnr()
    total.update(integer.run(program, (x,))[0], run(x)[0])
    assert total.db >= EXACT_DB
    kernels = {layer.kernel for layer in audit.layers if layer.op == "matmul_packed"}
    assert kernels == {"integer"}
