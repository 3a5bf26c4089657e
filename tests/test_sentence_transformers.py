"""sentence-transformers loads the compiled all-MiniLM-L6-v2 unchanged, with `backend="onnx"`.

Its ONNX backend needs optimum-onnx, which works with older transformers only. Both are therefore
installed in an environment of their own, which sees torch, onnxruntime and the rest of this one. It
is kept in build/st-venv for the next run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qcompiler.artifact import Artifact
from qcompiler.spec import ModelSpec

HOME = Path(__file__).parents[1] / "build" / "st-venv"
PACKAGES = ("sentence-transformers==5.7.0", "optimum-onnx==0.1.0")
SENTENCES = [
    "The harbour was empty except for one blue boat.",
    "Only a single boat lay in the port.",
    "Interest rates rose by a quarter of a percent.",
    "ok",
]
ENCODE = """
import json, sys
from sentence_transformers import SentenceTransformer
folder, result = sys.argv[1:]
model = SentenceTransformer(
    folder,
    backend="onnx",
    local_files_only=True,
    model_kwargs={"provider": "CPUExecutionProvider"},
)
vectors = model.encode(json.load(sys.stdin))
with open(result, "w") as file:
    json.dump(vectors.tolist(), file)
"""


@pytest.fixture(scope="module")
def python() -> str:
    """The interpreter of an environment with sentence-transformers and optimum-onnx."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("there is no pip here to install sentence-transformers and optimum-onnx with")
    interpreter = HOME / ("Scripts" if os.name == "nt" else "bin") / "python"
    stamp = HOME / ".complete"
    wanted = "\n".join([sys.version, sysconfig.get_path("purelib"), *PACKAGES])
    if interpreter.is_file() and stamp.is_file() and stamp.read_text() == wanted:
        return str(interpreter)
    shutil.rmtree(HOME, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", HOME], check=True)
    query = [str(interpreter), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    Path(own, "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pins = HOME / "constraints.txt"  # what this environment has of these is used, not replaced
    pins.write_text(f"torch=={torch.__version__}\nnumpy=={np.__version__}\n")
    pip = [str(interpreter), "-m", "pip", "--disable-pip-version-check", "--retries", "1"]
    done = subprocess.run(
        [*pip, "install", "--quiet", "-c", str(pins), *PACKAGES],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        unreachable = ("NewConnectionError", "No matching distribution", "Could not fetch URL")
        if any(sign in done.stderr for sign in unreachable):
            reason = done.stderr.strip().splitlines()[-1]
            pytest.skip(f"the package index has no {' or '.join(PACKAGES)} for us: {reason}")
        pytest.fail(f"pip install {' '.join(PACKAGES)}:\n{done.stderr}")
    stamp.write_text(wanted)
    return str(interpreter)


@pytest.fixture(scope="module")
def vectors(
    python: str, minilm_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """What sentence-transformers makes of the sentences: (sentences, 384), length one."""
    folder = tmp_path_factory.mktemp("sentences")
    result = folder / "vectors.json"
    done = subprocess.run(
        [python, "-c", ENCODE, str(minilm_artifact.folder), str(result)],
        input=json.dumps(SENTENCES),
        cwd=folder,  # not the checkout, whose folders have importable names
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(result.read_text()))


def embed(run: Callable[..., Any], spec: ModelSpec) -> Tensor:
    """Mean of the token embeddings that the mask keeps, at length one."""
    assert spec.encode is not None
    inputs = dict(spec.encode(SENTENCES))  # type: ignore[arg-type]
    with torch.inference_mode():
        tokens = run(**inputs)
    mask = inputs["attention_mask"][..., None]
    return torch.nn.functional.normalize((tokens * mask).sum(1) / mask.sum(1))


def test_the_folder_has_what_sentence_transformers_reads(minilm_artifact: Artifact) -> None:
    wanted = (
        "model.onnx",
        "modules.json",
        "1_Pooling/config.json",
        "config.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    )
    assert [name for name in wanted if not (minilm_artifact.folder / name).is_file()] == []


def test_it_gives_the_artifacts_embeddings(
    vectors: Tensor, minilm_artifact: Artifact, minilm_spec: ModelSpec
) -> None:
    own = embed(minilm_artifact.load(), minilm_spec)
    assert vectors.shape == own.shape == (len(SENTENCES), 384)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(SENTENCES)))
    assert (vectors * own).sum(1).min() > 0.9999


def test_they_are_near_those_of_the_float_model(vectors: Tensor, minilm_spec: ModelSpec) -> None:
    cosine = (vectors * embed(minilm_spec.module, minilm_spec)).sum(1)
    assert cosine[:3].min() >= 0.99
    assert cosine[3] >= 0.98  # one word: calibration has sentences of three words and more
