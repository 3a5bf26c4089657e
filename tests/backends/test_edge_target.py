"""The machines of the `tvm:` targets: complete, known to TVM, and `native` is one of them."""

from __future__ import annotations

import platform

import pytest

from qcompiler.backends import edge_target
from qcompiler.backends.edge_target import MACHINES, machine
from qcompiler.errors import UnsupportedError
from qcompiler.target import Target, known_targets


def test_every_target_has_a_machine() -> None:
    """GPUs are no CPUs: their targets have compute capabilities instead."""
    asked = {text for text in known_targets() if text.startswith("tvm:")}
    gpus = {text for text in asked if text.startswith("tvm:cuda:")}
    assert gpus
    assert asked - gpus == {*MACHINES, "tvm:native", "tvm:native:dynamic"}


def test_native_is_the_richest_entry_that_runs_here() -> None:
    here = machine(Target.parse("tvm:native"))
    assert here.here
    assert here.family == edge_target.host_family()
    others = [entry for entry in MACHINES.values() if entry.here]
    assert len(here.features) == max(len(entry.features) for entry in others)


def test_missing_features_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(edge_target, "cpu_flags", lambda: frozenset({"asimd", "asimddp"}))
    assert edge_target.missing(("neon", "dotprod", "i8mm")) == ["i8mm"]
    assert edge_target.native() == "tvm:aarch64:dotprod"
    monkeypatch.setattr(platform, "machine", lambda: "s390x")
    with pytest.raises(UnsupportedError, match=r"s390x.*name a target"):
        edge_target.native()


def test_other_runtimes_have_none() -> None:
    with pytest.raises(UnsupportedError, match="ort:cpu"):
        machine(Target.parse("ort:cpu"))


@pytest.mark.parametrize("name", MACHINES)
def test_tvm_knows_it(name: str) -> None:
    tvm = pytest.importorskip("tvm", reason="the extra tvm is not installed")
    assert str(tvm.target.Target(MACHINES[name].tvm).kind) == "llvm"
