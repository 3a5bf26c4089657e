"""CUDA kernels → machine code, by nvcc; needs no GPU."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qcompiler.backends.edge_cuda_driver import Launch
from qcompiler.errors import UnsupportedError
from qcompiler.kernels.cuda_code import CudaKernel, generate

NVCC = ("nvcc", "/usr/local/cuda/bin/nvcc")
WHEELS = ("cu*/bin/nvcc", "cuda_nvcc/bin/nvcc")  # in the folder of NVIDIA's Python packages
STANDARD = "c++17"
# "variable was declared but never referenced", "set but never used": TVM names every index.
QUIET = "177,550"
TOGETHER = 8  # kernels of an image, where several are compiled at once


def compiler() -> str:
    """The command of NVIDIA's compiler: of a toolkit, or of its Python package.

    Raises:
        UnsupportedError: where it is not installed.
    """
    found = _found()
    if found is None:
        raise UnsupportedError(
            "GPU targets need NVIDIA's compiler, and 'nvcc' was not found; pip install "
            "'qcompiler[cuda]', or install CUDA's toolkit, 12.3 or later (no GPU is needed)"
        )
    return found


def installed() -> bool:
    """Whether there is a compiler."""
    return _found() is not None


def _found() -> str | None:
    packages = importlib.util.find_spec("nvidia")
    folders = (packages and packages.submodule_search_locations) or ()
    wheels = (p for folder in folders for glob in WHEELS for p in Path(folder).glob(glob))
    commands = (shutil.which(name) for name in (*NVCC, *map(str, wheels)))
    return next((command for command in commands if command), None)


def architecture(capability: int) -> str:
    """What nvcc calls it; 9.0 with the instructions that later GPUs don't have."""
    return "90a" if capability == 90 else str(capability)


def build(
    kernels: Sequence[CudaKernel], capabilities: Sequence[int]
) -> tuple[bytes, dict[str, Launch]]:
    """Compile kernels into one fat binary.

    Args:
        kernels: of different names.
        capabilities: compute capabilities, such as 90.

    Returns:
        The fat binary, and how each kernel is launched, by its name.

    Raises:
        UnsupportedError: if nvcc is missing or refuses.
    """
    compiler()  # that it is missing is said at once
    source = generate(kernels, f"sm_{architecture(max(capabilities))}")
    data = compiled(source, capabilities)
    return data, {k.name: launch(k) for k in kernels}


def launch(kernel: CudaKernel) -> Launch:
    """How a compiled kernel is launched."""
    k = kernel
    return Launch(f"{k.name}_kernel", k.blocks, k.threads, k.shared, k.order)


def build_images(kernels: Sequence[CudaKernel], capability: int) -> tuple[list[bytes], list[int]]:
    """Compile kernels into several fat binaries, at once on all of this machine's processors.

    Args:
        kernels: of different names.
        capability: compute capability, such as 90.

    Returns:
        The fat binaries, and of each kernel the number of its own.

    Raises:
        UnsupportedError: if nvcc is missing or refuses.
    """
    compiler()  # that it is missing is said at once
    arch = f"sm_{architecture(capability)}"
    parts = [kernels[i : i + TOGETHER] for i in range(0, len(kernels), TOGETHER)]
    sources = [generate(part, arch) for part in parts]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = list(pool.map(lambda source: compiled(source, [capability]), sources))
    return images, [i // TOGETHER for i in range(len(kernels))]


def compiled(source: str, capabilities: Sequence[int], *options: str) -> bytes:
    """The fat binary of CUDA C++, with more options of nvcc's.

    Raises:
        UnsupportedError: if nvcc is missing or refuses.
    """
    command = [compiler(), f"-std={STANDARD}", f"-diag-suppress={QUIET}", "-fatbin", *options]
    for capability in capabilities:
        name = architecture(capability)
        command.append(f"-gencode=arch=compute_{name},code=sm_{name}")
    with tempfile.TemporaryDirectory() as folder:
        text, image = Path(folder) / "kernels.cu", Path(folder) / "kernels.fatbin"
        text.write_text(source)
        done = subprocess.run(
            [*command, "-o", str(image), str(text)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            first = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise UnsupportedError(f"nvcc refused the kernels: {first}")
        return image.read_bytes()
