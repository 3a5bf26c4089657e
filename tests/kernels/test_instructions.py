"""The inner loops for ARM are what they should be: dot products, loads shared, nothing spilled."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qcompiler.kernels import isa as isas
from qcompiler.kernels.assembly import loops
from qcompiler.kernels.isa import Isa


@pytest.fixture(scope="module")
def instructions() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "instructions.py"
    spec = importlib.util.spec_from_file_location("instructions", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["instructions"] = module  # where its dataclass looks for its own names
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("rows", [1, 128])
def test_the_dot_product_is_sdot(instructions: ModuleType, rows: int) -> None:
    text = instructions.assembly("tvm:aarch64:dotprod", isas.DOTPROD, "int8", (rows, 384, 384))
    loop = instructions.inner_loop(text)
    names = {line.split()[0] for line in loop.lines}
    assert "sdot" in names
    assert not names & {"mul", "mla", "smull", "smlal", "smlal2", "sshll"}
    assert loop.macs == 16 * loop.multiplies
    assert loop.stores == 0  # the accumulators stay in registers
    assert loop.loads <= loop.multiplies * (1 if rows == 1 else 0.5)


@pytest.mark.parametrize("rows", [1, 128])
def test_matrix_instructions(instructions: ModuleType, rows: int) -> None:
    """Two rows by two columns: for one row half of it is lost, and no more."""
    text = instructions.assembly("tvm:aarch64:i8mm", isas.I8MM, "int8", (rows, 384, 384))
    loop = instructions.inner_loop(text)
    assert "smmla" in {line.split()[0] for line in loop.lines}
    assert loop.macs == 32 * loop.multiplies
    assert loop.stores == 0
    assert loop.loads <= loop.multiplies * (1.1 if rows == 1 else 0.6)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("isa", "rows", "instruction"),
    [(isas.DOTPROD, 128, "sdot"), (isas.I8MM, 128, "smmla"), (isas.I8MM, 1, "sdot")],
    ids=["dotprod", "i8mm", "i8mm, one row"],
)
def test_few_bits_are_unpacked_in_registers(
    instructions: ModuleType, isa: Isa, rows: int, instruction: str, bits: int
) -> None:
    target = f"tvm:aarch64:{'i8mm' if isa is isas.I8MM else 'dotprod'}"
    text = instructions.assembly(target, isa, f"{bits}-bit × int8", (rows, 384, 384))
    loop = instructions.inner_loop(text)
    names = {line.split()[0] for line in loop.lines}
    assert instruction in names
    assert not names & {"mul", "mla", "smull", "smlal"}


def test_without_it_there_is_none(instructions: ModuleType) -> None:
    text = instructions.assembly("tvm:aarch64", isas.NEON, "int8", (128, 384, 384))
    assert "sdot" not in text
    assert instructions.inner_loop(text).stores == 0


def test_floats_are_fused(instructions: ModuleType) -> None:
    text = instructions.assembly("tvm:aarch64", isas.NEON, "float32", (128, 384, 384))
    loop = instructions.inner_loop(text)
    assert {line.split()[0] for line in loop.lines} >= {"fmla"}
    assert loop.stores == 0


def test_the_innermost_loop_is_found(instructions: ModuleType) -> None:
    text = """
    .LBB0_1:
        mov x1, #0
    .LBB0_2:
        ldr q1, [x2], #16
        sdot v0.4s, v1.16b, v2.4b[0]   // a comment
        subs x1, x1, #1
        b.ne .LBB0_2
        str q0, [x3]
        cbnz x4, .LBB0_1
    """
    loop = instructions.inner_loop(text)
    assert (loop.macs, loop.loads, loop.stores, len(loop.lines)) == (16, 1, 0, 4)
    assert (loop.widest, loop.products, loop.moved("ld"), loop.moved("st")) == ("sdot", 16, 16, 0)
    with pytest.raises(ValueError, match="no loop"):
        instructions.inner_loop("ret")


def test_bytes_and_products_of_a_loop() -> None:
    """What unpacks and scales is no product, and each way of moving registers has its width."""
    (loop,) = loops("""
    .LBB0_2:
        ldp q1, q2, [x2], #32
        ldrb w9, [x3]
        ld1 { v3.4s, v4.4s }, [x5]
        ldr s7, [x4]
        bic v1.16b, v1.16b, v9.16b
        smlal v0.4s, v1.4h, v2.4h
        smlal2 v0.4s, v1.8h, v2.8h
        fmla v5.4s, v6.4s, v0.4s
        stp x8, x9, [x6]
        str q5, [x7]
        cbnz x1, .LBB0_2
    """)
    assert (loop.widest, loop.products, loop.macs) == ("smlal", 8, 12)
    assert loop.moved("ld") == 32 + 1 + 32 + 4
    assert loop.moved("st") == 16 + 16
