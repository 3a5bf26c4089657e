"""Elementwise expressions: what is computed for each element of a tensor, and where it is stored.

An `Expression` is a list of steps over one output shape. It stands alone as an elementwise kernel,
or follows a kernel that makes a tensor row by row (a matrix product, a norm), whose result is then
its
value 0 and never goes through memory: dequantization, bias, activation, residual sum and
requantization are all steps of such an expression.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.errors import UnsupportedError
from qcompiler.kernels import code

FLOAT = code.FLOAT
NARROW = "bfloat16"  # in memory 16 bits, declared as uint16; in registers a float32


@dataclass(frozen=True)
class Access:
    """How an argument's elements lie under the output's shape.

    Attributes:
        argument: which of the kernel's arguments.
        dtype: of its elements.
        offset: of the first element.
        strides: per dimension of the output, in elements; 0 where it is broadcast.
    """

    argument: int
    dtype: str
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One value of an expression.

    Attributes:
        op: a name in `OPS`, or `anchor` (the result of the kernel that the expression follows),
            `load` (with an access), `lookup` (an access into a table whose row is read from
            `index`; numbers: elements from row to row, rows), `constant`.
        dtype: of the value.
        values: indices of earlier steps.
        access: for `load` and `lookup`.
        index: for `lookup`, where the row numbers lie; of stride 0 along the last dimension.
        numbers: constants of the op.
    """

    op: str
    dtype: str
    values: tuple[int, ...] = ()
    access: Access | None = None
    numbers: tuple[float, ...] = ()
    index: Access | None = None


@dataclass(frozen=True)
class Expression:
    """Steps over a shape, and where values are stored.

    Attributes:
        shape: of the output; the last dimension is the one that vectors run along.
        steps: in order of computation.
        stores: pairs of a step's index and where it goes.
    """

    shape: tuple[int, ...]
    steps: tuple[Step, ...]
    stores: tuple[tuple[int, Access], ...]

    @property
    def rows(self) -> int:
        """The product of all dimensions but the last."""
        return prod(self.shape[:-1])

    @property
    def width(self) -> int:
        """The last dimension."""
        return self.shape[-1] if self.shape else 1


def _select(condition: Any, yes: Any, no: Any) -> Any:
    return T.Select(condition, yes, no)


def _truth(value: bool, lanes: int) -> Any:
    return code.spread(T.Cast("bool", T.int32(value)), lanes)


def _quantize(lanes: int, quotient: Any, zero: Any, numbers: tuple[float, ...]) -> Any:
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


def _unary(name: str, lanes: int, dtype: str, x: Any, numbers: tuple[float, ...]) -> Any:
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
            return _select(x > zero, x, x * code.number(numbers[0], lanes))
        case "round":
            return code.round_half_even(x, lanes)
        case "not":
            return _select(x, _truth(False, lanes), _truth(True, lanes))
        case "log" | "sin" | "cos" | "floor" | "ceil":
            return code.intrinsic(f"llvm.{name}", code.named(FLOAT, lanes), x)
    raise UnsupportedError(f"no elementwise op '{name}'")


UNARY = frozenset({
    "neg", "abs", "relu", "sqrt", "rsqrt", "reciprocal", "exp", "erf",
    "sigmoid", "tanh", "silu", "gelu", "gelu_tanh", "hardsigmoid", "hardswish", "clamp",
    "leaky_relu", "round", "not", "log", "sin", "cos", "floor", "ceil",
})  # fmt: skip
BINARY = frozenset({
    "add", "sub", "mul", "div", "maximum", "minimum", "pow", "eq",
    "ne", "lt", "le", "gt", "ge", "and", "or",
})  # fmt: skip
# quantize divides by a scale; quantize_by multiplies with the two factors of `division.factors`.
OTHER = frozenset({"where", "cast", "quantize", "quantize_by", "dequantize"})
OPS = UNARY | BINARY | OTHER


def _binary(name: str, lanes: int, a: Any, b: Any) -> Any:
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
        case "ne":
            return T.NE(a, b)
        case "lt":
            return a < b
        case "le":
            return a <= b
        case "gt":
            return a > b
        case "ge":
            return a >= b
        case "and":
            return T.And(a, b) if lanes == 1 else _select(a, b, a)
        case "or":
            return T.Or(a, b) if lanes == 1 else _select(a, a, b)
    raise UnsupportedError(f"no elementwise op '{name}'")


