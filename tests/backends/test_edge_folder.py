"""Edge artifacts made from a small model: the library, the runner, the example, their refusals."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qcompiler.backends import edge_folder, edge_load, edge_target
from qcompiler.backends.edge_model import Entry, Step, Tensor
from qcompiler.backends.edge_program import check, checksum, program_source, quoted
from qcompiler.backends.edge_target import MACHINES, machine
from qcompiler.errors import InputError, UnsupportedError
from qcompiler.target import Target

NATIVE = "tvm:native"
FOREIGN = ["tvm:aarch64", "tvm:aarch64:i8mm", "tvm:armv7", "tvm:riscv64", "tvm:x86-64-v3"]
FILES = {
    "weights.bin", "model.h", "libmodel.a", "libmodel.so", "model", "CMakeLists.txt", "example.c",
}  # fmt: skip

Make = Callable[[str], Any]


def inputs(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)


def agrees(made: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    # float32 sums of 8 products of numbers of order 1
    np.testing.assert_allclose(y.numpy(), made.expected(x.numpy()), rtol=1e-5, atol=1e-5)


def test_the_folder(edge: Make) -> None:
    made = edge(NATIVE)
    assert {path.name for path in made.folder.iterdir()} == FILES
    assert (made.folder / "model").stat().st_size < 1_500_000
    assert (made.folder / "weights.bin").read_bytes() == made.model.weights


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_it_computes(edge: Make, threads: int) -> None:
    made = edge(NATIVE)
    model = edge_load.load(made.folder, threads)
    for count, rows in enumerate((1, 2, 4, 5, 63, 64, 1), start=1):  # padded up to 1, 4 or 64
        x = inputs(rows, rows)
        y, runs = model(x)
        assert y.shape == (rows, 16)
        agrees(made, x, y)
        assert runs.item() == count  # the state lives from run to run
    assert isinstance(model, edge_load.Native)
    model.reset()
    assert model(x)[1].item() == 1


def test_thread_counts_give_equal_bits(edge: Make) -> None:
    folder = edge(NATIVE).folder
    x = inputs(61)
    first, *others = (edge_load.load(folder, threads)(x)[0] for threads in (1, 2, 3, 7))
    assert all(torch.equal(first, other) for other in others)


def test_python_threads_take_turns(edge: Make) -> None:
    made = edge(NATIVE)
    model = edge_load.load(made.folder, 2)

    def work(seed: int) -> bool:
        x = inputs(seed % 60 + 1, seed)
        agrees(made, x, model(x)[0])
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(200)))
    assert model(inputs(1))[1].item() == 201


def test_a_forked_process_ends(edge: Make) -> None:
    """A child of fork has the model, but none of its threads: it can let it go, and load anew."""
    code = """
