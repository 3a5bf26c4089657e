"""Packed weights in a GPU's registers: a fragment of A, 16 rows by 16 columns of float16.

    a[n, k] = float16(float16(scale[n, k's group]) · weight[n, k])

Weights that lie there for products of integers (`Widened`) are taken 64 times as large, so that
steps down to 1e-6 keep float16's precision; the sums are divided by that.
"""

from __future__ import annotations

from typing import Any

from qcompiler.kernels.cuda_code import address, call
from qcompiler.kernels.cuda_device import DEVICE
from qcompiler.kernels.cuda_weights import LIFT, NIBBLE, Weights, Widened

DEVICE |= {
    # Four bytes, each with the four bits of a number of row g and those of row g + 8 above, → eight
    # float16; see `qc_unpack4`. The sign of four bits goes by xor with 8: 1024 + 8 + number.
    "qc_unpack_signed": (
        "void",
        """__device__ __forceinline__ void qc_unpack_signed(void* to, const void* from) {
  unsigned* r = (unsigned*)to;
  unsigned w = *(const unsigned*)from;
  unsigned first = __byte_perm(w, 0, 0x4140), last = __byte_perm(w, 0, 0x4342);
  asm("lop3.b32 %0, %1, 0x000f000f, 0x64086408, 0x6a;" : "=r"(r[0]) : "r"(first));
  asm("lop3.b32 %0, %1, 0x00f000f0, 0x64806480, 0x6a;" : "=r"(r[1]) : "r"(first));
  asm("lop3.b32 %0, %1, 0x000f000f, 0x64086408, 0x6a;" : "=r"(r[2]) : "r"(last));
  asm("lop3.b32 %0, %1, 0x00f000f0, 0x64806480, 0x6a;" : "=r"(r[3]) : "r"(last));
  asm("sub.f16x2 %0, %0, %1;" : "+r"(r[0]) : "r"(0x64086408));
  asm("sub.f16x2 %0, %0, %1;" : "+r"(r[2]) : "r"(0x64086408));
  asm("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(r[1]) : "r"(0x2c002c00), "r"(0xd480d480));
  asm("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(r[3]) : "r"(0x2c002c00), "r"(0xd480d480));
}""",
    ),
    # As `qc_scale_rows`, by float32 scales.
    "qc_scale_rows_of_floats": (
        "void",
        f"""#include <cuda_fp16.h>
__device__ __forceinline__ void qc_scale_rows_of_floats(void* a, const void* scale) {{
  half2* r = (half2*)a;
  float2 s = *(const float2*)scale;
  half2 low = __float2half2_rn(s.x * {LIFT * NIBBLE}.0f);
  half2 high = __float2half2_rn(s.y * {LIFT * NIBBLE}.0f);
  r[0] = __hmul2(r[0], low); r[1] = __hmul2(r[1], high);
  r[2] = __hmul2(r[2], low); r[3] = __hmul2(r[3], high);
}}""",
    ),
}


def unpack(
    form: Weights | Widened, a: Any, held: Any, memory: Any, base: Any, step: Any, lane: Any
) -> None:
    """A fragment of a stage.

    Args:
        form: of the weights.
        a: where it goes: four registers.
        held: packed weights of the lane.
        memory, base: shared memory, and where the tile's stage begins there.
        step: of 16 columns in the stage.
        lane: of the warp.
    """
    wide = isinstance(form, Widened)
    call("qc_unpack_signed" if wide else f"qc_unpack{form.bits}", a, held)
    if form.group:
        pair = (step // (form.group // 16) * 8 + lane // 4) * (8 if wide else 4)
        at = address(memory, base + form.weight_bytes + pair)
        call("qc_scale_rows_of_floats" if wide else "qc_scale_rows", a, at)
