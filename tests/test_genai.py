"""onnxruntime-genai loads a compiled language model unchanged and writes what we write.

It brings its own onnxruntime, so it is installed in an environment of its own, kept in
build/genai-venv for the next run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qcompiler
from qcompiler.artifact import Artifact
from qcompiler.backends import ort_genai
from qcompiler.backends.ort_session import LIBRARY, MODEL
from qcompiler.models import find
from qcompiler.recipe import load_recipe

HOME = Path(__file__).parents[1] / "build" / "genai-venv"
PACKAGE = "onnxruntime-genai==0.18.0"
WRITE = """
import json, sys
import onnxruntime_genai as genai
folder, prompt, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = genai.Model(folder)
tokenizer = genai.Tokenizer(model)
tokens = [int(t) for t in tokenizer.encode(prompt)]
options = genai.GeneratorParams(model)
options.set_search_options(max_length=len(tokens) + count, do_sample=False)
generator = genai.Generator(model, options)
generator.append_tokens(tokens)
written = []
while not generator.is_done():
    generator.generate_next_token()
    written.append(int(generator.get_next_tokens()[0]))
print(json.dumps({"prompt": tokens, "written": written}))
"""


@pytest.fixture(scope="module")
def python() -> str:
    """The interpreter of an environment with onnxruntime-genai."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("there is no pip here to install onnxruntime-genai with")
    interpreter = HOME / ("Scripts" if os.name == "nt" else "bin") / "python"
    stamp = HOME / ".complete"
    wanted = f"{sys.version}\n{PACKAGE}"
    if interpreter.is_file() and stamp.is_file() and stamp.read_text() == wanted:
        return str(interpreter)
    subprocess.run([sys.executable, "-m", "venv", "--clear", HOME], check=True)
    pip = [str(interpreter), "-m", "pip", "--disable-pip-version-check", "--retries", "1"]
    done = subprocess.run(
        [*pip, "install", "--quiet", PACKAGE], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        unreachable = ("NewConnectionError", "No matching distribution", "Could not fetch URL")
        if any(sign in done.stderr for sign in unreachable):
            reason = done.stderr.strip().splitlines()[-1]
            pytest.skip(f"the package index has no {PACKAGE} for us: {reason}")
        pytest.fail(f"pip install {PACKAGE}:\n{done.stderr}")
    stamp.write_text(wanted)
    return str(interpreter)


def check_the_same_tokens(python: str, artifact: Artifact) -> None:
    """What genai writes from the folder as it is, against what we write."""
    prompt, count = "the cat sat", 24
    done = subprocess.run(
        [python, "-c", WRITE, str(artifact.folder), prompt, str(count)],
        capture_output=True,
        text=True,
        check=False,
        cwd=artifact.folder.parent,  # not the folder itself: what it names is found beside it
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    generator = artifact.generator(1)
    assert theirs["prompt"] == generator.tokenizer.encode(prompt)
    ours = generator.generate(prompt, count).tokens
    stop = generator.settings["stop"]
    assert [t for t in theirs["written"] if t not in stop] == list(ours)


def test_it_writes_the_same_tokens(python: str, language_artifact: Artifact) -> None:
    check_the_same_tokens(python, language_artifact)


def test_it_runs_generated_kernels(
    python: str, language_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library of operators lies beside the model, and the configuration names it."""
    pytest.importorskip("tvm", reason="the extra tvm is not installed")
    from qcompiler.backends import edge_ort

    monkeypatch.setattr(edge_ort, "ROWS", (1, 8))  # fewer sizes of code, built faster
    spec = find(f"hf:{language_folder}")
    assert not isinstance(spec, Path)
    recipe = load_recipe("w4a8", {"rounding": "rtn"})
    made = qcompiler.compile(spec, target="ort:cpu+tvm", recipe=recipe, out=tmp_path / "out")
    assert (made.folder / LIBRARY).is_file()
    check_the_same_tokens(python, made)


def test_the_library_of_a_model_is_named(language_artifact: Artifact, tmp_path: Path) -> None:
    shutil.copy(language_artifact.folder / MODEL, tmp_path)
    manifest = language_artifact.manifest
    for content in (None, b"a library"):
        if content is not None:
            (tmp_path / LIBRARY).write_bytes(content)
        path = ort_genai.write(tmp_path, manifest["generation"], manifest["inputs"])
        assert path is not None
        options = json.loads(path.read_text())["model"]["decoder"]["session_options"]
        assert options.get("custom_ops_library") == (LIBRARY if content else None)
