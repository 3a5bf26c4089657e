"""Device functions of the attention over a cache; see `cuda_device`."""

from __future__ import annotations

# Name → (result, source).
ATTENTION: dict[str, tuple[str, str]] = {
    # Over `lanes` neighbours of a warp, a power of two; each gets the result.
    "qc_lanes_sum": (
        "float32",
        """__device__ __forceinline__ float qc_lanes_sum(float x, int lanes) {
  for (int i = lanes / 2; i; i /= 2) x += __shfl_xor_sync(0xffffffff, x, i);
  return x;
}""",
    ),
    # Eight sums over the groups of `lanes` neighbours.
    "qc_sum_groups8": (
        "void",
        """__device__ __forceinline__ void qc_sum_groups8(float* x, int lanes) {
  for (int i = 16; i >= lanes; i /= 2)
    for (int e = 0; e < 8; ++e) x[e] += __shfl_xor_sync(0xffffffff, x[e], i);
}""",
    ),
    "qc_dot8": (
        "void",
        """__device__ __forceinline__ void qc_dot8(float* sum, const float* a, const float* b) {
  for (int i = 0; i < 8; ++i) *sum = fmaf(a[i], b[i], *sum);
}""",
    ),
    # c += factor · x
    "qc_add_scaled8": (
        "void",
        """__device__ __forceinline__ void qc_add_scaled8(float* c, const float* x, float factor) {
  for (int i = 0; i < 8; ++i) c[i] = fmaf(x[i], factor, c[i]);
}""",
    ),
    # Eight numbers of a cache: float16, or integers that are stored with an offset.
    "qc_eight_16": (
        "void",
        """#include <cuda_fp16.h>
__device__ __forceinline__ void qc_eight_16(float* to, const void* from) {
  const half2* pairs = (const half2*)from;
  for (int i = 0; i < 4; ++i) {
    float2 two = __half22float2(pairs[i]);
    to[2 * i] = two.x; to[2 * i + 1] = two.y;
  }
}""",
    ),
    # Their bits under those of 1024 make 1024 + q; see `qc_unpack4`.
    "qc_eight_8": (
        "void",
        """#include <cuda_fp16.h>
__device__ __forceinline__ void qc_eight_8(float* to, const void* from) {
  const unsigned* w = (const unsigned*)from;
  for (int i = 0; i < 4; ++i) {
    unsigned held = __byte_perm(w[i / 2], 0x64646464, i % 2 ? 0x4342 : 0x4140);
    float2 two = __half22float2(*(const half2*)&held);
    to[2 * i] = two.x - 1152; to[2 * i + 1] = two.y - 1152;
  }
}""",
    ),
    "qc_eight_4": (
        "void",
        """#include <cuda_fp16.h>
__device__ __forceinline__ void qc_eight_4(float* to, const void* from) {
  unsigned w = *(const unsigned*)from;
  for (int i = 0; i < 4; ++i) {
    unsigned held = (w >> 4 * i & 0x000f000f) | 0x64006400;
    float2 two = __half22float2(*(const half2*)&held);
    to[i] = two.x - 1032; to[i + 4] = two.y - 1032;
  }
}""",
    ),
    "qc_put_byte": (
        "void",
        """__device__ __forceinline__ void qc_put_byte(void* to, unsigned char x) {
  *(volatile unsigned char*)to = x;
}""",
    ),
    "qc_put_half": (
        "void",
        """#include <cuda_fp16.h>
__device__ __forceinline__ void qc_put_half(void* to, half x) {
  *(volatile unsigned short*)to = __half_as_ushort(x);
}""",
    ),
    "qc_move8": (
        "void",
        """__device__ __forceinline__ void qc_move8(void* to, const void* from) {
  *(int2*)to = *(const int2*)from;
}""",
    ),
    "qc_move4": (
        "void",
        """__device__ __forceinline__ void qc_move4(void* to, const void* from) {
  *(int*)to = *(const int*)from;
}""",
    ),
    # One element of a softmax's parts put together, 16 under way at once; other blocks wrote them,
    # so not from L1.
    "qc_merge_parts": (
        "void",
        """__device__ __forceinline__ void qc_merge_parts(
    float* to, const float* sums, const float* ends, int parts, int size, int element) {
  float top = -3.4e38f, total = 0, sum = 0;
  for (int first = 0; first < parts; first += 16) {
    float m[16], l[16], s[16], most = top;
    #pragma unroll
    for (int i = 0; i < 16; ++i) {
      int at = first + i < parts ? first + i : parts - 1;
      float2 end = __ldcg((const float2*)(ends + 2 * at));
      m[i] = end.x; l[i] = first + i < parts ? end.y : 0;
      s[i] = first + i < parts ? __ldcg(sums + at * size + element) : 0;
    }
    #pragma unroll
    for (int i = 0; i < 16; ++i) most = fmaxf(most, m[i]);
    float old = __expf(top - most);
    total *= old; sum *= old;
    #pragma unroll
    for (int i = 0; i < 16; ++i) {
      float factor = __expf(m[i] - most);
      total = fmaf(factor, l[i], total); sum = fmaf(factor, s[i], sum);
    }
    top = most;
  }
  *to = sum / total;
}""",
    ),
    # Over the lanes of a warp, all of which take part; each gets the result.
    "qc_warp_max": (
        "float32",
        """__device__ __forceinline__ float qc_warp_max(float x) {
  for (int i = 16; i; i /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, i));
  return x;
}""",
    ),
}
