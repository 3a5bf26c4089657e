"""Single weights beside the grid in programs, artifacts and the allocation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompiler
from qcompiler import allocation
from qcompiler.backends import ort
from qcompiler.errors import InputError, UnsupportedError
from qcompiler.format import Format
from qcompiler.passes.allocate import allocate
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.passes.measure_sensitivity import find_units, measure_sensitivity
from qcompiler.passes.pack_weights import pack_weights
from qcompiler.passes.split_outliers import outlier_layers, split_outliers
from qcompiler.recipe import load_recipe
from qcompiler.spec import ModelSpec
from qcompiler.study import Findings, Settings
from qcompiler.target import Target


class Layer(nn.Module):
    """A linear of which a few weights are thirty times as large as the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down = nn.Linear(64, 32)
        with torch.no_grad():
            self.down.weight.view(-1)[torch.randperm(64 * 32)[:50]] *= 30

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.down(x) / 20)


def batch(rows: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))


def outliers(weight: Tensor) -> tuple[Tensor, Tensor]:
    columns = weight.abs().topk(3, 1).indices.sort().values
    return columns.to(torch.int16), weight.gather(1, columns).half()


def test_both_products_are_the_layer(captured: Any) -> None:
    program = captured(Layer(), batch())
    weight = program.constants()["p_down_weight"]
    columns, values = outliers(weight)
    after = split_outliers(program, {"linear": (columns, values)})
    (want,), (got,) = program.run((batch(seed=1),)), after.run((batch(seed=1),))
    assert torch.allclose(want, got, rtol=1e-5, atol=1e-5)
    rest = after.constants()["linear_rest"]
    assert float(rest.gather(1, columns.long()).abs().max()) < 2e-3 * float(weight.abs().max())
    assert split_outliers(program, {}).exported is program.exported


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("where", ["ort:cpu", "tvm:x86-64", "tvm:native"])
def test_backends_compute_what_torch_does(
    captured: Any, tmp_path: Path, rows: int, where: str
) -> None:
    program = captured(Layer(), batch(rows))
    program = split_outliers(program, {"linear": outliers(program.constants()["p_down_weight"])})
    recipe = load_recipe("w4a16", {"formats": {"down": "int4:g32~3"}})
    target = Target.parse(where)
    made = pack_weights(insert_qdq(program, allocate(program, recipe, target)))
    (want,) = made.run((batch(rows, 1),))
    backend: Any = ort
    if target.runtime == "tvm":
        pytest.importorskip("tvm", reason="the extra tvm is not installed")
        from qcompiler.backends import edge as backend
    backend.lower(*((made,) if target.runtime == "ort" else (made, target)), tmp_path)
    (got,) = backend.load(tmp_path, 1)(batch(rows, 1))
    assert torch.allclose(torch.as_tensor(got), want, atol=2e-3 if where == "ort:cpu" else 1e-5)


@pytest.mark.parametrize("text", ["int4:g32", "int3:g32:affine"])
def test_an_artifact_with_single_weights_in_float(tmp_path: Path, text: str) -> None:
    data = [(batch(seed=i),) for i in range(8)]
    spec = ModelSpec("layer", Layer(), data[0], {"x": {0: "batch"}}, lambda: data)
    errors = {}
    for name in (text, f"{text}~3"):
        recipe = load_recipe("w4a16", {"formats": {"down": name}})
        artifact = qcompiler.compile(spec, recipe=recipe, out=tmp_path / name.replace(":", "-"))
        (row,) = [r for r in artifact.manifest["errors"]["quantization"] if r["data"] == "held-out"]
        errors[name] = row["sqnr_db"]
        assert "weights only" in [x["kernel"] for x in artifact.manifest["audit"]["layers"]]
    assert errors[f"{text}~3"] > errors[text] + 6


def test_single_weights_are_an_option_with_their_cost(captured: Any, tmp_path: Path) -> None:
    """Where size alone counts, the integer program takes them if they pay."""
    program = captured(Layer(), batch())
    units = find_units(program, lambda node: False)
    texts = ["int3:g32:affine", "int3:g32:affine~2", "int4:g32", "int4:g32~64"]
    settings = Settings(True, True, "minmax", 99.9, False, "", 2)
    data = [(batch(seed=i),) for i in range(4)]
    findings = Findings(tmp_path, "a")
    found = measure_sensitivity(
        program, units, [Format.parse(t) for t in texts], data, settings, findings,
        lambda kind: kind.bits, outlier_bytes=2,
    )  # fmt: skip
    unit = found[0]
    assert "int4:g32~64" not in [o.format for o in unit.options]  # its rows have 64 weights
    plain, kept, finer = (unit.option(t) for t in texts[:3])
    assert kept.bytes == plain.bytes + 32 * 2 * (2 + 2)
    assert kept.bits == 3 + 32 * 2 / 64
    assert kept.measures["error"] < finer.measures["error"] < plain.measures["error"]
    # What is kept on disk is the weight that was measured.
    weight, layer = findings.weights(0)[texts[1]][0](), program.constants()["p_down_weight"]
    noise = sum(float(((weight - layer) @ x.T).double().square().sum()) for (x,) in data[2:])
    bias = program.constants()["p_down_bias"]
    exact = sum(float((x @ layer.T + bias).double().square().sum()) for (x,) in data[2:])
    assert kept.measures["error"] == pytest.approx(noise / exact, rel=1e-3)
    limit = allocation.Limit("bytes", allocation.size, float(max(kept.bytes, finer.bytes)))
    (chosen,) = allocation.solve([unit], allocation.measure("error"), [limit])
    assert unit.options[chosen].format == texts[1]


def test_layers_are_named_by_the_recipe_and_refusals_say_why(captured: Any, tiny: Any) -> None:
    program = tiny("tiny-attention-block").normalized
    recipe = load_recipe("w4a16", {"formats": {"up": "int4:g16~4", "down": "int4:g16"}})
    assert list(outlier_layers(program, recipe).values()) == [4]
    network = captured(nn.Conv2d(4, 8, 3), torch.randn(1, 4, 8, 8))
    recipe = load_recipe("w8a16", {"formats": {"*": "int8:channel~2"}})
    assert outlier_layers(network, recipe) == {}
    (refusal,) = allocate(network, recipe, Target.parse("ort:cpu:vnni")).refusals
    assert "it is no linear" in refusal.reason
    for text in ("tvm:cuda:sm_90", "tvm:native:dynamic"):
        with pytest.raises(UnsupportedError, match="reads single weights beside the grid"):
            allocate(network, recipe, Target.parse(text))


def test_more_than_a_row_has_is_an_input_error(tmp_path: Path) -> None:
    data = [(batch(seed=i),) for i in range(4)]
    spec = ModelSpec("layer", Layer(), data[0], {"x": {0: "batch"}}, lambda: data)
    recipe = load_recipe("w4a16", {"formats": {"down": "int4:g32~64"}})
    with pytest.raises(InputError, match=r"down.*its rows have 64 weights"):
        qcompiler.compile(spec, recipe=recipe, out=tmp_path / "made")
