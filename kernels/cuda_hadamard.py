"""Rotations of rows by Kronecker products on a GPU: y = x · (M₁ ⊗ M₂ ⊗ …); see `hadamard`.

A block holds a row in shared memory. Walsh–Hadamard factors take four of their steps at once, 16
numbers in a thread's registers; any other factor is multiplied as it is, its inputs in registers.
Where the row is quantized next, the quantization's kernel rotates it (`cuda_quantize`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.errors import UnsupportedError
from qcompiler.kernels import code
from qcompiler.kernels.code import Argument
from qcompiler.kernels.cuda_code import (
    WARP,
    CudaKernel,
    address,
    call,
    cuda_kernel,
    registers,
    value,
)
from qcompiler.kernels.cuda_device import DEVICE
from qcompiler.kernels.expression import Emitter, Expression
from qcompiler.kernels.hadamard import Factor

RADIX = 16  # numbers that a thread mixes at once
BANKS = 32  # of shared memory; a row skips one float after so many
LARGEST = 176  # order of a factor that is multiplied as it is: its inputs are in registers

DEVICE |= {
    # Sums and differences of `count` numbers, a power of two.
    "qc_butterflies": (
        "void",
        """template <int count> __device__ __forceinline__ void qc_butterflies_of(float* x) {
  #pragma unroll
  for (int step = 1; step < count; step *= 2)
    #pragma unroll
    for (int i = 0; i < count; ++i)
      if (!(i & step)) {
        float a = x[i], b = x[i + step];
        x[i] = a + b; x[i + step] = a - b;
      }
}
#define qc_butterflies(x, count) qc_butterflies_of<count>(x)""",
    ),
    # c[i] += x · from[i]
    "qc_fma4": (
        "void",
        """__device__ __forceinline__ void qc_fma4(float* c, float x, const float* from) {
  float4 m = __ldg((const float4*)from);
  c[0] = fmaf(x, m.x, c[0]); c[1] = fmaf(x, m.y, c[1]);
  c[2] = fmaf(x, m.z, c[2]); c[3] = fmaf(x, m.w, c[3]);
}""",
    ),
    "qc_fma1": (
        "void",
        """__device__ __forceinline__ void qc_fma1(float* c, float x, const float* from) {
  c[0] = fmaf(x, __ldg(from), c[0]);
}""",
    ),
}


