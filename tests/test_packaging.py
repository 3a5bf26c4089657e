"""The wheel: exactly the tree's modules, under one name, never asking for two runtimes."""

from __future__ import annotations

import email
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FOLDERS = ("passes", "backends", "kernels", "models")
PLATFORMS = [
    ("linux", "x86_64", "onnxruntime-gpu"),
    ("win32", "AMD64", "onnxruntime-gpu"),
    ("linux", "aarch64", "onnxruntime"),
    ("darwin", "arm64", "onnxruntime"),
    ("darwin", "x86_64", "onnxruntime"),
    ("win32", "ARM64", "onnxruntime"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the tree: a build in place leaves files and picks up stale ones."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    for name in ("qcompiler", *FOLDERS):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "tests").mkdir()  # what must not be shipped is there to be found
    (tree / "tests" / "__init__.py").touch()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", *options, str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("qcompiler-*.whl")
    assert path.name.endswith("-py3-none-any.whl")
    return zipfile.ZipFile(path)


def requirements(wheel: zipfile.ZipFile) -> list[Requirement]:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    return [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]


def test_wheel_is_the_tree(wheel: zipfile.ZipFile) -> None:
    tree = {f"qcompiler/{path.name}" for path in (ROOT / "qcompiler").glob("*.py")}
    tree |= {f"qcompiler/{f}/{path.name}" for f in FOLDERS for path in (ROOT / f).glob("*.py")}
    tree |= {"qcompiler/py.typed", "qcompiler/models/smollm2_samples.json"}
    tree |= {f"qcompiler/backends/{path.name}" for path in (ROOT / "backends").glob("*.[ch]")}
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert shipped == tree


def test_one_name_in_site_packages(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert len(tops) == 2
    assert all(top == "qcompiler" or top.startswith("qcompiler-") for top in tops)


def test_licence_and_command(wheel: zipfile.ZipFile) -> None:
    names = {name.split(".dist-info/")[-1]: name for name in wheel.namelist()}
    assert "licenses/LICENSE" in names
    assert b"qcompiler = qcompiler.cli:main" in wheel.read(names["entry_points.txt"])
    assert b"License-Expression: Apache-2.0" in wheel.read(names["METADATA"])


@pytest.mark.parametrize(("system", "machine", "package"), PLATFORMS)
def test_one_onnxruntime(wheel: zipfile.ZipFile, system: str, machine: str, package: str) -> None:
    """Both packages give the module `onnxruntime`: installed together, they break each other."""
    environment = {"sys_platform": system, "platform_machine": machine, "extra": ""}
    asked = [
        requirement.name
        for requirement in requirements(wheel)
        if requirement.name.startswith("onnxruntime")
        and (requirement.marker is None or requirement.marker.evaluate(environment))
    ]
    assert asked == [package]


def test_constraints_pin_what_is_asked_for(wheel: zipfile.ZipFile) -> None:
    """Every requirement has a tested version within its range; on Linux, torch's CPU build."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    pins = [Requirement(line) for line in lines if line]
    by_name = {pin.name.lower(): pin for pin in pins}
    for requirement in requirements(wheel):
        if requirement.name == "qcompiler":
            continue
        assert requirement.name.lower() in by_name, f"{requirement.name}: not in constraints.txt"
        (pin,) = by_name[requirement.name.lower()].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{requirement}, pinned to {pin}"
    linux = {"sys_platform": "linux"}
    torch = [p for p in pins if p.name == "torch" and (not p.marker or p.marker.evaluate(linux))]
    assert [str(pin.specifier) for pin in torch] == ["==2.13.0+cpu"]
