"""NVIDIA's driver: which GPU this machine has, and how much of its memory is free.

Through ctypes, in the device's primary context, which torch and ONNX Runtime use too.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

from qcompiler.errors import UnsupportedError

DRIVER = 12_000  # CUDA 12
_COMPUTE_MAJOR, _COMPUTE_MINOR = 75, 76


@cache
def driver() -> Any:
    """libcuda, initialised.

    Raises:
        UnsupportedError: on a machine without a GPU, or where its driver is too old.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise UnsupportedError("no GPU: NVIDIA's driver (libcuda.so.1) was not found") from None
    if library.cuInit(0):
        raise UnsupportedError("no GPU: NVIDIA's driver finds no device that it can use")
    version = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    if version.value < DRIVER:
        raise UnsupportedError(
            f"the GPU's driver is made for CUDA {_version(version.value)}; "
            f"{_version(DRIVER)} or later is needed"
        )
    return library


def driver_version() -> str:
    """The CUDA version that the driver is made for."""
    version = ctypes.c_int()
    driver().cuDriverGetVersion(ctypes.byref(version))
    return _version(version.value)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def check(code: int, what: str) -> None:
    """Raise what the driver says went wrong.

    Raises:
        UnsupportedError: if the code is not 0.
    """
    if code:
        text = ctypes.c_char_p()
        driver().cuGetErrorName(code, ctypes.byref(text))
        name = (text.value or b"unknown error").decode()
        raise UnsupportedError(f"{what}: the GPU's driver answered {name}")


@dataclass(frozen=True)
class Device:
    """A GPU: its number, name, compute capability such as 90, bytes of memory."""

    number: int
    name: str
    capability: int
    memory: int


def device(number: int = 0) -> Device:
    """A GPU of this machine, its primary context made current in the calling thread.

    Raises:
        UnsupportedError: if there is none.
    """
    found, context = _opened(number)
    check(driver().cuCtxSetCurrent(context), "context")  # each thread has its own current one
    return found


@cache
def _opened(number: int) -> tuple[Device, ctypes.c_void_p]:
    """The device and its primary context, which is held from then on."""
    library = driver()
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    check(library.cuDeviceGet(ctypes.byref(handle), number), f"device {number}")
    check(library.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "context")
    name, total = ctypes.create_string_buffer(100), ctypes.c_size_t()
    library.cuDeviceGetName(name, 100, handle)
    library.cuDeviceTotalMem_v2(ctypes.byref(total), handle)
    parts = []
    for attribute in (_COMPUTE_MAJOR, _COMPUTE_MINOR):
        value = ctypes.c_int()
        library.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
        parts.append(value.value)
    found = Device(number, name.value.decode(), parts[0] * 10 + parts[1], total.value)
    return found, context


def free_memory() -> int:
    """Bytes of device memory that are free."""
    device()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    check(driver().cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)), "memory")
    return free.value
