"""ATen's elementwise ops as steps of an `Expression`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from qcompiler import ops
from qcompiler.backends.edge_ops import Op, Ref, Storage
from qcompiler.kernels import division
from qcompiler.kernels.expression import Step

aten = torch.ops.aten

NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.bool: "bool",
}

UNARY = {
    aten.neg.default: "neg", aten.abs.default: "abs", aten.relu.default: "relu",
    aten.sqrt.default: "sqrt", aten.rsqrt.default: "rsqrt", aten.reciprocal.default: "reciprocal",
    aten.exp.default: "exp", aten.erf.default: "erf", aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh", aten.silu.default: "silu", aten.hardswish.default: "hardswish",
    aten.hardsigmoid.default: "hardsigmoid", aten.log.default: "log", aten.sin.default: "sin",
    aten.cos.default: "cos", aten.floor.default: "floor", aten.ceil.default: "ceil",
    aten.round.default: "round", aten.logical_not.default: "not", aten.bitwise_not.default: "not",
    aten.sign.default: "sign", aten.expm1.default: "expm1", aten.log1p.default: "log1p",
    aten.log2.default: "log2", aten.log10.default: "log10", aten.exp2.default: "exp2",
    aten.tan.default: "tan", aten.asin.default: "asin", aten.acos.default: "acos",
    aten.atan.default: "atan", aten.sinh.default: "sinh", aten.cosh.default: "cosh",
    aten.trunc.default: "trunc",
}  # fmt: skip
BINARY = {
    aten.mul.Tensor: "mul", aten.mul.Scalar: "mul", aten.div.Tensor: "div",
    aten.div.Scalar: "div", aten.maximum.default: "maximum", aten.minimum.default: "minimum",
    aten.pow.Tensor_Tensor: "pow", aten.atan2.default: "atan2",
    aten.fmod.Tensor: "fmod", aten.fmod.Scalar: "fmod",
    aten.remainder.Tensor: "remainder", aten.remainder.Scalar: "remainder",
    aten.__lshift__.Scalar: "shl", aten.bitwise_left_shift.Tensor: "shl",
    aten.__rshift__.Scalar: "shr", aten.bitwise_right_shift.Tensor: "shr",
}  # fmt: skip
SCALED = {  # a ± alpha · b
    aten.add.Tensor: ("add", False), aten.add.Scalar: ("add", False),
    aten.sub.Tensor: ("sub", False), aten.sub.Scalar: ("sub", False),
    aten.rsub.Tensor: ("sub", True), aten.rsub.Scalar: ("sub", True),
}  # fmt: skip
COMPARE = {
    getattr(getattr(aten, name), form): name
    for name in ("eq", "ne", "lt", "le", "gt", "ge")
    for form in ("Tensor", "Scalar")
}
LOGICAL = {  # on bool; integers bit by bit
    aten.logical_and.default: "and", aten.bitwise_and.Tensor: "and", aten.bitwise_and.Scalar: "and",
    aten.__and__.Tensor: "and", aten.__and__.Scalar: "and", aten.logical_or.default: "or",
    aten.bitwise_or.Tensor: "or", aten.bitwise_or.Scalar: "or", aten.__or__.Tensor: "or",
    aten.__or__.Scalar: "or", aten.bitwise_xor.Tensor: "xor", aten.bitwise_xor.Scalar: "xor",
    aten.__xor__.Tensor: "xor", aten.__xor__.Scalar: "xor", aten.logical_xor.default: "xor",
}  # fmt: skip
BOOLEAN = {"mul": "and", "minimum": "and", "add": "or", "maximum": "or"}  # on bool
SPARSE = "sparse"  # Σ_k table[columns[:, k]] · values[:, k]: `qc::sparse_linear`, transposed
LOOKUPS = frozenset(
    {aten.embedding.default, aten.index_select.default, aten.index.Tensor, aten.gather.default,
     SPARSE}
)  # fmt: skip
SPECIAL = frozenset(
    {
        aten.gelu.default, aten.relu6.default, aten.clamp.default, aten.hardtanh.default,
        aten.leaky_relu.default, aten.pow.Tensor_Scalar, aten.where.self, aten.where.ScalarOther,
        aten.masked_fill.Scalar, aten._to_copy.default, aten.clone.default,
        aten.full.default,
        aten.isnan.default, aten.floor_divide.default, ops.quantize, ops.dequantize, *LOOKUPS,
    }
)  # fmt: skip
ELEMENTWISE = frozenset({*UNARY, *BINARY, *SCALED, *COMPARE, *LOGICAL, *SPECIAL})

REDUCE = {
    aten.mean.dim: "mean",
    aten.sum.dim_IntList: "sum",
    aten.sum.default: "sum",
    aten.mean.default: "mean",
    aten.amax.default: "max",
    aten.amin.default: "min",
}


class Steps(Protocol):
    """What writes an expression: `edge_group.Writer`.

    Attributes:
        fused: whether the machine has a fused multiply-add.
    """

    fused: bool

    def value(self, operand: Any, dtype: str) -> int:
        """A tensor or a number as a step of that dtype."""

    def step(self, op: str, dtype: str, *values: int, numbers: tuple[float, ...] = ()) -> int:
        """A new step."""

    def lookup(self, op: Op) -> int:
        """What an op in `LOOKUPS` takes, at places found at run time."""

    def rows(self, table: Ref, index: Ref) -> int:
        """Rows of a matrix, found at run time."""

    def written(self, index: int) -> Step:
        """The step of that index."""


def writes(op: Op) -> bool:
    """Whether the op is elementwise, and of dtypes that the kernels know."""
    if op.target not in ELEMENTWISE or op.out.dtype not in NAMES:
        return False
    if op.target not in (aten._to_copy.default, aten.clone.default) and any(
        ref.dtype == torch.bfloat16 for ref in (op.out, *op.refs())
    ):
        return False
    if op.target in (ops.quantize, ops.dequantize):
        group = op.args[4] if len(op.args) > 4 else 0
        return group == 0 or not isinstance(group, int)
    return True


def write(op: Op, steps: Steps) -> int:
    """The steps that compute the op's value; returns the last one's index."""
    kind = NAMES[op.out.dtype]
    target, args = op.target, op.args
    if target in UNARY:
        return steps.step(UNARY[target], kind, steps.value(args[0], kind))
    if target is aten.isnan.default:
        if args[0].dtype != torch.float32:
            return steps.value(False, kind)
        return steps.step("isnan", kind, steps.value(args[0], "float32"))
    if target in BINARY:
        name = BINARY[target]
        name = BOOLEAN.get(name, name) if kind == "bool" else name
        return steps.step(name, kind, steps.value(args[0], kind), steps.value(args[1], kind))
    if target in SCALED:
        name, swapped = SCALED[target]
        name = BOOLEAN.get(name, name) if kind == "bool" else name
        alpha = op.kwargs.get("alpha", args[2] if len(args) > 2 else 1)
        a, b = (args[1], args[0]) if swapped else (args[0], args[1])
        right = steps.value(b, kind)
        if alpha != 1:
            right = steps.step("mul", kind, right, steps.value(alpha, kind))
        return steps.step(name, kind, steps.value(a, kind), right)
    if target in COMPARE:
        common = _common(args[0], args[1])
        return steps.step(
            COMPARE[target], "bool", steps.value(args[0], common), steps.value(args[1], common)
        )
    if target in LOGICAL:
        a, b, name = steps.value(args[0], kind), steps.value(args[1], kind), LOGICAL[target]
        if kind != "bool":
            name = f"bit{name}"
        return steps.step(name, kind, a, b)
    return _SPECIAL[target](op, kind, steps)


def _common(a: Any, b: Any) -> str:
    def kind(x: Any) -> Any:
        if isinstance(x, bool | int | float):
            return x
        return torch.empty(x.shape or (), dtype=x.dtype, device="meta")

    return NAMES[torch.result_type(kind(a), kind(b))]


def _argument(op: Op, index: int, name: str, default: Any) -> Any:
    return op.args[index] if len(op.args) > index else op.kwargs.get(name, default)


def _gelu(op: Op, kind: str, steps: Steps) -> int:
    name = "gelu_tanh" if _argument(op, 1, "approximate", "none") == "tanh" else "gelu"
    return steps.step(name, kind, steps.value(op.args[0], kind))


def _bounds(low: Any, high: Any) -> tuple[float, float]:
    return (
        -math.inf if low is None else float(low),
        math.inf if high is None else float(high),
    )


def _clamp(op: Op, kind: str, steps: Steps) -> int:
    if op.target is aten.relu6.default:
        bounds = (0.0, 6.0)
    elif op.target is aten.hardtanh.default:
        bounds = _bounds(_argument(op, 1, "min_val", -1.0), _argument(op, 2, "max_val", 1.0))
    else:
        bounds = _bounds(_argument(op, 1, "min", None), _argument(op, 2, "max", None))
    value = steps.value(op.args[0], kind)
    if kind == "float32":
        return steps.step("clamp", kind, value, numbers=bounds)
    for name, bound in zip(("maximum", "minimum"), bounds, strict=True):
        if math.isfinite(bound):
            value = steps.step(name, kind, value, steps.value(int(bound), kind))
    return value


def _leaky(op: Op, kind: str, steps: Steps) -> int:
    slope = float(_argument(op, 1, "negative_slope", 0.01))
    return steps.step("leaky_relu", kind, steps.value(op.args[0], kind), numbers=(slope,))


def _power(op: Op, kind: str, steps: Steps) -> int:
    base, exponent = steps.value(op.args[0], kind), op.args[1]
    if exponent in (2, 3):
        square = steps.step("mul", kind, base, base)
        return square if exponent == 2 else steps.step("mul", kind, square, base)
    if exponent in (0.5, -0.5):
        return steps.step("sqrt" if exponent > 0 else "rsqrt", kind, base)
    return steps.step("pow", kind, base, steps.value(exponent, kind))


def _where(op: Op, kind: str, steps: Steps) -> int:
    if op.target is aten.masked_fill.Scalar:
        no, condition, yes = op.args[:3]
    else:
        condition, yes, no = op.args[:3]
    return steps.step(
        "where", kind, steps.value(condition, "bool"), steps.value(yes, kind),
        steps.value(no, kind),
    )  # fmt: skip


def _copy(op: Op, kind: str, steps: Steps) -> int:
    return steps.value(op.args[0], kind)


def _lookup(op: Op, kind: str, steps: Steps) -> int:
    return steps.lookup(op)


def _sparse(op: Op, kind: str, steps: Steps) -> int:
    table, values, columns = op.args
    count, each = columns.shape

    def column(ref: Ref, number: int, shape: tuple[int, ...]) -> Ref:
        strides = (ref.strides[0], 0)[: len(shape)]
        return replace(
            ref, offset=ref.offset + number * ref.strides[1], shape=shape, strides=strides
        )

    total = None
    for number in range(each):
        value = steps.rows(table, column(columns, number, (count,)))
        factor = steps.value(column(values, number, (count, 1)), kind)
        value = steps.step("mul", kind, value, factor)
        total = value if total is None else steps.step("add", kind, total, value)
    assert total is not None
    return total


def _floor_divide(op: Op, kind: str, steps: Steps) -> int:
    a, b = steps.value(op.args[0], kind), steps.value(op.args[1], kind)
    if kind != "float32":
        return steps.step("floordiv", kind, a, b)
    rest = steps.step("sub", kind, a, steps.step("remainder", kind, a, b))
    return steps.step("round", kind, steps.step("div", kind, rest, b))


def _full(op: Op, kind: str, steps: Steps) -> int:
    return steps.value(op.args[1], kind)


def _quantize(op: Op, kind: str, steps: Steps) -> int:
    x, scale, zero, _, _, low, high = op.args
    value, numbers = steps.value(x, "float32"), (float(low), float(high))
    known, point = scale.storage.constant, zero.storage.constant
    if steps.fused and known is not None and known.numel() == 1 and point is not None:
        middle = int(point.reshape(-1)[0])
        value = _unclamped(value, op, known, point, steps)
        found = division.factors(known, low - middle, high - middle)
        if found is not None:
            parts = [steps.value(_one(number), "float32") for number in found]
            last = steps.value(zero, NAMES[zero.dtype])
            return steps.step("quantize_by", kind, value, *parts, last, numbers=numbers)
    return steps.step(
        "quantize", kind, value, steps.value(scale, "float32"),
        steps.value(zero, NAMES[zero.dtype]), numbers=numbers,
    )  # fmt: skip


def _unclamped(value: int, op: Op, scale: Tensor, zero: Tensor, steps: Steps) -> int:
    """What a ReLU or clamp before the quantization was given, where rounding clamps as narrowly."""
    step = steps.written(value)
    if step.op not in ("relu", "clamp"):
        return value
    ends = torch.tensor(step.numbers or (0.0, math.inf))
    low, high = (int(n) for n in op.args[5:7])
    q = ops.quantize(ends, scale.reshape(()), zero.reshape(()), 0, 0, low, high)
    return step.values[0] if q.tolist() == [low, high] else value


def _one(number: float) -> Ref:
    """A constant that is read from memory, so that layers with others share their code."""
    return Ref(Storage(torch.float32, 1, torch.tensor([number])), torch.float32, 0, (), ())


def _dequantize(op: Op, kind: str, steps: Steps) -> int:
    q, scale, zero = op.args[:3]
    return steps.step(
        "dequantize", kind, steps.value(q, NAMES[q.dtype]), steps.value(scale, "float32"),
        steps.value(zero, NAMES[zero.dtype]),
    )  # fmt: skip


_SPECIAL: dict[Any, Callable[[Op, str, Steps], int]] = {
    aten.gelu.default: _gelu,
    aten.relu6.default: _clamp,
    aten.clamp.default: _clamp,
    aten.hardtanh.default: _clamp,
    aten.leaky_relu.default: _leaky,
    aten.pow.Tensor_Scalar: _power,
    aten.where.self: _where,
    aten.where.ScalarOther: _where,
    aten.masked_fill.Scalar: _where,
    aten._to_copy.default: _copy,
    aten.clone.default: _copy,
    **dict.fromkeys(LOOKUPS, _lookup),
    SPARSE: _sparse,
    aten.floor_divide.default: _floor_divide,
    aten.full.default: _full,
    ops.quantize: _quantize,
    ops.dequantize: _dequantize,
}
