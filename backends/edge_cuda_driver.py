"""CUDA's driver API through ctypes: modules, launches, graphs. Nothing but the driver is needed.

It works in the device's primary context, which torch uses too where it is there, so that tensors
and streams are shared.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qcompiler.errors import UnsupportedError
from qcompiler.gpu import check, device, driver

_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PROGRAMMATIC = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Attributes:
        name: of the function in the module.
        blocks: extents of the grid.
        threads: of a block.
        shared: bytes of dynamic shared memory.
        order: which of the call's arguments each parameter is.
        early: whether it may start while the kernel before still runs: it waits itself before it
            touches what others write.
    """

    name: str
    blocks: tuple[int, int, int]
    threads: int
    shared: int
    order: tuple[int, ...]
    early: bool = True


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


class Module:
    """Kernels of a cubin or a fatbin, loaded.

    Args:
        image: the file's contents.
        number: of the device.
    """

    def __init__(self, image: bytes, number: int = 0) -> None:
        device(number)
        self._library = driver()
        self._handle = ctypes.c_void_p()
        code = self._library.cuModuleLoadData(ctypes.byref(self._handle), image)
        if code == 209:  # CUDA_ERROR_NO_BINARY_FOR_GPU
            found = device(number)
            raise UnsupportedError(
                f"the artifact holds no code for {found.name} (compute capability "
                f"{found.capability / 10}); compile it with --target "
                f"tvm:cuda:sm_{found.capability}"
            )
        check(code, "loading the kernels")
        self._functions: dict[str, Any] = {}

    def prepare(self, launch: Launch) -> Any:
        """The function of a launch, given the shared memory that it needs."""
        if launch.name not in self._functions:
            function = ctypes.c_void_p()
            name = launch.name.encode()
            check(self._library.cuModuleGetFunction(ctypes.byref(function), self._handle, name),
                  f"kernel {launch.name}")  # fmt: skip
            check(
                self._library.cuFuncSetAttribute(function, _DYNAMIC_SHARED, launch.shared),
                f"{launch.shared} bytes of shared memory for {launch.name}",
            )
            self._functions[launch.name] = function
        return self._functions[launch.name]

    def run(self, launch: Launch, arguments: Sequence[int], stream: int = 0) -> None:
        """Launch a kernel.

        Args:
            launch: how.
            arguments: device addresses, in the order of the kernel's own arguments.
            stream: handle.

        Raises:
            UnsupportedError: if the driver refuses.
        """
        function = self.prepare(launch)
        values = [ctypes.c_void_p(arguments[i]) for i in launch.order]
        pointers = (ctypes.c_void_p * len(values))(
            *(ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in values)
        )
        attribute = _Attribute(_PROGRAMMATIC, 0, (ctypes.c_int * 16)(1))
        config = _Config(
            *launch.blocks, launch.threads, 1, 1, launch.shared, stream,
            ctypes.pointer(attribute), int(launch.early),
        )  # fmt: skip
        code = self._library.cuLaunchKernelEx(
            ctypes.byref(config), function, pointers, ctypes.c_void_p(None)
        )
        check(code, f"launching {launch.name}")


class Stream:
    """Work in order, and graphs of it."""

    def __init__(self) -> None:
        device()
        self._handle = ctypes.c_void_p()
        check(driver().cuStreamCreate(ctypes.byref(self._handle), 1), "stream")

    @property
    def handle(self) -> int:
        """For `Module.run`."""
        return self._handle.value or 0

    def wait(self) -> None:
        """Until all work is done."""
        check(driver().cuStreamSynchronize(self._handle), "running the kernels")

    def capture(self, work: Callable[[], None]) -> Any:
        """What `work` would launch on this stream, as a graph that is replayed at once."""
        library, graph, made = driver(), ctypes.c_void_p(), ctypes.c_void_p()
        check(library.cuStreamBeginCapture_v2(self._handle, 0), "capturing a graph")
        work()
        check(library.cuStreamEndCapture(self._handle, ctypes.byref(graph)), "capturing a graph")
        code = library.cuGraphInstantiateWithFlags(ctypes.byref(made), graph, ctypes.c_ulonglong(0))
        check(code, "making a graph")
        library.cuGraphDestroy(graph)
        return made

    def replay(self, graph: Any) -> None:
        """Launch a captured graph."""
        check(driver().cuGraphLaunch(graph, self._handle), "launching a graph")


def _free(held: ctypes.c_uint64) -> None:
    device()  # collected in any thread
    driver().cuMemFree_v2(held)


class Memory:
    """Device memory, freed with the object.

    Args:
        size: bytes.
    """

    def __init__(self, size: int) -> None:
        device()
        self.size = size
        held = ctypes.c_uint64()
        code = driver().cuMemAlloc_v2(ctypes.byref(held), ctypes.c_size_t(size))
        check(code, f"{size >> 20} MiB on the GPU")
        self.address = held.value
        self._end = weakref.finalize(self, _free, held)

    def write_from(self, host: int, size: int, stream: Stream) -> None:
        """Copy from an address of the host; it is read before this returns."""
        code = driver().cuMemcpyHtoDAsync_v2(
            ctypes.c_uint64(self.address), ctypes.c_void_p(host), ctypes.c_size_t(size),
            ctypes.c_void_p(stream.handle),
        )  # fmt: skip
        check(code, "copying to the GPU")

    def read_into(self, host: int, size: int, stream: Stream) -> None:
        """Copy to an address of the host; done when the stream has been waited for."""
        code = driver().cuMemcpyDtoHAsync_v2(
            ctypes.c_void_p(host), ctypes.c_uint64(self.address), ctypes.c_size_t(size),
            ctypes.c_void_p(stream.handle),
        )  # fmt: skip
        check(code, "copying from the GPU")

    def write(self, data: bytes, stream: Stream) -> None:
        """Copy bytes, and wait until they are there."""
        self.write_from(ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0, len(data),
                        stream)  # fmt: skip
        stream.wait()

    def clear(self, stream: Stream) -> None:
        """Set all to zero."""
        code = driver().cuMemsetD8Async(
            ctypes.c_uint64(self.address), 0, ctypes.c_size_t(self.size),
            ctypes.c_void_p(stream.handle),
        )  # fmt: skip
        check(code, "clearing memory")
