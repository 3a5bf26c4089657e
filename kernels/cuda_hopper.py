"""Hopper's own instructions (sm_90a): warpgroup products, bulk copies, barriers in shared memory.

A block is one warpgroup (four warps) that keeps a ring of stages filled by bulk copies, and others
that multiply. Operands are units (`cuda_units`), so that a stage is a few contiguous copies and no
tensor map is needed.

Source: PTX ISA 8.0, wgmma and cp.async.bulk.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.kernels.cuda_code import call
from qcompiler.kernels.cuda_device import DEVICE

GROUP = 128  # threads of a warpgroup

DEVICE["qc_barrier_init"] = (
    "void",
    """__device__ __forceinline__ void qc_barrier_init(void* barrier, int count) {
  unsigned at = (unsigned)__cvta_generic_to_shared(barrier);
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(at), "r"(count) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}""",
)
DEVICE["qc_barrier_expect"] = (
    "void",
    """__device__ __forceinline__ void qc_barrier_expect(void* barrier, int bytes) {
  unsigned at = (unsigned)__cvta_generic_to_shared(barrier);
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"
               :: "r"(at), "r"(bytes) : "memory");
}""",
)
DEVICE["qc_barrier_arrive"] = (
    "void",
    """__device__ __forceinline__ void qc_barrier_arrive(void* barrier) {
  unsigned at = (unsigned)__cvta_generic_to_shared(barrier);
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" :: "r"(at) : "memory");
}""",
)
# A warp has read what its lanes were to read. One arrival is enough after the warp's own barrier,
# which racecheck does not follow: compiled for it, each lane arrives.
_LANES = """#ifndef QC_ARRIVE
#ifdef QC_EACH_LANE
#define QC_ARRIVE 32
#else
#define QC_ARRIVE 1
#endif
#endif
"""
DEVICE["qc_barrier_init_warps"] = (
    "void",
    _LANES
    + DEVICE["qc_barrier_init"][1].replace("qc_barrier_init(", "qc_barrier_init_warps(")
    .replace('"r"(count)', '"r"(count * QC_ARRIVE)'),
)  # fmt: skip
DEVICE["qc_barrier_arrive_warp"] = (
    "void",
    _LANES
    + """__device__ __forceinline__ void qc_barrier_arrive_warp(void* barrier, int lane) {
  unsigned at = (unsigned)__cvta_generic_to_shared(barrier);
  __syncwarp();
  if (lane < QC_ARRIVE) asm volatile("mbarrier.arrive.shared.b64 _, [%0];" :: "r"(at) : "memory");
}""",
)
DEVICE["qc_barrier_wait"] = (
    "void",
    """__device__ __forceinline__ void qc_barrier_wait(void* barrier, int parity) {
  unsigned at = (unsigned)__cvta_generic_to_shared(barrier);
  asm volatile("{ .reg .pred p;\\n"
               "again: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\\n"
               "@p bra done;\\n bra again;\\n done: }" :: "r"(at), "r"(parity) : "memory");
}""",
)
# Bytes from global to shared memory, counted by a barrier; multiples of 16, addresses too.
DEVICE["qc_bulk_copy"] = (
    "void",
    """__device__ __forceinline__ void qc_bulk_copy(
    void* to, const void* from, int bytes, void* barrier) {
  unsigned at = (unsigned)__cvta_generic_to_shared(to);
  unsigned count = (unsigned)__cvta_generic_to_shared(barrier);
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1], %2, [%3];" :: "r"(at), "l"(from), "r"(bytes), "r"(count) : "memory");
}""",
)
# Flags in global memory: what was written before is seen by who waits.
DEVICE["qc_flag_set"] = (
    "void",
    """__device__ __forceinline__ void qc_flag_set(int* flag) {
  __threadfence();
  asm volatile("st.release.gpu.global.s32 [%0], 1;" :: "l"(flag) : "memory");
}""",
)
DEVICE["qc_flag_clear"] = (
    "void",
    """__device__ __forceinline__ void qc_flag_clear(int* flag) { *(volatile int*)flag = 0; }""",
)
DEVICE["qc_flag_wait"] = (
    "void",
    """__device__ __forceinline__ void qc_flag_wait(const int* flag) {
  int found;
  do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(found) : "l"(flag) : "memory");
  while (!found);
}""",
)
MAP_BYTES = 128  # of a tensor map: where a matrix lies and how a tile of it is to be stored
# A tile from (row, column) on, counted by a barrier; zeros beyond the matrix. The map is one of
# the kernel's parameters (`CudaKernel.maps`).
DEVICE["qc_tile_copy"] = (
    "void",
    """__device__ __forceinline__ void qc_tile_copy(
    void* to, const void* map, int column, int row, void* barrier) {
  unsigned at = (unsigned)__cvta_generic_to_shared(to);
  unsigned count = (unsigned)__cvta_generic_to_shared(barrier);
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%2, %3}], [%4];"
               :: "r"(at), "l"(map), "r"(column), "r"(row), "r"(count) : "memory");
}""",
)
# Give registers up, or take them, each warpgroup for itself: 3 × 168 = 40 + 2 × 232,
# 4 × 128 = 32 + 3 × 160, 3 × 80 = 32 + 2 × 104.
for _way, _count in (("dec", 40), ("inc", 232), ("dec", 32), ("inc", 160), ("inc", 104)):
    DEVICE[f"qc_registers_{_way}_{_count}"] = (
        "void",
        f"""__device__ __forceinline__ void qc_registers_{_way}_{_count}() {{
  asm volatile("setmaxnreg.{_way}.sync.aligned.u32 {_count};");
}}""",
    )
DEVICE["qc_wgmma_begin"] = (
    "void",
    """__device__ __forceinline__ void qc_wgmma_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}""",
)
DEVICE["qc_wgmma_commit"] = (
    "void",
    """__device__ __forceinline__ void qc_wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}""",
)
DEVICE["qc_wgmma_wait"] = (
    "void",
    """template <int left> __device__ __forceinline__ void qc_wgmma_wait_for() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(left) : "memory");
}
#define qc_wgmma_wait(left) qc_wgmma_wait_for<left>()""",
)
# Wait until a product's sums are there: without naming them the compiler may read them before.
DEVICE["qc_settle"] = (
    "void",
    """template <int count> __device__ __forceinline__ void qc_settle_all(float* c) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  #pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(c[i]) :: "memory");
}
template <int count> __device__ __forceinline__ void qc_settle_all(int* c) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  #pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+r"(c[i]) :: "memory");
}
#define qc_settle(c, count) qc_settle_all<count>(c)""",
)
# As `qc_wgmma_wait(1)`, but for all products where `last`: behind a loop whose products are still
# under way the compiler takes the registers that they read for free.
DEVICE["qc_wgmma_wait_last"] = (
    "void",
    """__device__ __forceinline__ void qc_wgmma_wait_last(int last) {
  if (last) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  else asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
}""",
)
# A barrier for the warpgroups that multiply.
DEVICE["qc_sync_readers"] = (
    "void",
    """__device__ __forceinline__ void qc_sync_readers(int threads) {
  asm volatile("bar.sync 1, %0;" :: "r"(threads) : "memory");
}""",
)
# The blocks of a cluster wait for one another; each then sees what the others wrote before.
DEVICE["qc_cluster_meet"] = (
    "void",
    """__device__ __forceinline__ void qc_cluster_meet() {
  asm volatile("barrier.cluster.arrive.release;\\nbarrier.cluster.wait.acquire;" ::: "memory");
}""",
)
# Add four floats that lie there in the shared memory of the cluster's block `of`.
DEVICE["qc_add16_of"] = (
    "void",
    """__device__ __forceinline__ void qc_add16_of(float* to, const void* from, int of) {
  unsigned at = (unsigned)__cvta_generic_to_shared(from), there;
  float x, y, z, w;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(of));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x), "=f"(y), "=f"(z), "=f"(w) : "r"(there) : "memory");
  to[0] += x; to[1] += y; to[2] += z; to[3] += w;
}""",
)
# A matrix of units in shared memory: rows of 128 bytes, eight of them 1024 bytes, 128B swizzle.
_MATRIX = """#ifndef QC_MATRIX
#define QC_MATRIX
__device__ __forceinline__ unsigned long long qc_matrix(const void* start) {
  unsigned long long at = (unsigned)__cvta_generic_to_shared(start);
  return ((at & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}
#endif
"""


