"""bfloat16 products as machine code, against the program that says what is rounded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from qcompiler.backends import edge
from qcompiler.backends.edge_target import machine
from qcompiler.passes.fuse_attention import fuse_attention
from qcompiler.passes.normalize import normalize
from qcompiler.passes.round_products import round_products
from qcompiler.program import Program, capture
from qcompiler.target import Target
from qcompiler.verify import Sqnr

NATIVE = "tvm:x86-64:avx512bf16"
# Sums in another order, whose last bit may turn the rounding of the next operand: 2⁻⁹ of a few.
NEAR_DB = 60.0


def rounded(program: Program) -> Program:
    return round_products(fuse_attention(normalize(program)))


def runner(target: str) -> None:
    aim = machine(Target.parse(target))
    tools = ["cc"] if aim.here else [aim.compiler, aim.qemu[0]]
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed")


def check(
    program: Program, batch: Any, folder: Path, target: str, bound: float = NEAR_DB, **more: Any
) -> edge.Audit:
    runner(target)
    folder.mkdir()
    audit = edge.lower(program, Target.parse(target), folder, **more)
    for want, got in zip(program.run(batch), edge.load(folder)(*batch), strict=True):
        total = Sqnr()
        total.update(want, got)
        assert total.db >= bound
    return audit


@pytest.mark.parametrize("target", [NATIVE, "tvm:aarch64:bf16"])
@pytest.mark.parametrize("name", ["tiny-mlp", "tiny-attention-block", "tiny-post-norm-block"])
def test_tiny_models(tiny: Callable[[str], Any], tmp_path: Path, name: str, target: str) -> None:
    made = tiny(name)
    batch = tuple(x[:1] for x in made.held_out[0])
    audit = check(
        rounded(made.captured), batch, tmp_path / "a", target,
        dynamic_shapes=made.spec.dynamic_shapes, padding_mask=made.spec.padding_mask,
        buckets={"sequence": [batch[0].shape[1]]} if made.spec.padding_mask else {},
    )  # fmt: skip
    assert {layer.kernel for layer in audit.layers} == {"bfloat16"}


class Odd(nn.Module):
    """Sizes that no step divides, a product of two computed matrices, a rounding read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(13, 20), nn.Linear(13, 20, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = torch.tanh(self.one(x))
        return left @ torch.tanh(self.two(x)).transpose(1, 2) + x.sum()


@pytest.mark.parametrize("target", [NATIVE, "tvm:aarch64:bf16", "tvm:x86-64-v3"])
def test_odd_sizes(tmp_path: Path, target: str) -> None:
    """Where there is no instruction, the rounded operands are multiplied in float32."""
    generator = torch.Generator().manual_seed(0)
    module, x = Odd(), torch.randn(2, 7, 13, generator=generator)
    program = rounded(capture(module, (x,)))
    audit = check(program, (x,), tmp_path / "a", target)
    kernels = audit.kernels
    if target == "tvm:x86-64-v3":
        assert "matmul_bf16" not in kernels
    else:
        assert kernels["matmul_bf16"] == 3
        assert "matmul_float" not in kernels
