"""`qcompiler run` on edge artifacts: on this machine, and under an emulator, which it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from qcompiler.artifact import Artifact
from qcompiler.cli import app
from qcompiler.errors import InputError
from qcompiler.passes.normalize import normalize
from qcompiler.program import capture
from qcompiler.target import Target


@pytest.fixture(params=["tvm:native", "tvm:aarch64"])
def made(request: pytest.FixtureRequest, edge: Callable[[str], Any], tmp_path: Path) -> Any:
    """The small model's folder with a manifest, as `compile` leaves it."""
    made = edge(request.param)
    folder = tmp_path / "artifact"
    shutil.copytree(made.folder, folder)
    ports = {
        kind: [{"name": p.name, "dtype": p.dtype, "shape": [*p.shape]} for p in found]
        for kind, found in (("inputs", made.model.inputs), ("outputs", made.model.outputs))
    }
    manifest = {"format": 1, "target": request.param, "files": {}, **ports}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return made, folder, request.param


def test_run(made: Any, tmp_path: Path) -> None:
    small, folder, target = made
    if target == "tvm:aarch64" and shutil.which("qemu-aarch64") is None:
        pytest.skip("qemu-aarch64 is not installed")
    x = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    words = ["run", str(folder), "--input", f"x={tmp_path / 'x.npy'}", "--threads", "2"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    y = np.load(tmp_path / "out" / "y.npy")
    np.testing.assert_allclose(y, small.expected(x), rtol=1e-5, atol=1e-5)
    result = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    if result["emulator"]:
        assert "not this machine: run by qemu-aarch64" in done.stdout
    else:
        assert "on this machine" in done.stdout
    assert result["outputs"][1]["mean"] == 1


def test_load_takes_names_and_structure(made: Any) -> None:
    small, folder, target = made
    if target == "tvm:aarch64" and shutil.which("qemu-aarch64") is None:
        pytest.skip("qemu-aarch64 is not installed")
    import torch

    x = torch.randn(2, 8)
    y, runs = Artifact.open(folder).load(threads=1)(x=x)
    np.testing.assert_allclose(y.numpy(), small.expected(x.numpy()), rtol=1e-5, atol=1e-5)
    assert runs.item() == 1


def test_numbers_outside_a_table(tmp_path: Path) -> None:
    """An embedding's input is checked before anything runs, not clamped."""
    pytest.importorskip("tvm", reason="the extra tvm is not installed")
    if shutil.which("cc") is None:
        pytest.skip("cc is not installed")
    from qcompiler.backends import edge as backend

    table = torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Linear(8, 3)).eval()
    ids = torch.tensor([[0, 9, 4]])
    program = normalize(capture(table, (ids,)))
    backend.lower(program, Target.parse("tvm:native"), tmp_path)
    run = backend.load(tmp_path, 1)
    torch.testing.assert_close(run(ids)[0], table(ids), rtol=0, atol=1e-6)
    for wrong in (10, -1, 1 << 40):
        ids[0, 1] = wrong
        with pytest.raises(InputError, match=rf"the number {wrong} at position 1, .* 10 rows"):
            run(ids)