def _wgmma(name: str, columns: int, kind: str, adds: int = 1) -> str:
    """A warpgroup product of 64 rows by `columns`; its source. `adds` 0: sums begin at zero."""
    count = columns // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    bytes_ = kind != "f16"  # both operands come from shared memory
    form, held = ("r", "int") if kind in ("s8", "u8") else ("f", "float")
    outputs = ", ".join(f'"+{form}"(c[{i}])' for i in range(count))
    if bytes_:
        signature = "const void* a, const void* b"
        types, more = (f"s32.{kind}.s8", "") if form == "r" else ("f32.e4m3.e4m3", ", 1, 1")
        text = f"m64n{columns}k32.{types} {{{sums}}}, %{count}, %{count + 1}, {adds}{more};"
        inputs = '"l"(qc_matrix(a)), "l"(qc_matrix(b))'
        before = ""
    else:
        signature = "const void* a_, const void* b"
        fragment = ", ".join(f"%{count + i}" for i in range(4))
        text = f"m64n{columns}k16.f32.f16.f16 {{{sums}}}, {{{fragment}}}, %{count + 4}, 1, 1, 1, 0;"
        inputs = ", ".join(f'"r"(a[{i}])' for i in range(4)) + ', "l"(qc_matrix(b))'
        before = "  const unsigned* a = (const unsigned*)a_;\n"
    return (
        f"{_MATRIX}__device__ __forceinline__ void {name}({held}* c, {signature}) {{\n{before}"
        f'  asm volatile("wgmma.mma_async.sync.aligned.{text}" : {outputs} : {inputs} : "memory");'
        "\n}"
    )


