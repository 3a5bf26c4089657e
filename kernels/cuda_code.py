"""CUDA kernels through TVM's IR builder: the launch, shared memory, and the device functions.

Loops, indices, buffers and the launch are TIR. What TIR has no form for (tensor core instructions,
asynchronous copies into shared memory, unpacking nibbles in three-input logic) are device functions
of a few lines of PTX (`cuda_device`), which TIR calls by name.

    with cuda_kernel("name", arguments, blocks, threads, shared) as (
        made, buffers, block, thread, memory,
    ): ...

gives a `CudaKernel`; `generate` makes CUDA C++ of several, which needs no GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tvm
from tvm.backend.cuda.op import cuda_func_call
from tvm.script.ir_builder import IRBuilder
from tvm.tirx import Var
from tvm.tirx.script.builder import ir as T

from qcompiler.errors import UnsupportedError
from qcompiler.kernels.code import GPU, Argument, Size
from qcompiler.kernels.cuda_device import DEVICE

WARP = 32


@dataclass(frozen=True)
class Gpu:
    """What bounds a kernel on a GPU.

    Attributes:
        capability: such as 90.
        processors: that share the work out.
        shared: bytes of shared memory that a block may use.
    """

    capability: int
    processors: int
    shared: int


# CUDA C++ Programming Guide, "Technical specifications per compute capability"; less 1 KiB each.
GPUS = {
    80: Gpu(80, 108, (163 << 10) - 1024),
    86: Gpu(86, 84, (99 << 10) - 1024),
    89: Gpu(89, 142, (99 << 10) - 1024),
    90: Gpu(90, 132, (227 << 10) - 1024),
}
HOPPER = GPUS[90]
MOST_BLOCKS = 65535  # along y and z

_MAP = "struct alignas(64) qc_map { char bytes[128]; };\n"
_SIGNATURE = re.compile(r'extern "C" __global__ void \S*\s*(\w+)_kernel\(([^)]*)\);')


class CudaKernel:
    """A kernel with its launch.

    Attributes:
        name: of the function in CUDA C++.
        arguments: in the order of the launch; last, of extents of the grid that are expressions,
            their values (`blocks_x`, …).
        blocks, threads: extents of the grid and of a block, (x, y, z) and x; those of the grid are
            expressions where a call says how many tokens there are.
        shared: bytes of dynamic shared memory.
        resident: blocks that a processor must be able to hold at once; 0: the compiler chooses.
    """

    def __init__(
        self, name: str, arguments: Sequence[Argument | Size], blocks: tuple[int, ...],
        threads: int, shared: int, resident: int = 0,
    ) -> None:  # fmt: skip
        self.name, self.arguments = name, tuple(arguments)
        x, y, z = (*blocks, *(1,) * (3 - len(blocks)))
        self.blocks = x, y, z
        self.threads, self.shared, self.resident = threads, shared, resident
        self.cluster = 1  # blocks along y that run at once and read one another's shared memory
        self.function: Any = None
        self.maps: tuple[str, ...] = ()  # arguments that are tensor maps, given by value
        self.order: tuple[int, ...] = ()  # of the generated function's parameters; see `generate`


@contextmanager
def cuda_kernel(
    name: str, arguments: Sequence[Argument | Size], blocks: tuple[Any, ...], threads: int,
    shared: int = 0, resident: int = 0,
) -> Iterator[tuple[CudaKernel, list[Any], list[Any], Any, Any]]:  # fmt: skip
    """Open a kernel; what is written inside runs once in each thread.

    Args:
        name: of the function.
        arguments: flat buffers in global memory, then a size that a call gives.
        blocks: extents of the grid.
        threads: of a block.
        shared: bytes of dynamic shared memory.
        resident: blocks that a processor must be able to hold at once; 0: the compiler chooses.

    Yields:
        The kernel, its buffers, the block's indices, the thread's index, and shared memory as
        a buffer of bytes (None without).

    Raises:
        UnsupportedError: for a grid that no GPU launches.

    Kernels overlap: each calls `qc_after_previous` before it touches what other kernels write, and
    only then `qc_let_next`. So two run at once at most. With the calls the other way round a third
    one waits on a processor whose first-level cache the first one still fills: measured on an
    H200, it then read lines that the second had overwritten.
    """
    if any(isinstance(extent, int) and extent > MOST_BLOCKS for extent in blocks[1:]):
        raise UnsupportedError(f"GPUs launch up to {MOST_BLOCKS} blocks a dimension: {blocks}")
    made = CudaKernel(name, arguments, blocks, threads, shared, resident)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        buffers = [
            T.arg(a.name, T.buffer((max(a.size or 1, 1),), a.dtype))
            for a in arguments
            if isinstance(a, Argument)
        ]
        for size in arguments:
            if isinstance(size, Size):
                T.arg(size.name, size.variable)
        # TVM makes parameters of what host and kernel both compute: what is computed of a size is a
        # size of its own.
        extents = list(blocks)
        for place, extent in enumerate(blocks):
            if not isinstance(extent, int):
                title = f"blocks_{'xyz'[place]}"
                extents[place] = T.arg(title, Var(title, "int32"))
                made.arguments += (Size(title, extents[place]),)
        frames = [T.launch_thread(f"blockIdx.{d}", n) for d, n in zip("xyz", extents, strict=False)]
        frames.append(T.launch_thread("threadIdx.x", threads))
        indices = [frame.__enter__() for frame in frames]
        memory = T.alloc_buffer((shared,), "uint8", scope="shared.dyn") if shared else None
        outside = GPU.set(True)
        yield made, buffers, indices[:-1], indices[-1], memory
        GPU.reset(outside)
        for frame in reversed(frames):
            frame.__exit__(None, None, None)
    made.function = builder.get()


def tokens_of(arguments: Sequence[Argument | Size], tokens: int) -> Any:
    """How many tokens there are: what the call gives where it does, `tokens` otherwise."""
    return next((a.variable for a in arguments if isinstance(a, Size)), tokens)


def call(name: str, *arguments: Any) -> None:
    """A device function, as a statement."""
    T.evaluate(value(name, *arguments))


def value(name: str, *arguments: Any) -> Any:
    """What a device function returns."""
    result, source = DEVICE[name]
    return cuda_func_call(name, *arguments, source_code=source + "\n", return_type=result)


def registers(size: int, dtype: str) -> Any:
    """An array of a thread's own; every index into it must be known when it is compiled."""
    return T.alloc_buffer((size,), dtype, scope="local")


