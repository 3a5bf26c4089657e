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
FLOAT8 = "float8_e4m3fn"  # read alone, on GPUs; declared as uint8, in registers a float32


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
            `load` (with an access), `lookup` (an access into a table whose rows, in one or more
            of its dimensions, are read from `indices`; numbers: for each of them the elements
            from row to row and the rows; negative ones count from the end), `constant`.
        dtype: of the value.
        values: indices of earlier steps.
        access: for `load` and `lookup`.
        indices: for `lookup`, where the row numbers lie.
        numbers: constants of the op.
    """

    op: str
    dtype: str
    values: tuple[int, ...] = ()
    access: Access | None = None
    numbers: tuple[float, ...] = ()
    indices: tuple[Access, ...] = ()

    @property
    def wanders(self) -> bool:
        """Whether neighbours along the last dimension are looked up apart."""
        return any(index.strides and index.strides[-1] for index in self.indices)


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
    def wanders(self) -> bool:
        """Whether it must be computed element by element."""
        return any(step.wanders for step in self.steps)

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
        case "isnan":
            return code.is_nan(x, lanes)
        case "sign":
            one = code.spread(T.Cast(dtype, T.int32(1)), lanes)
            return _select(x > zero, one, _select(x < zero, zero - one, x))
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


def _binary(name: str, lanes: int, dtype: str, a: Any, b: Any) -> Any:
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
        case "xor":
            turned = _select(b, _truth(False, lanes), _truth(True, lanes))
            return _select(a, turned, b)
        case "or":
            return T.Or(a, b) if lanes == 1 else _select(a, a, b)
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


class Emitter:
    """Writes an expression's code, vector by vector."""

    def __init__(self, expression: Expression, buffers: Sequence[Any]) -> None:
        self.expression, self.buffers = expression, buffers

    def coordinates(self, row: Any) -> list[Any]:
        """The leading coordinates of a row's number."""
        found: list[Any] = []
        leading = self.expression.shape[:-1]
        for place, size in reversed([*enumerate(leading)]):
            if not code.known(size):
                if place == 0:  # a row's number is below that of all rows
                    return [row, *found]
                found.insert(0, code.remainder_of(row, size))
                row = code.quotient(row, size)
                continue
            found.insert(0, row % size if size > 1 else 0)
            row = row // size if size > 1 else row
        return found

    def start(self, access: Access, row: list[Any], column: Any) -> Any:
        """The index of an access's element at those coordinates."""
        start: Any = access.offset
        strides = access.strides or (0,)  # a single number
        for index, stride in zip([*row, column], strides, strict=True):
            if not code.same(stride, 0):
                start = start + index * stride
        return start

    def _read(self, access: Access, start: Any, lanes: int) -> Any:
        buffer = self.buffers[access.argument]
        stride = access.strides[-1] if access.strides else 0
        if code.same(stride, 0):
            value = code.spread(code.bind(code.load(buffer, start, 1)), lanes)
        else:
            value = code.load(buffer, start, lanes, stride)
        if access.dtype == "bool":
            return T.NE(value, code.spread(T.uint8(0), lanes))
        if access.dtype == FLOAT8:
            return code.cast(code.bits(code.bind(value), FLOAT8, lanes), FLOAT, lanes)
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
                self.start(access, row, column),
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
            value = self._read(access, self.start(access, row, column), lanes)
            if access.dtype in ("int8", "uint8"):  # integers travel as int32
                value = code.cast(value, "int32", lanes)
            return value
        if step.op == "lookup" and access is not None:
            return self._lookup(step, access, row, column, lanes)
        if step.op == "constant":
            if step.dtype in (FLOAT, NARROW, FLOAT8):
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
        return _binary(step.op, lanes, step.dtype, *given)

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
        if lanes > 1 and step.wanders:
            raise UnsupportedError("a lookup's row must not vary along the last dimension")
        start = self.start(access, row, column)
        for index, distance, rows in zip(
            step.indices, step.numbers[::2], step.numbers[1::2], strict=True
        ):
            start = start + self.found(index, row, column, int(rows)) * int(distance)
        value = self._read(access, start, lanes)
        return code.cast(value, "int32", lanes) if access.dtype in ("int8", "uint8") else value

    def found(self, index: Access, row: list[Any], column: Any, rows: int) -> Any:
        """The row number that is read there: never outside the table, whatever it holds."""
        number = code.bind(
            code.load(self.buffers[index.argument], self.start(index, row, column), 1)
        )
        zero, count, one = (T.Cast(index.dtype, T.int32(n)) for n in (0, rows, 1))
        number = T.Select(number < zero, number + count, number)
        return code.bind(T.Cast("int32", T.min(T.max(number, zero), count - one)))

    def value(self, row: list[Any], column: Any, lanes: int, anchor: Any = None) -> Any:
        """The last step's value, where the expression is another kernel's input."""
        values: list[Any] = []
        for step in self.expression.steps:
            given = [values[i] for i in step.values]
            value = self._value(step, given, row, column, lanes, anchor)
            values.append(value if step.dtype == "bool" else code.bind(value))
        return values[-1]

    def turned(self, dim: int) -> Emitter:
        """The same with dimension `dim` last, so that vectors run along it."""
        order = [i for i in range(len(self.expression.shape)) if i != dim] + [dim]

        def turn(access: Access) -> Access:
            return replace(access, strides=tuple(access.strides[i] for i in order))

        steps = tuple(
            replace(s, access=s.access and turn(s.access), indices=tuple(map(turn, s.indices)))
            for s in self.expression.steps
        )
        shape = tuple(self.expression.shape[i] for i in order)
        return Emitter(Expression(shape, steps, ()), self.buffers)
