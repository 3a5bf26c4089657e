"""Mixed precision end to end: budgets kept, points compile, bad budgets refused."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import qcompiler
from qcompiler import costs
from qcompiler.cli import app
from qcompiler.compiler import study
from qcompiler.errors import InputError, UnsupportedError
from qcompiler.format import Format
from qcompiler.mixed import _beaten, prepared
from qcompiler.mixer import Point
from qcompiler.recipe import load_recipe
from qcompiler.spec import ModelSpec
from qcompiler.target import Target


class Tower(nn.Module):
    """Layers of very different weight in the output: the first matters most."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.gains = (1.0, 0.3, 0.1, 0.03)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for layer, gain in zip(self.layers, self.gains, strict=True):
            out = out + gain * torch.tanh(layer(out))
        return out


def tower() -> ModelSpec:
    g = torch.Generator().manual_seed(1)
    data = [(torch.randn(8, 64, generator=g),) for _ in range(8)]
    return ModelSpec("tower", Tower(), data[0], {"x": {0: "batch"}}, lambda: data)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("mixed")
    recipe = load_recipe("mixed", {"bits": 3.5})
    return qcompiler.compile(tower(), recipe=recipe, out=folder / "a", study=folder / "s")


def test_the_budget_is_kept_and_used(made: Any) -> None:
    mixed = made.manifest["mixed"]
    assert 3.0 < mixed["chosen"]["bits"] <= 3.5
    bits = {u["name"]: Format.parse(u["format"]).bits for u in mixed["units"]}
    assert sum(bits.values()) / 4 == mixed["chosen"]["bits"]
    # What matters more has more bits.
    assert bits["layers.0"] > bits["layers.3"]
    # Better than three bits everywhere, at half a bit more; better than every other proposal.
    losses = {p["label"]: p["loss"] for p in mixed["uniform"]}
    assert mixed["chosen"]["loss"] < losses["all int3:g32:affine"]
    assert mixed["chosen"]["loss"] <= min(p["loss"] for p in mixed["tried"])
    labels = {p["label"] for p in mixed["tried"]}
    assert {"greedy", "closed form", "integer program on kl"} <= labels


def test_a_budget_of_size_is_not_told_to_give_one() -> None:
    best, other = (Point("", (), 4.0, 100, loss, loss) for loss in (2.0, 1.0))
    told = [_beaten(best, [other], Target.parse("ort:cpu"), sized) for sized in (False, True)]
    assert ["--size" in str(text) for text in told] == [True, False]
    assert _beaten(other, [best], Target.parse("ort:cpu"), False) is None


def test_a_better_plan_outside_of_the_budget_is_named(tmp_path: Path) -> None:
    """`ort:cpu` stores 3 bits in 4: fewer bits are no smaller there."""
    formats = {"candidates": ("int3:g32:affine", "int4:g32")}
    found = {}
    for name, budget in (("bits", 3.5), ("size", 0.02)):
        recipe = load_recipe("mixed", {**formats, name: budget})
        made = qcompiler.compile(tower(), recipe=recipe, out=tmp_path / name, study=tmp_path / "s")
        assert not any("/" in step for step in made.manifest["seconds"])  # 1/6 … 6/6 are one
        warnings = [w for w in made.manifest["warnings"] if "loses less" in w]
        found[name] = made.manifest["mixed"]["chosen"], warnings
    (mixed, (told,)), (finer, none) = found["bits"], found["size"]
    assert told.startswith("'all int4:g32' loses less than the chosen plan")
    assert "ort:cpu" in told
    assert not none
    assert finer["bytes"] <= mixed["bytes"]
    assert finer["loss"] < mixed["loss"]


def test_the_artifact_has_the_chosen_formats(made: Any) -> None:
    mixed = made.manifest["mixed"]
    planned = {r["path"]: r["qtype"] for r in made.manifest["plan"] if r["site"].endswith("[1]")}
    assert planned == {u["name"]: u["format"] for u in mixed["units"]}
    assert made.manifest["recipe"]["bits"] is None
    assert made.manifest["recipe"]["formats"] == planned


def test_bfloat16_is_a_format_like_others(tmp_path: Path) -> None:
    formats = ("int8:channel/int8:token", "bfloat16")
    settings = {"bits": 10.0, "candidates": formats, "rounding": "rtn", "clip": False}
    recipe = load_recipe("mixed", settings)
    target = "tvm:x86-64:avx512bf16"
    made = qcompiler.compile(
        tower(), target=target, recipe=recipe, out=tmp_path / "a", study=tmp_path / "s"
    )
    mixed = made.manifest["mixed"]
    # Ten bits on average: one layer of four in bfloat16, and the one that matters most.
    chosen = {u["name"]: u["format"] for u in mixed["units"]}
    assert chosen == {f"layers.{i}": formats[i == 0] for i in range(4)}
    (narrow,) = (o for o in mixed["units"][0]["options"] if o["format"] == "bfloat16")
    assert narrow["bytes"] == 2 * 64 * 64
    # The option's error is that of the layer with both operands rounded.
    layer = Tower().layers[0]
    x = torch.cat([batch[0] for batch in tower().calibration()]).double()[-16:]
    rounded = x.bfloat16().double() @ layer.weight.detach().bfloat16().double().T
    exact = x @ layer.weight.detach().double().T
    given = layer(x.float()).detach()
    error = float((rounded - exact).square().sum() / given.square().sum())
    assert narrow["measures"]["error"] == pytest.approx(error, rel=0.5)
    history = {entry["name"]: entry["notes"] for entry in made.manifest["history"]}
    assert history["round_products"] == ["1 linears in bfloat16"]


