"""What a backend says of the kernels that run: the same terms for every runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Layer:
    """One matrix product or convolution as it runs.

    Attributes:
        name: the program's node.
        path: its module path, where the plan knows it.
        op: the operator or kernel that runs.
        kernel: "integer", "weights only" (integer weights, activations quantized inside or
            float), "float8" or "bfloat16" (both operands; sums in float32) or "float".
        reason: why it is not integer; empty for integer, float8 and bfloat16 kernels.
    """

    name: str
    path: str
    op: str
    kernel: str
    reason: str = ""


@dataclass(frozen=True)
class Audit:
    """The findings.

    Attributes:
        layers: all products and convolutions, in order.
        kernels: how often each operator or kernel runs.
        stray: Q/DQ nodes that feed a float kernel or undo each other, instead of being fused; 0
            where conversions are part of the kernels.
        broken: promises that were not kept, for people.
        time_share: share of the time by operator, largest first, where it was profiled.
    """

    layers: tuple[Layer, ...]
    kernels: Mapping[str, int]
    stray: int = 0
    broken: tuple[str, ...] = ()
    time_share: tuple[tuple[str, float], ...] = field(default=())
