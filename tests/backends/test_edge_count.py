"""Cycles counted from generated code: they follow the sizes, the formats and the bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from qcompiler.backends import edge_count
from qcompiler.backends.edge import choose_isa
from qcompiler.backends.edge_calls import Calls
from qcompiler.backends.edge_group import Constants
from qcompiler.backends.edge_target import machine
from qcompiler.backends.edge_trace import trace
from qcompiler.costs import in_format
from qcompiler.passes.normalize import normalize
from qcompiler.program import capture
from qcompiler.target import Target

DOT, MATRIX, NEON = (
    Target.parse(text) for text in ("tvm:aarch64:dotprod", "tvm:aarch64:i8mm", "tvm:aarch64")
)
INT8, INT4 = "int8:channel/int8:token", "int4:g32/int8:token"


def cycles(
    target: Target, rows: int, text: str = "float", outputs: int = 192, inputs: int = 256
) -> float:
    """Of one linear."""
    program = normalize(capture(nn.Linear(inputs, outputs), (torch.randn(rows, inputs),)))
    if text != "float":
        made = in_format(program, text, target)
        assert made is not None
        program = made
    return edge_count.cycles(program, target, {program.inputs[0]: [rows, inputs]})


def test_products_run_at_most_at_what_the_core_can() -> None:
    """A Cortex-A76 makes two vector operations a cycle: of 4, 16 and 32 products each.

    Quantizing the input is counted as well, half of the time at 192 outputs with SMMLA.
    """
    macs = 64 * 192 * 256
    found = {
        "fmla": macs / cycles(NEON, 64),
        "sdot": macs / cycles(DOT, 64, INT8),
        "smmla": macs / cycles(MATRIX, 64, INT8),
    }
    assert 7 < found["fmla"] <= 8
    assert 20 < found["sdot"] <= 32
    assert 24 < found["smmla"] <= 64


def test_twice_the_outputs_take_twice_the_cycles() -> None:
    assert cycles(DOT, 64, outputs=384) == pytest.approx(2 * cycles(DOT, 64), rel=0.01)


def test_one_row_waits_for_its_weights() -> None:
    """Bytes of the weights at 4 a cycle: 4 bits are faster for one row, 8 for many."""
    assert cycles(DOT, 1) >= 192 * 256 * 4 / 4
    assert cycles(DOT, 1, INT4) < cycles(DOT, 1, INT8) < cycles(DOT, 1)
    assert cycles(DOT, 64, INT8) < cycles(DOT, 64, INT4) < cycles(DOT, 64)


def test_what_a_row_is_quantized_from_is_not_written() -> None:
    """Its cost follows the integers, a quarter of the bytes of the numbers they are made of."""
    program = normalize(capture(nn.Linear(256, 192), (torch.randn(64, 256),)))
    made = in_format(program, INT8, DOT)
    assert made is not None
    calls = Calls(
        trace(made, {made.inputs[0]: [64, 256]}), choose_isa(machine(DOT)), Constants()
    ).calls
    (rows,) = [call for call in calls if call.kind == "quantize_rows"]
    assert sorted(storage.size for storage in rows.writes) == [64, 64 * 256]
    assert [s.dtype for s in rows.writes] == [torch.int8, torch.float32]


def test_single_weights_beside_the_grid_are_counted() -> None:
    plain, kept = (cycles(DOT, 64, text) for text in (INT4, "int4:g32~4/int8:token"))
    assert kept > plain + 64 * 192 * 4 / 8


def test_what_is_only_read_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, 32 bytes a cycle: a row's smallest and largest number leave loops in registers."""
    found, count = [], edge_count._cycles

    def kept(call: Any, where: Any) -> float:
        if call.key[0] == "range":
            found.append(count(call, where))
        return count(call, where)

    monkeypatch.setattr(edge_count, "_cycles", kept)
    cycles(DOT, 64, "int8:channel/uint8:token:affine", inputs=2048)
    assert len(found) == 2
    assert min(found) >= 64 * 2048 * 4 / 32


def test_what_is_counted() -> None:
    for text in ("tvm:aarch64", "tvm:armv7", "tvm:riscv64", "tvm:x86-64-v3"):
        assert edge_count.countable(Target.parse(text))
    for text in ("tvm:x86-64", "ort:cpu:arm64", "tvm:cuda:sm_90", "tvm:native:dynamic"):
        assert not edge_count.countable(Target.parse(text))


@pytest.mark.parametrize(
    ("text", "floats", "integers"),
    [("tvm:x86-64:avx512vnni", 16, 64), ("tvm:x86-64-v3", 16, 32), ("tvm:armv7", 4, 4),
     ("tvm:riscv64", 1, 1)],
)  # fmt: skip
def test_other_cores_run_at_most_at_their_peak(text: str, floats: int, integers: int) -> None:
    """Products a cycle: Zen 4's two pipes of 256 bits, a Cortex-A55's of 64, one of a U74."""
    target = Target.parse(text)
    macs = 64 * 192 * 256
    assert 0.75 * floats < macs / cycles(target, 64) <= floats
    assert 0.25 * integers < macs / cycles(target, 64, INT8) <= integers
