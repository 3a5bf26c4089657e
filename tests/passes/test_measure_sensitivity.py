"""The study against the model itself with one layer's weight replaced by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompiler.format import Format
from qcompiler.passes.fuse_attention import fuse_attention
from qcompiler.passes.measure_gradients import measure_gradients
from qcompiler.passes.measure_sensitivity import (
    find_units,
    measure_sensitivity,
    simulated,
)
from qcompiler.qtype import QType
from qcompiler.study import Findings, Settings, Study
from qcompiler.verify import Sqnr

PLAIN = Settings(False, False, "minmax", 99.99, False, "", 2)
FORMATS = tuple(map(Format.parse, ("int2:g16", "int4:g16", "int8:channel/uint8:tensor:affine")))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


def batches(count: int = 4) -> list[tuple[Tensor, ...]]:
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(6, 32, generator=g),) for _ in range(count)]


def stored(kind: QType) -> int:
    return kind.bits


def study(module: nn.Module, captured: Any, folder: Path, **more: Any) -> tuple[Any, Any, Any]:
    program = captured(module, batches()[0][0])
    units = find_units(program, lambda node: False)
    findings = Findings(folder, "a")
    found = measure_sensitivity(program, units, FORMATS, batches(), PLAIN, findings, stored, **more)
    return program, findings, found


def test_losses_are_those_of_the_model_with_one_layer_changed(
    captured: Any, tmp_path: Path
) -> None:
    module = Two().eval()
    _, _, found = study(module, captured, tmp_path)
    assert [unit.name for unit in found.values()] == ["first", "second"]
    trials = batches()[-2:]
    with torch.no_grad():
        want = [module(*b) for b in trials]
        for unit in found.values():
            assert [o.format for o in unit.options] == [*map(str, FORMATS), "float"]
            for text in ("int2:g16", "int4:g16"):
                changed = copy.deepcopy(module)
                layer = changed.get_submodule(unit.name)
                assert isinstance(layer, nn.Linear)
                exact = layer.weight.clone()
                layer.weight.copy_(QType.parse(text).round_trip(exact, 1))
                noise = sum(float((changed(*b) - w).double().square().sum()) for b, w in
                            zip(trials, want, strict=True))  # fmt: skip
                signal = sum(float(w.double().square().sum()) for w in want)
                option = unit.option(text)
                assert option.measures["kl"] == pytest.approx(0.5 * noise / signal, rel=1e-4)
                inputs = [b[0] for b in trials]
                if unit.name == "second":
                    inputs = [torch.tanh(module.first(x)) for x in inputs]
                local = Sqnr()
                for x in inputs:
                    bias = layer.bias
                    local.update(
                        nn.functional.linear(x, exact, bias),
                        nn.functional.linear(x, layer.weight, bias),
                    )
                assert -10 * torch.tensor(option.measures["error"]).log10() == pytest.approx(
                    local.db, abs=0.01
                )


def test_bytes_count_scales(captured: Any, tmp_path: Path) -> None:
    _, _, found = study(Two().eval(), captured, tmp_path)
    first = found[0]
    assert first.option("int4:g16").bytes == 32 * 48 // 2 + 4 * 48 * 2
    assert first.option("int8:channel/uint8:tensor:affine").bytes == 32 * 48 + 4 * 48
    assert first.option("float").bytes == 4 * 32 * 48


def test_static_activations_are_rounded_over_their_range(captured: Any, tmp_path: Path) -> None:
    module = Two().eval()
    _, findings, found = study(module, captured, tmp_path)
    text = "int8:channel/uint8:tensor:affine"
    low, high = findings.ranges(0)["uint8:tensor:affine"]
    every = torch.cat([b[0] for b in batches()])
    assert (low, high) == (float(every.min()), float(every.max()))
    kind = QType.parse("uint8:tensor:affine")
    scale, zero = kind.scale_for(torch.tensor(low), torch.tensor(high))
    noise = signal = 0.0
    with torch.no_grad():
        weight = QType.parse("int8:channel").round_trip(module.first.weight, 0)
        for (x,) in batches()[-2:]:
            rounded = (kind.quantize(x, scale, zero).float() - zero.float()) * scale
            hidden = nn.functional.linear(rounded, weight, module.first.bias)
            want = module(x)
            noise += float((module.second(hidden.tanh()) - want).double().square().sum())
            signal += float(want.double().square().sum())
    assert found[0].option(text).measures["kl"] == pytest.approx(0.5 * noise / signal, rel=1e-3)


def test_interrupted_studies_go_on_to_the_same_result(captured: Any, tmp_path: Path) -> None:
    module = Two().eval()
    _, _, whole = study(module, captured, tmp_path / "a")

    class Interrupted(Exception):
        pass

    def stop(name: str) -> None:
        if name == "second":
            raise Interrupted

    with pytest.raises(Interrupted):
        study(module, captured, tmp_path / "b", say=stop)
    asked: list[str] = []
    _, _, resumed = study(module, captured, tmp_path / "b", say=asked.append)
    assert asked == ["second"]
    assert resumed == whole
    (tmp_path / "b/units/0000.json").write_text("{")  # damaged: measured again
    asked.clear()
    assert study(module, captured, tmp_path / "b", say=asked.append)[2] == whole
    assert asked == ["first"]


def test_another_fingerprint_is_not_used(captured: Any, tmp_path: Path) -> None:
    study(Two().eval(), captured, tmp_path)
    other = Findings(tmp_path, "b")
    assert other.get(0) is None
    assert other.stale == 1


def test_gradient_measures(captured: Any, tmp_path: Path) -> None:
    """For a linear model both are known: tr(F)/n per weight is mean(x²) / mean(y²)."""
    module = nn.Sequential(nn.Linear(16, 64)).eval()
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(64, 16, generator=g),) for _ in range(4)]
    program = captured(module, data[0][0])
    units = find_units(program, lambda node: False)
    findings = Findings(tmp_path, "a")
    settings = replace(PLAIN, trials=4)
    formats = [Format.parse("int4:g16")]
    found = measure_sensitivity(program, units, formats, data, settings, findings, stored)
    (unit,) = measure_gradients(program, found, data, settings, findings, probes=8).values()
    measured = unit.option("int4:g16").measures
    layer = module[0]
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        error = QType.parse("int4:g16").round_trip(layer.weight, 1) - layer.weight
        ratios = [
            float(x.square().sum(0).mean() / module(x).square().mean()) / module(x).numel()
            for (x,) in data
        ]
        want = 0.5 * sum(ratios) / len(ratios) * float(error.square().sum())
    assert measured["second"] == pytest.approx(want, rel=0.1)
    # E|gᵀΔ| of a Gaussian is √(2/π) of its deviation, whose square is twice the divergence's sum.
    rows = sum(module(x).numel() for (x,) in data) / len(data)
    spread = (2 * measured["kl"] * rows) ** 0.5
    assert measured["first"] == pytest.approx((2 / torch.pi) ** 0.5 * spread, rel=0.4)
    assert unit.option("float").measures == {"error": 0.0, "kl": 0.0, "first": 0.0, "second": 0.0}


def test_layers_that_share_a_weight_have_one_gradient(captured: Any, tmp_path: Path) -> None:
    layer = nn.Linear(32, 32)
    program, findings, found = study(nn.Sequential(layer, nn.Tanh(), layer), captured, tmp_path)
    one, two = measure_gradients(program, found, batches(), PLAIN, findings).values()
    for text in map(str, FORMATS):
        first, second = one.option(text).measures, two.option(text).measures
        assert first["second"] == pytest.approx(second["second"], rel=0.5)  # rounded twice
        assert first["second"] > 0


def test_query_key_and_value_move_together(tiny: Any) -> None:
    program = fuse_attention(tiny("tiny-attention-block").normalized)
    units = [unit.paths for unit in find_units(program, lambda node: False)]
    assert ("query", "key", "value") in units
    assert ("up",) in units


def test_dynamic_activations_are_rounded_by_token() -> None:
    kind = QType.parse("int8:token")
    x, w = torch.randn(5, 16), torch.randn(4, 16)
    want = nn.functional.linear(kind.round_trip(x), w)
    dynamic = Format(QType.parse("int8:channel"), kind)
    assert torch.allclose(simulated(w, dynamic)(x, None), want, atol=1e-5)
    narrow = simulated(w.bfloat16().float(), Format.parse("bfloat16"))(x, None)
    exact = nn.functional.linear(x.bfloat16().double(), w.bfloat16().double())
    assert torch.allclose(narrow.double(), exact, atol=1e-5)


def test_a_study_is_written_and_read(captured: Any, tmp_path: Path) -> None:
    _, _, found = study(Two().eval(), captured, tmp_path)
    made = Study(tuple(found.values()), "a", "ort:cpu", {"cpu": "x"}, ("note",), 1.5)
    made.save(tmp_path)
    assert Study.read(tmp_path) == made
    assert made.weights == 32 * 48 + 48 * 8


def test_tokens_with_nan_are_left_out_and_counted(captured: Any, tmp_path: Path) -> None:
    program = captured(Two().eval(), batches()[0][0])
    units = find_units(program, lambda node: False)
    settings = replace(PLAIN, gptq=True)
    found = {}
    for name, data in (("whole", batches()), ("spoiled", batches())):
        first = data[0][0]
        if name == "spoiled":
            first[2, 5] = torch.nan
        else:
            data[0] = (torch.cat([first[:2], first[3:]]),)  # the same without that token
        findings = Findings(tmp_path / name, "a")
        measured = measure_sensitivity(
            program, units, FORMATS[:2], data, settings, findings, stored
        )
        found[name] = [measured[i] for i in sorted(measured)]
        assert [findings.get(i).left_out for i in (0, 1)] == [u.left_out for u in found[name]]
    assert [u.left_out for u in found["spoiled"]] == [1, 1]
    assert [u.left_out for u in found["whole"]] == [0, 0]
    for spoiled, whole in zip(found["spoiled"], found["whole"], strict=True):
        assert spoiled.options == whole.options


def test_columns_in_float_are_an_option_with_their_cost(captured: Any, tmp_path: Path) -> None:
    """Two outlier inputs of a layer: keeping their columns is worth more than the bits it takes."""
    module = nn.Sequential(nn.Linear(32, 48)).eval()
    g = torch.Generator().manual_seed(0)
    data = []
    for _ in range(4):
        x = torch.randn(24, 32, generator=g)
        x[:, [5, 20]] *= 100
        data.append((x,))
    program = captured(module, data[0][0])
    units = find_units(program, lambda node: False)
    formats = [Format.parse("int2:g16:affine"), Format.parse("int2:g16:affine+2")]
    findings = Findings(tmp_path, "a")
    settings = replace(PLAIN, gptq=True, clip=True)
    found = measure_sensitivity(program, units, formats, data, settings, findings, stored)
    plain, split = (found[0].option(str(f)) for f in formats)
    assert split.bits == 2 + 32 * 2 / 32
    assert split.bytes == plain.bytes + 2 * 48 * 4 + 2 * 8
    assert split.measures["error"] < 0.05 * plain.measures["error"]
    # What is kept on disk is the weight that was measured.
    weight = findings.weights(0)["int2:g16:affine+2"][0]()
    layer = module[0]
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        error = weight - layer.weight
        noise = sum(float((error @ x.T).double().square().sum()) for (x,) in data[2:])
        signal = sum(float(module(x).double().square().sum()) for (x,) in data[2:])
    assert split.measures["error"] == pytest.approx(noise / signal, rel=1e-3)


def test_groups_that_were_made_smaller_are_kept_as_they_are(captured: Any, tmp_path: Path) -> None:
    """48 inputs have no groups of 32: what is on disk is the weight in groups of 16."""
    program = captured(Two().eval(), batches()[0][0])
    units = find_units(program, lambda node: False)
    findings = Findings(tmp_path, "a")
    formats = [Format.parse("int4:g32")]
    measure_sensitivity(program, units, formats, batches(), PLAIN, findings, stored)
    weight = program.constants()["p_second_weight"]
    want = QType.parse("int4:g16").round_trip(weight, 1)
    assert torch.equal(findings.weights(1)["int4:g32"][0](), want)