import os, sys, torch
from pathlib import Path
from qcompiler.backends.edge_load import load
model = load(Path(sys.argv[1]), 3)
x = torch.ones(64, 8)
y = model(x)[0]
child = os.fork()
if child == 0:
    del model
    good = torch.equal(load(Path(sys.argv[1]), 3)(x)[0], y)
    os._exit(0 if good else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    command = [sys.executable, "-W", "ignore", "-c", code, str(edge(NATIVE).folder)]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0


def test_models_in_one_process_are_apart(edge: Make, tmp_path: Path) -> None:
    """Two models of one library, and a second library with the same names in it."""
    made = edge(NATIVE)
    other = replace(made.model, weights=bytes(len(made.model.weights)))
    edge_folder.write(other, tmp_path)
    first, second = (edge_load.load(made.folder, 2) for _ in range(2))
    zero = edge_load.load(tmp_path, 3)
    x = inputs(33)
    for count in (1, 2, 3):
        assert first(x)[1].item() == count
        assert second(x)[1].item() == count
        assert zero(x)[0].abs().max() == 0
        agrees(made, x, first(x)[0])
        first.reset()  # type: ignore[attr-defined]
        for _ in range(count):
            first(x)


@pytest.mark.parametrize("target", FOREIGN)
def test_other_machines(edge: Make, target: str) -> None:
    """Code for other machines, run by an emulator where this machine cannot."""
    made = edge(target)
    emulator = machine(Target.parse(target)).qemu[0]
    if not machine(Target.parse(target)).here and shutil.which(emulator) is None:
        pytest.skip(f"{emulator} is not installed")
    model = edge_load.load(made.folder, 2)
    assert isinstance(model, edge_load.Native) == machine(Target.parse(target)).here
    for rows in (1, 3, 64):
        x = inputs(rows, rows)
        y, runs = model(x)
        agrees(made, x, y)
        assert runs.item() >= 1
    with pytest.raises(InputError, match="rows=65 fit none"):
        model(inputs(65))
    assert (made.folder / "model").stat().st_size < 1_500_000


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(65, 8), "rows=65 fit none that were compiled: rows=1, rows=4, rows=64"),
        (torch.zeros(3, 7), r"'x' has the shape \(3, 7\), and the model takes \(rows, 8\)"),
        (torch.zeros(8), r"'x' has the shape \(8\)"),
        (torch.zeros(0, 8), r"'x' has the shape \(0, 8\)"),
        (torch.zeros(1, 1, 1, 1, 1, 1, 1, 1, 1), "rank 9"),
        (torch.zeros(3, 8, dtype=torch.int64), "'x' is int64, and the model takes float32"),
        (torch.zeros(3, 8, dtype=torch.complex64), "complex64"),
    ],
)
def test_wrong_inputs(edge: Make, given: torch.Tensor, message: str) -> None:
    model = edge_load.load(edge(NATIVE).folder, 1)
    with pytest.raises(InputError, match=message):
        model(given)
    with pytest.raises(InputError, match="2 inputs given, the model takes 1"):
        model(given, given)
    assert model(inputs(2))[0].shape == (2, 16)  # it is as good as before


