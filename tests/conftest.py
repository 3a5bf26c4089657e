"""Fixtures of all tests: golden texts and the evaluation data."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"

Golden = Callable[[str, str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write the golden texts under tests/golden instead of comparing with them",
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """`golden(name, text)` fails with a diff where tests/golden/<name>.txt holds another text."""
    update = request.config.getoption("--update-golden")

    def check(name: str, text: str) -> None:
        __tracebackhide__ = True
        path = GOLDEN / f"{name}.txt"
        text = text.rstrip("\n") + "\n"
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.exists():
            pytest.fail(f"no tests/golden/{name}.txt; run pytest --update-golden and look at it")
        want = path.read_text(encoding="utf-8")
        if text != want:
            lines = difflib.unified_diff(
                want.splitlines(), text.splitlines(), f"golden/{name}.txt", "now", lineterm=""
            )
            diff = "\n".join(lines)
            pytest.fail(f"{diff}\n\nIf this change is meant: pytest --update-golden", pytrace=False)

    return check


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the evaluation data, which lies beside the checkout and not in it."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no ../shared/data beside this checkout: evaluation data is not here")
    return path