def test_generated_kernels_inside_another_runtime(tmp_path: Path) -> None:
    """Their times are measured as any other's, and the plan runs on them."""
    pytest.importorskip("tvm", reason="the extra tvm is not installed")
    if shutil.which("cc") is None:
        pytest.skip("no C compiler is installed")
    target = Target.parse("ort:cpu+tvm")
    texts = ("int4:g32/int8:token", "int8:channel/int8:token")
    settings = {"bits": 5.0, "candidates": texts, "rounding": "rtn", "clip": False}
    recipe = load_recipe("mixed", settings)
    artifact = qcompiler.compile(tower(), target=target, recipe=recipe, out=tmp_path / "a")
    chosen = {u["name"]: u["format"] for u in artifact.manifest["mixed"]["units"]}
    assert chosen == {f"layers.{i}": texts[i == 0] for i in range(4)}
    assert (tmp_path / "a" / "libqcompiler_ort.so").is_file()
    assert artifact.manifest["errors"]["lowering"][0]["sqnr_db"] > 60
    times = costs.micro(target, [(64, 64)], texts, {"prefill": 8}, tmp_path, print)
    assert all(times[64, 64][text]["prefill"] > 0 for text in ("float", *texts))


@pytest.mark.parametrize("target", ["ort:cuda", "ort:cuda+tvm", "tvm:cuda:sm_90", "ort:cpu"])
def test_a_target_is_not_refused_for_candidates_that_nobody_named(target: str) -> None:
    spec = ModelSpec("m", nn.Linear(64, 64), (torch.randn(1, 64),))
    recipe = prepared(load_recipe("mixed", {"max_loss": 0.1}), Target.parse(target), spec)
    assert any(text.startswith("int4:g32") for text in recipe.candidates)
    named = load_recipe("mixed", {"max_loss": 0.1, "candidates": ["int8:tensor/uint4:token"]})
    with pytest.raises(UnsupportedError, match="candidate int8:tensor/uint4:token on target"):
        prepared(named, Target.parse(target), spec)


def test_candidates_of_generated_kernels_quantize_by_token() -> None:
    target = Target.parse("ort:cpu+tvm")
    for settings, want in (
        ({"latency": 0.5}, ("int4:g32/int8:token", "int8:channel/int8:token")),
        ({"bits": 3.0}, ("int2:g32:affine/int8:token", "int3:g32:affine/int8:token",
                         "int4:g32/int8:token", "int8:g32/int8:token")),
    ):  # fmt: skip
        assert prepared(load_recipe("mixed", settings), target, tower()).candidates == want


