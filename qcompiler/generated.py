"""Operators that a code generator makes and another runtime runs inside its own graph.

One operator rotates rows, or quantizes them for each token, or first the one and then the other,
and computes all linears that read the result:

    y_i = quantized(x · (left ⊗ right)) · dequantized(weight_i)ᵀ + bias_i

The backend that writes the graph cuts them out; the one that generates code compiles them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Linear:
    """One of an operator's linears.

    Attributes:
        name: the program's node.
        q: weights, int8 or uint8 (N, K).
        scale, zero_point, axis, group: as in `qc::dequantize`.
        bias: float32 (N,), or None.
    """

    name: str
    q: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int
    group: int
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class Operator:
    """One operator: float32 (…, K) → float32 (…, N) for each linear; without any, (…, K).

    Attributes:
        name: for people.
        depth: K.
        rotation: the factors left and right of `qc::rotate`, or None.
        activation: the `QType` of what the linears read, with a range for each token.
        linears: may be none where there is a rotation.
    """

    name: str
    depth: int
    rotation: tuple[Tensor, Tensor] | None
    activation: str
    linears: tuple[Linear, ...]

    @property
    def columns(self) -> tuple[int, ...]:
        """The last size of each output."""
        return tuple(len(linear.q) for linear in self.linears) or (self.depth,)


@dataclass(frozen=True)
class Library:
    """Operators compiled to a library, and what the graph holds for it.

    Attributes:
        content: of the file.
        number: by which the library knows a graph that was made for it.
        weights: the constants of each operator, packed as its kernels read them.
    """

    content: bytes
    number: int
    weights: tuple[bytes, ...]


Generate = Callable[[Sequence[Operator]], Library]
