"""Which stages of which pieces a block computes: compiled for this machine, run for each block."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Sequence
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from tvm.tirx.script.builder import ir as T

from qcompiler.kernels.code import Argument
from qcompiler.kernels.cuda_code import CudaKernel, cuda_kernel, generate
from qcompiler.kernels.cuda_pieces import OwnPieces
from qcompiler.kernels.cuda_tall import Tall
from qcompiler.kernels.cuda_weights import Weights

# Partition, tokens, outputs, inputs; its stages have 64 columns up to 2048 inputs.
CASES = [
    (Tall(256, 1, blocks=132), 1024, 11008, 4096),  # whole pieces, then some that are shared out
    (Tall(128, 1, blocks=132), 1100, 2000, 576),  # a few left: shared out with others
    (Tall(64, 1, blocks=132), 70, 3000, 192),  # fewer pieces than blocks, more blocks than stages
    (Tall(128, 2, blocks=132), 500, 300, 64),
    (Tall(128, 1, blocks=7), 300, 900, 1536),
    (Tall(128, 1, blocks=7), 128, 7 * 128, 1536),  # nothing to share out
    (Tall(64, 1, blocks=1), 130, 300, 200),
    (Tall(128, 1, splits=4), 300, 300, 576),
    (Tall(64, 1, splits=8), 70, 300, 64 * 10),  # five blocks have two stages each
]
HEAD = """
#include <algorithm>
#include <cstdint>
using std::max; using std::min;
struct Place { int x, y, z; };
static Place blockIdx, threadIdx;
static int qc_number(int x) { return x; }
"""
RUN = """
extern "C" void run(void **a, int x, int y) {
  for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x) k_kernel(GIVEN);
}
"""


def sizes_of(how: Tall, tokens: int, form: Weights) -> tuple[int, ...]:
    """Of what is counted: stages, pieces, and sums of blocks."""
    pieces, blocks = prod(how.pieces(tokens, form)), max(how.blocks, 1)
    return pieces * form.stages, pieces, blocks, blocks


def kernel(how: Tall, tokens: int, form: Weights) -> CudaKernel:
    """Counts what is done: each stage, piece, sums left by a block, sums taken from a block."""
    across = how.pieces(tokens, form)[1]
    sizes = sizes_of(how, tokens, form)
    given = [Argument(f"a{i}", "int32", size) for i, size in enumerate(sizes)]
    grid = (how.blocks, 1) if how.blocks else (sizes[1], how.clustered(form))
    with cuda_kernel("k", given, grid, 1) as (made, buffers, (block, split), _, _):
        stages, pieces, left, taken = buffers
        own = OwnPieces(how, form, tokens, block, split)

        def count(buffer: T.Buffer, at: object, what: object = 1) -> None:
            T.buffer_store(buffer, buffer[at] + what, [at])

        def body(piece: T.Var, where: tuple[object, object], start: T.Var, many: T.Var,
                 done: T.Var) -> None:  # fmt: skip
            with T.serial(0, many) as i:
                count(stages, piece * form.stages + start + i)
            with T.If(start == 0):
                with T.Then():
                    count(pieces, where[0] * across + where[1])
                    if own.common:
                        others = own.last_of(piece) - block
                        with T.If(piece < own.common), T.Then(), T.serial(0, others) as other:
                            count(taken, block + 1 + other, piece + 1)
                with T.Else():
                    if how.blocks:
                        count(left, block, piece + 1)

        own.each(body)
    return made


def run(made: CudaKernel, folder: Path, sizes: Sequence[int]) -> list[Tensor]:
    source = generate([made], "sm_90a")
    (text,) = re.findall(r'^extern "C" __global__ void [^{;]*\{\n.*?^\}\n', source, re.M | re.S)
    text = re.sub(r"__global__|__launch_bounds__\(.*?\)|__cluster_dims__\(.*?\)", "", text)
    given = ", ".join(f"(int*)a[{i}]" for i in range(len(made.order)))
    (folder / "k.cc").write_text(HEAD + text + RUN.replace("GIVEN", given))
    command = ["c++", "-O1", "-w", "-shared", "-fPIC", "-o", "k.so", "k.cc"]
    subprocess.run(command, cwd=folder, check=True)
    counts = [torch.zeros(size, dtype=torch.int32) for size in sizes]
    in_order = [counts[i].data_ptr() for i in made.order]
    function = ctypes.CDLL(str(folder / "k.so")).run
    function((ctypes.c_void_p * len(in_order))(*in_order), *made.blocks[:2])
    return counts


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[1:])))
def test_each_stage_of_each_piece_once(case: tuple[Tall, int, int, int], tmp_path: Path) -> None:
    """And each block's sums that were left are taken by the one that finishes their piece."""
    how, tokens, rows, depth = case
    form = Weights(rows, depth, 4, 32)
    made = kernel(how, tokens, form)
    stages, pieces, left, taken = run(made, tmp_path, sizes_of(how, tokens, form))
    assert (stages == 1).all()
    assert (pieces == 1).all()
    assert torch.equal(left, taken)
