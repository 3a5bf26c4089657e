"""The ops of an expression's steps, on vectors of some lanes: their code."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.errors import UnsupportedError
from qcompiler.kernels import code

FLOAT = code.FLOAT


def select(condition: Any, yes: Any, no: Any) -> Any:
    """Lane by lane, `yes` where the condition holds."""
    return T.Select(condition, yes, no)


def truth(value: bool, lanes: int) -> Any:
    """The same truth value in all lanes."""
    return code.spread(T.Cast("bool", T.int32(value)), lanes)


def quantized(lanes: int, quotient: Any, zero: Any, numbers: tuple[float, ...]) -> Any:
    """round(quotient) + zero between the two numbers, as int32."""
    low, high = (code.number(bound, lanes) for bound in numbers)
    zero = code.cast(zero, "int32", lanes)
    shift = code.bind(code.cast(zero, FLOAT, lanes))
    q = code.minimum(code.maximum(quotient, low - shift), high - shift)
    return code.round_to_int(code.bind(q), lanes) + zero


def _gelu(lanes: int, x: Any, tanh: bool) -> Any:
    half = code.number(0.5, lanes)
    if tanh:
        inner = x * code.number(0.7978845608028654, lanes) * (
            code.number(1.0, lanes) + code.number(0.044715, lanes) * x * x
        )  # fmt: skip
        bent = code.tanh(code.bind(inner), lanes)
    else:
        bent = code.erf(x * code.number(0.7071067811865476, lanes), lanes)
    scaled = code.bind(x * half)
    return code.fma(scaled, bent, scaled, lanes)


def unary(name: str, lanes: int, dtype: str, x: Any, numbers: tuple[float, ...]) -> Any:
    """An op of `UNARY`; `dtype`: of the result, `numbers`: its constants."""
    zero = code.spread(T.Cast(dtype, T.int32(0)), lanes) if dtype != "bool" else None
    match name:
        case "neg":
            return zero - x
        case "abs":
            return code.maximum(x, zero - x)
        case "relu":
            return code.maximum(x, zero)
        case "sqrt":
            return code.intrinsic("llvm.sqrt", code.named(FLOAT, lanes), x)
        case "rsqrt":
            root = code.intrinsic("llvm.sqrt", code.named(FLOAT, lanes), x)
            return code.number(1.0, lanes) / root
        case "reciprocal":
            return code.number(1.0, lanes) / x
        case "exp":
            return code.exp(x, lanes)
        case "erf":
            return code.erf(x, lanes)
        case "sigmoid":
            return code.sigmoid(x, lanes)
        case "tanh":
            return code.tanh(x, lanes)
        case "silu":
            return x * code.sigmoid(x, lanes)
        case "gelu":
            return _gelu(lanes, x, False)
        case "gelu_tanh":
            return _gelu(lanes, x, True)
        case "hardsigmoid" | "hardswish":
            gate = code.minimum(
                code.maximum(x + code.number(3.0, lanes), code.number(0.0, lanes)),
                code.number(6.0, lanes),
            ) / code.number(6.0, lanes)
            return gate if name == "hardsigmoid" else x * gate
        case "clamp":
            low, high = (code.number(bound, lanes) for bound in numbers)
            return code.minimum(code.maximum(x, low), high)
        case "leaky_relu":
            return select(x > zero, x, x * code.number(numbers[0], lanes))
        case "round":
            return code.round_half_even(x, lanes)
        case "not":
            return select(x, truth(False, lanes), truth(True, lanes))
        case "isnan":
            return code.is_nan(x, lanes)
        case "sign":
            one = code.spread(T.Cast(dtype, T.int32(1)), lanes)
            return select(x > zero, one, select(x < zero, zero - one, x))
        case "expm1":
            return code.expm1(x, lanes)
        case "log1p":
            return code.log1p(x, lanes)
        case _ if name in LIBRARY:
            return code.intrinsic(f"llvm.{name}", code.named(FLOAT, lanes), x)
    raise UnsupportedError(f"no elementwise op '{name}'")


LIBRARY = frozenset({
    "log", "log2", "log10", "exp2", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh",
    "floor", "ceil", "trunc",
})  # fmt: skip
UNARY = LIBRARY | frozenset({
    "neg", "abs", "relu", "sqrt", "rsqrt", "reciprocal", "exp", "erf",
    "sigmoid", "tanh", "silu", "gelu", "gelu_tanh", "hardsigmoid", "hardswish", "clamp",
    "leaky_relu", "round", "not", "sign", "expm1", "log1p", "isnan",
})  # fmt: skip
BINARY = frozenset({
    "add", "sub", "mul", "div", "maximum", "minimum", "pow", "eq",
    "ne", "lt", "le", "gt", "ge", "and", "or", "atan2", "fmod", "remainder", "floordiv",
    "xor", "bitand", "bitor", "bitxor", "shl", "shr",
})  # fmt: skip
# quantize divides by a scale; quantize_by multiplies with the two factors of `division.factors`.
OTHER = frozenset({"where", "cast", "quantize", "quantize_by", "dequantize"})
OPS = UNARY | BINARY | OTHER


def binary(name: str, lanes: int, dtype: str, a: Any, b: Any) -> Any:
    """An op of `BINARY`; `dtype`: of the result."""
    match name:
        case "add":
            return a + b
        case "sub":
            return a - b
        case "mul":
            return a * b
        case "div":
            return a / b
        case "maximum":
            return code.maximum(a, b)
        case "minimum":
            return code.minimum(a, b)
        case "pow":
            return code.intrinsic("llvm.pow", code.named(FLOAT, lanes), a, b)
        case "eq":
            return T.EQ(a, b)
        case "ne":  # of floats T.NE is false beside NaN
            return select(T.EQ(a, b), truth(False, lanes), truth(True, lanes))
        case "lt":
            return a < b
        case "le":
            return a <= b
        case "gt":
            return a > b
        case "ge":
            return a >= b
        case "and":
            return T.And(a, b) if lanes == 1 else select(a, b, a)
        case "xor":
            turned = select(b, truth(False, lanes), truth(True, lanes))
            return select(a, turned, b)
        case "or":
            return T.Or(a, b) if lanes == 1 else select(a, a, b)
        case "atan2":
            return code.intrinsic("llvm.atan2", code.named(FLOAT, lanes), a, b)
        case "fmod" | "remainder":
            if dtype != FLOAT:
                return T.truncmod(a, b) if name == "fmod" else T.floormod(a, b)
            return code.remainder(a, b, name == "remainder", lanes)
        case "floordiv":
            return T.floordiv(a, b)
        case "bitand":
            return T.bitwise_and(a, b)
        case "bitor":
            return T.bitwise_or(a, b)
        case "bitxor":
            return T.bitwise_xor(a, b)
        case "shl":
            return T.shift_left(a, b)
        case "shr":
            return T.shift_right(a, b)
    raise UnsupportedError(f"no elementwise op '{name}'")
