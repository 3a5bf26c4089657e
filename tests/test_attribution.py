"""Planted faults are found; what adds up adds up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qcompiler import explaining, mixed_report, ops
from qcompiler.attribution import Attribution, _float_settings, attribute
from qcompiler.compiler import Compiled, compile, quantize
from qcompiler.data import Data
from qcompiler.explaining import explain
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.passes.pack_weights import pack_weights
from qcompiler.plan import Plan
from qcompiler.program import Program
from qcompiler.recipe import load_recipe
from qcompiler.rewrite import Draft, rewrite
from qcompiler.sources import find_sources
from qcompiler.stages import Stages
from qcompiler.target import Target

BLOCK = "tiny-attention-block"
CPU = Target.parse("ort:cpu")


def compiled(tiny: Callable[[str], Any], recipe: str, target: Target = CPU, **settings: Any) -> Any:
    model = tiny(BLOCK)
    chosen = load_recipe(recipe, {"rounding": "rtn", **settings})
    data = Data(model.captured, model.spec, chosen)
    return quantize(model.captured, data, chosen, target, lambda step: None), model


def account(made: Compiled, quantized: Program, model: Any) -> Attribution:
    return attribute(made.floating, quantized, model.batches[:3], model.spec.padding_mask)


def test_a_layer_in_two_bits_is_named_first(tiny: Callable[[str], Any]) -> None:
    made, model = compiled(
        tiny,
        "w8a8",
        formats={"up": "int2:g16/uint8:tensor:affine"},
        target=Target.parse("torch:cpu"),
    )
    found = account(made, made.quantized, model)
    first = found.shares[0]
    assert (first.source.path, first.source.kind) == ("up", "weight")
    assert first.source.format.startswith("int2")
    assert first.share > 0.5
    # What it is told to change is that layer, and both the forecast and the measurement say why.
    change = found.changes[0]
    assert change.settings == {"formats": {"up": "int8:g16"}}
    assert change.measured > 0.5 * found.total
    assert change.predicted == pytest.approx(change.measured, rel=0.2)


def test_an_activation_clipped_at_half_its_range_is_named_first(tiny: Callable[[str], Any]) -> None:
    made, model = compiled(tiny, "w8a8", smooth=False, correct_bias=False)
    site = next(s for s, a in made.plan.items() if s.path == "down" and a.low is not None)
    old = made.plan[site]
    halved = replace(old, low=old.low / 2, high=old.high / 2)
    plan = Plan({**made.plan.entries, site: halved})
    found = account(made, pack_weights(insert_qdq(made.floating, plan)), model)
    first = found.shares[0]
    assert (first.source.path, first.source.kind) == ("down", "activation")
    assert found.by_kind()["activation"] > 0.5
    layer = next(row for row in found.layers if row.path == "down")
    assert layer.activation == max(layer.weight, layer.activation, layer.inherited)


@rewrite(exact=False)
def coarsen(draft: Draft, index: int) -> None:
    """A wrong scale: one cached tensor in two bits."""
    trips = list(draft.calls(ops.cache_round_trip))
    trips[index].update_arg(1, "uint2:token:affine")
    draft.changed = True


@pytest.mark.parametrize("index", [0, 1])
def test_a_wrong_cache_is_named_first(tiny: Callable[[str], Any], index: int) -> None:
    made, model = compiled(
        tiny, "w8", Target.parse("torch:cpu"), keys="uint8:token:affine",
        values="uint8:token:affine",
    )  # fmt: skip
    wrong = coarsen(made.quantized, index)
    found = account(made, wrong, model)
    assert found.shares[0].source.kind == "kv cache"
    trips = [n.name for n in wrong.exported.graph.nodes if n.target is ops.cache_round_trip]
    assert found.shares[0].source.node == trips[index]
    assert found.changes[0].settings == {"keys": None, "values": None}


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic", "w4a16"])
def test_bypassing_all_sources_gives_the_float_program(
    tiny: Callable[[str], Any], recipe: str
) -> None:
    made, model = compiled(tiny, recipe, correct_bias=False)
    functions = {
        node: function
        for site in find_sources(made.floating, made.quantized)
        for node, function in site.bypass.items()
    }
    left = [
        node.name for node in made.quantized.exported.graph.nodes
        if node.target in (ops.dequantize, ops.cache_round_trip) and node not in functions
    ]  # fmt: skip
    assert not left
    with Stages(made.quantized, model.batches[:1]) as stages:
        (got,) = stages.outputs(functions)
    for want, value in zip(made.floating.run(model.batches[0]), got, strict=True):
        assert torch.allclose(want, value, rtol=1e-5, atol=1e-6)


def test_the_sums_add_up(tiny: Callable[[str], Any]) -> None:
    made, model = compiled(tiny, "w8a8")
    found = account(made, made.quantized, model)
    assert sum(row.share for row in found.shares) == pytest.approx(1)
    alone = sum(row.alone for row in found.shares)
    assert found.total == pytest.approx(alone + found.interaction - found.bias, rel=1e-6)
    assert sum(found.by_kind().values()) == pytest.approx(1)
    # Lemma 7 by hand: the product of 1 + ‖Ŵ − W‖ / ‖W‖, layer by layer.
    constants = made.floating.constants()
    product = 1.0
    nodes = {n.name: n for n in made.floating.exported.graph.nodes}
    plan = {s.node: a.qtype for s, a in made.plan.items() if s.operand == 1}
    for row in found.layers:
        weight = constants[nodes[row.node].args[1].name]
        error = plan[row.node].round_trip(weight, 0) - weight
        product *= 1 + float(error.norm() / weight.norm())
        assert row.bound == pytest.approx((product - 1) ** 2, rel=1e-3)


def test_advice_says_what_was_measured(tiny: Callable[[str], Any]) -> None:
    """An input in float leaves the weight as it is; an embedding in float is kept so by name."""
    formats = {"down": "int4:g16/uint8:tensor:affine"}
    made, _ = compiled(tiny, "w8a8", Target.parse("torch:cpu"), formats=formats)
    sites = find_sources(made.floating, made.quantized)
    weights = {p: s.source.format for s in sites if s.source.kind == "weight"
               for p in s.source.readers}  # fmt: skip
    assert weights["down"] == "int4:g16"
    for site in sites:
        settings = _float_settings(site.source, weights)
        if site.source.kind == "activation" and site.source.readers == ("down",):
            assert settings == {"formats": {"down": "int4:g16"}}
        if site.source.path == "embedding":
            assert settings == {"keep_float": ("embedding",)}
    made, _ = compiled(tiny, "w2a16")
    kinds = {s.source.format for s in find_sources(made.floating, made.quantized)}
    assert any(kind.startswith("int2:g") and kind.endswith(":affine") for kind in kinds)


def test_artifacts_explain_themselves(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    model = tiny(BLOCK)
    settings = {"rounding": "rtn", "formats": {"up": "int4:g16"}}
    recipe = load_recipe("w8a8", settings)
    compile(model.spec, recipe=recipe, out=tmp_path / "a")
    found = explain(tmp_path / "a")
    assert found["shares"][0]["source"]["path"] == "up"
    assert 0 <= found["kernel"] < 1
    # The advice is a recipe that compiles, and does what was measured.
    assert found["changes"][0]["refused"] is None
    (tmp_path / "better.yaml").write_text(found["changes"][0]["recipe"])
    better = load_recipe(str(tmp_path / "better.yaml"))
    assert better.formats == {"up": "int8:g16"}
    compile(model.spec, recipe=better, out=tmp_path / "b")
    assert explain(tmp_path / "b")["total"] < 0.8 * found["total"]


def test_changes_that_the_target_has_no_kernel_for_say_so() -> None:
    alone = {"formats": {"a": "float", "b": "float8_e4m3:channel"}}
    reason = explaining._refusal("tvm:cuda:sm_90", alone)
    assert reason is not None
    assert "not float8_e4m3:channel with float ones" in reason
    assert explaining._refusal("tvm:cuda:sm_90", {"formats": {"a": "float"}}) is None
    assert explaining._refusal("ort:cpu", {"keys": None, "values": None}) is None
    source = {"path": "b", "node": "b", "kind": "activation", "format": "float8_e4m3:token"}
    change = {"source": source, "to": "float", "predicted": 1.0, "measured": 1.0, "recipe": ""}
    changes = [{**change, "refused": told} for told in (None, reason)]
    page = "".join(map(str, mixed_report._changes(changes)))
    assert page.count("the target would refuse it") == 1
