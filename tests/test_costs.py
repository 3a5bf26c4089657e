"""Measured costs: kept and used again, scaled to the whole model, refused where nothing runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompiler
from qcompiler import costs
from qcompiler.compiler import study
from qcompiler.errors import UnsupportedError
from qcompiler.mixed_report import study_page
from qcompiler.models import ZOO
from qcompiler.recipe import load_recipe
from qcompiler.study import Option, Unit
from qcompiler.target import Target

CPU = Target.parse("ort:cpu")
FORMATS = ["int4:g32", "int8:channel/uint8:tensor:affine"]


def unit(name: str, shape: tuple[int, int]) -> Unit:
    options = tuple(Option(text, 8, 1) for text in (*FORMATS, "float"))
    return Unit((name,), (name,), shape[0] * shape[1], (shape,), 1.0, options)


def test_every_format_of_a_shape_is_timed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    rows = {"prefill": 8, "decode": 1}
    found = costs.micro(CPU, [(64, 32)], FORMATS, rows, tmp_path, asked.append)
    for text in (*FORMATS, "float"):
        assert set(found[64, 32][text]) == {"prefill", "decode"}
        assert all(0 < ms < 1000 for ms in found[64, 32][text].values())
    assert len(asked) == 2
    assert costs.micro(CPU, [(64, 32)], FORMATS, rows, tmp_path, asked.append) == found
    assert len(asked) == 2
    # Times of another machine or version are not used.
    monkeypatch.setattr(costs, "_key", lambda *_: "another")
    monkeypatch.setattr(costs, "_timed", lambda *_: dict.fromkeys(("float", *FORMATS), 5.0))
    other = costs.micro(CPU, [(64, 32)], FORMATS, rows, tmp_path, asked.append)
    assert other[64, 32]["float"] == {"prefill": 5.0, "decode": 5.0}


def test_latencies_sum_up_to_the_whole_model() -> None:
    """Kernels alone say 4 → 1 and 2 ms; the model in one format gains other amounts."""
    times: dict[Any, Any] = {
        (64, 64): {"float": {"prefill": 4.0}, FORMATS[0]: {"prefill": 2.0},
                   FORMATS[1]: {"prefill": 1.0}},
        (128, 64): {"float": {"prefill": 8.0}, FORMATS[0]: {"prefill": 4.0},
                    FORMATS[1]: {"prefill": 2.0}},
    }  # fmt: skip
    units = [unit("a", (64, 64)), unit("b", (128, 64))]
    plain = costs.with_latency(units, times)
    assert plain[1].option(FORMATS[1]).latency == {"prefill": 2.0}
    whole = {"float": 20.0, FORMATS[0]: 17.0, FORMATS[1]: 9.5}
    scaled = costs.with_latency(units, times, whole)
    for text in FORMATS:
        total = sum(u.option(text).latency["prefill"] for u in scaled)
        base = sum(u.option("float").latency["prefill"] for u in scaled)
        assert total - base == pytest.approx(whole[text] - whole["float"])
    # The larger layer keeps the larger part of the difference.
    gains = [4.0 - scaled[0].option(FORMATS[0]).latency["prefill"],
             8.0 - scaled[1].option(FORMATS[0]).latency["prefill"]]  # fmt: skip
    assert gains[1] == pytest.approx(2 * gains[0])


def test_formats_without_a_time_are_no_options() -> None:
    times: dict[Any, Any] = {(64, 64): {"float": {"prefill": 4.0}, FORMATS[0]: {"prefill": 2.0}}}
    (found,) = costs.with_latency([unit("a", (64, 64))], times)
    assert [o.format for o in found.options] == [FORMATS[0], "float"]


def test_only_this_machine_is_timed(tmp_path: Path) -> None:
    assert costs.here(CPU)
    assert not costs.here(Target.parse("tvm:riscv64"))
    assert not costs.here(Target.parse("torch:cpu"))
    gpu = Target.parse("tvm:cuda:sm_90")
    assert not costs.here(gpu)
    assert not costs.counted(gpu)
    recipe = load_recipe("mixed", {"latency": "0.6x"})
    with pytest.raises(UnsupportedError, match=r"this machine is not tvm:cuda:sm_90"):
        qcompiler.compile(
            ZOO["tiny-mlp"].build(), target="tvm:cuda:sm_90", recipe=recipe, out=tmp_path / "a"
        )


def test_a_budget_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With given times the plan keeps the budget, and loses less than the fastest format."""
    fast = {"float": 1.0, "int4:g32": 0.9, "int8:channel/uint8:tensor:affine": 0.4,
            "int8:channel/uint8:tensor:affine:dynamic": 0.5}  # fmt: skip

    def micro(target: Any, shapes: Any, formats: Any, rows: Any, *_: Any) -> Any:
        assert set(rows) == {"prefill"}
        return {
            shape: {t: {"prefill": v * shape[0] * shape[1]} for t, v in fast.items()}
            for shape in shapes
        }

    def anchors(programs: Any, *_: Any) -> dict[str, float]:
        return {text: 10.0 * fast[text] + 2.0 for text in programs}

    monkeypatch.setattr(costs, "micro", micro)
    monkeypatch.setattr(costs, "anchors", anchors)
    recipe = load_recipe("mixed", {"latency": "0.7x", "rounding": "rtn", "clip": False})
    spec = ZOO["tiny-attention-block"].build()
    artifact = qcompiler.compile(spec, recipe=recipe, out=tmp_path / "a")
    mixed = artifact.manifest["mixed"]
    whole = {text: 10.0 * value + 2.0 for text, value in fast.items()}
    assert mixed["timed"] == whole
    base = sum(_latency(u, "float") for u in mixed["units"])
    chosen = sum(_latency(u, u["format"]) for u in mixed["units"])
    assert (whole["float"] - base + chosen) / whole["float"] <= 0.7 * (1 + 1e-6)
    losses = {p["label"]: p["loss"] for p in mixed["uniform"]}
    assert mixed["chosen"]["loss"] < losses["all int8:channel/uint8:tensor:affine"]
    # A front of time beside that of bits: slower plans lose less, and each is a recipe.
    points = mixed["front_of_time"]
    assert len(points) >= 12
    assert points[0]["time"] == pytest.approx((10.0 * 0.4 + 2.0) / 12.0, rel=0.05)
    assert [p["time"] for p in points] == sorted(p["time"] for p in points)
    assert points[0]["loss"] > 10 * points[-1]["loss"]
    folder = Path(mixed["folder"])
    assert (folder / "front-time.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "points" / "time-03.yaml").is_file()
    assert "share of the float model&#x27;s time" in (tmp_path / "a" / "report.html").read_text()
    for point in mixed["uniform"]:
        text = point["label"].removeprefix("all ")
        total = whole["float"] - base + point["latency"]["prefill"]
        assert total == pytest.approx(whole[text])


def test_instructions_are_counted_for_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget of time for 64-bit ARM: an estimate, and called one wherever it is shown."""
    arm = Target.parse("tvm:aarch64:dotprod")
    monkeypatch.setattr(costs, "here", lambda target: False)  # on an ARM machine as well
    assert costs.counted(arm)
    assert not costs.counted(Target.parse("tvm:x86-64"))  # no fused multiply-add
    monkeypatch.setattr(costs, "_timed", None)  # nothing is timed
    settings = {"latency": "0.6x", "rounding": "rtn", "clip": False}
    recipe = load_recipe("mixed", settings)
    spec = ZOO["tiny-mlp"].build()
    found = study(spec, target=arm, recipe=recipe, out=tmp_path)
    assert "counted, not timed: cycles that a Cortex-A76 would" in found["estimate"]
    assert found["timed"] == {}
    assert any("estimate" in note for note in found["notes"])
    assert not (tmp_path / "costs.json").exists()
    assert "machine" not in (tmp_path / "estimates.json").read_text()
    assert "time_estimate" in (tmp_path / "front.csv").read_text()
    page = study_page(found, "mlp")
    assert "counted, not timed" in page
    assert "float model&#x27;s time" not in page
    for point in found["uniform"]:
        share = sum(
            next(o for o in u["options"] if point["label"] == f"all {o['format']}")["latency"][
                "prefill"
            ]
            for u in found["units"]
        ) / sum(_latency(u, "float") for u in found["units"])
        assert point["time"] == pytest.approx(share)
        assert share < 0.9  # both integer formats, by dot products


@pytest.mark.parametrize(
    ("target", "buckets", "want"),
    [
        ("ort:cpu", None, 24),
        ("tvm:native", None, 32),
        ("tvm:native", {"sequence": [8, 48]}, 48),
        ("tvm:native", {"sequence": [8]}, 24),  # a size that no code is generated for
    ],
)
def test_sizes_are_those_that_run(
    tiny: Callable[[str], Any], target: str, buckets: Any, want: int
) -> None:
    model = tiny("tiny-post-norm-block")
    batch = tuple(torch.zeros(1, 24, *x.shape[2:], dtype=x.dtype) for x in model.batches[0])
    spec = model.spec
    found = costs.sizes_run(
        Target.parse(target), model.normalized, batch, spec.dynamic_shapes, spec.padding_mask,
        buckets,
    )  # fmt: skip
    assert found == {"batch": 1, "sequence": want}


def _latency(unit: dict[str, Any], text: str) -> float:
    (found,) = [o["latency"]["prefill"] for o in unit["options"] if o["format"] == text]
    return float(found)
