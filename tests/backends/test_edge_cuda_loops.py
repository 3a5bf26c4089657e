"""GPU code whose threads don't work together (no shared memory, no barriers), run on the CPU.

CUDA C++ of such kernels is C++ once blocks and threads are loops. It shows what the code computes,
nothing of how a GPU runs it.
"""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("tvm", reason="needs the extra [tvm]")

import qcompiler
from qcompiler import integer
from qcompiler.artifact import REFERENCE
from qcompiler.backends import edge_cuda_folder
from qcompiler.backends.edge_cuda_build import launch
from qcompiler.backends.edge_cuda_driver import Launch
from qcompiler.backends.edge_cuda_load import PROGRAM, WEIGHTS
from qcompiler.errors import UnsupportedError
from qcompiler.kernels import cuda_expressions
from qcompiler.kernels.code import Argument
from qcompiler.kernels.cuda_code import MOST_BLOCKS, cuda_kernel, generate
from qcompiler.kernels.expression import Access, Expression, Step
from qcompiler.kernels.tiles import Product
from qcompiler.program import Program
from qcompiler.recipe import load_recipe

HEAD = """
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
using std::max; using std::min;
typedef unsigned int uint; typedef unsigned char uchar; typedef unsigned short ushort;
struct Place { int x, y, z; };
static Place blockIdx, threadIdx;
static void qc_let_next() {}
static void qc_after_previous() {}
static int __float_as_int(float x) { int y; memcpy(&y, &x, 4); return y; }
static float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
"""
BODY = re.compile(r'^extern "C" __global__ void [^{;]*\{\n.*?^\}\n', re.MULTILINE | re.DOTALL)


