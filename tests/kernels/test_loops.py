"""Running sums, positions of extremes, sorting and scattering against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompiler.kernels import isa as isas
from qcompiler.kernels.code import Argument, Kernel
from qcompiler.kernels.expression import Access, Expression, Step
from qcompiler.kernels.loops import fold, rank, scatter

Run = Callable[..., Any]
SIZES = (3, 21, 2)


class Plain:
    """Tensors of a kernel that has no expression: outputs first."""

    def __init__(self, outputs: list[Tensor], inputs: list[Tensor]) -> None:
        self.tensors = [*outputs, *inputs]
        self.outputs = list(range(len(outputs)))

    @property
    def arguments(self) -> list[Argument]:
        return [
            Argument(f"a{i}", str(t.dtype).removeprefix("torch."), t.numel())
            for i, t in enumerate(self.tensors)
        ]


def values(dtype: torch.dtype) -> Tensor:
    """With equal elements, zeros of both signs and NaN."""
    x = torch.randn(SIZES, generator=torch.Generator().manual_seed(0)) * 3
    x[:, ::4] = x[:, 1:2]
    if dtype != torch.float32:
        return (x * 1e6).to(dtype) * (1 << 20 if dtype == torch.int64 else 1)
    x[0, 3], x[0, 9] = 0.0, -0.0
    x[1, 5, 0], x[1, 7, 0] = torch.nan, torch.nan
    return x


def folded(kind: str, dtype: torch.dtype, name: str = "f") -> tuple[Kernel, Plain, list[Tensor]]:
    x = values(dtype)
    if kind in ("cumsum", "cumprod", "sum", "prod"):
        x = x.nan_to_num(1.0)
        want = [getattr(x, kind)(1)]
    elif kind.startswith(("arg", "am")):
        want = [getattr(x, kind)(1)]
    else:
        want = [*getattr(x, kind)(1)]
    given = Plain([torch.zeros_like(w) for w in want], [x])
    dtype_name = str(dtype).removeprefix("torch.")
    return fold(name, given.arguments, kind, SIZES, 0, dtype_name), given, want


def ranked(dtype: torch.dtype, down: bool, top: int, name: str = "r") -> Any:
    x = values(dtype)
    want = [t[:, :top] for t in x.sort(dim=1, descending=down, stable=True)]
    given = Plain([torch.zeros_like(w) for w in want], [x])
    dtype_name = str(dtype).removeprefix("torch.")
    return rank(name, given.arguments, SIZES, 0, dtype_name, top, down), given, want


def compare(found: list[Tensor], want: list[Tensor]) -> None:
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(
            got.reshape(expected.shape), expected, rtol=1e-6, atol=1e-5, equal_nan=True
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "kind", ["cumsum", "cumprod", "sum", "prod", "argmax", "argmin", "max", "min", "amax", "amin"]
)
def test_folds(run: Run, kind: str, dtype: torch.dtype) -> None:
    kernel, given, want = folded(kind, dtype)
    compare(run(kernel, given, isas.VNNI), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(("down", "top"), [(False, 21), (True, 21), (True, 4)])
def test_sorting(run: Run, dtype: torch.dtype, down: bool, top: int) -> None:
    kernel, given, want = ranked(dtype, down, top)
    compare(run(kernel, given, isas.VNNI), want)


@pytest.mark.parametrize("add", [False, True])
def test_scattering(run: Run, add: bool) -> None:
    """Places that do not exist are the nearest that do; nothing is written outside."""
    rows = torch.tensor([0, 4, 4, -1, 99])
    source = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    out = torch.ones(5, 3)
    given = Plain([out], [source, rows])
    load = Step("load", "float32", access=Access(1, "float32", 0, (3, 1)))
    kernel = scatter(
        "s", given.arguments, Expression((5, 3), (load,), ()), Access(0, "float32", 0, (0, 1)),
        (Access(2, "int64", 0, (1, 0)),), (3.0, 5.0), add,
    )  # fmt: skip
    want = torch.ones(5, 3)
    for row, line in zip([0, 4, 4, 4, 4], source, strict=True):
        want[row] = want[row] + line if add else line
    if add:  # what is written begins as zeros in a kernel that has outputs alone
        given.tensors[0] = out
    compare(run(kernel, given, isas.VNNI), [want])


@pytest.mark.parametrize("target", ["tvm:aarch64", "tvm:armv7", "tvm:riscv64"])
def test_other_machines(emulate: Run, target: str) -> None:
    cases = [
        folded("cumsum", torch.int64, "f0"), folded("argmax", torch.float32, "f1"),
        ranked(torch.float32, False, 21, "r0"), ranked(torch.int64, True, 5, "r1"),
    ]  # fmt: skip
    results = emulate(target, [(kernel, given) for kernel, given, _ in cases])
    for found, (_, _, want) in zip(results, cases, strict=True):
        compare(found, want)
