"""Ops that torch's exporter writes wrongly in ONNX: right forms, and refusals where there is none.

The exporter writes a batch normalization by the batch's own statistics as one by the running ones,
gives a 3-dimensional convolution without bias one of two dimensions, and angles of −π for π.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from onnxscript import opset23
from torch.fx import Node

from qcompiler.errors import UnsupportedError
from qcompiler.program import Program
from qcompiler.rewrite import operand, place

aten = torch.ops.aten
op: Any = opset23  # its annotations hold for tensors of one known type; here the type is any


def _normalized(
    x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, eps: float
) -> tuple[Any, Any, Any]:
    """(y, mean, 1 / √(variance + eps)); the statistics are given back in training only."""
    own = training or mean is None
    if own:
        axes = op.Constant(value_ints=[i for i in range(len(x.shape)) if i != 1])
        centred = op.Sub(x, op.ReduceMean(x, axes))
        variance = op.ReduceMean(op.Mul(centred, centred), axes, keepdims=0)
        mean = op.ReduceMean(x, axes, keepdims=0)
    one, zero = (op.CastLike(op.Constant(value_floats=[n]), x) for n in (1.0, 0.0))
    scale = op.Expand(one, op.Shape(x, start=1, end=2)) if weight is None else weight
    shift = op.Expand(zero, op.Shape(x, start=1, end=2)) if bias is None else bias
    y = op.BatchNormalization(x, scale, shift, mean, variance, epsilon=eps)
    if not own:
        nothing = op.CastLike(op.Constant(value_floats=[]), x)
        return y, nothing, nothing
    small = op.CastLike(op.Constant(value_float=eps), x)
    return y, mean, op.Reciprocal(op.Sqrt(op.Add(variance, small)))


def batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, momentum: float,
    eps: float,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """`aten.native_batch_norm`; the running statistics stay what they are: a model has no state."""
    return _normalized(x, weight, bias, mean, variance, training, eps)


def batch_norm_functional(
    x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, momentum: float,
    eps: float,
) -> tuple[Any, ...]:  # fmt: skip
    """`batch_norm`, and the running statistics, as they were."""
    found = _normalized(x, weight, bias, mean, variance, training, eps)
    return (*found, op.Identity(mean), op.Identity(variance))


def batch_norm_of_batch(
    x: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float
) -> tuple[Any, Any, Any]:
    """`batch_norm` without running statistics."""
    return _normalized(x, weight, bias, None, None, True, eps)


def conv3d(
    x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Any:  # fmt: skip
    """A convolution over three dimensions."""

    def three(sizes: Any) -> list[int]:
        given = [sizes] if isinstance(sizes, int) else [*sizes]
        return given * (3 // len(given))

    return op.Conv(
        x, weight, bias, strides=three(stride), pads=three(padding) * 2, dilations=three(dilation),
        group=groups,
    )  # fmt: skip


def atan2(y: Any, x: Any) -> Any:
    """The angle of (x, y); the exporter's is −π on the negative axis, and 0 / 0 in the middle."""
    if y.dtype not in (1, 10, 11, 16):  # of integers
        y, x = op.Cast(y, to=1), op.Cast(x, to=1)
    zero, half_turn, one = (op.CastLike(op.Constant(value_float=n), x) for n in (0.0, math.pi, 1.0))

    def negative(t: Any) -> Any:  # −0 too
        return op.Less(op.Where(op.Equal(t, zero), op.Div(one, t), t), zero)

    both = op.And(op.IsInf(x), op.IsInf(y))
    middle = op.And(op.Equal(x, zero), op.Equal(y, zero))
    ratio = op.Where(both, op.Mul(op.Sign(x), op.Sign(y)), op.Div(y, op.Where(middle, one, x)))
    turn = op.Where(negative(y), op.Neg(half_turn), half_turn)
    slope = op.Where(middle, y, op.Atan(ratio))
    return op.Where(negative(x), op.Add(slope, turn), slope)


_POOLS = {aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}
_SMOOTHED = (
    aten._upsample_bilinear2d_aa.default, aten._upsample_bilinear2d_aa.vec,
    aten._upsample_bicubic2d_aa.default, aten._upsample_bicubic2d_aa.vec,
)  # fmt: skip
_TAILS = (aten.special_log_ndtr.default, aten.special_erfcx.default)


def refuse(program: Program) -> None:
    """Name what the exporter would write, but wrongly.

    Raises:
        UnsupportedError: names the op, the model's source line and what to do.
    """
    for node in program.exported.graph.nodes:
        reason = _reason(node)
        if reason:
            raise UnsupportedError(f"no ONNX form: '{node.name}' {reason} ({place(node)})")


def _reason(node: Node) -> str:
    if node.target in _POOLS and operand(node, 6) is not None:
        return (
            "divides windows that reach beyond the border by a number of its own; leave out "
            "ceil_mode or divisor_override"
        )
    if node.target in _SMOOTHED and operand(node, 2):
        return "resizes with both antialias and align_corners; leave out one"
    if node.target in _TAILS:
        return "is inaccurate far from zero in ONNX, which has only erf; compile for tvm: or avoid"
    if node.target is aten.scatter_reduce.two and operand(node, 4) == "mean":
        return "puts the mean in each place, which ONNX's operator cannot; divide sums by counts"
    if node.target is aten.pad.default and operand(node, 2) == "replicate":
        shape = operand(node, 0).meta["val"].shape
        for side, pad in enumerate(operand(node, 1)):
            if isinstance(pad, int) and -pad >= shape[-1 - side // 2]:
                return "cuts off all that it then repeats; cut off less"
    return ""
