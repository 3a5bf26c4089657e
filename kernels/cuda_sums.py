"""What a warp of `cuda_skinny` adds up: a few tokens times tiles of 16 rows of the weight.

float16 activations by weights of 4 or 8 bits that are unpacked in registers; int8 or uint8 ones by
int8 weights, e4m3 ones by e4m3 weights; int8 ones by weights of 4 bits in groups,

    sum[m, n] = Σ_g scale[n, g] · Σ_(k in g) x[m, k] · weight[n, k]

with the inner sum exact in int32. A weight's four bits come as the high ones of a byte, 16 times
too large with the sign in its place. Sums begin at the integer whose bits are the float
12582912 = 1.5 · 2^23: read as a float, they are that number plus the sum, below 2^22 in magnitude,
without any conversion.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.kernels.cuda_code import address, call, registers
from qcompiler.kernels.cuda_device import DEVICE
from qcompiler.kernels.cuda_units import UNIT, UNIT_BYTES, UNIT_ROWS, sums_of
from qcompiler.kernels.cuda_weights import Bytes, Form, Nibbles, Weights

DEVICE |= {
    # Sixteen weights of 4 bits → 16 times as large in int8; the order is that of a fragment of A.
    "qc_unpack_bytes": (
        "void",
        """__device__ __forceinline__ void qc_unpack_bytes(void* to, const void* from) {
  unsigned* r = (unsigned*)to;
  const unsigned* w = (const unsigned*)from;
  for (int i = 0; i < 2; ++i) {
    r[2 * i] = w[i] << 4 & 0xf0f0f0f0; r[2 * i + 1] = w[i] & 0xf0f0f0f0;
  }
}""",
    ),
    # c[16 x 8] = bits of 12582912 + a[16 x 32] b[32 x 8]
    "qc_mma_s8_first": (
        "void",
        """__device__ __forceinline__ void qc_mma_s8_first(
    int* c, const void* a_, const void* b_) {
  const unsigned* a = (const unsigned*)a_;
  const unsigned* b = (const unsigned*)b_;
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(0x4b400000));
}""",
    ),
    # c[0..1] += scale[0]·part[0..1], c[2..3] += scale[1]·part[2..3]; parts as above.
    "qc_add_group": (
        "void",
        """__device__ __forceinline__ void qc_add_group(
    float* c, const int* part, const void* scale) {
  float2 s = *(const float2*)scale;
  for (int i = 0; i < 4; ++i)
    c[i] = fmaf(i < 2 ? s.x : s.y, __int_as_float(part[i]) - 12582912.0f, c[i]);
}""",
    ),
}


def whole(tokens: int) -> int:
    """Tokens of fragments of eight."""
    return -(-tokens // 8) * 8


def sums(form: Form, tiles: int, tokens: int, wide: int, lane: Any, memory: Any) -> Any:
    """The sums for a form of weights.

    Args:
        form: of the weights.
        tiles: of 16 rows.
        tokens: at most 64.
        wide: bytes from a tile of a stage to the next in shared memory; tokens follow.
        lane: of the warp.
        memory: shared memory.
    """
    kinds: dict[type, Any] = {Weights: Halves, Bytes: Integers, Nibbles: Groups}
    return kinds[type(form)](form, tiles, tokens, wide, lane, memory)


class Halves:
    """Sums of a warp: float16 activations by weights that are unpacked in registers."""

    dtype = "float32"

    def __init__(
        self, form: Weights, tiles: int, tokens: int, wide: int, lane: Any, memory: Any
    ) -> None:
        self.form, self.tiles, self.tokens, self.wide = form, tiles, tokens, wide
        self.columns = columns = whole(tokens) // 8
        self.lane, self.memory = lane, memory
        self.total = registers(tiles * columns * 4, "float32")
        self.part = registers(tiles * columns * 4, "float32")
        self.held = registers(tiles * 4, "int32")  # 16 bytes of packed weights of each tile
        self.a, self.b = registers(4, "int32"), registers(columns * 4, "int32")

    def clear(self) -> None:
        """Set the sums to zero."""
        _zero(self.total, self.tiles * self.columns * 4, T.float32(0))

    def activation(self, row: Any, count: int, stage: Any, chunk: Any) -> tuple[Any, Any, None]:
        """Whether 16 bytes of x are there, and where; they are swizzled on their way."""
        k = T.Bind(stage * self.form.stage + chunk * 8)
        valid = T.Bind(T.And(k < self.form.depth, row < count))
        start = T.cast(row, "int64") * self.form.depth + k
        return valid, T.Select(valid, start, T.int64(0)), None

    def multiply(self, base: Any) -> None:
        """Add one stage, which lies there in shared memory."""
        form, tiles, columns, lane, memory = (
            self.form, self.tiles, self.columns, self.lane, self.memory,
        )  # fmt: skip
        groups = form.stage // form.group if form.group else 1
        steps = form.stage // 16 // groups  # k16 steps of a group
        words = form.bits // 4  # of a lane for a k16 step
        source = T.Bind(base + tiles * self.wide)
        for step in range(form.stage // 16):
            if step % 2 == 0:  # a load brings the tokens of two steps
                _tokens(self, source, step)
            if step * words % 4 == 0:
                for tile in range(tiles):
                    at = base + tile * self.wide + step * words // 4 * 512 + lane * 16
                    call("qc_move16", address(self.held, tile * 4, 4), address(memory, at))
            into = self.part if form.group else self.total
            if form.group and step % steps == 0:
                _zero(self.part, tiles * columns * 4, T.float32(0))
            for tile in range(tiles):
                held = address(self.held, tile * 4 + step * words % 4, words)
                call(f"qc_unpack{form.bits}", address(self.a, 0, 4), held)
                for column in range(columns):
                    call("qc_mma_f16", address(into, (tile * columns + column) * 4, 4),
                         address(self.a, 0, 4),
                         address(self.b, column * 4 + step % 2 * 2, 2))  # fmt: skip
            if form.group and step % steps == steps - 1:
                for tile in range(tiles):
                    at = base + tile * self.wide + form.weight_bytes
                    at = at + (step // steps * 8 + lane // 4) * 4
                    for column in range(columns):
                        i = (tile * columns + column) * 4
                        call("qc_add_scaled", address(self.total, i, 4), address(self.part, i, 4),
                             address(memory, at))  # fmt: skip


class Integers:
    """Sums of a warp: activations by weights of 8 bits, both as units; integers exact in int32."""

    def __init__(
        self, form: Bytes | Nibbles, tiles: int, tokens: int, wide: int, lane: Any, memory: Any
    ) -> None:
        self.form, self.tiles, self.tokens, self.wide = form, tiles, tokens, wide
        self.columns = columns = whole(tokens) // 8
        self.lane, self.memory, self.dtype = lane, memory, sums_of(form.kind)
        self.total = registers(tiles * columns * 4, self.dtype)
        self.a, self.b = registers(4, "int32"), registers(columns * 4, "int32")

    def clear(self) -> None:
        """Set the sums to zero."""
        _zero(self.total, self.tiles * self.columns * 4, T.Cast(self.dtype, T.int32(0)))

    def activation(self, row: Any, count: int, stage: Any, chunk: Any) -> tuple[Any, Any, Any]:
        """Whether 16 bytes of x are there, and where; units are swizzled already."""
        valid = T.Bind(row < count)
        unit = T.cast(row // UNIT_ROWS, "int64") * self.form.stages + stage
        start = unit * UNIT + row % UNIT_ROWS * UNIT_BYTES + chunk * 16
        return valid, T.Select(valid, start, T.int64(0)), chunk

    def multiply(self, base: Any) -> None:
        """Add one stage, which lies there in shared memory."""
        lane = self.lane
        source = T.Bind(base + self.tiles * self.wide)
        for step in range(UNIT_BYTES // 32):
            if step % 2 == 0:
                _tokens(self, source, step)
            for tile in range(self.tiles):
                # Rows 0-7, 8-15 of the step's first 16 columns, then of its last.
                piece = T.bitwise_xor(step * 2 + lane // 16, lane % 8)
                at = base + tile * self.wide + lane % 16 * UNIT_BYTES + piece * 16
                call("qc_ldmatrix", address(self.a, 0, 4), address(self.memory, at))
                for column in range(self.columns):
                    call(f"qc_mma_{self.form.kind}",
                         address(self.total, (tile * self.columns + column) * 4, 4),
                         address(self.a, 0, 4),
                         address(self.b, column * 4 + step % 2 * 2, 2))  # fmt: skip


class Groups(Integers):
    """Sums of a warp: int8 activations as units by 4-bit weights; float32 beyond a group."""

    form: Nibbles

    def __init__(
        self, form: Nibbles, tiles: int, tokens: int, wide: int, lane: Any, memory: Any
    ) -> None:
        self.form, self.tiles, self.tokens, self.wide = form, tiles, tokens, wide
        self.columns = columns = whole(tokens) // 8
        self.lane, self.memory, self.dtype = lane, memory, "float32"
        self.steps = form.group // 32  # of 32 columns in a group
        self.deep = max(2, self.steps)  # that are multiplied together: a load brings two
        self.total = registers(tiles * columns * 4, "float32")
        self.part = registers(4, "int32")
        self.held = registers(tiles * self.deep * 2, "int32")
        self.a, self.b = (
            registers(tiles * self.deep * 4, "int32"),
            registers(self.deep * 2, "int32"),
        )

    def multiply(self, base: Any) -> None:
        """Add one stage, which lies there in shared memory."""
        lane, memory, deep = self.lane, self.memory, self.deep
        source = T.Bind(base + self.tiles * self.wide)
        for first in range(0, UNIT_BYTES // 32, deep):
            for tile in range(self.tiles):
                for pair in range(deep // 2):
                    at = base + tile * self.wide + (first // 2 + pair) * 512 + lane * 16
                    held = (tile * deep + 2 * pair) * 2
                    call("qc_move16", address(self.held, held, 4), address(memory, at))
                for step in range(deep):
                    n = tile * deep + step
                    call("qc_unpack_bytes", address(self.a, n * 4, 4), address(self.held, n * 2, 2))
            for column in range(self.columns):
                token = T.Bind(T.min(column * 8 + lane % 8, self.tokens - 1))
                for pair in range(deep // 2):
                    chunk = T.bitwise_xor((first + 2 * pair) * 2 + lane // 8, token % 8)
                    call("qc_ldmatrix", address(self.b, pair * 4, 4),
                         address(memory, source + token * UNIT_BYTES + chunk * 16))  # fmt: skip
                for tile in range(self.tiles):
                    for group in range(deep // self.steps):
                        self._group(base, first, group, tile, column)

    def _group(self, base: Any, first: int, group: int, tile: int, column: int) -> None:
        for step in range(group * self.steps, (group + 1) * self.steps):
            name = "qc_mma_s8" if step % self.steps else "qc_mma_s8_first"
            call(name, address(self.part, 0, 4),
                 address(self.a, (tile * self.deep + step) * 4, 4),
                 address(self.b, step * 2, 2))  # fmt: skip
        at = base + tile * self.wide + self.form.weight_bytes
        at = at + ((first // self.steps + group) * 8 + self.lane // 4) * 8
        call("qc_add_group", address(self.total, (tile * self.columns + column) * 4, 4),
             address(self.part, 0, 4), address(self.memory, at))  # fmt: skip


def _tokens(of: Halves | Integers, source: Any, step: int) -> None:
    """Fragments of all tokens for this step and the next: 64 bytes of each."""
    for column in range(of.columns):
        token = T.Bind(T.min(column * 8 + of.lane % 8, of.tokens - 1))
        chunk = T.Bind(T.bitwise_xor(step * 2 + of.lane // 8, token % 8))
        at = source + token * of.form.line + chunk * 16
        call("qc_ldmatrix", address(of.b, column * 4, 4), address(of.memory, at))


def _zero(buffer: Any, size: int, zero: Any) -> None:
    for i in range(size):
        T.buffer_store(buffer, zero, [i])
