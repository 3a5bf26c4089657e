"""Columns kept in float: the same function, the right columns, and a smaller error for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompiler
from qcompiler.errors import InputError
from qcompiler.format import Format
from qcompiler.passes.split_columns import split_columns, split_layers
from qcompiler.qtype import QType
from qcompiler.recipe import load_recipe
from qcompiler.rounding import outlier_columns
from qcompiler.spec import ModelSpec


def spiked(seed: int = 0) -> Tensor:
    """Inputs with three channels fifty times as large as the others."""
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))
    x[:, [3, 17, 40]] *= 50
    return x


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.down(x))
        return out


def test_both_products_are_the_layer(captured: Any) -> None:
    program = captured(Layer(), spiked())
    after = split_columns(program, {"linear": torch.tensor([3, 17])})
    (want,), (got,) = program.run((spiked(1),)), after.run((spiked(1),))
    assert torch.allclose(want, got, rtol=1e-5, atol=1e-5)
    text = str(after)
    assert text.count("aten.linear") == 1
    assert "aten.index_select" in text
    weight = after.constants()["linear_rest"]
    assert int((weight.abs().sum(0) == 0).sum()) == 2
    assert split_columns(program, {}).exported is program.exported


def test_columns_are_those_that_lose_most() -> None:
    """Against the loss of each column by itself, measured on the outputs."""
    weight, x, kind = torch.randn(32, 64), spiked(), QType.parse("int4:g32")
    error = kind.round_trip(weight, 1) - weight
    losses = [
        float((x[:, j : j + 1] @ error[:, j : j + 1].T).double().square().sum()) for j in range(64)
    ]
    want = sorted(sorted(range(64), key=lambda j: -losses[j])[:5])
    found = outlier_columns(weight, x.square().sum(0), kind, 5)
    assert found.tolist() == want
    assert {3, 17, 40} <= set(want)


def test_layers_are_named_by_the_recipe(tiny: Callable[[str], Any]) -> None:
    program = tiny("tiny-attention-block").normalized
    recipe = load_recipe("w4a16", {"formats": {"up": "int4:g16+4", "down": "int4:g16"}})
    assert list(split_layers(program, recipe).values()) == [4]


def test_an_artifact_with_columns_in_float(tmp_path: Path) -> None:
    """Three outlier inputs cost most of the error of 4 bits; the artifact shows it as it runs."""
    data = [(spiked(i),) for i in range(8)]
    spec = ModelSpec("layer", Layer(), data[0], {"x": {0: "batch"}}, lambda: data)
    errors = {}
    for text in ("int4:g32", "int4:g32+3"):
        recipe = load_recipe("w4a16", {"formats": {"down": text}, "rounding": "rtn", "clip": False})
        artifact = qcompiler.compile(spec, recipe=recipe, out=tmp_path / text.replace(":", "-"))
        (row,) = [r for r in artifact.manifest["errors"]["quantization"] if r["data"] == "held-out"]
        errors[text] = row["sqnr_db"]
        kernels = [layer["kernel"] for layer in artifact.manifest["audit"]["layers"]]
        assert "weights only" in kernels
    assert errors["int4:g32+3"] > errors["int4:g32"] + 10


def test_formats_with_columns_print_and_parse() -> None:
    for text in ("int4:g32+16", "int8:channel+2/int8:token"):
        assert str(Format.parse(text)) == text
    with pytest.raises(InputError, match=r"write int4:g32\+16"):
        Format.parse("int4:g32+x")
    with pytest.raises(InputError, match="beside a quantized weight alone"):
        Format.parse("float+3")
