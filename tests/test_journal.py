"""An interrupted rounding goes on where it stopped, with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qcompiler.errors import InputError
from qcompiler.journal import Journal, fingerprint
from qcompiler.passes import round_weights as module
from qcompiler.passes.allocate import allocate
from qcompiler.passes.round_weights import round_weights
from qcompiler.plan import Rounded
from qcompiler.recipe import load_recipe
from qcompiler.target import Target


def test_an_interrupted_rounding_continues_with_the_same_bits(
    tmp_path: Path, tiny: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("tiny-gqa-decoder")
    program, batches = model.normalized, model.batches
    plan = allocate(program, load_recipe("w4a16", {"weights": "int4:g16"}), Target.parse("ort:cpu"))
    whole = round_weights(program, plan, batches)
    print_of = fingerprint(program, plan, {"method": "gptq"}, batches)

    real, calls = module.round_weight, []

    def interrupted(*args: Any, **kwargs: Any) -> Rounded:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "round_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        round_weights(program, plan, batches, journal=Journal(tmp_path / "j", print_of))
    monkeypatch.setattr(module, "round_weight", real)
    journal = Journal(tmp_path / "j", print_of)
    resumed = round_weights(program, plan, batches, journal=journal)
    assert journal.taken == 4
    assert resumed.keys() == whole.keys()
    for site, rounded in whole.items():
        for field in ("stored", "weight", "scale", "zero_point"):
            assert torch.equal(getattr(resumed[site], field), getattr(rounded, field)), site


def test_another_fingerprint_is_not_used(tmp_path: Path) -> None:
    q, zero = torch.ones(2, 2, dtype=torch.int8), torch.zeros(2, dtype=torch.int8)
    rounded = Rounded(q, torch.ones(2), zero, damping=0.01, silent=3)
    Journal(tmp_path, "first").put("linear", rounded)
    assert Journal(tmp_path, "second").get("linear") is None
    found = Journal(tmp_path, "first").get("linear")
    assert found is not None
    assert (found.damping, found.silent) == (0.01, 3)


@pytest.mark.parametrize("content", [b"", b"not a file of torch", b"PK\x03\x04"])
def test_a_damaged_file_is_computed_again(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "linear.pt").write_bytes(content)
    assert Journal(tmp_path, "first").get("linear") is None


def test_the_fingerprint_depends_on_all_that_decides(tiny: Callable[[str], Any]) -> None:
    model, other = tiny("tiny-gqa-decoder"), tiny("tiny-mlp")
    recipe = load_recipe("w4a16", {"weights": "int4:g16"})
    plan = allocate(model.normalized, recipe, Target.parse("ort:cpu"))
    wider = allocate(model.normalized, load_recipe("w8"), Target.parse("ort:cpu"))
    prints = {
        fingerprint(model.normalized, plan, {"clip": False}, model.batches),
        fingerprint(model.normalized, plan, {"clip": True}, model.batches),
        fingerprint(model.normalized, wider, {"clip": False}, model.batches),
        fingerprint(model.normalized, plan, {"clip": False}, model.batches[:3]),
        fingerprint(other.normalized, plan, {"clip": False}, model.batches),
    }
    assert len(prints) == 5
    again = fingerprint(model.normalized, plan, {"clip": False}, model.batches)
    assert again in prints


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="the journal's folder"):
        Journal(tmp_path / "file", "first")
