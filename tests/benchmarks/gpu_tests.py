"""The tests marked `gpu`, for `gpu.py`: all at once, since most of their time is compiling."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT = 240  # seconds that a test may take


def run() -> list[dict[str, Any]]:
    """Each test's outcome (passed, failed, skipped), seconds, and why."""
    files = [
        path.relative_to(ROOT) for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text()
    ]  # fmt: skip
    # Of all tests: a folder's conftest.py that skips is an error where the folder is named.
    done = _pytest("-q", "--collect-only")
    lines = done.stdout.splitlines()
    names = [line for line in lines if line.startswith("tests/") and ".py::" in line]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [*pool.map(_one, names)]
    for file in files:
        if any(name.startswith(f"{file}::") for name in names):
            continue
        places = str(file), str(file.parent / "conftest.py")
        told = [line for line in lines if line.startswith(("ERROR", "SKIPPED"))]
        why = next((line for line in told if any(place in line for place in places)), "")
        outcome = "skipped" if why.startswith("SKIPPED") else "failed"
        found.append(_row(str(file), outcome, 0.0, why or (done.stdout + done.stderr)[-1000:]))
    return found


def _one(name: str) -> dict[str, Any]:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        try:
            done = _pytest("-q", f"--junitxml={report}", name)
        except subprocess.TimeoutExpired:
            return _row(name, "failed", float(LIMIT), f"stopped after {LIMIT} seconds")
        seconds = round(time.monotonic() - start, 1)
        case = next(ET.parse(report).iter("testcase"), None) if report.exists() else None
        if case is None:
            return _row(name, "failed", seconds, (done.stdout + done.stderr)[-1000:])
        told = next((x for x in case if x.tag in ("failure", "error", "skipped")), None)
        if told is None:
            return _row(name, "passed", seconds, "")
        outcome = "skipped" if told.tag == "skipped" else "failed"
        return _row(name, outcome, seconds, str(told.get("message", ""))[:1000])


def _pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *arguments],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=LIMIT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def _row(name: str, outcome: str, seconds: float, why: str) -> dict[str, Any]:
    print(f"{name:100} {outcome:8}{seconds:6.1f} s", *([why] if why else []), flush=True)
    return {"name": name, "outcome": outcome, "seconds": seconds, "why": why}
