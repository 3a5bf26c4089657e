"""Kernels built and called on their own: natively through TVM, or for other machines under qemu."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("tvm", reason="the extra tvm is not installed")

import tvm

from qcompiler.backends import edge_folder, edge_load
from qcompiler.backends.edge_model import EdgeModel, Entry, Port, Step
from qcompiler.backends.edge_model import Tensor as Placed
from qcompiler.backends.edge_target import host_family, machine
from qcompiler.kernels import expression as expressions
from qcompiler.kernels import isa as isas
from qcompiler.kernels.code import Argument, Kernel
from qcompiler.kernels.expression import Access, Expression
from qcompiler.kernels.isa import Isa
from qcompiler.target import Target

# What code for each instruction set is built as. The plain ones are built for any x86-64: their
# tiles and packing are their own, and their multiplications exist everywhere.
BUILT_AS = {
    isas.VNNI: "tvm:x86-64:avx512vnni",
    isas.VNNI_BF16: "tvm:x86-64:avx512bf16",
    isas.AVX2: "tvm:x86-64-v3",
}
HELD = {torch.bool: torch.uint8, torch.bfloat16: torch.uint16}  # what kernels declare
PLAIN = "tvm:x86-64"


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor without gaps."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def _held(dtype: torch.dtype) -> str:
    return str(HELD.get(dtype, dtype)).removeprefix("torch.")


class Writer:
    """An expression written step by step, with the tensors that its kernel gets.

    Args:
        shape: that the expression runs over.
        tensors: the kernel's arguments before those of the expression.
    """

    def __init__(self, shape: tuple[int, ...], *tensors: Tensor) -> None:
        self.shape, self.tensors = shape, [*tensors]
        self.steps: list[expressions.Step] = []
        self.stores: list[tuple[int, Access]] = []
        self.outputs: list[int] = []

    def _access(self, tensor: Tensor, strides: tuple[int, ...] | None, offset: int) -> Access:
        number = next((i for i, known in enumerate(self.tensors) if known is tensor), -1)
        if number < 0:
            number = len(self.tensors)
            self.tensors.append(tensor)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Access(number, dtype, offset, contiguous(self.shape) if strides is None else strides)

    def access(self, tensor: Tensor, strides: tuple[int, ...], offset: int = 0) -> Access:
        return self._access(tensor, strides, offset)

    def step(
        self, op: str, dtype: str, *values: int, numbers: tuple[float, ...] = (), **more: Any
    ) -> int:
        self.steps.append(expressions.Step(op, dtype, values, numbers=numbers, **more))
        return len(self.steps) - 1

    def load(self, tensor: Tensor, strides: tuple[int, ...] | None = None, offset: int = 0) -> int:
        """A tensor's element; contiguous over the shape unless strides say otherwise."""
        access = self._access(tensor, strides, offset)
        return self.step("load", access.dtype, access=access)

    def number(self, value: float, dtype: str = "float32") -> int:
        return self.step("constant", dtype, numbers=(value,))

    def store(
        self, value: int, dtype: torch.dtype = torch.float32,
        strides: tuple[int, ...] | None = None, offset: int = 0, size: int = 0,
    ) -> None:  # fmt: skip
        """A new output, filled with 77 where nothing is written."""
        made = torch.full((size or prod(self.shape),), 77).to(dtype)
        self.stores.append((value, self._access(made, strides, offset)))
        self.outputs.append(len(self.tensors) - 1)

    @property
    def expression(self) -> Expression:
        return Expression(self.shape, tuple(self.steps), tuple(self.stores))

    @property
    def arguments(self) -> list[Argument]:
        return [Argument(f"a{i}", _held(t.dtype), t.numel()) for i, t in enumerate(self.tensors)]


@pytest.fixture(scope="session")
def writer() -> type[Writer]:
    return Writer


def build(kernels: Sequence[Kernel], target: str) -> Any:
    """As the backend builds them."""
    functions = {made.name: made.function for made in kernels}
    with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
        return tvm.tirx.build(
            tvm.IRModule(functions),
            target=tvm.target.Target(machine(Target.parse(target)).tvm),
        )


@pytest.fixture(scope="session")
def run() -> Callable[..., list[Tensor]]:
    """`run(kernel, writer, isa)`: the outputs, flat, computed on this machine."""

    def call(made: Kernel, given: Writer, isa: Isa) -> list[Tensor]:
        target = BUILT_AS.get(isa, PLAIN)
        if not machine(Target.parse(target)).here:
            pytest.skip(f"this CPU does not run code for {target}")
        held = [
            tvm.runtime.tensor(t.reshape(-1).view(HELD.get(t.dtype, t.dtype)).numpy())
            for t in given.tensors
        ]
        build([made], target)[made.name](*held)
        found = [torch.from_numpy(held[i].numpy().copy()) for i in given.outputs]
        return [f.view(given.tensors[i].dtype) for f, i in zip(found, given.outputs, strict=True)]

    return call


@pytest.fixture
def emulate(tmp_path: Path) -> Callable[..., list[list[Tensor]]]:
    """`emulate(target, [(kernel, writer), …])`: the outputs of each, one program under qemu."""

    def call(target: str, cases: Sequence[tuple[Kernel, Writer]]) -> list[list[Tensor]]:
        aim = machine(Target.parse(target))
        tools = ["cc"] if aim.family == host_family() else [aim.compiler, aim.qemu[0]]
        for tool in tools:
            if shutil.which(tool) is None:
                pytest.skip(f"{tool} is not installed")
        weights, tensors, steps, outputs = b"", [], [], []
        for made, given in cases:
            numbers = []
            for i, tensor in enumerate(given.tensors):
                dtype = "bool" if tensor.dtype == torch.bool else _held(tensor.dtype)
                numbers.append(len(tensors))
                if i in given.outputs:
                    tensors.append(Placed("output", len(outputs), dtype, (tensor.numel(),)))
                    outputs.append(Port(f"y{len(outputs)}", dtype, (tensor.numel(),)))
                    continue
                tensors.append(Placed("weights", len(weights), dtype, (tensor.numel(),)))
                data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                weights += data + b"\0" * (-len(data) % 64)
            steps.append(Step(made.name, made.name, tuple(numbers)))
        library = build([made for made, _ in cases], target)
        library.write_to_file(str(tmp_path / "kernels.o"), "o")
        edge = EdgeModel(
            target=target, features=aim.features,
            inputs=(Port("x", "float32", (1,)),), outputs=tuple(outputs),
            entries=(Entry({}, 0, tuple(tensors), tuple(steps)),), padded=frozenset(), state=0,
            objects=(("kernels.o", (tmp_path / "kernels.o").read_bytes()),), weights=weights,
        )  # fmt: skip
        folder = tmp_path / "edge"
        folder.mkdir()
        edge_folder.write(edge, folder)
        flat = list(edge_load.load(folder, 2)(torch.zeros(1)))
        return [[flat.pop(0) for _ in given.outputs] for _, given in cases]

    return call
