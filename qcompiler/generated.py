"""Operators that a code generator makes and another runtime runs inside its own graph.

One operator computes rows step by step, quantizes them for each token, and computes all linears
that read the result:

    x = steps(x_0, x_1, …),   y_i = quantized(x) · dequantized(weight_i)ᵀ + bias_i

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
class Step:
    """One computation on rows.

    Attributes:
        kind: "add", "mul", "silu", "gelu", "gelu_tanh", "rms_norm" (x / √(mean x² + ε) · scale),
            "layer_norm" ((x − mean) / √(var + ε) · scale + shift) or "rotate" (x · (left ⊗ right)).
        operands: numbers of values: the operator's inputs are the first, then come the steps.
        constants: float32 of 1 or K numbers: the second operand of "add" and "mul" where they have
            but one; scale, and shift, of norms. The factors left and right of `qc::rotate`.
        epsilon: ε.
    """

    kind: str
    operands: tuple[int, ...]
    constants: tuple[Tensor, ...] = ()
    epsilon: float = 0.0


@dataclass(frozen=True, eq=False)
class Operator:
    """One operator: float32 (…, K) → float32 (…, N) for each linear; without any, (…, K).

    Attributes:
        name: for people.
        depth: K.
        activation: the `QType` of what the linears read, with a range for each token; empty where
            they read it as it is: float16, on a GPU.
        linears: may be none, where the last step's value is what is wanted.
        inputs: how many tensors (…, K) it reads.
        steps: the last is what is quantized; without any, the first input is.
        kept: numbers of values that are outputs too, behind those of the linears.
    """

    name: str
    depth: int
    activation: str
    linears: tuple[Linear, ...]
    inputs: int = 1
    steps: tuple[Step, ...] = ()
    kept: tuple[int, ...] = ()

    @property
    def columns(self) -> tuple[int, ...]:
        """The last size of each output."""
        own = tuple(len(linear.q) for linear in self.linears) or (self.depth,)
        return own + (self.depth,) * len(self.kept)


@dataclass(frozen=True)
class Library:
    """Operators compiled to a library, and what the graph holds for it.

    Attributes:
        content: of the file.
        number: by which the library knows a graph that was made for it.
        weights: the constants of each operator, packed as its kernels read them.
        tables: whether rows of the operator's first weight can be looked up in those constants, as
            an embedding that is tied to it wants.
    """

    content: bytes
    number: int
    weights: tuple[bytes, ...]
    tables: tuple[bool, ...]


Generate = Callable[[Sequence[Operator]], Library]
