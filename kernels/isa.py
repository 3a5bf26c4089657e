"""What a machine's vector instructions can do, as far as the kernels choose by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.kernels import code


@dataclass(frozen=True)
class Isa:
    """How the integer dot product is done and how many accumulators fit into the registers.

    Attributes:
        name: for reports.
        dot: "vnni" (vpdpbusd on 512 bits), "madd" (vpmaddwd on 16-bit values: exact, where
            vpmaddubsw would saturate), "sdot" (ARM's, signed by signed), "smmla" (ARM's, two rows
            by two columns), "multiply" (plain multiplication).
        vectors: accumulators of 16 lanes that a tile may hold.
        narrow: how bfloat16 numbers are multiplied: "dpbf16" (AVX512-BF16), "bfmmla" (ARM's), or
            not at all.
        fused: whether there is a fused multiply-add, not a function that imitates it.
    """

    name: str
    dot: str
    vectors: int
    narrow: str = ""
    fused: bool = True

    @property
    def depth(self) -> int:
        """Products summed in one step of the integer dot product; weights are packed so."""
        return {"vnni": 4, "sdot": 4, "smmla": 8, "madd": 2, "multiply": 1}[self.dot]

    @property
    def narrow_depth(self) -> int:
        """Products of bfloat16 numbers summed in one step."""
        return {"dpbf16": 2, "bfmmla": 4}[self.narrow]

    @property
    def signed(self) -> bool:
        """Whether activations must be int8 for the dot product (uint8 otherwise)."""
        return self.dot == "sdot"

    @property
    def panel(self) -> int:
        """Output columns that are packed together: a multiple of 16."""
        return 32 if self.vectors >= 16 else 16

    def tile(self, rows: int) -> tuple[int, int]:
        """Rows and panels of the accumulator tile for a product of that many rows."""
        across = self.panel // code.LANES
        most = max(1, self.vectors // across)
        if rows >= most:
            return most, 1
        held = rows + rows % 2 if self.dot == "smmla" else rows  # rows go in pairs there
        return rows, max(1, min(4, most // held))


VNNI = Isa("AVX512-VNNI", "vnni", 16)
VNNI_BF16 = Isa("AVX512-VNNI and BF16", "vnni", 16, "dpbf16")
AVX2 = Isa("AVX2", "madd", 6)
SSE = Isa("SSE", "multiply", 2, fused=False)
NEON = Isa("NEON", "multiply", 5)
DOTPROD = Isa("NEON dotprod", "sdot", 6)
I8MM = Isa("NEON i8mm", "smmla", 6)
I8MM_BF16 = Isa("NEON i8mm and BF16", "smmla", 6, "bfmmla")
ARMV7 = Isa("ARMv7 NEON", "multiply", 2)
SCALAR = Isa("scalar", "multiply", 1)


def dot(isa: Isa, accumulator: Any, index: int, weights: Any, start: Any, word: Any) -> None:
    """accumulator[index … index + 16] += Σ over `isa.depth` of activation × weight.

    Args:
        isa: the machine.
        accumulator: local int32 buffer.
        index: its first lane.
        weights: buffer of packed int8.
        start: of 16 · depth of them, lane by lane.
        word: what `activation_word` gave.
    """
    match isa.dot:
        case "vnni":
            lanes, name = 16, "llvm.x86.avx512.vpdpbusd.512"
        case "sdot":
            lanes, name = 4, "llvm.aarch64.neon.sdot.v4i32.v16i8"
        case "madd":
            for part in range(0, code.LANES, 8):
                wide = code.cast(code.load(weights, start + part * 2, 16), "int16", 16)
                pairs = code.bits(T.broadcast(word, 8), "int16", 16)
                sums = code.intrinsic("llvm.x86.avx2.pmadd.wd", "int32x8", pairs, wide)
                had = code.load(accumulator, index + part, 8)
                code.store(accumulator, index + part, had + sums, 8)
            return
        case _:
            product = code.cast(code.load(weights, start), "int32") * code.spread(word)
            code.store(accumulator, index, code.load(accumulator, index) + product)
            return
    for part in range(0, code.LANES, lanes):
        had = code.load(accumulator, index + part, lanes)
        packed = code.load(weights, start + part * 4, lanes * 4)
        kind = "int8"
        given = code.bits(T.broadcast(word, lanes), kind, lanes * 4)
        operands = (packed, given) if isa.dot == "sdot" else (given, packed)
        total = code.intrinsic(name, f"int32x{lanes}", had, *operands)
        code.store(accumulator, index + part, total, lanes)


def activation_word(isa: Isa, buffer: Any, start: Any, signed: bool) -> Any:
    """`isa.depth` activations from `start`, in the form that `dot` broadcasts; see `zero_shift`.

    Args:
        isa: the machine.
        buffer: int8 or uint8 activations.
        start: of the first one.
        signed: whether they are int8.
    """
    if isa.depth == 4:
        word = code.bits(code.load(buffer, start, 4), "int32", 1)
        if signed != isa.signed:  # the other sign: flip the top bits, which adds or takes 128
            word = T.bitwise_xor(word, T.int32(-0x7F7F7F80))
        return code.bind(word)
    if isa.depth == 2:
        low, high = (T.Cast("int32", buffer[start + i]) for i in range(2))
        return code.bind(
            T.bitwise_or(T.bitwise_and(low, T.int32(0xFFFF)), T.shift_left(high, T.int32(16)))
        )
    return code.bind(T.Cast("int32", code.load(buffer, start, 1)))


def zero_shift(isa: Isa, signed: bool) -> int:
    """What `activation_word` adds to each activation; the zero point must be moved as far."""
    if isa.depth != 4 or signed == isa.signed:
        return 0
    return 128 if signed else -128
