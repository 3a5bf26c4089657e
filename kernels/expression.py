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
from qcompiler.kernels.scalar_ops import UNARY, binary, quantized, select, truth, unary

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
        op: a name in `scalar_ops.OPS`, or `anchor` (the result of the kernel that the expression
            follows), `load` (with an access), `lookup` (an access into a table whose rows, in one
            or more of its dimensions, are read from `indices`; numbers: for each of them the
            elements from row to row and the rows; negative ones count from the end), `constant`.
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
        values = self.values(row, column, lanes, anchor)
        for index, access in self.expression.stores:
            self.store(index, access, row, column, lanes, values[index])

    def store(
        self, index: int, access: Access, row: list[Any], column: Any, lanes: int, value: Any
    ) -> None:
        """Store `lanes` elements of step `index`'s value."""
        dtype = access.dtype
        have = self.expression.steps[index].dtype
        if dtype == "bool":
            value = select(value, code.spread(T.uint8(1), lanes), code.spread(T.uint8(0), lanes))
        elif dtype == NARROW:
            if have != dtype:
                value = code.round_bfloat16(code.bind(value), lanes)
            value = code.narrow(value, lanes)
        elif have != dtype or dtype in ("int8", "uint8"):
            value = code.cast(value, dtype, lanes)
        stride = access.strides[-1] if access.strides else 1
        at = self.start(access, row, column)
        code.store(self.buffers[access.argument], at, value, lanes, stride)

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
                return truth(bool(step.numbers[0]), lanes)
            return code.spread(T.Cast(step.dtype, T.int64(int(step.numbers[0]))), lanes)
        if step.op == "where":
            return select(*given)
        if step.op == "cast":
            return self._cast(step, given[0], lanes)
        if step.op == "quantize":
            return quantized(lanes, given[0] / given[1], given[2], step.numbers)
        if step.op == "quantize_by":
            x, high, low, zero = given
            return quantized(lanes, code.fma(x, high, x * low, lanes), zero, step.numbers)
        if step.op == "dequantize":
            q = code.cast(given[0], FLOAT, lanes) - code.cast(given[2], FLOAT, lanes)
            return q * given[1]
        if step.op in UNARY:
            return unary(step.op, lanes, step.dtype, given[0], step.numbers)
        kinds = {self.expression.steps[i].dtype for i in step.values}
        if step.op in ("eq", "ne") and kinds == {"bool"}:  # LLVM would compare them as floats
            unequal = binary("xor", lanes, "bool", *given)
            return unequal if step.op == "ne" else unary("not", lanes, "bool", unequal, ())
        if self._simplified(step):
            given = [code.opaque(value, lanes) for value in given]
        return binary(step.op, lanes, step.dtype, *given)

    def _simplified(self, step: Step) -> bool:
        """Whether TVM's simplifier would take floats for real numbers, without NaN and rounding.

        x · 0 and 0 / x are 0 to it, x − x too, (x + y) − y and y − (y − x) are x, and x = x always.
        """
        steps = self.expression.steps
        operands = [steps[i] for i in step.values]
        if any(operand.dtype not in (FLOAT, NARROW) for operand in operands):
            return False
        if step.op in ("mul", "div"):
            return any(s.op == "constant" and s.numbers[0] == 0 for s in operands)
        if step.op not in ("sub", "eq", "ne"):
            return False
        a, b = step.values  # equal steps are one step
        if a == b:
            return True
        sums = ("add", "sub")
        return step.op == "sub" and (
            (steps[a].op in sums and b in steps[a].values)
            or (steps[b].op in sums and a in steps[b].values)
        )

    def _cast(self, step: Step, value: Any, lanes: int) -> Any:
        have = self.expression.steps[step.values[0]].dtype
        want = "int32" if step.dtype in ("int8", "uint8") else step.dtype
        if have == NARROW:
            have = FLOAT
        if want == NARROW and have == FLOAT:
            return code.round_bfloat16(value, lanes)
        if have == "bool":
            one, zero = (code.spread(T.Cast(want, T.int32(n)), lanes) for n in (1, 0))
            return select(value, one, zero)
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
        return self.values(row, column, lanes, anchor)[-1]

    def values(self, row: list[Any], column: Any, lanes: int, anchor: Any = None) -> list[Any]:
        """Each step's value."""
        values: list[Any] = []
        for step in self.expression.steps:
            given = [values[i] for i in step.values]
            value = self._value(step, given, row, column, lanes, anchor)
            values.append(self._named(step, value, lanes))
        return values

    def _named(self, step: Step, value: Any, lanes: int) -> Any:
        """A step's value, computed once; TVM's analyzer fails on some."""
        if step.dtype == "bool":  # on comparisons of vectors
            return value
        branches = [self.expression.steps[i].op for i in step.values[1:]]
        if step.op == "where" and step.dtype == FLOAT and "constant" not in branches:
            return code.opaque(value, lanes)  # on bounds of what may be one or the other (PReLU)
        return code.bind(value)

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