def test_points_of_the_front_compile(made: Any, tmp_path: Path) -> None:
    folder = Path(made.manifest["mixed"]["folder"])
    rows = json.loads((folder / "front.json").read_text())
    with (folder / "front.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [r["point"] for r in rows] == [r["point"] for r in table]
    assert len([r for r in rows if r["point"] != "chosen"]) >= 12
    losses = [r["loss"] for r in rows if r["point"] != "chosen"]
    assert losses[0] > 10 * losses[-1]
    for name in ("front", "sensitivity"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = ElementTree.parse(folder / f"{name}.svg").getroot()
        assert svg.tag.endswith("svg")
    recipe = load_recipe(str(folder / "points/03.yaml"))
    artifact = qcompiler.compile(tower(), recipe=recipe, out=tmp_path / "p")
    assert artifact.manifest["recipe"]["formats"] == recipe.formats
    bits = [Format.parse(text).bits for text in recipe.formats.values()]
    assert sum(bits) / len(bits) <= float(table[3]["bits"]) + 1e-9


def test_a_second_budget_uses_the_study(made: Any, tmp_path: Path) -> None:
    folder = Path(made.manifest["mixed"]["folder"])
    before = {p: p.stat().st_mtime_ns for p in (folder / "units").iterdir()}
    recipe = load_recipe("mixed", {"size": 0.012})
    artifact = qcompiler.compile(tower(), recipe=recipe, out=tmp_path / "b", study=folder)
    assert {p: p.stat().st_mtime_ns for p in (folder / "units").iterdir()} == before
    assert artifact.manifest["mixed"]["chosen"]["bytes"] <= 12_000


def test_the_cheapest_within_a_loss(made: Any, tmp_path: Path) -> None:
    recipe = load_recipe("mixed", {"max_loss": "0.5%"})
    artifact = qcompiler.compile(tower(), recipe=recipe, out=tmp_path / "c")
    mixed = artifact.manifest["mixed"]
    assert mixed["chosen"]["loss"] <= 0.5 * 0.005
    cheaper = [p for p in mixed["tried"] if p["bytes"] < mixed["chosen"]["bytes"]]
    assert all(p["loss"] > 0.5 * 0.005 for p in cheaper)


def test_impossible_budgets(made: Any, tmp_path: Path) -> None:
    folder = Path(made.manifest["mixed"]["folder"])
    for settings, message in (
        ({"bits": 1.0}, r"bits a weight: 1 cannot be reached; .* is 2"),
        ({"size": 0.001}, r"MB of weights: 0.001 cannot be reached; .* is 0.0"),
    ):
        recipe = load_recipe("mixed", settings)
        with pytest.raises(InputError, match=message):
            qcompiler.compile(tower(), recipe=recipe, out=tmp_path / "d", study=folder)
        assert not (tmp_path / "d").exists()


def test_a_study_of_another_model_is_measured_again(made: Any, tmp_path: Path) -> None:
    spec = tower()
    first = study(spec, out=tmp_path / "s")
    assert not any("another" in note for note in first["notes"])
    with torch.no_grad():
        spec.module.get_parameter("layers.0.weight").mul_(1.5)
    second = study(spec, out=tmp_path / "s")
    assert any("another model" in note for note in second["notes"])
    assert second["units"][0]["options"] != first["units"][0]["options"]


def test_recipes_without_a_budget_or_a_kernel(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["compile", "tiny-mlp", "--recipe", "mixed", "--out", str(tmp_path / "a")]
    )
    assert result.exit_code == 2
    assert "needs a budget: --bits" in result.stderr
    recipe = load_recipe("mixed", {"bits": 4, "max_loss": "1%"})
    with pytest.raises(InputError, match="give max_loss alone"):
        qcompiler.compile(tower(), recipe=recipe, out=tmp_path / "b", study=tmp_path / "s")
    assert not (tmp_path / "s").exists()  # before anything is measured
    recipe = load_recipe("mixed", {"bits": 4, "candidates": "int4:g32/int8:tensor"})
    with pytest.raises(UnsupportedError, match="candidate int4:g32/int8:tensor on target"):
        qcompiler.compile(tower(), recipe=recipe, out=tmp_path / "b")


def test_the_commands(tmp_path: Path, tiny: Callable[[str], Any]) -> None:
    runner = CliRunner()
    folder = str(tmp_path / "s")
    result = runner.invoke(app, ["sensitivity", "tiny-attention-block", "--out", folder])
    assert result.exit_code == 0, result.stderr
    assert "the most sensitive first" in result.stdout
    assert "(query, key, value)" in result.stdout
    out = str(tmp_path / "a")
    command = ["compile", "tiny-attention-block", "--recipe", "mixed", "--bits", "4.5", "--out"]
    result = runner.invoke(app, [*command, out, "--study", folder])
    assert result.exit_code == 0, result.stderr
    result = runner.invoke(app, ["explain", out])
    assert result.exit_code == 0, result.stderr
    assert "changes that would buy the most" in result.stdout
    result = runner.invoke(app, ["explain", folder])
    assert result.exit_code == 2


def test_reports_show_the_choice_and_where_the_error_comes_from(tmp_path: Path) -> None:
    recipe = load_recipe("mixed", {"bits": 3.5, "explain": True})
    artifact = qcompiler.compile(tower(), recipe=recipe, out=tmp_path / "a")
    page = (tmp_path / "a/report.html").read_text()
    for text in ("Mixed precision", "one format for all", "Where the error comes from", "lemma 7"):
        assert text in page
    # Every unit has a row, and every number that sorts stands in the page as it was measured.
    for unit in artifact.manifest["mixed"]["units"]:
        coarsest = min(unit["options"], key=lambda o: o["bits"])
        assert f'data-key="{coarsest["measures"]["kl"]!r}"' in page
    # The one script that may run is the one whose digest the policy names.
    script = page.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#x27;sha256-{digest}&#x27;" in page
    assert page.count("<script>") == 1


def test_formats_print_and_parse() -> None:
    for text in ("float", "int4:g32", "int8:channel/uint8:tensor:affine"):
        assert str(Format.parse(text)) == text
    with pytest.raises(InputError, match="need a quantized weight"):
        Format.parse("float/int8:token")
    recipe = load_recipe("w8a8", {"formats": {"*.down": "int4:g32", "a.down": "float"}})
    assert str(recipe.format_of("b.down", "linear")) == "int4:g32"
    assert str(recipe.format_of("a.down", "linear")) == "float"
    assert recipe.format_of("up", "linear") == recipe.format
