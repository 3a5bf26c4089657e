"""Studies by several processes and by a Ray cluster: the same results, also when workers die."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from qcompiler.compiler import study
from qcompiler.errors import UnsupportedError
from qcompiler.recipe import load_recipe
from qcompiler.spec import ModelSpec

RECIPE = load_recipe("mixed", {"candidates": "int2:g32:affine,int4:g32"})


def tower() -> ModelSpec:
    torch.manual_seed(0)
    layers = [part for _ in range(5) for part in (nn.Linear(64, 64), nn.Tanh())]
    data = [(torch.randn(8, 64, generator=torch.Generator().manual_seed(i)),) for i in range(6)]
    module = nn.Sequential(*layers)
    return ModelSpec("tower", module, data[0], {"input": {0: "batch"}}, lambda: data)


def measures(found: dict[str, Any]) -> list[Any]:
    return [[o["measures"] for o in unit["options"]] for unit in found["units"]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What one process measures."""
    return measures(study(tower(), recipe=RECIPE, out=tmp_path_factory.mktemp("alone")))


def test_two_processes_measure_the_same_and_a_dead_one_is_replaced(
    alone: list[Any], tmp_path: Path
) -> None:
    """One worker is killed as soon as it is there; torch alone takes it seconds to load."""
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            for child in psutil.Process().children(recursive=True):
                if any("spawn_main" in part for part in child.cmdline()):
                    child.kill()
                    killed.append(child.pid)
                    return
            time.sleep(0.05)

    killer = threading.Thread(target=kill)
    killer.start()
    said: list[str] = []
    found = study(tower(), recipe=RECIPE, out=tmp_path, jobs=2, progress=said.append)
    killer.join()
    assert killed
    assert any("given out again" in line for line in said)
    assert measures(found) == alone


def test_a_cluster_measures_the_same(alone: list[Any], tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'qcompiler[ray]'")
    found = study(tower(), recipe=RECIPE, out=tmp_path, jobs=2, ray="local")
    assert measures(found) == alone


def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"^--ray 127\.0\.0\.1:9: "):
        study(tower(), recipe=RECIPE, out=tmp_path, ray="127.0.0.1:9")
