"""Numbers beyond float16 are found where they are, and masks are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qcompiler
from qcompiler import overflow
from qcompiler.compiler import quantize
from qcompiler.data import Data
from qcompiler.program import capture
from qcompiler.recipe import load_recipe
from qcompiler.spec import ModelSpec
from qcompiler.target import Target


class Massive(nn.Module):
    """A stream with one huge channel, between norms; scores with a mask."""

    def __init__(self, size: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 32)
        self.norm = nn.RMSNorm(32)
        with torch.no_grad():
            self.up.weight[3] *= size

    def forward(self, x: Tensor) -> Tensor:
        stream = x + self.up(x)
        hidden = torch.finfo(torch.float32).min * (x[..., :1] > 0)
        return torch.softmax(self.down(self.norm(stream)) + hidden, -1)


X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


def test_the_largest_number_is_found() -> None:
    module = Massive(1e6)
    node, value = overflow.peak(capture(module, (X,)), (X,)) or pytest.fail("nothing found")
    with torch.no_grad():
        largest = (X + module.up(X)).abs().max()
    assert node.name in ("add", "linear")
    assert value == pytest.approx(float(largest), rel=1e-4)
    assert overflow.warning(capture(Massive(1.0), (X,)), (X,)) is None
    said = str(overflow.warning(capture(module, (X,)), (X,), generated=True))
    assert said.endswith("--set products=bfloat16, without --kernels")


def test_compile_says_what_float16_cannot_hold(tmp_path: Path, torchlib_once: None) -> None:
    said = []
    for products in ("float32", "bfloat16"):
        recipe = load_recipe("w8", {"products": products, "embeddings": None})
        made = qcompiler.compile(
            Massive(1e6), (X,), calibration=[(X,)] * 2, target="ort:cuda", recipe=recipe,
            out=tmp_path / products,
        )  # fmt: skip
        said.append([w for w in made.manifest["warnings"] if "float16 ends at 65504" in w])
    assert ["products=bfloat16" in w for w in said[0]] == [True]
    assert said[1] == []


def test_what_linears_read() -> None:
    """Where the stream is float32 the norm after it is right; a linear that reads it is not."""

    class Stream(Massive):
        def __init__(self, size: float) -> None:
            super().__init__(size)
            self.gate = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            large = x + self.up(x)
            return self.down(large) + self.gate(large)

    said = []
    for module in (Massive(1e6), Stream(1e6)):
        program, recipe = capture(module, (X,)), load_recipe("w8", {"embeddings": None})
        spec = ModelSpec(
            name="m", module=module, example_inputs=(X,), calibration=lambda: [(X,)] * 2
        )
        target = Target.parse("tvm:cuda:sm_90")
        made = quantize(program, Data(program, spec, recipe), recipe, target, lambda step: None)
        said.append(overflow.warning_of_products(made.quantized, (X,)))
    assert said[0] is None
    assert said[1].startswith("'down' reads numbers up to ")
    assert said[1].endswith("--set keep_float=down,gate")
