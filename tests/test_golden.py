"""The golden fixture itself: it writes only when told to, and a missing or different text fails."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BODY = "def test_text(golden):\n    golden('folder/name', 'one\\ntwo')\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    tests = tmp_path / "tests"
    tests.mkdir()
    shutil.copy(Path(__file__).with_name("conftest.py"), tests / "conftest.py")
    (tests / "test_one.py").write_text(BODY)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    return tmp_path


def run(project: Path, *options: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_golden(project: Path) -> None:
    path = project / "tests" / "golden" / "folder" / "name.txt"

    code, output = run(project)
    assert code == 1
    assert "no tests/golden/folder/name.txt" in output
    assert not path.exists()

    assert run(project, "--update-golden")[0] == 0
    assert path.read_text() == "one\ntwo\n"
    assert run(project)[0] == 0

    path.write_text("one\nthree\n")
    code, output = run(project)
    assert code == 1
    assert "-three" in output
    assert "+two" in output
    assert path.read_text() == "one\nthree\n"
