"""What quantizes rows on GPUs, compiled for this machine: the bits of the reference executor."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from qcompiler import ops
from qcompiler.kernels import cuda_round
from qcompiler.qtype import QType

# CUDA's own functions that the device functions call, in C.
CUDA = """
#include <math.h>
#include <stdlib.h>
#include <string.h>
#define __device__ static
#define __forceinline__ inline
typedef unsigned uint1;
typedef struct { unsigned x, y; } uint2;
static float __fdiv_rn(float x, float y) { return x / y; }
static float __frcp_rn(float x) { return 1.0f / x; }
static unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
static unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
  unsigned char from[8];
  unsigned made = 0;
  memcpy(from, &x, 4); memcpy(from + 4, &y, 4);
  for (int i = 0; i < 4; ++i) made |= (unsigned)from[s >> 4 * i & 7] << 8 * i;
  return made;
}
"""
# One scale for every four numbers.
ROWS = """
void rows(unsigned char *q, float *zero, const float *x, const float *scale, const float *low,
          long fours, float bottom, float top, int affine, int bounded) {
  for (long i = 0; i < fours; ++i) {
    if (affine) zero[i] = qc_zero_point(low[i], scale[i], bottom, top);
    qc_quantize4(q + 4 * i, x + 4 * i, scale[i], qc_inverse(scale[i]), zero[i], bottom, top,
                 bounded);
    unsigned char two[8], *mine = q + 4 * i / 8 * 8;
    if (i % 2) {
      qc_quantize8(two, x + 4 * i - 4, scale[i], qc_inverse(scale[i]), zero[i], bottom, top,
                 bounded);
      if (memcmp(two, mine, 8)) abort();
    }
  }
}
"""
Quantize = Callable[[Tensor, Tensor, Tensor, QType, bool], tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def quantize(tmp_path_factory: pytest.TempPathFactory) -> Quantize:
    """`quantize(x, scale, low, kind, bounded)`: integers and zero points of rows of 8 · n."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    folder: Path = tmp_path_factory.mktemp("round")
    names = "qc_inverse", "qc_zero_point", "qc_quantize4", "qc_quantize8"
    sources = [cuda_round.DEVICE[name][1] for name in names]
    (folder / "rows.c").write_text("\n".join([CUDA, *sources, ROWS]))
    options = ["-O2", "-ffp-contract=off", "-shared", "-fPIC", "-w"]
    subprocess.run(["cc", *options, "rows.c", "-o", "rows.so", "-lm"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "rows.so"))

    def run(
        x: Tensor, scale: Tensor, low: Tensor, kind: QType, bounded: bool
    ) -> tuple[Tensor, Tensor]:
        fours = x.shape[1] // 4
        q = torch.full(x.shape, 99, dtype=kind.dtype)
        zero = torch.full((len(x), fours), float(kind.middle))
        each = [t.reshape(-1, 1).expand(-1, fours).contiguous() for t in (scale, low)]
        given = [t.contiguous() for t in (q, zero, x, *each)]
        library.rows(
            *(ctypes.c_void_p(t.data_ptr()) for t in given), ctypes.c_long(zero.numel()),
            ctypes.c_float(kind.qmin), ctypes.c_float(kind.qmax), int(not kind.symmetric), bounded,
        )  # fmt: skip
        return given[0], given[1][:, :1]

    return run


@pytest.mark.parametrize("size", [1.0, 1e-20, 1e-25, 1e-36, 1e-42, 1e20, 1e31, 1e36])
def test_quotients_near_halves_are_rounded_as_a_division(quantize: Quantize, size: float) -> None:
    """All floats around each half, for scales with significands of every kind."""
    kind = QType.parse("int8:token")
    bits = torch.arange(-10, 400).clamp(min=0) * 20_977  # up to 2²³
    bits[:10] = (1 << 23) - 1 - torch.arange(10)
    scale = (bits.int() | 0x3F800000).view(torch.float32) * size
    halves = torch.arange(-130, 131, dtype=torch.float64) + 0.5
    near = (halves * scale[:, None].double()).float().contiguous().view(torch.int32)
    x = (near[..., None] + torch.arange(-4, 4)).int().view(torch.float32).flatten(1)
    x = x.where(x.isfinite(), torch.tensor(1.0))
    found, _ = quantize(x, scale, scale, kind, False)
    want = kind.quantize(x, scale[:, None], torch.zeros(len(x), 1, dtype=torch.int8))
    assert torch.equal(found, want)


@pytest.mark.parametrize("text", ["int8:token", "uint8:token", "uint8:token:affine"])
def test_rows(quantize: Quantize, text: str) -> None:
    """Random ones, those whose ends are the same but for the sign, and those of strange numbers."""
    kind = QType.parse(text)
    x = torch.cat([torch.randn(400, 64).half().float(), torch.randn(400, 64)])
    x[::5, 7] = -x[::5].amax(-1)
    x[0] = 0
    x[1] = torch.arange(-64, 64, 2) / 2 - 0.5  # ties
    x[2] *= 1e-42  # denormal
    x[3] *= 1e38
    x[4, 0], x[5, 1], x[6, 2] = float("inf"), -float("inf"), float("nan")
    x[7] = torch.arange(64) * 1.4e-45
    want, scale, zero = ops.dynamic_quantize(x, text)
    low = (-x.amin(-1)).clamp(min=0)
    found, points = quantize(x, scale, low, kind, kind.symmetric)
    assert torch.equal(found, want)
    assert torch.equal(points, zero.float())
