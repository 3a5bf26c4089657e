"""The command line: what it prints, its exit codes, and one clear line for each bad input."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from qcompiler import cli_artifact, compiler, terminal
from qcompiler.artifact import FORMAT, Artifact
from qcompiler.cli import app
from qcompiler.errors import QCompilerError

MANIFEST = Path(__file__).parent / "manifest.json"
COMMANDS = ("compile", "verify", "bench", "run", "inspect", "targets", "recipes", "models")

MODEL = """
import torch
from qcompiler import ModelSpec

class Branch(torch.nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x

linear = torch.nn.Linear(4, 4)
batches = lambda: [(torch.ones(2, 4),)] * 4
not_a_spec = lambda: 3
no_export = lambda: ModelSpec("branch", Branch(), (torch.ones(2, 4),), {}, batches)
wrong_shape = lambda: ModelSpec("shape", linear, (torch.ones(2, 5),), {}, batches)
wrong_dtype = lambda: ModelSpec("dtype", linear, (torch.ones(2, 4).long(),), {}, batches)
nothing = lambda: []
with_nan = lambda: [{"x": torch.full((4, 32), torch.nan)}] * 4
"""

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    def call(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact's folder as far as the command line reads it itself."""
    path = tmp_path / "artifact"
    path.mkdir()
    (path / "manifest.json").write_text(MANIFEST.read_text())
    (path / "program.txt").write_text("graph():\n    return (x,)\n")
    return path


def error_line(result: Result, code: int = 2) -> str:
    """The one line on stderr, without the program's name."""
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.output
    assert lines[0].startswith("qcompiler: ")
    return lines[0].removeprefix("qcompiler: ").removeprefix("error: ")


def raising(error: BaseException) -> Callable[..., Any]:
    def stand_in(*_: object, **__: object) -> Any:
        raise error

    return stand_in


# Help


def test_help_is_light() -> None:
    heavy = {"torch", "numpy", "pydantic", "yaml", "onnx", "onnxruntime", "tvm", "transformers"}
    code = f"import qcompiler.cli, sys; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("command", [(), *((c,) for c in COMMANDS)], ids=" ".join)
def test_help_teaches(run: Run, command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Examples" in result.stdout
    assert f"qcompiler {' '.join(command)}".strip() in result.stdout
    assert "Exit codes" in result.stdout
    assert "130 interrupted" in result.stdout


def test_every_command_is_listed(run: Run) -> None:
    text = run("--help").stdout
    assert all(command in text for command in COMMANDS)


def test_version(run: Run) -> None:
    from qcompiler import __version__

    assert run("--version").stdout == f"qcompiler {__version__}\n"


def test_usage_errors(run: Run) -> None:
    for arguments in (["compile", "tiny-mlp"], ["compyle"], ["bench", "x", "--threads", "none"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.output


# Bad input


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nothere.py:build"], ["no file 'nothere.py'"]),
        (["nothere.pt2"], ["nothere.pt2: no such file"]),
        (["minlm"], ["unknown model 'minlm'", "did you mean 'minilm'?"]),
        (["hf:nothere"], ["nothere"]),
        (["{here}/corrupt.pt2"], ["corrupt.pt2: not a program"]),
        (["{here}/model.py:bild"], ["has no 'bild'"]),
        (["{here}/model.py:not_a_spec"], ["returned a int, not a ModelSpec"]),
        (["tiny-mlp", "--calibration", "nothere.npz"], ["nothere.npz"]),
        (["tiny-mlp", "--calibration", "{here}/empty.npz"], ["empty.npz"]),
        (["tiny-mlp", "--calibration", "{here}/names.npz"], ["names.npz", "the model takes x"]),
        (["tiny-mlp", "--calibration", "{here}/model.py:nothing"], ["model.py:nothing"]),
        (["tiny-mlp", "--recipe", "w8a9"], ["recipe 'w8a9'", "did you mean 'w8a8'?"]),
        (["tiny-mlp", "--recipe", "nothere.yaml"], ["nothere.yaml: no such file"]),
        (["tiny-mlp", "--set", "smoth=1"], ["no key 'smoth'", "did you mean 'smooth'?"]),
        (["tiny-mlp", "--set", "calibration=minmx"], ["minmx", "did you mean 'minmax'?"]),
        (["tiny-mlp", "--set", "smooth"], ["--set smooth: write key=value"]),
        (["tiny-mlp", "--target", "ort:gpu"], ["target 'ort:gpu'", "Known: ort:cpu"]),
        (["tiny-mlp", "--set", "weights=int4:g32"], ["target 'ort:cpu'", "no kernel"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input(run: Run, tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    write_inputs(tmp_path)
    out = tmp_path / "out"
    filled = [argument.replace("{here}", str(tmp_path)) for argument in arguments]
    line = error_line(run("compile", *filled, "--out", out))
    assert all(part in line for part in parts), line
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["{here}/model.py:no_export"], ["model.py:6", "torch.where"]),
        (["{here}/model.py:wrong_shape"], ["check their shapes"]),
        (
            ["{here}/model.py:wrong_dtype"],
            ["Linear does not export", "check their shapes and dtypes"],
        ),
        (["tiny-mlp", "--calibration", "{here}/model.py:with_nan"], ["batch 0", "NaN"]),
        (["tiny-mlp", "--calibration", "{here}/nan.npz"], ["NaN"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_input_that_fails_on_the_way(
    run: Run, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    """What is found out while compiling leaves no folder behind either."""
    test_bad_input(run, tmp_path, arguments, parts)


def write_inputs(folder: Path) -> None:
    (folder / "corrupt.pt2").write_bytes(b"PK no zip file")
    (folder / "model.py").write_text(MODEL.lstrip())
    np.savez(folder / "empty.npz", x=np.zeros((0, 32), np.float32))
    np.savez(folder / "names.npz", y=np.zeros((8, 32), np.float32))
    np.savez(folder / "nan.npz", x=np.full((8, 32), np.nan, np.float32))


def test_output_exists(run: Run, tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    line = error_line(run("compile", "tiny-mlp", "--out", tmp_path))
    assert "exists; give another --out, or --force" in line
    line = error_line(run("compile", "tiny-mlp", "--out", tmp_path, "--force"))
    assert "is no artifact" in line
    assert (tmp_path / "kept.txt").read_text() == "mine"


@pytest.mark.parametrize("command", ["verify", "bench", "inspect"])
@pytest.mark.parametrize(
    ("manifest", "part"),
    [
        ("{", "is corrupt"),
        ("[]", "is corrupt"),
        ('{"format": 1}', "is corrupt"),
        ('{"format": "x"}', "is corrupt"),
        (json.dumps({"format": FORMAT + 1}), "install a newer qcompiler"),
        (None, "no manifest.json there"),
    ],
)
def test_bad_manifest(
    run: Run, tmp_path: Path, command: str, manifest: str | None, part: str
) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    assert part in error_line(run(command, tmp_path))


def test_caches_are_one_row_of_verify() -> None:
    def check(what: str, value: float, ok: bool = True) -> dict[str, Any]:
        return {"what": f"artifact: {what}", "value": value, "bound": 3.0, "ok": ok}

    checks = [
        {"what": "files", "value": 7, "bound": "checksums", "ok": True},
        check("logits, calibration", 30.0),
        check("present.0.key, calibration", 20.0), check("present.0.value, calibration", 10.0),
        check("logits, held-out", 31.0),
        check("present.0.key, held-out", 2.0, False), check("present.0.value, held-out", 12.0),
    ]  # fmt: skip
    assert [(c["what"], c["value"], c["ok"]) for c in cli_artifact._grouped(checks)] == [
        ("files", 7, True),
        ("artifact: logits, calibration", 30.0, True),
        ("artifact: caches, calibration (the worst of 2)", 10.0, True),
        ("artifact: logits, held-out", 31.0, True),
        ("artifact: caches, held-out (the worst of 2)", 2.0, False),
    ]


def test_changed_file(run: Run, folder: Path) -> None:
    assert "model.onnx is missing" in error_line(run("verify", folder), code=1)
    (folder / "model.onnx").write_bytes(b"other")
    assert "checksum differs" in error_line(run("verify", folder), code=1)


def test_unknown_peer(run: Run, folder: Path) -> None:
    line = error_line(run("bench", folder, "--against", "float,ort-dynamc"))
    assert "did you mean 'ort-dynamic'?" in line


def test_ctrl_c(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "capture", raising(KeyboardInterrupt()))
    result = run("compile", "tiny-mlp", "--out", tmp_path / "out")
    assert error_line(result, code=130) == "interrupted; nothing was written"
    assert [*tmp_path.iterdir()] == []


def test_full_disk(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(compiler, "capture", raising(full))
    line = error_line(run("compile", "tiny-mlp", "--out", tmp_path / "out"))
    assert "is full; nothing was written" in line
    assert [*tmp_path.iterdir()] == []
    monkeypatch.setattr(compiler, "compile", raising(full))  # outside of the artifact's folder
    line = error_line(run("compile", "tiny-mlp", "--out", tmp_path / "out"))
    assert line.startswith("the disk is full: nothing was written")


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (MemoryError(), 2, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), 2, "out of memory"),
        (PermissionError(errno.EACCES, "Permission denied", "d"), 2, "d: Permission denied"),
        (QCompilerError("two\nlines"), 2, "two lines"),
        (KeyError("x"), 3, "internal error: KeyError: 'x'; run again with --debug and report it"),
        (AssertionError(), 3, "internal error: AssertionError; run again"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_errors(
    run: Run,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: int,
    part: str,
) -> None:
    monkeypatch.setattr(compiler, "verify", raising(error))
    assert part in error_line(run("verify", folder), code)


def test_debug_shows_the_traceback(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "verify", raising(KeyError("x")))
    result = run("verify", folder, "--debug")
    assert result.exit_code == 3
    assert "Traceback" in result.stderr
    assert "in stand_in" in result.stderr
    assert "internal error" in result.stderr.splitlines()[-1]


def test_a_reader_that_goes_is_no_error() -> None:
    code = "import sys; from qcompiler.cli import main; sys.argv = ['q', 'recipes', 'w8a8']; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait()
    process.stderr.close()


# What the commands do


def test_compile(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def stand_in(model: Any, **options: Any) -> Artifact:
        given.update(options, model=model)
        options["progress"]("capture")
        print("a library talks")
        return Artifact.open(folder)

    monkeypatch.setattr(compiler, "compile", stand_in)
    monkeypatch.setattr(sys, "argv", ["qcompiler", "compile", "tiny-mlp", "--set", "p=3 "])
    arguments = ["compile", "tiny-mlp", "--out", tmp_path / "new", "--set", "keep_float=a,b"]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "fold_norm" in result.stdout
    assert "27.4 dB" in result.stdout
    assert f"wrote {tmp_path / 'new'}" in result.stdout.replace("\n", "")
    assert "a library talks" not in result.stdout
    assert given["model"].name == "tiny-mlp"
    assert str(given["target"]) == "ort:cpu"
    assert given["recipe"].keep_float == ("a", "b")
    assert given["calibration"] is None
    assert given["force"] is False
    assert given["command"] == "qcompiler compile tiny-mlp --set 'p=3 '"
    result = run(*arguments, "--json")
    assert json.loads(result.stdout) == json.loads(MANIFEST.read_text())


def test_compile_a_saved_program(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calibration data of a .pt2 file is read by the names and dtypes of its inputs."""
    given: dict[str, Any] = {}

    def stand_in(model: Any, **options: Any) -> Artifact:
        given.update(options, model=model)
        return Artifact.open(folder)

    size = torch.export.Dim("batch", max=64)
    linear = torch.nn.Linear(32, 4)
    exported = torch.export.export(
        linear, (torch.ones(2, 32),), dynamic_shapes=({0: size},), strict=False
    )
    torch.export.save(exported, tmp_path / "saved.pt2")
    np.savez(tmp_path / "data.npz", input=np.ones((20, 32), np.float32))
    monkeypatch.setattr(compiler, "compile", stand_in)
    arguments = ["--calibration", tmp_path / "data.npz", "--out", tmp_path / "new"]
    result = run("compile", tmp_path / "saved.pt2", *arguments)
    assert result.exit_code == 0, result.output
    assert given["model"].inputs == ("input",)
    assert [len(batch["input"]) for batch in given["calibration"]()] == [8, 8, 4]


@pytest.mark.parametrize("ok", [True, False])
def test_verify(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, ok: bool) -> None:
    checks = [
        {"what": "files", "value": 9, "bound": "checksums", "ok": True},
        {"what": "lowering: y, held-out", "value": 51.26, "bound": 50.0, "ok": ok},
    ]
    monkeypatch.setattr(compiler, "verify", lambda _: {"ok": ok, "checks": checks})
    result = run("verify", folder)
    assert result.exit_code == (0 if ok else 1)
    assert "51.3 dB" in result.stdout
    assert ("BROKEN" in result.stdout) is not ok
    result = run("verify", folder, "--json")
    assert result.exit_code == (0 if ok else 1)
    assert json.loads(result.stdout) == {"ok": ok, "checks": checks}


def test_bench(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    timed = {"ms": 20.31, "ratio": 1.0, "low": 1.0, "high": 1.0, "rounds": 41}
    failed = dict.fromkeys(("ms", "ratio", "low", "high", "size_bytes", "sqnr_db"))
    rows = [
        {"name": "float", "size_bytes": 90871234, "sqnr_db": None, "note": "", **timed},
        {"name": "ort-static", **failed, "rounds": 0, "note": "failed: [oh]"},
    ]

    def stand_in(where: Path, **options: Any) -> dict[str, Any]:
        given.append({"folder": where, **options})
        return {"rows": rows, "threads": 2, "shape": "8×128", "machine": {"cpu": "a CPU"}}

    monkeypatch.setattr(compiler, "bench", stand_in)
    result = run("bench", folder, "--threads", 2, "--against", "float,ort-static")
    assert result.exit_code == 0, result.output
    assert given[0]["against"] == ["float", "ort-static"]
    assert (given[0]["threads"], given[0]["seconds"], given[0]["shape"]) == (2, 3.0, None)
    assert "20.3 ms" in result.stdout
    assert "failed: [oh]" in result.stdout
    assert "8×128, 2 threads; interleaved, median of 41 rounds; a CPU" in result.stdout
    assert json.loads(run("bench", folder, "--json").stdout)["rows"] == rows
    shapes = run("bench", folder, "--json", "--shape", "1x8", "--shape", "2x8")
    assert len(json.loads(shapes.stdout)) == 2
    assert [call["shape"] for call in given[-2:]] == ["1x8", "2x8"]


def test_inspect_an_artifact(run: Run, folder: Path) -> None:
    manifest = json.loads(MANIFEST.read_text())
    assert run("inspect", folder, "--what", "program").stdout == "graph():\n    return (x,)\n"
    plan = run("inspect", folder, "--what", "plan").stdout
    assert all(entry["site"] in plan for entry in manifest["plan"])
    assert all(s["path"] in run("inspect", folder).stdout for s in manifest["sites"])
    assert "fold_norm" in run("inspect", folder, "--what", "history").stdout
    assert "stray Q/DQ nodes: 2" in run("inspect", folder, "--what", "audit").stdout
    parts = json.loads(run("inspect", folder, "--json").stdout)
    assert [*parts] == ["program", "plan", "sites", "history", "audit"]
    assert parts["audit"] == manifest["audit"]
    (folder / "program.txt").unlink()
    assert "program.txt is missing" in error_line(run("inspect", folder))


def test_inspect_a_model(run: Run) -> None:
    result = run("inspect", "tiny-mlp")
    assert result.exit_code == 0
    assert result.stdout.startswith("graph():")
    assert result.stdout.count("aten.linear.default") == 3
    line = error_line(run("inspect", "tiny-mlp", "--what", "plan"))
    assert "is a model and has no plan yet" in line


def test_lists(run: Run) -> None:
    targets = json.loads(run("targets", "--json").stdout)
    assert targets[0]["name"] == "ort:cpu"
    assert "w8a8" in targets[0]["recipes"]
    caching = {row["name"] for row in targets if "w4a8kv8" in row["recipes"]}
    assert {"ort:cpu", "tvm:cuda:sm_90"} <= caching
    assert not {"tvm:native", "tvm:aarch64", "ort:cuda"} & caching  # `compile` refuses it there
    assert all("mixed" in row["recipes"] for row in targets)  # on kernels by token alone too
    described = {row["name"]: row["description"] for row in targets}
    assert described["ort:cpu:arm64"] == "64-bit ARM"  # not with what this CPU has
    recipes = json.loads(run("recipes", "--json").stdout)
    assert {"w8a8", "w4a16"} <= {row["name"] for row in recipes}
    assert recipes[0]["fields"]["weights"] == "int8:channel"
    assert "minilm" in {row["name"] for row in json.loads(run("models", "--json").stdout)}
    for command in ("targets", "recipes", "models"):
        result = run(command)
        assert result.exit_code == 0
        assert all(
            row["name"] in result.stdout for row in json.loads(run(command, "--json").stdout)
        )
    fields = run("recipes", "w8a8").stdout
    assert "smooth" in fields
    assert "SmoothQuant" in fields
    assert "did you mean 'w8a8'?" in error_line(run("recipes", "w8a"))


def test_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A terminal sees the steps; a pipe and --json see nothing."""
    with terminal.steps(quiet=False) as progress:
        progress("capture")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with terminal.steps(quiet=False) as progress:
        for step in ("fold_norm", *(f"step {i}" for i in range(9))):
            progress(step)
        print("a library talks")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "step 8" in captured.err
    assert "a library talks" in captured.err
    with terminal.steps(quiet=True) as progress:
        progress("capture")
    assert capsys.readouterr().err == ""


def test_compile_verify_inspect(run: Run, tmp_path: Path) -> None:
    """The whole way, on a model that takes seconds."""
    out = tmp_path / "mlp"
    result = run("compile", "tiny-mlp", "--out", out)
    assert result.exit_code == 0, result.output
    assert "SQNR to float" in result.stdout
    assert "report.html" in result.stdout
    assert run("verify", out).exit_code == 0
    assert "qc.quantize" in run("inspect", out, "--what", "program").stdout
    assert (out / "report.html").read_text().startswith("<!DOCTYPE html>")
    result = run("bench", out, "--seconds", 0.1, "--shape", "2", "--json")
    assert result.exit_code == 0, result.output
    assert [row["name"] for row in json.loads(result.stdout)["rows"]] == ["float", "qcompiler"]
