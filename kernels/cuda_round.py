"""Rounding rows to 8 bits on a GPU, each with a range of its own, with the bits of `qc::quantize`.

A quotient is rounded to float32 first and then to the nearest integer or e4m3, half to even, so it
must be the one that IEEE's division gives, which takes ten times as long as a product. With r = 1/s
rounded, q = x · r is less than two units in the last place off, and one Newton step,

    q + (x − q · s) · r      (the bracket without rounding: fused)

gives the quotient itself (Markstein 1990, "Computation of elementary functions on the IBM RISC
System/6000 processor"). Around every number halfway between two integers up to 255 all of float32's
significands as s were tried, with four floats on each side as x. Scales whose remainders would be
denormal or infinite are divided by; so are those that are NaN or infinite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tvm.tirx.script.builder import ir as T

from qcompiler.kernels import code
from qcompiler.kernels.cuda_code import address, call, value
from qcompiler.kernels.cuda_device import DEVICE
from qcompiler.kernels.cuda_units import UNIT, UNIT_BYTES, UNIT_ROWS
from qcompiler.qtype import QType

# 1/s, or 0 where a number must be divided by s.
DEVICE["qc_inverse"] = (
    "float32",
    """__device__ __forceinline__ float qc_inverse(float scale) {
  return scale > 1e-24f && scale < 1e30f ? __frcp_rn(scale) : 0.0f;
}""",
)
# As the reference computes it; what is no number becomes 0.
DEVICE["qc_zero_point"] = (
    "float32",
    """__device__ __forceinline__ float qc_zero_point(
    float low, float scale, float bottom, float top) {
  float zero = rintf(bottom + __fdiv_rn(low, scale));
  return zero == zero ? fminf(fmaxf(zero, bottom), top) : 0.0f;
}""",
)
_QUOTIENTS = """#ifndef QC_QUOTIENTS
#define QC_QUOTIENTS
__device__ __forceinline__ void qc_quotients(
    float* q, const float* x, int count, float scale, float inverse) {
  if (inverse != 0.0f) {
    #pragma unroll
    for (int i = 0; i < count; ++i) {
      q[i] = x[i] * inverse;
      q[i] = fmaf(-fmaf(q[i], scale, -x[i]), inverse, q[i]);
    }
  } else {
    #pragma unroll
    for (int i = 0; i < count; ++i) q[i] = __fdiv_rn(x[i], scale);
  }
}
#endif
"""
# Floats whose low byte is round(x / scale) + zero between two bounds: 1.5·2²³ is added to each.
# `bounded`: the quotients are between them, but for scales that are denormal or no numbers.
_ROUNDED = f"""{_QUOTIENTS}#ifndef QC_ROUNDED
#define QC_ROUNDED
__device__ __forceinline__ void qc_rounded(
    float* q, const float* x, int count, float scale, float inverse, float zero, float low,
    float high, int bounded) {{
  qc_quotients(q, x, count, scale, inverse);
  if (!bounded || inverse == 0.0f) {{
    low -= zero; high -= zero;
    #pragma unroll
    for (int i = 0; i < count; ++i) {{
      if (inverse == 0.0f && q[i] != q[i]) q[i] = -zero;  // no number: 0
      q[i] = fminf(fmaxf(q[i], low), high);
    }}
  }}
  #pragma unroll
  for (int i = 0; i < count; ++i) {{
    q[i] += {code.ROUNDER}f;
    if (zero != 0.0f) q[i] += zero;
  }}
}}
#endif
"""
for _count in (4, 8):
    # As bytes.
    DEVICE[f"qc_quantize{_count}"] = (
        "void",
        f"""{_ROUNDED}__device__ __forceinline__ void qc_quantize{_count}(
    void* to, const float* x, float scale, float inverse, float zero, float low, float high,
    int bounded) {{
  float q[{_count}];
  uint{_count // 4} held;
  qc_rounded(q, x, {_count}, scale, inverse, zero, low, high, bounded);
  #pragma unroll
  for (int i = 0; i < {_count // 4}; ++i) {{
    const float* of = q + 4 * i;
    unsigned first = __byte_perm(__float_as_uint(of[0]), __float_as_uint(of[1]), 0x0040);
    unsigned second = __byte_perm(__float_as_uint(of[2]), __float_as_uint(of[3]), 0x0040);
    ((unsigned*)&held)[i] = __byte_perm(first, second, 0x5410);
  }}
  *(uint{_count // 4}*)to = held;
}}""",
    )
    # As float16: of each four, two here and two there.
    DEVICE[f"qc_quantize{_count}_halves"] = (
        "void",
        f"""#include <cuda_fp16.h>
{_ROUNDED}__device__ __forceinline__ void qc_quantize{_count}_halves(
    void* first, void* second, const float* x, float scale, float inverse, float zero, float low,
    float high, int bounded) {{
  float q[{_count}];
  uint{_count // 4} held[2];
  qc_rounded(q, x, {_count}, scale, inverse, zero, low, high, bounded);
  #pragma unroll
  for (int i = 0; i < {_count}; ++i) q[i] -= {code.ROUNDER}f;
  #pragma unroll
  for (int i = 0; i < {_count // 4}; ++i) {{
    ((half2*)&held[0])[i] = __floats2half2_rn(q[4 * i], q[4 * i + 1]);
    ((half2*)&held[1])[i] = __floats2half2_rn(q[4 * i + 2], q[4 * i + 3]);
  }}
  *(uint{_count // 4}*)first = held[0];
  *(uint{_count // 4}*)second = held[1];
}}""",
    )
    # x / scale as the nearest e4m3, half to even: what is too large becomes 448.
    DEVICE[f"qc_quantize{_count}_e4m3"] = (
        "void",
        f"""{_QUOTIENTS}__device__ __forceinline__ void qc_quantize{_count}_e4m3(
    void* to, const float* x, float scale, float inverse) {{
  float q[{_count}];
  uint{_count // 4} held;
  qc_quotients(q, x, {_count}, scale, inverse);
  #pragma unroll
  for (int i = 0; i < {_count // 2}; ++i)
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
        : "=h"(((unsigned short*)&held)[i]) : "f"(q[2 * i + 1]), "f"(q[2 * i]));
  *(uint{_count // 4}*)to = held;
}}""",
    )


class Range(NamedTuple):
    """Of a row, each float32: its scale and zero point, and what replaces a division by the scale.

    Attributes:
        scale, zero: as they are stored.
        inverse: 1/scale, or 0.
    """

    scale: Any
    zero: Any
    inverse: Any


def range_of(kind: QType, fold: Callable[[Callable[[Any, Any], Any]], Any]) -> Range:
    """A row's range.

    Args:
        kind: of what is stored.
        fold: gives the largest of what step(total, x) makes of the row's numbers, from 0 on.
    """
    bottom, top = code.number(float(kind.qmin), 1), code.number(float(kind.qmax), 1)
    low: Any = None  # of −x
    if kind.symmetric:
        high = fold(lambda total, x: value("qc_larger_magnitude", total, x))
        reach = high / code.number(float(kind.qmax - kind.middle), 1)
    else:
        high = fold(lambda total, x: value("qc_larger", total, x))
        low = fold(lambda total, x: value("qc_larger", total, T.float32(0) - x))
        reach = (high + low) / code.number(float(kind.qmax - kind.qmin), 1)
    reach = T.Bind(reach)
    scale = T.Bind(T.Select(reach == T.float32(0), T.float32(1), reach))
    zero = code.number(float(kind.middle), 1)
    if low is not None:
        zero = T.Bind(value("qc_zero_point", low, scale, bottom, top))
    return Range(scale, zero, T.Bind(value("qc_inverse", scale)))


def place_in_units(row: Any, byte: Any, across: int) -> Any:
    """Where a row's byte lies in units, `across` of them side by side."""
    unit = T.cast(row // UNIT_ROWS, "int64") * across + byte // UNIT_BYTES
    piece = T.bitwise_xor(byte % UNIT_BYTES // 16, row % 8)
    return unit * UNIT + row % UNIT_ROWS * UNIT_BYTES + piece * 16 + byte % 16


def store_quantized(
    units: Any, row: Any, column: Any, across: int, wide: bool, numbers: Any, count: int,
    kind: QType, of: Range,
) -> None:  # fmt: skip
    """Quantize numbers of a row, and store them.

    Args:
        units: where to.
        row, column: of the first.
        across: units side by side.
        wide: as float16.
        numbers: where they are.
        count: of them, 4 or 8; the column is a multiple.
        kind: of what is stored.
        of: the row.
    """
    bottom, top = code.number(float(kind.qmin), 1), code.number(float(kind.qmax), 1)
    name = f"qc_quantize{count}"
    how = of.scale, of.inverse, of.zero, bottom, top, int(kind.symmetric)
    if not wide:
        at = address(units, place_in_units(row, column, across))
        if kind.floating:
            call(f"{name}_e4m3", at, numbers, of.scale, of.inverse)
        else:
            call(name, at, numbers, *how)
        return
    # `widened_columns`: of 16, the n-th four lie at 2n and at 2n + 8.
    byte = T.Bind(column // 16 * 32 + column % 16)
    first, second = (address(units, place_in_units(row, byte + n, across)) for n in (0, 16))
    call(f"{name}_halves", first, second, numbers, *how)
