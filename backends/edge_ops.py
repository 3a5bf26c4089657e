"""A program at fixed sizes: ops on memory. `edge_trace` makes it, the code generator reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcompiler import qtype


@dataclass(eq=False)
class Weight:
    """A constant tensor that is stored as integers: (q − zero_point) · scale.

    Attributes:
        q: int8 or uint8 of the tensor's shape.
        scale, zero_point, axis, group: as in `qc::dequantize`.
    """

    q: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int
    group: int

    def dequantized(self) -> Tensor:
        """The float tensor."""
        return qtype.dequantize(self.q, self.scale, self.zero_point, self.axis, self.group)


@dataclass(eq=False)
class Storage:
    """A piece of memory.

    Attributes:
        dtype: of its elements.
        size: number of elements.
        constant: its contents where they are known.
        weight: its contents where they are quantized.
        port: name of the input that it is.
        state: its number among what lives from run to run; −1 for the rest.
        maker: the op that writes it.
        readers: the ops that read it.
    """

    dtype: torch.dtype
    size: int
    constant: Tensor | None = None
    weight: Weight | None = None
    port: str = ""
    state: int = -1
    maker: Op | None = None
    readers: list[Op] = field(default_factory=list)


@dataclass(frozen=True)
class Ref:
    """A tensor: a strided view of a storage, in elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie in order without gaps."""
        return dense_order(self) == tuple(range(len(self.shape)))


def dense_order(ref: Ref) -> tuple[int, ...] | None:
    """The dimensions from the outermost to the innermost where the tensor has no gaps."""
    order = sorted(range(len(ref.shape)), key=lambda d: (-ref.strides[d], d))
    order = [d for d in order if ref.shape[d] != 1] + [d for d in order if ref.shape[d] == 1]
    expected = 1
    for d in reversed([d for d in order if ref.shape[d] != 1]):
        if ref.strides[d] != expected:
            return None
        expected *= ref.shape[d]
    kept = [d for d in order if ref.shape[d] != 1]
    # Dimensions of size 1 lie anywhere: leave them where the logical order has them.
    if kept == sorted(kept):
        return tuple(range(len(ref.shape)))
    return tuple(order)


@dataclass(eq=False)
class Op:
    """One op: arguments are `Ref`s and plain values, nested as in the op's schema."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Ref, ...]
    label: str

    @property
    def out(self) -> Ref:
        """The only output."""
        return self.outputs[0]

    def refs(self) -> list[Ref]:
        """The tensors that it reads."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return [leaf for leaf in leaves if isinstance(leaf, Ref)]


@dataclass(frozen=True)
class Trace:
    """A program at fixed sizes."""

    inputs: tuple[Ref, ...]
    outputs: tuple[Ref, ...]
    ops: tuple[Op, ...]
