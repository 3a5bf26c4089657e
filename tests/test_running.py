"""`qcompiler run`: any artifact, once, on files or on the data kept with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import qcompiler
from qcompiler.artifact import Artifact
from qcompiler.cli import app


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    batches = [(torch.randn(3, 8),) for _ in range(4)]
    module = torch.nn.Sequential(torch.nn.Linear(8, 4))
    shapes = {"input": {0: "batch"}}
    out = tmp_path_factory.mktemp("run") / "artifact"
    return qcompiler.compile(
        module, batches[0], calibration=batches, dynamic_shapes=shapes, recipe="w8", out=out
    )


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["run", *map(str, words)])


def test_on_files(artifact: Artifact, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    words = ("--input", f"input={tmp_path / 'x.npy'}", "--out", tmp_path / "out", "--json")
    (result,) = json.loads(run(artifact.folder, *words).stdout)["outputs"]
    y = np.load(result["file"])
    np.testing.assert_array_equal(y, artifact.load()(torch.from_numpy(x)).numpy())
    assert result["shape"] == [5, 4]
    assert result["dtype"] == "float32"
    assert result["not_finite"] == 0
    np.testing.assert_allclose(
        [result["min"], result["mean"], result["max"]], [y.min(), y.mean(), y.max()], rtol=1e-6
    )


def test_on_the_data_kept_with_it(artifact: Artifact) -> None:
    done = run(artifact.folder, "--threads", 1)
    assert done.exit_code == 0
    assert "held-out batch kept with the artifact" in done.stdout
    assert "ort:cpu, on this machine" in done.stdout
    assert "3 × 4" in done.stdout


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("x.npy", "give NAME=FILE.npy; known names: input"),
        ("inptu=x.npy", "no input 'inptu'; did you mean 'input'"),
        ("input=nothere.npy", "nothere.npy: No such file"),
        ("input={here}/text.npy", "text.npy: no .npy file"),
        ("input={here}/archive.npz", "holds several arrays"),
        ("input={here}/double.npy", "it holds float64, and input 'input' is float32"),
        ("input={here}/wide.npy", "its shape is (2, 9), and input 'input' is batch × 8"),
        ("input={here}/flat.npy", "its shape is (8,)"),
    ],
)
def test_bad_inputs(artifact: Artifact, tmp_path: Path, word: str, message: str) -> None:
    (tmp_path / "text.npy").write_text("no array")
    np.savez(tmp_path / "archive.npz", a=np.zeros(3))
    np.save(tmp_path / "double.npy", np.zeros((2, 8)))
    np.save(tmp_path / "wide.npy", np.zeros((2, 9), np.float32))
    np.save(tmp_path / "flat.npy", np.zeros(8, np.float32))
    done = run(artifact.folder, "--input", word.format(here=tmp_path))
    assert done.exit_code == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert message in done.stderr


def test_input_given_twice(artifact: Artifact) -> None:
    done = run(artifact.folder, "--input", "input=a.npy", "--input", "input=b.npy")
    assert done.exit_code == 2
    assert "given twice" in done.stderr
