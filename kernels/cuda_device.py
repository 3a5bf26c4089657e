"""Device functions of the CUDA kernels: what TIR has no form for, as a few lines of PTX or C++.

`DEVICE` maps a name to its result's type and its source; `cuda_code.call` uses them. Source: PTX
ISA 8 (cp.async, ldmatrix, mma, griddepcontrol).
"""

from __future__ import annotations


def load_matrices(name: str, change: str = "") -> str:
    """Source of a function that loads four 8 × 8 matrices of 16-bit numbers from shared memory.

    Args:
        name: of the function (to, row); each lane gives the address of one row.
        change: ".trans" for each of them transposed.
    """
    return f"""__device__ __forceinline__ void {name}(void* to, const void* row) {{
  unsigned* r = (unsigned*)to;
  unsigned at = (unsigned)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4{change}.shared.b16 {{%0,%1,%2,%3}}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}}"""


# The larger one; NaN where one is, as in torch.
_LARGER = """#ifndef QC_LARGER
#define QC_LARGER
__device__ __forceinline__ float qc_larger(float x, float y) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(x), "f"(y));
  return larger;
}
#endif
"""
# Name → (result, source). PTX ISA 8: cp.async, ldmatrix, mma, griddepcontrol.
DEVICE: dict[str, tuple[str, str]] = {
    # 16 bytes from global to shared memory, past L1; zeros where `valid` is 0.
    "qc_copy16": (
        "void",
        """__device__ __forceinline__ void qc_copy16(void* to, const void* from, int valid) {
  unsigned at = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(at), "l"(from), "r"(valid ? 16 : 0));
}""",
    ),
    "qc_commit": (
        "void",
        """__device__ __forceinline__ void qc_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}""",
    ),
    # Until at most `left` of this thread's groups of copies are under way.
    "qc_wait": (
        "void",
        """template <int left> __device__ __forceinline__ void qc_wait_for() {
  asm volatile("cp.async.wait_group %0;" :: "n"(left) : "memory");
}
#define qc_wait(left) qc_wait_for<left>()""",
    ),
    # The kernel before may still run until here; the next one may start from here on.
    "qc_after_previous": (
        "void",
        """__device__ __forceinline__ void qc_after_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}""",
    ),
    "qc_let_next": (
        "void",
        """__device__ __forceinline__ void qc_let_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}""",
    ),
    # Four 8 x 8 matrices of 16-bit numbers; each lane gives the address of one row.
    "qc_ldmatrix": ("void", load_matrices("qc_ldmatrix")),
    # c[16 x 8] += a[16 x 16] b[16 x 8], float16 with float32 sums.
    "qc_mma_f16": (
        "void",
        """__device__ __forceinline__ void qc_mma_f16(float* c, const void* a_, const void* b_) {
  const unsigned* a = (const unsigned*)a_;
  const unsigned* b = (const unsigned*)b_;
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}""",
    ),
    # Eight nibbles w + 8 → eight float16 w. 0x6400 is 1024: or-ing a nibble into its low bits gives
    # 1024 + nibble exactly, and into bits 4-7 1024 + 16·nibble (Kim et al. 2022, "Who says
    # elephants can't run", section 3.2). The order is that of a fragment of A: see `pack`.
    "qc_unpack4": (
        "void",
        """__device__ __forceinline__ void qc_unpack4(void* to, const void* from) {
  unsigned* r = (unsigned*)to;
  unsigned w = *(const unsigned*)from, v = w >> 8;
  asm("lop3.b32 %0, %1, 0x000f000f, 0x64006400, 0xea;" : "=r"(r[0]) : "r"(w));
  asm("lop3.b32 %0, %1, 0x00f000f0, 0x64006400, 0xea;" : "=r"(r[1]) : "r"(w));
  asm("lop3.b32 %0, %1, 0x000f000f, 0x64006400, 0xea;" : "=r"(r[2]) : "r"(v));
  asm("lop3.b32 %0, %1, 0x00f000f0, 0x64006400, 0xea;" : "=r"(r[3]) : "r"(v));
  asm("sub.f16x2 %0, %0, %1;" : "+r"(r[0]) : "r"(0x64086408));
  asm("sub.f16x2 %0, %0, %1;" : "+r"(r[2]) : "r"(0x64086408));
  asm("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(r[1]) : "r"(0x2c002c00), "r"(0xd480d480));
  asm("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(r[3]) : "r"(0x2c002c00), "r"(0xd480d480));
}""",
    ),
    # Eight bytes w + 128 → eight float16 w, likewise.
    "qc_unpack8": (
        "void",
        """__device__ __forceinline__ void qc_unpack8(void* to, const void* from) {
  unsigned* r = (unsigned*)to;
  const unsigned* w = (const unsigned*)from;
  r[0] = __byte_perm(w[0], 0x64646464, 0x4140);
  r[1] = __byte_perm(w[0], 0x64646464, 0x4342);
  r[2] = __byte_perm(w[1], 0x64646464, 0x4140);
  r[3] = __byte_perm(w[1], 0x64646464, 0x4342);
  for (int i = 0; i < 4; ++i) asm("sub.f16x2 %0, %0, %1;" : "+r"(r[i]) : "r"(0x64806480));
}""",
    ),
    # c[0..1] += low(scale)·part[0..1], c[2..3] += high(scale)·part[2..3]
    "qc_add_scaled": (
        "void",
        """#include <cuda_fp16.h>
__device__ __forceinline__ void qc_add_scaled(float* c, const float* part, const void* scale) {
  float2 s = __half22float2(*(const half2*)scale);
  c[0] = fmaf(s.x, part[0], c[0]); c[1] = fmaf(s.x, part[1], c[1]);
  c[2] = fmaf(s.y, part[2], c[2]); c[3] = fmaf(s.y, part[3], c[3]);
}""",
    ),
    # Multiply a fragment of A by its rows' scales: low(scale) is that of row g, high of row g + 8.
    "qc_scale_rows": (
        "void",
        """#include <cuda_fp16.h>
__device__ __forceinline__ void qc_scale_rows(void* a, const void* scale) {
  half2* r = (half2*)a;
  half2 s = *(const half2*)scale;
  half2 low = __low2half2(s), high = __high2half2(s);
  r[0] = __hmul2(r[0], low); r[1] = __hmul2(r[1], high);
  r[2] = __hmul2(r[2], low); r[3] = __hmul2(r[3], high);
}""",
    ),
    # Whether this block is the last of `count` to come here, all of whose writes it then sees. The
    # counter is left at 0.
    "qc_is_last": (
        "int32",
        """__device__ __forceinline__ int qc_is_last(int* counter, int count) {
  __shared__ int last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1) == count - 1;
    if (last) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}""",
    ),
    # 16 bytes between registers and shared memory.
    "qc_move16": (
        "void",
        """__device__ __forceinline__ void qc_move16(void* to, const void* from) {
  *(int4*)to = *(const int4*)from;
}""",
    ),
    "qc_add16": (
        "void",
        """__device__ __forceinline__ void qc_add16(float* to, const float* from) {
  float4 v = __ldcg((const float4*)from);
  to[0] += v.x; to[1] += v.y; to[2] += v.z; to[3] += v.w;
}""",
    ),
    # The block's barrier, where TVM is not to add others of its own.
    "qc_sync": ("void", "__device__ __forceinline__ void qc_sync() { __syncthreads(); }"),
    "qc_sync_warp": (
        "void",
        "__device__ __forceinline__ void qc_sync_warp() { __syncwarp(); }",
    ),
    # Eight float16 between memory and float32 registers.
    "qc_load8": (
        "void",
        """#include <cuda_fp16.h>
__device__ __forceinline__ void qc_load8(float* to, const void* from) {
  int4 held = *(const int4*)from;
  const half2* pairs = (const half2*)&held;
  for (int i = 0; i < 4; ++i) {
    float2 two = __half22float2(pairs[i]);
    to[2 * i] = two.x; to[2 * i + 1] = two.y;
  }
}""",
    ),
    "qc_store8": (
        "void",
        """#include <cuda_fp16.h>
__device__ __forceinline__ void qc_store8(void* to, const float* from) {
  int4 held;
  half2* pairs = (half2*)&held;
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2half2_rn(from[2 * i], from[2 * i + 1]);
  *(int4*)to = held;
}""",
    ),
    "qc_larger": ("float32", _LARGER),
    "qc_larger_magnitude": (
        "float32",
        _LARGER
        + """__device__ __forceinline__ float qc_larger_magnitude(float total, float x) {
  return qc_larger(total, fabsf(x));
}""",
    ),
    # Over all threads of a block; each gets the result. `scratch` holds a float for each warp.
    "qc_block_sum": (
        "float32",
        """__device__ __forceinline__ float qc_block_sum(float x, void* scratch_, int warps) {
  volatile float* scratch = (volatile float*)scratch_;
  for (int i = 16; i; i /= 2) x += __shfl_xor_sync(0xffffffff, x, i);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = threadIdx.x % 32 < warps ? scratch[threadIdx.x % 32] : 0;
  for (int i = 16; i; i /= 2) x += __shfl_xor_sync(0xffffffff, x, i);
  __syncthreads();
  return x;
}""",
    ),
    "qc_block_max": (
        "float32",
        _LARGER
        + """__device__ __forceinline__ float qc_block_max(float x, void* scratch_, int warps) {
  volatile float* scratch = (volatile float*)scratch_;
  for (int i = 16; i; i /= 2) x = qc_larger(x, __shfl_xor_sync(0xffffffff, x, i));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = scratch[threadIdx.x % 32 < warps ? threadIdx.x % 32 : 0];
  for (int i = 16; i; i /= 2) x = qc_larger(x, __shfl_xor_sync(0xffffffff, x, i));
  __syncthreads();
  return x;
}""",
    ),
    # A float in shared memory; as calls, so that TVM adds no barriers of its own.
    "qc_get": (
        "float32",
        """__device__ __forceinline__ float qc_get(const void* from) {
  return *(const volatile float*)from;
}""",
    ),
    "qc_put": (
        "void",
        """__device__ __forceinline__ void qc_put(void* to, float x) {
  *(volatile float*)to = x;
}""",
    ),
    "qc_warp_sum": (
        "float32",
        """__device__ __forceinline__ float qc_warp_sum(float x) {
  for (int i = 16; i; i /= 2) x += __shfl_xor_sync(0xffffffff, x, i);
  return x;
}""",
    ),
}
# c[16 x 8] += a[16 x 32] b[32 x 8]: int8 by int8 or uint8 with int32 sums, e4m3 with float32 ones.
for _kind, _a, _c, _type, _held in (
    ("s8", "s8", "s32", "int", "r"), ("u8", "s8", "s32", "int", "r"),
    ("e4m3", "e4m3", "f32", "float", "f"),
):  # fmt: skip
    DEVICE[f"qc_mma_{_kind}"] = (
        "void",
        f"""__device__ __forceinline__ void qc_mma_{_kind}(
    {_type}* c, const void* a_, const void* b_) {{
  const unsigned* a = (const unsigned*)a_;
  const unsigned* b = (const unsigned*)b_;
  asm("mma.sync.aligned.m16n8k32.row.col.{_c}.{_a}.{_kind}.{_c} "
      "{{%0,%1,%2,%3}}, {{%4,%5,%6,%7}}, {{%8,%9}}, {{%0,%1,%2,%3}};"
      : "+{_held}"(c[0]), "+{_held}"(c[1]), "+{_held}"(c[2]), "+{_held}"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}}""",
    )
