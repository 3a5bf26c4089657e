"""What a GPU's products store: four neighbouring results of a token at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.kernels import code
from qcompiler.kernels.cuda_code import address, call, registers
from qcompiler.kernels.cuda_device import DEVICE
from qcompiler.kernels.expression import Access, Emitter

TOGETHER = 4
STORES = {"float16": "qc_store4", "float32": "qc_move16"}  # by dtype: what stores four floats

DEVICE["qc_store4"] = (
    "void",
    """#include <cuda_fp16.h>
__device__ __forceinline__ void qc_store4(void* to, const float* from) {
  half2 two[2] = {__floats2half2_rn(from[0], from[1]), __floats2half2_rn(from[2], from[3])};
  *(uint2*)to = *(const uint2*)two;
}""",
)


def store_together(emitter: Emitter, row: list[Any], column: Any, found: Sequence[Any]) -> None:
    """Compute and store four elements of a row, all of which are there.

    Args:
        emitter: of the expression.
        row: coordinates.
        column: of the first, a multiple of four.
        found: value 0 of each.
    """
    expression = emitter.expression
    values = [emitter.values(row, column + i, 1, one) for i, one in enumerate(found)]
    for index, access in expression.stores:
        mine = [each[index] for each in values]
        if expression.steps[index].dtype == "float32" and _aligned(access):
            four = registers(TOGETHER, "float32")
            for i, one in enumerate(mine):
                T.buffer_store(four, one, [i])
            to = address(emitter.buffers[access.argument], emitter.start(access, row, column))
            call(STORES[access.dtype], to, address(four, 0, TOGETHER))
            continue
        for i, one in enumerate(mine):
            emitter.store(index, access, row, column + i, 1, one)


def _aligned(access: Access) -> bool:
    """Whether four elements from a multiple of four on are one store."""
    leading = [*access.strides[:-1], access.offset]
    return (
        access.dtype in STORES
        and bool(access.strides)
        and code.same(access.strides[-1], 1)
        and all(code.known(stride) and stride % TOGETHER == 0 for stride in leading)
    )