class Emitter:
    """Writes an expression's code, vector by vector."""

    def __init__(self, expression: Expression, buffers: Sequence[Any]) -> None:
        self.expression, self.buffers = expression, buffers

    def coordinates(self, row: Any) -> list[Any]:
        """The leading coordinates of a row's number."""
        found: list[Any] = []
        for size in reversed(self.expression.shape[:-1]):
            found.insert(0, row % size if size > 1 else 0)
            row = row // size if size > 1 else row
        return found

    def _start(self, access: Access, row: list[Any], column: Any) -> Any:
        start: Any = access.offset
        strides = access.strides or (0,)  # a single number
        for index, stride in zip([*row, column], strides, strict=True):
            if stride:
                start = start + index * stride
        return start

    def _read(self, access: Access, start: Any, lanes: int) -> Any:
        buffer = self.buffers[access.argument]
        stride = access.strides[-1] if access.strides else 0
        if stride == 0:
            value = code.spread(code.bind(code.load(buffer, start, 1)), lanes)
        else:
            value = code.load(buffer, start, lanes, stride)
        if access.dtype == "bool":
            return T.NE(value, code.spread(T.uint8(0), lanes))
        return code.widen(value, lanes) if access.dtype == NARROW else value

    def vector(self, row: list[Any], column: Any, lanes: int, anchor: Any = None) -> None:
        """Compute and store `lanes` elements from (row, column); `anchor` is value 0."""
        values: list[Any] = []
        for step in self.expression.steps:
            given = [values[i] for i in step.values]
            value = self._value(step, given, row, column, lanes, anchor)
            # TVM's analyzer fails on bound comparisons of vectors.
            values.append(value if step.dtype == "bool" else code.bind(value))
        for index, access in self.expression.stores:
            value, dtype = values[index], access.dtype
            have = self.expression.steps[index].dtype
            if dtype == "bool":
                value = _select(
                    value, code.spread(T.uint8(1), lanes), code.spread(T.uint8(0), lanes)
                )
            elif dtype == NARROW:
                if have != dtype:
                    value = code.round_bfloat16(code.bind(value), lanes)
                value = code.narrow(value, lanes)
            elif have != dtype or dtype in ("int8", "uint8"):
                value = code.cast(value, dtype, lanes)
            stride = access.strides[-1] if access.strides else 1
            code.store(
                self.buffers[access.argument],
                self._start(access, row, column),
                value,
                lanes,
                stride,
            )

    def _value(
        self, step: Step, given: list[Any], row: list[Any], column: Any, lanes: int, anchor: Any
    ) -> Any:
        access = step.access
        if step.op == "anchor":
            return anchor
        if step.op == "load" and access is not None:
            value = self._read(access, self._start(access, row, column), lanes)
            if access.dtype in ("int8", "uint8"):  # integers travel as int32
                value = code.cast(value, "int32", lanes)
            return value
        if step.op == "lookup" and access is not None:
            return self._lookup(step, access, row, column, lanes)
        if step.op == "constant":
            if step.dtype in (FLOAT, NARROW):
                return code.number(step.numbers[0], lanes)
            if step.dtype == "bool":
                return _truth(bool(step.numbers[0]), lanes)
            return code.spread(T.Cast(step.dtype, T.int64(int(step.numbers[0]))), lanes)
        if step.op == "where":
            return _select(*given)
        if step.op == "cast":
            return self._cast(step, given[0], lanes)
        if step.op == "quantize":
            return _quantize(lanes, given[0] / given[1], given[2], step.numbers)
        if step.op == "quantize_by":
            x, high, low, zero = given
            return _quantize(lanes, code.fma(x, high, x * low, lanes), zero, step.numbers)
        if step.op == "dequantize":
            q = code.cast(given[0], FLOAT, lanes) - code.cast(given[2], FLOAT, lanes)
            return q * given[1]
        if step.op in UNARY:
            return _unary(step.op, lanes, step.dtype, given[0], step.numbers)
        return _binary(step.op, lanes, *given)

    def _cast(self, step: Step, value: Any, lanes: int) -> Any:
        have = self.expression.steps[step.values[0]].dtype
        want = "int32" if step.dtype in ("int8", "uint8") else step.dtype
        if have == NARROW:
            have = FLOAT
        if want == NARROW and have == FLOAT:
            return code.round_bfloat16(value, lanes)
        if have == "bool":
            one, zero = (code.spread(T.Cast(want, T.int32(n)), lanes) for n in (1, 0))
            return _select(value, one, zero)
        if want == "bool":
            return T.Cast(code.named("bool", lanes), value)
        if have in ("int8", "uint8"):
            have = "int32"
        return value if have == want else code.cast(value, want, lanes)

    def _lookup(self, step: Step, access: Access, row: list[Any], column: Any, lanes: int) -> Any:
        if step.index is None or (lanes > 1 and step.index.strides[-1]):
            raise UnsupportedError("a lookup's row must not vary along the last dimension")
        distance, rows = (int(n) for n in step.numbers)
        found = code.load(
            self.buffers[step.index.argument], self._start(step.index, row, column), 1
        )
        # Never read outside the table, whatever the caller passed.
        found = T.Cast(
            "int32",
            T.min(
                T.max(found, T.Cast(step.index.dtype, T.int32(0))),
                T.Cast(step.index.dtype, T.int32(rows - 1)),
            ),
        )
        start = self._start(access, row, column) + code.bind(found) * distance
        value = self._read(access, start, lanes)
        return code.cast(value, "int32", lanes) if access.dtype in ("int8", "uint8") else value

    def value(self, row: list[Any], column: Any, lanes: int) -> Any:
        """The last step's value, where the expression is another kernel's input."""
        values: list[Any] = []
        for step in self.expression.steps:
            given = [values[i] for i in step.values]
            value = self._value(step, given, row, column, lanes, None)
            values.append(value if step.dtype == "bool" else code.bind(value))
        return values[-1]

    def turned(self, dim: int) -> Emitter:
        """The same with dimension `dim` last, so that vectors run along it."""
        order = [i for i in range(len(self.expression.shape)) if i != dim] + [dim]

        def turn(access: Access | None) -> Access | None:
            if access is None:
                return None
            return replace(access, strides=tuple(access.strides[i] for i in order))

        steps = tuple(
            replace(s, access=turn(s.access), index=turn(s.index)) for s in self.expression.steps
        )
        shape = tuple(self.expression.shape[i] for i in order)
        return Emitter(Expression(shape, steps, ()), self.buffers)
