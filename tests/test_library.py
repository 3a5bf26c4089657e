"""A library that is written again where another one was loaded from is the new one."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from qcompiler.library import under_its_own_name


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_library_that_was_written_again(tmp_path: Path) -> None:
    path, loaded = tmp_path / "made.so", []
    for number in (1, 2):
        path.unlink(missing_ok=True)  # as a folder that is compiled again: a new file
        words = ["cc", "-shared", "-x", "c", "-", "-o", str(path)]
        subprocess.run(words, input=f"int number(void) {{ return {number}; }}".encode(), check=True)
        with under_its_own_name(path) as name:
            loaded.append(ctypes.CDLL(str(name)))
        with under_its_own_name(path) as name:
            loaded.append(ctypes.CDLL(str(name)))  # loaded already: the same one
    assert [library.number() for library in loaded] == [1, 1, 2, 2]
    assert loaded[2]._handle == loaded[3]._handle


def test_a_system_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with under_its_own_name(tmp_path / "made.so") as name:
        assert name == tmp_path / "made.so"
    with (
        pytest.raises(OSError, match=r"made\.so"),
        under_its_own_name(tmp_path / "made.so") as name,
    ):
        ctypes.CDLL(str(name))  # errors of the caller are not swallowed
