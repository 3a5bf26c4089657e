"""Convolutions as machine code: integer sums that are the reference's, whatever the shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from qcompiler import integer
from qcompiler.verify import Sqnr

EXACT_DB = 100.0  # rounding of float32 alone
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "runs that end between steps": (lambda: nn.Conv2d(3, 20, 3, stride=2, padding=1), (2, 3, 9, 8)),
    "many rows of taps": (lambda: nn.Conv2d(8, 33, 5, padding=2), (1, 8, 7, 6)),
    "dilated": (lambda: nn.Conv2d(5, 16, 3, dilation=2, padding=(2, 1)), (1, 5, 9, 9)),
    "strided points": (lambda: nn.Conv2d(12, 24, 1, stride=2), (1, 12, 7, 7)),
    "points": (lambda: nn.Conv2d(12, 24, 1), (3, 12, 3, 5)),
    "points of squeezed images": (
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 24, 1)),
        (3, 12, 3, 5),
    ),
    "groups": (lambda: nn.Conv2d(12, 40, 3, padding=1, groups=2), (1, 12, 6, 6)),
    "groups of points": (lambda: nn.Conv2d(20, 12, 1, groups=4), (2, 20, 4, 4)),
    "two filters for each channel": (lambda: nn.Conv2d(6, 12, 3, groups=6), (1, 6, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(27, 27, 3, padding=1, groups=27), (2, 27, 6, 7)),
    "one side padded": (
        lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 8, 3, stride=2)),
        (1, 4, 8, 8),
    ),
    "signal": (lambda: nn.Conv1d(10, 24, 3, padding=1), (2, 10, 17)),
    "signal in groups": (lambda: nn.Conv1d(8, 24, 5, stride=2, dilation=2, groups=2), (1, 8, 23)),
    "signal padded before": (
        lambda: nn.Sequential(nn.ConstantPad1d((4, 0), 0), nn.Conv1d(10, 24, 3, dilation=2)),
        (2, 10, 17),
    ),
    "signal, depthwise": (lambda: nn.Conv1d(20, 20, 4, padding=3, groups=20), (1, 20, 13)),
}


class Around(nn.Module):
    """A layer with a residual sum and another of its kind of one point behind it."""

    def __init__(self, layer: nn.Module, channels: int, flat: bool) -> None:
        super().__init__()
        self.layer = layer
        kind = nn.Conv1d if flat else nn.Conv2d
        self.first, self.last = kind(channels, channels, 1), kind(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.first(x)) + x
        y = nn.functional.relu(self.layer(x))
        return y + self.last(x) if y.shape == x.shape else y


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("recipe", ["w8a8", "w8"])
def test_convolutions(compiled: Any, case: str, recipe: str) -> None:
    make, shape = CASES[case]
    torch.manual_seed(1)
    module = Around(make(), shape[1], len(shape) == 3)
    settings = {"weights": None} if recipe == "w8" else {"correct_bias": False}
    program, run, audit, _ = compiled(module, shape, recipe, settings)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    total = Sqnr()
    total.update(integer.run(program, (x,))[0], run(x)[0])
    assert total.db >= EXACT_DB
    kind = "integer" if recipe == "w8a8" else "float"
    assert {layer.kernel for layer in audit.layers} == {kind}, audit.layers
    assert recipe == "w8" or not audit.broken


class Turned(nn.Sequential):
    """Padding, of which a convolution reads a part with its sides exchanged."""

    def forward(self, x: Tensor) -> Tensor:
        padded = nn.functional.pad(nn.functional.relu(self[0](x)), (3, 1, 2, 0))
        return self[1](padded[:, :, 1:].transpose(2, 3))


def test_a_part_of_what_was_padded(compiled: Any) -> None:
    torch.manual_seed(1)
    module, shape = Turned(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), (2, 3, 9, 7)
    program, run, _, _ = compiled(module, shape, "w8a8", {"correct_bias": False})
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    total = Sqnr()
    total.update(integer.run(program, (x,))[0], run(x)[0])
    assert total.db >= EXACT_DB