@dataclass(frozen=True)
class Rotation:
    """A rotation of rows.

    Attributes:
        width: of a row.
        factors: in any order.
        scale: of the result.
    """

    width: int
    factors: tuple[Factor, ...]
    scale: float

    @property
    def threads(self) -> int:
        """Of a block: fewer where a thread needs many registers."""
        dense = max((f.size for f in self.factors if f.matrix >= 0), default=0)
        if dense > LARGEST:
            raise UnsupportedError(
                f"GPU targets rotate rows by matrices of order {LARGEST} at most, not {dense}, "
                "where they are no Walsh–Hadamard ones"
            )
        most = 256 if dense > 40 else 512 if dense else 1024
        return min(most, -(-self.width // (8 * WARP)) * WARP)

    @property
    def shared(self) -> int:
        """Bytes of a row in shared memory."""
        return (self.width + self.width // BANKS + 1) * 4


class Line:
    """A row in shared memory.

    Args:
        memory: shared memory as bytes.
        at: where the row begins.
        thread: index in the block.
        rotation: of the row.
        buffers: the kernel's, for factors that are multiplied as they are.
    """

    def __init__(
        self, memory: Any, at: int, thread: Any, rotation: Rotation, buffers: Sequence[Any]
    ) -> None:
        self.memory, self.at, self.thread = memory, at, thread
        self.rotation, self.buffers = rotation, buffers

    def _spot(self, index: Any) -> Any:
        return address(self.memory, self.at + (index + index // BANKS) * 4)

    def get(self, index: Any) -> Any:
        """A number."""
        return value("qc_get", self._spot(index))

    def put(self, index: Any, x: Any) -> None:
        """Store a number."""
        call("qc_put", self._spot(index), x)

    def each(self, count: int, body: Callable[[Any], None]) -> None:
        """body(i) for i below count, shared out among the threads."""
        threads = self.rotation.threads
        with T.serial(0, -(-count // threads)) as turn:
            index = T.Bind(turn * threads + self.thread)
            with T.If(index < count), T.Then():
                body(index)

    def rotate(self, x: Callable[[Any], Any]) -> None:
        """Put a row there and rotate it, but for the scale; the block meets at the end.

        Args:
            x: element → number.
        """
        self.each(self.rotation.width, lambda i: self.put(i, x(i)))
        call("qc_sync")
        for factor in self.rotation.factors:
            if factor.matrix < 0:
                self._butterflies(factor)
            else:
                self._dense(factor)

    def _butterflies(self, factor: Factor) -> None:
        step, left = factor.stride, factor.size
        while left > 1:
            radix = min(RADIX, left)
            held = registers(radix, "float32")

            def mix(index: Any, step: int = step, radix: int = radix, held: Any = held) -> None:
                start = T.Bind(index // step * (radix * step) + index % step)
                for i in range(radix):
                    T.buffer_store(held, self.get(start + i * step), [i])
                call("qc_butterflies", address(held, 0, radix), radix)
                for i in range(radix):
                    self.put(start + i * step, held[i])

            self.each(self.rotation.width // radix, mix)
            call("qc_sync")
            step, left = step * radix, left // radix

    def _dense(self, factor: Factor) -> None:
        """Several threads share the results of the same numbers; all read before any writes."""
        size, step, threads = factor.size, factor.stride, self.rotation.threads
        groups, matrix = self.rotation.width // size, self.buffers[factor.matrix]
        wide = 4 if size % 4 == 0 else 1
        share = max(1, min(size // wide, threads // groups))
        own = -(-(size // wide) // share)  # results of a thread, `wide` at a time
        held, sums = registers(size, "float32"), registers(wide, "float32")

        def results(index: Any, meet: bool) -> None:
            group, part = T.Bind(index % groups), T.Bind(index // groups)
            start = T.Bind(group // step * (size * step) + group % step)
            active = part < share
            with T.If(active), T.Then():
                for i in range(size):
                    T.buffer_store(held, self.get(start + i * step), [i])
            if meet:
                call("qc_sync")
            with T.If(active), T.Then(), T.serial(0, own) as turn:
                j = T.Bind((part * own + turn) * wide)
                with T.If(j < size), T.Then():
                    for e in range(wide):
                        T.buffer_store(sums, T.float32(0), [e])
                    for i in range(size):
                        call(f"qc_fma{wide}", address(sums, 0, wide), held[i],
                             address(matrix, i * size + j))  # fmt: skip
                    for e in range(wide):
                        self.put(start + (j + e) * step, sums[e])

        if share > 1:
            results(self.thread, True)
        else:
            self.each(groups, lambda index: results(index, False))
        call("qc_sync")


def rotate_rows(
    name: str, arguments: Sequence[Argument], source: Expression, factors: Sequence[Factor],
    scale: float, expression: Expression,
) -> CudaKernel:  # fmt: skip
    """The kernel; see `hadamard.rotate_rows`."""
    rotation = Rotation(source.width, tuple(factors), scale)
    with cuda_kernel(name, arguments, (source.rows,), rotation.threads, rotation.shared) as (
        made, buffers, (row,), thread, memory,
    ):  # fmt: skip
        read, write = Emitter(source, buffers), Emitter(expression, buffers)
        call("qc_after_previous")
        call("qc_let_next")
        place = read.coordinates(row)
        line = Line(memory, 0, thread, rotation, buffers)
        line.rotate(lambda i: read.value(place, i, 1))

        def finish(index: Any) -> None:
            result = line.get(index) * code.number(scale, 1)
            write.vector(place, index, 1, T.Bind(result))

        line.each(rotation.width, finish)
    return made
