"""The inner loops for ARM are what they should be: dot products, loads shared, nothing spilled."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qcompiler.kernels import isa as isas
from qcompiler.kernels.assembly import inner_loop, loops
from qcompiler.kernels.cores_arm import A55, A76
from qcompiler.kernels.cores_riscv import U74
from qcompiler.kernels.cores_x86 import ZEN4
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
    loop = inner_loop(text, A76)
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
    loop = inner_loop(text, A76)
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
    loop = inner_loop(text, A76)
    names = {line.split()[0] for line in loop.lines}
    assert instruction in names
    assert not names & {"mul", "mla", "smull", "smlal"}


def test_without_it_there_is_none(instructions: ModuleType) -> None:
    text = instructions.assembly("tvm:aarch64", isas.NEON, "int8", (128, 384, 384))
    assert "sdot" not in text
    assert inner_loop(text, A76).stores == 0


def test_floats_are_fused(instructions: ModuleType) -> None:
    text = instructions.assembly("tvm:aarch64", isas.NEON, "float32", (128, 384, 384))
    loop = inner_loop(text, A76)
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
    loop = inner_loop(text, A76)
    assert (loop.macs, loop.loads, loop.stores, len(loop.lines)) == (16, 1, 0, 4)
    assert (loop.widest, loop.products, loop.reads, loop.writes) == ("sdot", 16, 16, 0)
    with pytest.raises(ValueError, match="no loop"):
        inner_loop("ret", A76)


def test_bytes_and_products_of_a_loop() -> None:
    """What unpacks and scales is no product, and each way of moving registers has its width."""
    (loop,) = loops(
        """
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
        str q5, [sp, #16]              // a register that was short: no data
        cbnz x1, .LBB0_2
    """,
        A76,
    )
    assert (loop.widest, loop.products, loop.macs) == ("smlal", 8, 12)
    assert loop.reads == 32 + 1 + 32 + 4
    assert loop.writes == 16 + 16
    assert (loop.loads, loop.stores) == (4, 3)


def test_loops_for_x86() -> None:
    """By the optimisation guide: a pipe of 256 bits works on a register of 512 for two cycles."""
    (loop,) = loops(
        """
    .LBB2_4:
        vmovdqa64 -64(%r11), %zmm22        # a comment
        vpdpbusd -2716(%r15,%r8){1to16}, %zmm22, %zmm11
        vpdpbusd %zmm22, %zmm23, %zmm12
        vpbroadcastd %r10d, %zmm23
        vpmovsxbw (%r11), %ymm4
        vmovups %zmm3, 128(%rsp)
        vmovups %ymm4, (%rax)
        vpmovdb %zmm5, (%rax,%rcx)
        jb .LBB2_9
        addq $4, %rbp
        jne .LBB2_4
    .LBB2_9:
        retq
    """,
        ZEN4,
    )
    assert (loop.widest, loop.products, loop.multiplies) == ("pdpbusd", 128, 2)
    assert loop.reads == 64 + 4 + 16
    assert loop.writes == 32 + 16
    assert loop.cycles == pytest.approx(2 + 1 + 0.5)  # the stores: two, one and half a cycle
    (products,) = loops(".L1:\nvpmaddubsw %ymm1, %ymm2, %ymm3\nvpmaddwd %ymm3, %ymm4, %ymm5\n"
                        "vfmadd231ps %ymm1, %ymm2, %ymm6\nja .L1\n", ZEN4)  # fmt: skip
    assert [i.macs for i in products.instructions] == [32, 16, 8, 0]
    assert products.cycles == 1.5


def test_loops_for_riscv() -> None:
    """One multiplication, one access to memory a cycle; jumps forward stay inside, calls do not."""
    (loop,) = loops(
        """
    .LBB0_2:
        flw fa3, 0(a3)
        lb a5, 3(a4)
        beqz a5, .LBB0_3
        fmadd.s ft10, fa3, fa2, ft10
    .LBB0_3:
        fmadd.s ft9, fa3, fa1, ft9
        sd a0, 400(sp)
        fsw ft9, 0(a2)
        bne a3, a0, .LBB0_2
    .LBB0_4:
        call fmaf
        bnez a1, .LBB0_4
    """,
        U74,
    )
    assert (loop.widest, loop.products, loop.reads, loop.writes) == ("fmadd.s", 2, 5, 4)
    assert loop.cycles == 4


def test_loops_for_32_bit_arm() -> None:
    """Two vector pipes of 64 bits; one element that is spread over a register is 4 bytes."""
    (loop,) = loops(
        """
    .LBB2_4:
        vld1.32 {d10, d11}, [r1:128]!      @ a comment
        vld1.32 {d8[], d9[]}, [r6:32]!
        ldrsb r9, [r6, -lr]!
        vfma.f32 q12, q4, q5
        vmla.i32 d1, d2, d3
        vst1.32 {d16, d17}, [r7:128]!
        vstmia r2, {d16, d17}
        cmp r5, #24576
        bne .LBB2_4
    """,
        A55,
    )
    assert (loop.widest, loop.products, loop.macs) == ("vfma.f32", 4, 6)
    assert (loop.reads, loop.writes) == (16 + 4 + 1, 16 + 16)
    assert loop.cycles == 4.5  # nine instructions, two a cycle
