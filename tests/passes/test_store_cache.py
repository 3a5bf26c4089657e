"""Caches of integers: their scales, and a compiled model that reads and writes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qcompiler
from qcompiler import cached
from qcompiler.artifact import Artifact
from qcompiler.errors import UnsupportedError
from qcompiler.models import find
from qcompiler.passes.fuse_cache import fuse_cache
from qcompiler.passes.normalize import normalize
from qcompiler.passes.store_cache import measure_cache, store_cache
from qcompiler.program import Program, capture
from qcompiler.qtype import QType
from qcompiler.recipe import load_recipe
from qcompiler.spec import ModelSpec

INT8, INT4 = QType.parse("int8:channel"), QType.parse("int4:tensor")


@pytest.fixture(scope="module")
def spec(language_folder: Path) -> ModelSpec:
    found = find(f"hf:{language_folder}")
    assert isinstance(found, ModelSpec)
    return found


@pytest.fixture(scope="module")
def program(spec: ModelSpec) -> Program:
    captured = capture(spec.module, spec.example_inputs, spec.dynamic_shapes)
    return fuse_cache(normalize(captured), context=48)


def batches(spec: ModelSpec) -> list[Any]:
    assert spec.calibration is not None
    return [tuple(batch.values()) for batch in list(spec.calibration())[:3]]


def test_scales_are_the_largest_magnitudes_outside_of_padding(
    program: Program, spec: ModelSpec
) -> None:
    data = batches(spec)
    found = measure_cache(program, data)
    assert len(found) == 2
    mask_at = program.inputs.index("attention_mask")
    presents = [program.run(batch)[1:] for batch in data]  # key, value of each layer
    for layer, (key, value) in enumerate(found.values()):
        for largest, index in ((key, 2 * layer), (value, 2 * layer + 1)):
            rows = torch.cat([
                present[index].movedim(2, 1)[batch[mask_at] != 0]  # (tokens, heads, size)
                for batch, present in zip(data, presents, strict=True)
            ])  # fmt: skip
            torch.testing.assert_close(largest[:, 0], rows.abs().amax(0))


@pytest.mark.parametrize("kind", [INT8, INT4], ids=str)
def test_what_is_cached_lies_on_the_grid(kind: QType, program: Program, spec: ModelSpec) -> None:
    (batch, *_) = data = batches(spec)
    extremes = measure_cache(program, data)
    after = store_cache(program, kind, kind, extremes)
    assert [n.target for n in after.exported.graph.nodes].count(cached.stored_attention) == 2
    assert "2 caches hold keys as" in str(after.history[-1].notes)
    assert store_cache(after, kind, kind, extremes).exported is after.exported
    half = (1 << (kind.bits - 1)) - 1
    before, now = program.run(batch)[1:3], after.run(batch)[1:3]  # of the first layer
    for x, got, largest in zip(before, now, next(iter(extremes.values())), strict=True):
        scale = (largest if kind.granularity == "channel" else largest.amax()) / half
        expected = (x / scale).round().clamp(-half - 1, half) * scale
        torch.testing.assert_close(got, expected)


@pytest.fixture(scope="module", params=["int8:channel", "int4:channel"])
def artifact(
    request: pytest.FixtureRequest, spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    settings = {"weights": "int8:channel", "keys": request.param, "values": request.param}
    recipe = load_recipe("w4a8kv8", {**settings, "rounding": "rtn", "clip": False})
    return qcompiler.compile(spec, recipe=recipe, out=tmp_path_factory.mktemp("kv") / "llama")


def test_the_runtime_keeps_integers_and_gives_the_simulated_logits(artifact: Artifact) -> None:
    """The lowering error stays what ONNX Runtime's own rounding of activations is."""
    from qcompiler.backends import ort

    bits = 8 if "int8" in artifact.manifest["recipe"]["keys"] else 4
    session = ort.session(artifact.folder / ort.MODEL, 1)
    caches = [i for i in session.get_inputs() if i.name.startswith("past_")]
    assert {i.type for i in caches} == {"tensor(int8)" if bits == 8 else "tensor(uint8)"}
    assert {i.shape[3] for i in caches} == {16 * bits // 8}
    logits = [e for e in artifact.manifest["errors"]["lowering"] if e["output"] == "logits"]
    assert logits
    # That rounding moves some of the integers, each of which is a larger step in 4 bits.
    assert min(e["sqnr_db"] for e in logits) > (24 if bits == 8 else 12)


def test_pieces_give_what_a_whole_text_gives(artifact: Artifact) -> None:
    """What was read before comes from the integers, in the same buffer."""
    runtime = artifact.generator(1).runtime
    tokens = np.arange(3, 33)
    runtime.reset(30)
    whole = runtime.feed(tokens)
    runtime.reset(30)
    pieces = [runtime.feed(part) for part in np.split(tokens, [1, 12, 13])]
    np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=1e-3, atol=1e-3)


def test_no_cache_to_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no attention of this model is one op with its"):
        qcompiler.compile(
            torch.nn.Linear(32, 8), (torch.randn(4, 32),), recipe="w4a8kv8",
            calibration=[(torch.randn(4, 32),)] * 4, out=tmp_path / "x",
        )  # fmt: skip