def keep_source(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let artifacts hold CUDA C++ for `Emulated` instead of machine code: needs no nvcc."""

    def build(kernels: Any, capabilities: Any) -> tuple[bytes, dict[str, Launch]]:
        source = generate(kernels, "sm_90")
        (folder / "kernels.cu").write_text(source)
        return b"", {k.name: launch(k) for k in kernels}

    monkeypatch.setattr(edge_cuda_folder, "build", build)


class Emulated:
    """The artifact's only entry.

    Args:
        artifact: the artifact's folder.
        work: with the source of `keep_source`; takes a library.
    """

    def __init__(self, artifact: Path, work: Path) -> None:
        compiler = shutil.which("c++")
        if compiler is None:
            pytest.skip("needs a C++ compiler")
        self.program = json.loads((artifact / PROGRAM).read_text())
        (self.entry,) = self.program["entries"]
        self.weights = np.frombuffer((artifact / WEIGHTS).read_bytes(), np.uint8).copy()
        text = HEAD
        for body in BODY.findall((work / "kernels.cu").read_text()):
            plain = re.sub(r"__global__|__launch_bounds__\(\d+\)", "", body)
            text += plain
            name, given = re.findall(r"(\w+_kernel)\((.*?)\)", plain)[0]
            kinds = [
                part.rsplit(" ", 1)[0].replace("__restrict__", "") for part in given.split(",")
            ]
            values = ", ".join(f"({kind})a[{i}]" for i, kind in enumerate(kinds))
            text += f"""extern "C" void run_{name}(void **a, int x, int y, int z, int threads) {{
  for (blockIdx.z = 0; blockIdx.z < z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) {name}({values});
}}
"""
        (work / "kernels.cc").write_text(text)
        command = [compiler, "-O2", "-w", "-shared", "-fPIC", "-o", "kernels.so", "kernels.cc"]
        subprocess.run(command, cwd=work, check=True)
        self.library = ctypes.CDLL(str(work / "kernels.so"))

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """One run; what a step has not written holds NaN."""
        memory = {
            "weights": self.weights,
            "arena": np.full(self.entry["arena"] + 64, 0xFF, np.uint8),
            "state": np.zeros(self.program["state"] + 64, np.uint8),
        }
        made = [
            torch.full(port["shape"], float("nan")).to(getattr(torch, port["dtype"]))
            for port in self.program["outputs"]
        ]
        ports = {"input": [x.contiguous() for x in inputs], "output": made}
        for step in self.entry["steps"]:
            launch = self.program["launches"][step["symbol"]]
            assert not launch["shared"], f"{step['symbol']}: its threads share memory"
            addresses = []
            for number in step["tensors"]:
                space, at = (self.entry["tensors"][number][key] for key in ("space", "at"))
                known = space in ports
                start = ports[space][at].data_ptr() if known else memory[space].ctypes.data + at
                addresses.append(start)
            given = [addresses[i] for i in launch["order"]]
            run = self.library[f"run_{launch['name']}"]
            run((ctypes.c_void_p * len(given))(*given), *launch["blocks"], launch["threads"])
        return made


def agree(module: nn.Module, inputs: tuple[Tensor, ...], recipe: str, folder: Path,
          monkeypatch: pytest.MonkeyPatch, *more: tuple[Tensor, ...],
) -> dict[str, int]:  # fmt: skip
    """Compile, compare with the reference executor; the kernels that were used."""
    keep_source(monkeypatch, folder)
    made = qcompiler.compile(
        module.eval(), inputs, calibration=[inputs] * 2, target="tvm:cuda:sm_90",
        recipe=load_recipe(recipe, {"rounding": "rtn", "min_sqnr": 0.0}), out=folder / "artifact",
    )  # fmt: skip
    run = Emulated(made.folder, folder)
    program = Program(torch.export.load(made.folder / REFERENCE / "quantized.pt2"))
    for batch in (inputs, *more):
        for got, want in zip(run(*batch), integer.run(program, batch), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)
    kernels: dict[str, int] = made.manifest["audit"]["kernels"]
    return kernels


class Filters(nn.Module):
    """Strides, padding, dilation, groups, depthwise, patches, and one position alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1, groups=32),
            nn.Conv2d(32, 64, 3, 1, 1, groups=4, dilation=(1, 2)), nn.SiLU(),
            nn.Conv2d(64, 40, 4, 4), nn.Conv2d(40, 8, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_convolutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights of 4 bits, which are multiplied as floats."""
    x = torch.randn(2, 3, 33, 36, generator=torch.Generator().manual_seed(1))
    kernels = agree(Filters(), (x,), "w4a16", tmp_path, monkeypatch)
    assert (kernels["matmul_float"], kernels["depthwise"]) == (4, 1)


def test_more_pixels_than_a_grid_has_along_y() -> None:
    pixels = MOST_BLOCKS + 2
    given = [Argument(name, "float32", 4 * pixels) for name in ("x", "weight", "out")]
    written = ((0, Access(2, "float32", 0, (4, 1))),)
    expression = Expression((pixels, 4), (Step("anchor", "float32"),), written)
    product = Product(rows=pixels, columns=4, depth=4, row_stride=4)
    made = cuda_expressions.matmul_float("k", given, product, expression, 16)
    assert made.blocks == (pixels, 1, 1)
    refused = pytest.raises(UnsupportedError, match="up to 65535 blocks")
    with refused, cuda_kernel("k", given, (1, MOST_BLOCKS + 1), 32):
        pass


class Lines(nn.Module):
    """Running sums, extremes and where they are, the largest, sorting; a chain of functions."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        values, places = (x + torch.linspace(0, 0.5, 5)).topk(3, -1)
        ordered, order = (x + torch.linspace(0, 0.9, 70)[:, None]).sort(1, True)
        low, at = x.min(1)
        return (
            values, places, ordered, order, x.sort(-1).values, low, at, x.cumsum(1),
            mask.cumsum(-1), x.argmax(-1), x.argmax(), mask.sum(-1), mask.amax(0),
            nn.functional.mish(x),
        )  # fmt: skip


def test_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-9, 9, (3, 70, 5), generator=generator).float()  # with equal ones
    other = x.flip(1)
    other[1, 3, 2] = other[1, 4, 0] = float("nan")
    mask = torch.randint(0, 2, (4, 300), generator=generator)
    agree(Lines(), (x, mask), "fp32", tmp_path, monkeypatch, (other, mask))


class Experts(nn.Module):
    """The two best of six experts for each token, and sums at places of which some come twice."""

    def forward(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        shares, best = x.topk(2, -1)
        spread = torch.zeros_like(x).scatter(-1, best, shares * shares)
        return spread, torch.zeros(7).scatter_add(0, places, x[0, :2].flatten())


def test_scattering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 9, 6, generator=generator)
    places = torch.randint(0, 7, (12,), generator=generator)
    agree(Experts(), (x, places), "fp32", tmp_path, monkeypatch)
