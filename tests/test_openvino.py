"""OpenVINO reads the folder of a language model and computes what ONNX Runtime computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import qcompiler
from qcompiler.backends.ort_session import MODEL
from qcompiler.models import find
from qcompiler.recipe import load_recipe

openvino = pytest.importorskip("openvino", reason="pip install openvino to load folders in it")


def test_a_decoder_in_four_bits(language_folder: Path, tmp_path: Path) -> None:
    spec = find(f"hf:{language_folder}")
    assert not isinstance(spec, Path)
    recipe = load_recipe("w4a16", {"rounding": "rtn"})
    made = qcompiler.compile(spec, recipe=recipe, out=tmp_path / "out")
    run = openvino.Core().compile_model(
        made.folder / MODEL, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    names = [described["name"] for described in made.manifest["inputs"]]
    prefill, continued = made.batches("held-out")
    assert prefill[names.index("past_key_values.0.key")].shape[2] == 0
    assert continued[names.index("past_key_values.0.key")].shape[2] > 0
    for batch in (prefill, continued):
        feed = {n: x.numpy() for n, x in zip(names, batch, strict=True)}
        got = run(feed)["logits"]
        (wanted, *_) = made.runner(1)(*batch)
        # ONNX Runtime quantizes the inputs of 4-bit products to 8 bits, OpenVINO does not.
        error = np.linalg.norm(got - wanted.numpy()) / np.linalg.norm(wanted.numpy())
        assert error < 0.05