def address(buffer: Any, index: Any = 0, size: int = 1) -> Any:
    """Where `size` elements lie; TVM gives a thread's array no more room than accesses name."""
    if buffer.scope() == "local":
        return buffer.access_ptr("rw", offset=index, extent=size)
    return T.address_of(buffer[index])  # in shared memory an access_ptr would add barriers


def sync() -> None:
    """Wait for the block's other threads."""
    T.evaluate(T.tvm_storage_sync("shared"))


def generate(kernels: Sequence[CudaKernel], arch: str) -> str:
    """The CUDA C++ of several kernels.

    Args:
        kernels: of different names; each is told the order of the generated function's parameters
            (arguments that it never touches are left out).
        arch: such as "sm_90".
    """
    module = tvm.IRModule({k.name: k.function for k in kernels})
    target = tvm.target.Target({"kind": "cuda", "arch": arch}, host="llvm")
    # Loops marked so are left for nvcc to unroll.
    config = {"tirx.disable_assert": True, "tirx.UnrollLoop": {"explicit_unroll": False}}
    with tvm.transform.PassContext(config=config):
        library = tvm.tirx.build(module, target=target)
    source = "\n".join(m.inspect_source("cuda") for m in library.imports)
    # Swizzled units want 1024 bytes; TVM aligns to 64.
    source = source.replace("__shared__ __align__(64)", "__shared__ __align__(1024)")
    parameters = dict(_SIGNATURE.findall(source))
    for kernel in kernels:
        names = re.findall(r"(\w+?)(?:_ptr)?(?:,|$)", parameters[kernel.name])
        if kernel.resident:  # TVM's attribute for it is lost on the way to the device function
            bounds = f"__launch_bounds__({kernel.threads}"
            found = f"{bounds}) {kernel.name}_kernel("
            size = f"__cluster_dims__(1, {kernel.cluster}, 1) " if kernel.cluster > 1 else ""
            assert found in source, f"{kernel.name}: TVM writes launch bounds otherwise"
            source = source.replace(
                found, f"{bounds}, {kernel.resident}) {size}{kernel.name}_kernel("
            )
        for given in kernel.maps:
            source = _by_value(source, kernel.name, given)
        assert {*names} <= {a.name for a in kernel.arguments}, names
        order = {name: number for number, name in enumerate(names)}
        kernel.order = tuple(
            sorted((i for i, a in enumerate(kernel.arguments) if a.name in order),
                   key=lambda i: order[kernel.arguments[i].name])
        )  # fmt: skip
    return source


def _by_value(source: str, kernel: str, name: str) -> str:
    """The source with that argument, a pointer to a tensor map, as the map itself."""
    pointer = re.compile(rf"(?:const )?uchar\* __restrict__ {name}_ptr")
    opening = re.compile(rf"(\b{kernel}_kernel\([^)]*\))( {{)?")

    def change(found: re.Match[str]) -> str:
        text, count = pointer.subn(f"const __grid_constant__ qc_map {name}", found[1])
        assert count == 1, f"{kernel}: TVM writes the parameter {name} otherwise"
        return text + (f" {{\n  uchar* {name}_ptr = (uchar*)&{name};" if found[2] else "")

    return ("" if _MAP in source else _MAP) + opening.sub(change, source)
