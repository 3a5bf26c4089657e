"""What a backend makes, and the float model beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qcompiler
from qcompiler.artifact import REFERENCE
from qcompiler.backends import ort
from qcompiler.benching import bench
from qcompiler.deliver import verify
from qcompiler.errors import InputError, UnsupportedError


class Lengths(nn.Module):
    """Of vectors of two numbers: an op that ONNX has not."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.hypot(x, y)


class Either(nn.Module):
    """A sum of truth values, which ONNX has not; the largest of them."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x > 0) + (x > 1), (x > 0).amax(-1)


def test_code_is_made_where_the_float_model_has_no_onnx_form(tmp_path: Path) -> None:
    pytest.importorskip("tvm", reason="the extra tvm is not installed")
    inputs = torch.randn(3, 8), torch.randn(3, 8)
    made = qcompiler.compile(
        Lengths(), inputs, calibration=[inputs] * 2, target="tvm:native", recipe="fp32",
        out=tmp_path / "out",
    )  # fmt: skip
    (said,) = made.manifest["warnings"]
    assert said.startswith("not timed beside its float model, which ONNX Runtime would run: no ")
    assert made.manifest["latency"] == []
    assert made.manifest["size"]["float_bytes"] == 0
    assert not [*(made.folder / REFERENCE).glob("*.onnx")]
    torch.testing.assert_close(made.load()(*inputs), torch.hypot(*inputs))
    assert verify(made.folder)["ok"]
    with pytest.raises(InputError, match="keeps no float model"):
        bench(made.folder)


class Chosen(nn.Module):
    """Truth values, from which ONNX Runtime chooses on no device."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 1, x > 0, x < -1).float()


@pytest.mark.parametrize("target", ["ort:cpu", "tvm:native"])
def test_what_onnx_runtime_does_not_run(target: str, tmp_path: Path) -> None:
    """Is refused there, and not timed beside elsewhere."""
    x = torch.randn(3, 8)

    def build() -> qcompiler.Artifact:
        return qcompiler.compile(
            Chosen(), (x,), calibration=[(x,)] * 2, target=target, recipe="fp32",
            out=tmp_path / "out",
        )  # fmt: skip

    if target == "ort:cpu":
        with pytest.raises(UnsupportedError, match=r"ONNX Runtime does not run .*Where"):
            build()
        return
    pytest.importorskip("tvm", reason="the extra tvm is not installed")
    made = build()
    (said,) = made.manifest["warnings"]
    assert said.startswith("not timed beside its float model: ONNX Runtime does not run")
    assert torch.equal(made.load()(x), Chosen()(x))


class Signs(nn.Module):
    """Integers alone."""

    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).long().sum(1)


def test_integers_are_not_verified(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    made = qcompiler.compile(Signs(), (x,), target="ort:cpu", recipe="fp32", out=tmp_path / "out")
    assert any(said.startswith("not verified: none of its") for said in made.manifest["warnings"])


def test_types_that_onnx_does_not_take_are_refused(tmp_path: Path) -> None:
    program = qcompiler.capture(Either(), (torch.randn(2, 3),))
    with pytest.raises(UnsupportedError, match=r"no ONNX form: .*Add.*bool"):
        ort.lower(program, tmp_path)