for _columns in (64, 128, 256):
    for _kind in ("s8", "u8", "e4m3", "f16"):
        _name = f"qc_wgmma_{_kind}_{_columns}"
        DEVICE[_name] = ("void", _wgmma(_name, _columns, _kind))
for _columns in (64, 128):
    _name = f"qc_wgmma_e4m3_{_columns}_first"
    DEVICE[_name] = ("void", _wgmma(_name, _columns, "e4m3", 0))


class Ring:
    """Barriers of a ring of stages: `full` where a stage has come, `free` where it is used up.

    Args:
        memory: shared memory as bytes.
        at: where the barriers lie, 16 bytes for each stage.
        stages: of the ring.
    """

    def __init__(self, memory: Any, at: int, stages: int) -> None:
        self.memory, self.at, self.stages = memory, at, stages

    def full(self, slot: Any) -> Any:
        """Address of a barrier."""
        return T.address_of(self.memory[self.at + slot * 16])

    def free(self, slot: Any) -> Any:
        """Address of a barrier."""
        return T.address_of(self.memory[self.at + slot * 16 + 8])

    def start(self, thread: Any, readers: int, warps: bool = False) -> None:
        """Set the barriers up; the block must meet afterwards.

        Args:
            thread: of the block.
            readers: how many say that a stage is used up.
            warps: whether those are warps, with `qc_barrier_arrive_warp`.
        """
        with T.If(thread == 0), T.Then():
            for slot in range(self.stages):
                call("qc_barrier_init", self.full(slot), 1)
                call(f"qc_barrier_init{'_warps' * warps}", self.free(slot), readers)
