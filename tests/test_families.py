"""The transformers families, tiny: every recipe keeps the function, or the refusal says why not."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from qcompiler.backends import ort
from qcompiler.compiler import quantize
from qcompiler.data import Data
from qcompiler.manifest import Compiled
from qcompiler.models.families import FAMILIES, build
from qcompiler.program import Program, capture
from qcompiler.recipe import load_recipe
from qcompiler.spec import ModelSpec
from qcompiler.target import Target
from qcompiler.verify import Sqnr

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("torchlib_once")

# Recipe, settings, and the lowest SQNR of the output in dB: random weights have no outliers.
RECIPES: dict[str, tuple[str, dict[str, Any], float]] = {
    "w8": ("w8", {}, 30.0),
    "w4a16": ("w4a16", {"weights": "int4:g16"}, 10.0),
    "w8a8": ("w8a8", {}, 20.0),
    "w4a16 rotated": ("w4a16", {"weights": "int4:g16", "rotation": "hadamard"}, 10.0),
}
# Families whose residual stream is not rotated, and what the refusal says.
REFUSED = {
    "Gemma2": "writes the stream with a scale of its own",
    "Gemma3": "writes the stream with a scale of its own",
    "BLOOM": "writes the stream with a scale of its own",
    "BERT": "writes the stream with a scale of its own",
    "DistilBERT": "writes the stream with a scale of its own",
    "RoBERTa": "writes the stream with a scale of its own",
    "Mixtral": "which cannot be scaled",
    "ViT": "which cannot be scaled",
    "Whisper": "which cannot be scaled",
}


@functools.cache
def captured(family: str) -> tuple[ModelSpec, Program]:
    spec = build(family)
    return spec, capture(spec.module, spec.example_inputs, spec.dynamic_shapes)


def compiled(family: str, name: str) -> tuple[Compiled, float]:
    """A family under a recipe, and its SQNR against the module on held-out data."""
    spec, program = captured(family)
    preset, settings, _ = RECIPES[name]
    recipe = load_recipe(preset, {**settings, "min_sqnr": 0})
    data = Data(program, spec, recipe)
    made = quantize(program, data, recipe, Target.parse("ort:cpu:vnni"), lambda step: None)
    total = Sqnr()
    assert spec.held_out is not None
    for inputs, batch in zip(spec.held_out(), data.held_out(), strict=True):
        assert isinstance(inputs, dict)
        with torch.no_grad():
            total.update(spec.module(**inputs), made.quantized.run(batch)[0])
    return made, total.db


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_under_every_recipe(family: str, name: str) -> None:
    made, db = compiled(family, name)
    assert db > RECIPES[name][2]
    linears = {site.node for site in made.plan if site.operand == 1}
    assert len(linears) >= 9  # four of attention and two or three of the MLP, in two layers
    if "rotated" not in name:
        return
    (entry,) = (e for e in made.quantized.history if e.name == "fuse_rotation")
    if entry.changed:
        assert entry.residual is not None
        assert entry.bound is not None
        assert entry.residual <= entry.bound
    streams = [note for note in entry.notes if note.startswith("R1: Hadamard 12 ⊗ 4")]
    reasons = [r.reason for r in entry.refusals if r.reason.startswith("R1")]
    if family in REFUSED:
        assert not streams
        assert any(REFUSED[family] in reason for reason in reasons)
    else:
        assert streams
        assert not reasons


@pytest.mark.parametrize(
    ("family", "name"),
    [(family, [*RECIPES][index % len(RECIPES)]) for index, family in enumerate(FAMILIES)],
)
def test_onnx_runtime_computes_what_the_program_says(
    family: str, name: str, tmp_path: Path
) -> None:
    made, _ = compiled(family, name)
    spec, program = captured(family)
    ort.lower(made.quantized, tmp_path, dynamic_shapes=spec.dynamic_shapes)
    run, total = ort.load(tmp_path, 1), Sqnr()
    for batch in Data(program, spec, load_recipe("w8")).held_out():
        total.update(made.quantized.run(batch)[0], run(*batch)[0])
    # Weight-only kernels round what they read to 8 bits themselves; with w8a8 a value at the middle
    # of a step may fall on the other side, which shows where there are but a hundred.
    assert total.db > (25.0 if name.startswith("w4") or name == "w8" else 45.0)


def test_experts_stay_float_and_are_named() -> None:
    made, _ = compiled("Mixtral", "w4a16")
    reasons = [r.reason for r in made.plan.refusals]
    assert sum("experts that are chosen when it runs" in reason for reason in reasons) == 4
