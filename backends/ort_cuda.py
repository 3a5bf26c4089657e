"""ONNX Runtime's CUDA provider: sessions on an NVIDIA GPU, and why there is none."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from qcompiler.backends.ort_session import CPU, MODEL, open_session, session_options
from qcompiler.backends.ort_store import read_metadata
from qcompiler.errors import InputError, UnsupportedError
from qcompiler.gpu import device, free_memory

PROVIDER = "CUDAExecutionProvider"
BFLOAT16, ELEMENT = "tensor(bfloat16)", 16  # its number in onnx.TensorProto
ROOM = 256 << 20  # bytes for activations and the libraries' own memory, beside the weights


def session(path: Path, graphs: bool = False) -> Any:
    """An ONNX Runtime session on the GPU.

    Args:
        path: the model.
        graphs: capture CUDA graphs of runs that ask for it (`gpu_graph_id`).

    Raises:
        UnsupportedError: without a GPU, its driver, CUDA's libraries, or enough memory.
    """
    import onnxruntime

    if not path.is_file():
        raise InputError(f"{path}: no such file; compile the model again")
    found = device()
    if PROVIDER not in onnxruntime.get_available_providers():
        raise UnsupportedError(
            "this onnxruntime has no CUDA provider: pip uninstall onnxruntime; pip install "
            "'onnxruntime-gpu[cuda,cudnn]'"
        )
    needed = sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*")) + ROOM
    free = free_memory()
    if needed > free:
        raise UnsupportedError(
            f"{path} needs about {needed >> 20} MiB on the GPU, and {free >> 20} MiB of "
            f"{found.name} are free"
        )
    onnxruntime.preload_dlls()
    _check_libraries(Path(onnxruntime.__file__).parent)
    settings = {"enable_cuda_graph": "1"} if graphs else {}
    try:
        made = open_session(path, session_options(path), [(PROVIDER, settings), CPU])
    except Exception as error:  # of a class that onnxruntime does not export
        if "graph capture" not in str(error):
            raise
        raise UnsupportedError(
            f"{path}: not all of its operators run on the GPU, so that a token's step is no CUDA "
            "graph, and it writes no text there; compile it for ort:cpu"
        ) from error
    if PROVIDER not in made.get_providers():
        raise UnsupportedError(
            f"ONNX Runtime could not start its CUDA provider on {found.name}; its log says why: "
            "python -c 'import onnxruntime; onnxruntime.set_default_logger_severity(0)'"
        )
    return made


def _check_libraries(package: Path) -> None:
    """Raise an `UnsupportedError` that names the library which the provider misses."""
    provider = package / "capi" / "libonnxruntime_providers_cuda.so"
    if not provider.is_file():  # another system names it otherwise
        return
    for library in (package / "capi" / "libonnxruntime_providers_shared.so", provider):
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            missing = str(error).partition(":")[0]
            raise UnsupportedError(
                f"ONNX Runtime's CUDA provider needs {missing}, which was not found: pip install "
                "'onnxruntime-gpu[cuda,cudnn]', or install CUDA 13"
            ) from error


def load(folder: Path, threads: int | None = None) -> Callable[..., tuple[Tensor, ...]]:
    """The artifact's model as a function of flat inputs, returning flat outputs.

    `threads` means nothing here.
    """
    return load_model(folder / MODEL)


def load_model(path: Path) -> Callable[..., tuple[Tensor, ...]]:
    """An ONNX model on the GPU as a function of flat inputs, returning flat outputs.

    Tensors are on the CPU. Float inputs are converted to what the model takes, and outputs in
    float16 or bfloat16, as well as caches that it keeps as integers, to float32: a program has no
    other.
    """
    running = session(path)
    kinds = {i.name: i.type for i in running.get_inputs()}
    made = {o.name: o.type for o in running.get_outputs()}
    results = [*made]
    stores = read_metadata(running.get_modelmeta().custom_metadata_map)

    def run_narrow(*inputs: Tensor) -> tuple[Tensor, ...]:
        given = zip(kinds.items(), inputs, strict=True)
        feed = {
            name: given_value(x.bfloat16() if kind == BFLOAT16 else x) for (name, kind), x in given
        }
        found = map(from_dlpack, running.run_with_ort_values(results, feed))
        types = {BFLOAT16: torch.float32, "tensor(bool)": torch.bool}  # bytes in DLPack
        wanted = (types.get(kind) for kind in made.values())
        return tuple(
            y.to(kind or y.dtype, copy=True) for y, kind in zip(found, wanted, strict=True)
        )

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        feed = {}
        for (name, kind), value in zip(kinds.items(), inputs, strict=True):
            value = value.half() if kind == "tensor(float16)" else value
            array = value.detach().cpu().numpy()
            feed[name] = np.ascontiguousarray(
                stores[name].write(array) if name in stores else array
            )
        found = (
            torch.from_numpy(np.asarray(stores[name].read(y) if name in stores else y))
            for name, y in zip(results, running.run(None, feed), strict=True)
        )
        return tuple(y.float() if y.dtype == torch.float16 else y for y in found)

    # numpy knows no bfloat16. A cache of integers beside it is none of this function's.
    return run_narrow if BFLOAT16 in kinds.values() else run


def given_value(x: Tensor) -> Any:
    """A tensor of any type as ONNX Runtime's, on the CPU."""
    from onnxruntime import OrtValue

    x = x.detach().cpu().contiguous()
    if x.dtype != torch.bfloat16:
        return OrtValue.ortvalue_from_numpy(x.numpy())
    bits = x.view(torch.int16).numpy()
    return OrtValue.ortvalue_from_numpy_with_onnx_type(bits, ELEMENT)