def broken(made: Any, folder: Path, change: Callable[[Path], object]) -> Path:
    copy = folder / "copy"
    shutil.copytree(made.folder, copy)
    change(copy)
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "weights.bin").unlink(), "weights.bin is missing"),
        (lambda f: (f / "weights.bin").write_bytes(b""), "has 0 bytes.*weights have 576"),
        (lambda f: (f / "weights.bin").write_bytes(bytes(576)), "checksum differs"),
        (lambda f: swap(f / "weights.bin"), "checksum differs"),
        (lambda f: (f / "libmodel.so").write_bytes(b"no library"), "no library of a machine"),
    ],
)
def test_broken_files(
    edge: Make, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    folder = broken(edge(NATIVE), tmp_path, change)
    with pytest.raises(InputError, match=message):
        edge_load.load(folder, 1)
    if "weights" in message:
        done = run(folder / "model", "--benchmark", 1)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1


def swap(path: Path) -> None:
    """The same words in another order."""
    content = path.read_bytes()
    path.write_bytes(content[8:16] + content[:8] + content[16:])


def test_missing_features_are_named(edge: Make, tmp_path: Path) -> None:
    made = edge(NATIVE)
    edge_folder.write(replace(made.model, features=(*made.model.features, "levitation")), tmp_path)
    done = run(tmp_path / "model", "--benchmark", 1)
    assert done.returncode == 2
    assert "this CPU lacks 'levitation'" in done.stderr


def test_missing_tools_are_named(
    edge: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = edge(NATIVE)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for target in {*MACHINES} - {edge_target.native()}:
        aim = MACHINES[target]
        package = "gcc" if aim.family == edge_target.host_family() else aim.package
        with pytest.raises(UnsupportedError, match=f"apt-get install {package}"):
            edge_folder.write(replace(made.model, target=target), tmp_path)


def test_missing_emulator_is_named(edge: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = edge("tvm:riscv64")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"'qemu-riscv64' was not found.*qemu-user"):
        edge_load.load(made.folder)


def test_a_failing_kernel_is_an_error(edge: Make, tmp_path: Path) -> None:
    """A kernel checks its arguments: here it gets a tensor of the wrong shape."""
    made = edge(NATIVE)
    entry = made.model.entries[0]
    step = replace(entry.steps[1], tensors=(2, 2, 4))
    wrong = replace(entry, steps=(entry.steps[0], step))
    edge_folder.write(replace(made.model, entries=(wrong,)), tmp_path)
    with pytest.raises(InputError, match=r"^bias and ReLU failed: .*finish_1.*expected 2$"):
        edge_load.load(tmp_path, 2)(inputs(1))


def test_sizes_that_may_not_be_padded(edge: Make, tmp_path: Path) -> None:
    edge_folder.write(replace(edge(NATIVE).model, padded=frozenset()), tmp_path)
    model = edge_load.load(tmp_path, 1)
    assert model(inputs(4))[0].shape == (4, 16)
    with pytest.raises(InputError, match="rows=3 fit none"):
        model(inputs(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entries": ()}, "no entries"),
        ({"outputs": ()}, "no outputs"),
        ({"entries": (Entry({}, 0, (), ()),)}, "has no value"),
        ({"entries": (Entry({"rows": 1}, 0, (), ()),)}, "nothing writes output 'y'"),
        (
            {"entries": (Entry({"rows": 1}, 64, (Tensor("arena", 0, "int8", (65,)),), ()),)},
            "outside the arena of 64 bytes",
        ),
        (
            {"entries": (Entry({"rows": 1}, 64, (Tensor("arena", 8, "int8", (8,)),), ()),)},
            "not at a multiple of 64",
        ),
        (
            {"entries": (Entry({"rows": 2}, 64, (Tensor("input", 0, "int8", (8,)),), ()),)},
            "8 bytes, and 'x' has 64",
        ),
    ],
)
def test_models_that_contradict_themselves(
    edge: Make, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check(replace(edge(NATIVE).model, **change))
    broken = edge(NATIVE).model.entries[0]
    broken = replace(broken, steps=(Step("matmul_1", "l", (0, 99)),))
    with pytest.raises(ValueError, match="no such tensor"):
        check(replace(edge(NATIVE).model, entries=(broken,)))


def test_checksum_sees_order_and_tail() -> None:
    words = np.arange(1, 6, dtype="<u8") * np.uint64(0x9E3779B97F4A7C15)
    a = b = 0
    for word in words.tolist():  # as the C code computes it
        a = (a + word) % 2**64
        b = (b + a) % 2**64
    assert checksum(words.tobytes()) == (a, b)
    assert checksum(words[::-1].tobytes())[1] != b
    assert checksum(b"") == (0, 0)
    assert checksum(b"abc") == checksum(b"abc\0")


def test_names_are_data(edge: Make) -> None:
    """Labels and names come from models: nothing in them ends a C string or starts a trigraph."""
    assert quoted('a"b\\n??/é\n') == r'"a\042b\134n\077\077/\303\251\012"'
    assert r"linear \042one\042" in program_source(edge(NATIVE).model)


@pytest.mark.parametrize("target", [NATIVE, "tvm:aarch64"])
def test_example(edge: Make, target: str, tmp_path: Path) -> None:
    """example.c as its user builds it: with warnings, for C99, and as C++ where the header is."""
    made = edge(target)
    aim = machine(Target.parse(target))
    if not aim.here and shutil.which(aim.qemu[0]) is None:
        pytest.skip(f"{aim.qemu[0]} is not installed")
    compiler = "cc" if aim.here else aim.compiler
    if aim.here and shutil.which("c++"):
        cpp = ("-std=c++11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only")
        assert run("c++", *cpp, "-x", "c++", made.folder / "model.h").returncode == 0
    source, library = made.folder / "example.c", made.folder / "libmodel.a"
    built = run(
        compiler, "-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-static", source,
        f"-I{made.folder}", library, "-lm", "-lpthread", "-o", tmp_path / "example",
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    shutil.copy(made.folder / "weights.bin", tmp_path)
    emulator = () if aim.here else aim.qemu
    done = subprocess.run(
        [*emulator, "./example"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    first = made.expected(np.zeros((1, 8)))[0, 0]
    assert done.stdout.startswith("y starts with ")
    assert float(done.stdout.split()[-1]) == pytest.approx(first, abs=1e-5)
    assert len(source.read_text().splitlines()) < 20


def test_cmake(edge: Make, tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    folder = edge(NATIVE).folder
    assert run("cmake", "-S", folder, "-B", tmp_path).returncode == 0
    built = run("cmake", "--build", tmp_path)
    assert built.returncode == 0, built.stderr
    assert run("env", "-C", folder, tmp_path / "example").stdout.startswith("y starts with")


def test_the_library_shows_only_its_interface(edge: Make) -> None:
    """Names of kernels and hooks of two models in one program must not meet."""
    folder = edge(NATIVE).folder
    for command in (("nm", "-g", folder / "libmodel.a"), ("nm", "-D", folder / "libmodel.so")):
        defined = {
            line.split()[-1]
            for line in run(*command).stdout.splitlines()
            if len(line.split()) == 3 and line.split()[1] in "TDBRVW"
        }
        assert "model_run" in defined
        assert all(name.startswith("model_") for name in defined)


def test_python_and_c_agree(edge: Make) -> None:
    """The layouts that ctypes uses are those of model.h."""
    folder = edge(NATIVE).folder
    library = ctypes.CDLL(str(folder / "libmodel.so"))
    assert library.model_version() == edge_load.VERSION
    header = (folder / "model.h").read_text()
    names = header[header.index("typedef enum {") : header.index("} model_dtype;")]
    listed = [word.strip(" ,\n") for word in names.splitlines()[1:] if word.strip()]
    assert listed == [f"MODEL_{name.upper()}" for name in edge_load.DTYPES]
    assert f"#define MODEL_MAX_RANK {edge_load.MAX_RANK}" in header


def test_info(edge: Make) -> None:
    info = json.loads(run(edge(NATIVE).folder / "model", "--info").stdout)
    assert info["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["rows", 8]}]
    assert info["outputs"][1] == {"name": "runs", "dtype": "int64", "shape": [1]}
    assert info["features"].split() == [*edge(NATIVE).model.features]


@pytest.mark.parametrize(
    ("target", "emulator", "lacking"),
    [
        ("tvm:aarch64:i8mm", "qemu-aarch64 -cpu cortex-a76", "i8mm"),
        ("tvm:aarch64:dotprod", "qemu-aarch64 -cpu cortex-a57", "dotprod"),
        ("tvm:aarch64:dotprod", "qemu-aarch64 -cpu neoverse-n1", ""),
        ("tvm:armv7", "qemu-arm -cpu cortex-a9", "vfp4"),
        ("tvm:armv7", "qemu-arm -cpu cortex-a7", ""),
        ("tvm:x86-64-v3", "qemu-x86_64 -cpu Nehalem", "avx"),
        ("tvm:x86-64-v3", "qemu-x86_64 -cpu max", ""),
        ("tvm:x86-64", "qemu-x86_64 -cpu Nehalem", ""),
    ],
)
def test_features_of_real_cpus(edge: Make, target: str, emulator: str, lacking: str) -> None:
    """The check at start on emulated CPUs: it names what is missing, and lets the others run."""
    if shutil.which(emulator.split(maxsplit=1)[0]) is None:
        pytest.skip(f"{emulator.split(maxsplit=1)[0]} is not installed")
    done = run(*emulator.split(), edge(target).folder / "model", "--benchmark", 1)
    if lacking:
        assert done.returncode == 2
        assert f"this CPU lacks '{lacking}'" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
