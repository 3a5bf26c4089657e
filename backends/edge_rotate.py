"""`qc::rotate` by the Walsh–Hadamard kernel: its factors are found in the constants."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qcompiler.backends.edge_group import Group, Writer
from qcompiler.backends.edge_ops import Op
from qcompiler.errors import UnsupportedError
from qcompiler.hadamard import sylvester
from qcompiler.kernels.hadamard import Factor, rotate_rows

if TYPE_CHECKING:
    from qcompiler.backends.edge_calls import Calls


def split(matrix: Tensor) -> tuple[Tensor, int]:
    """(core, order): matrix = core ⊗ the Walsh–Hadamard matrix of that order, as large as it goes.

    The Walsh–Hadamard factor is orthogonal, entries ±1/√order; an order of 1 is none.
    """
    size = len(matrix)
    order = size & -size
    while order > 1:
        core = (matrix[::order, ::order] * order**0.5).contiguous()
        whole = torch.kron(core.double(), sylvester(order))
        if torch.allclose(whole, matrix.double(), rtol=0, atol=1e-6):
            return core, order
        order //= 2
    return matrix, 1


def factors_of(calls: Calls, op: Op, read: Writer) -> tuple[tuple[Factor, ...], float]:
    """The factors of a `qc::rotate`, and the result's scale.

    Args:
        calls: for the constants.
        op: the rotation.
        read: of the kernel that rotates; gets the matrices as arguments.
    """
    if any(ref.storage.constant is None for ref in op.args[1:]):
        raise UnsupportedError("a rotation by computed matrices")
    factors: list[Factor] = []
    stride, scale = 1, 1.0
    for ref in reversed(op.args[1:]):
        size = ref.shape[0]
        core, order = split(ref.storage.constant.reshape(size, size))
        if order > 1:
            scale *= order**-0.5
            last = factors[-1] if factors else None
            if last is not None and last.matrix < 0:
                factors[-1] = Factor(last.size * order, last.stride)
            else:
                factors.append(Factor(order, stride))
        stride *= order
        if len(core) > 1:
            dense = calls.constant((ref.storage.constant, "core"), core.float().contiguous)
            factors.append(Factor(len(core), stride, read.argument(dense.storage)))
        else:
            scale *= float(core)
        stride *= len(core)
    return tuple(factors), scale


def rotation(calls: Calls, g: Group, op: Op) -> None:
    """The call for `qc::rotate`."""
    x = op.args[0]
    read = calls.writer(x.shape, [])
    read.value(x, "float32")
    source = read.expression()
    factors, scale = factors_of(calls, op, read)
    writer = calls.writer(op.out.shape, read.arguments)
    writer.keep(op.out, writer.step("anchor", "float32"))
    writer.members(g, calls.stored)
    expression = writer.expression()
    calls.add(
        "rotate", op.label, (source, factors, scale, expression),
        lambda name: rotate_rows(
            name, writer.kernel_arguments(), source, factors, scale, expression
        ), writer,
    )  # fmt: skip
