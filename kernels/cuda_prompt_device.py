"""Device functions of the attention of many queries; see `cuda_device`."""

from __future__ import annotations

from qcompiler.kernels.cuda_device import load_matrices

NEVER = -1.0e30  # a masked score; finite, so that rows that saw nothing as yet stay numbers

# Name → (result, source).
PROMPT: dict[str, tuple[str, str]] = {
    # As `qc_ldmatrix`, each matrix transposed.
    "qc_ldmatrix_t": ("void", load_matrices("qc_ldmatrix_t", ".trans")),
    # Scores of 16 queries by 8 · columns keys: none of keys after a query's last, nor of those
    # that its window has passed. `key`, `last`: of this lane's first score.
    "qc_mask_scores": (
        "void",
        f"""template <int columns> __device__ __forceinline__ void qc_mask_of(
    float* s, int key, int last, int window) {{
  #pragma unroll
  for (int i = 0; i < 4 * columns; ++i) {{
    int k = key + i / 4 * 8 + i % 2, end = last + i / 2 % 2 * 8;
    if (k > end || k <= end - window) s[i] = {NEVER}f;
  }}
}}
#define qc_mask_scores(s, key, last, window, columns) qc_mask_of<columns>(s, key, last, window)""",
    ),
    # Scores s → exp2((s − m) · scale), m the largest so far (0 where all were masked, unless
    # `apart`: with the difference rounded first, all are 1 then); `factor` is what the sums so far
    # are multiplied with. Two rows of each lane, which four lanes share.
    "qc_soften": (
        "void",
        """__device__ __forceinline__ float qc_power2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
template <int columns, int apart> __device__ __forceinline__ void qc_soften_of(
    float* s, float* top, float* sum, float* factor, float scale) {
  #pragma unroll
  for (int h = 0; h < 2; ++h) {
    float m = top[h];
    #pragma unroll
    for (int j = 0; j < columns; ++j) m = fmaxf(m, fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
    m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 1));
    m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 2));
    float least = m < -1e29f ? 0 : m * scale, total = 0;
    factor[h] = qc_power2((top[h] - m) * scale);
    #pragma unroll
    for (int j = 0; j < columns; ++j)
      #pragma unroll
      for (int i = 2 * h; i < 2 * h + 2; ++i) {
        float x = s[4 * j + i];
        float p = qc_power2(apart ? (x - m) * scale : fmaf(x, scale, -least));
        s[4 * j + i] = p;
        total += p;
      }
    sum[h] = fmaf(sum[h], factor[h], total);
    top[h] = m;
  }
}
#define qc_soften(s, top, sum, factor, scale, columns, apart) \\
  qc_soften_of<columns, apart>(s, top, sum, factor, scale)""",
    ),
    # Multiply a lane's two rows with their factors.
    "qc_scale_sums": (
        "void",
        """template <int count> __device__ __forceinline__ void qc_scale_sums_of(
    float* c, const float* factor) {
  #pragma unroll
  for (int i = 0; i < count; ++i) c[i] *= factor[i / 2 % 2];
}
#define qc_scale_sums(c, factor, count) qc_scale_sums_of<count>(c, factor)""",
    ),
    # Sums of a product → float16 as the next product's fragments of A.
    "qc_to_halves": (
        "void",
        """#include <cuda_fp16.h>
template <int count> __device__ __forceinline__ void qc_to_halves_of(void* to, const float* s) {
  half2* pairs = (half2*)to;
  #pragma unroll
  for (int i = 0; i < count; ++i) pairs[i] = __floats2half2_rn(s[2 * i], s[2 * i + 1]);
}
#define qc_to_halves(to, s, count) qc_to_halves_of<count>(to, s)""",
    ),
    # 8 bytes of a cache's integers, stored with an offset, → float16; see `qc_unpack4`.
    "qc_halves_of_8": (
        "void",
        """#include <cuda_fp16.h>
__device__ __forceinline__ void qc_halves_of_8(void* to, const void* from) {
  int2 held = *(const int2*)from;
  int4 out;
  half2* pairs = (half2*)&out;
  #pragma unroll
  for (int i = 0; i < 4; ++i) {
    unsigned two = __byte_perm(i < 2 ? held.x : held.y, 0x64646464, i % 2 ? 0x4342 : 0x4140);
    pairs[i] = __hsub2(*(const half2*)&two, __float2half2_rn(1152));
  }
  *(int4*)to = out;
}""",
    ),
    "qc_halves_of_4": (
        "void",
        """#include <cuda_fp16.h>
__device__ __forceinline__ void qc_halves_of_4(void* to, const void* from) {
  int2 held = *(const int2*)from;
  int4 out[2];
  half2* pairs = (half2*)out;
  #pragma unroll
  for (int i = 0; i < 8; ++i) {
    unsigned v = (unsigned)(i < 4 ? held.x : held.y) >> i % 4 * 8;
    unsigned two = (v & 15) | (v & 0xf0) << 12 | 0x64006400;
    pairs[i] = __hsub2(*(const half2*)&two, __float2half2_rn(1032));
  }
  ((int4*)to)[0] = out[0]; ((int4*)to)[1] = out[1];
}""",
    ),
    # 8 bytes from global to shared memory; zeros where `valid` is 0.
    "qc_copy8": (
        "void",
        """__device__ __forceinline__ void qc_copy8(void* to, const void* from, int valid) {
  unsigned at = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
               :: "r"(at), "l"(from), "r"(valid ? 8 : 0));
}""",
    ),
    # 1 / a row's sum over the four lanes that share it.
    "qc_share_sums": (
        "void",
        """__device__ __forceinline__ void qc_share_sums(float* sum) {
  for (int h = 0; h < 2; ++h) {
    sum[h] += __shfl_xor_sync(0xffffffff, sum[h], 1);
    sum[h] = 1 / (sum[h] + __shfl_xor_sync(0xffffffff, sum[h], 2));
  }
}""",
    ),
}
