"""A thin layer over TVM's IR builder, with which the kernels write their loops and vectors.

Kernels think in vectors of `LANES` = 16 float32 or int32 lanes on every machine; LLVM splits them
into what the machine has (one AVX-512 register, two of AVX2, four of NEON). So the order of every
sum is the same everywhere, and results agree between machines bit for bit wherever the machine has
fused multiply-add.

A kernel is built with

    with kernel("name", arguments) as buffers:
        with parallel(tiles) as tile: ...

and has the packed C ABI that `backends/edge_model.py` describes; every argument is a flat buffer.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.sym import Analyzer
from tvm.tirx import Var
from tvm.tirx.script.builder import ir as T

LANES = 16
GPU: ContextVar[bool] = ContextVar("GPU", default=False)  # whether the open kernel is one for a GPU
FLOAT = "float32"
STACK = 64 << 10  # bytes of scratch up to which it lies on the stack, not in the workspace


@dataclass(frozen=True)
class Argument:
    """A kernel's argument: a flat buffer.

    Attributes:
        name: in the kernel's source.
        dtype: numpy's name.
        size: number of elements; None where only the call knows.
    """

    name: str
    dtype: str
    size: int | None


@dataclass(frozen=True)
class Size:
    """A kernel's argument: a size that the call gives.

    Attributes:
        name: in the kernel's source.
        variable: int64, by which the kernel's other sizes are expressed, as int32.
    """

    name: str
    variable: Any


class Kernel:
    """A kernel under construction and, afterwards, its function."""

    def __init__(self, name: str, arguments: Sequence[Argument | Size]) -> None:
        self.name, self.arguments = name, tuple(arguments)
        self.function: Any = None


@contextmanager
def kernel(name: str, arguments: Sequence[Argument | Size]) -> Iterator[tuple[Kernel, list[Any]]]:
    """Open a kernel; what is written inside becomes its body."""

    def declared(given: Argument) -> Any:
        size = Var(f"{given.name}_size", "int64") if given.size is None else max(given.size, 1)
        return T.arg(given.name, T.buffer((size,), given.dtype))

    made = Kernel(name, arguments)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        buffers = [declared(a) for a in arguments if isinstance(a, Argument)]
        for size in arguments:
            if isinstance(size, Size):
                T.arg(size.name, size.variable)
        yield made, buffers
    made.function = builder.get()


def known(size: Any) -> bool:
    """Whether a size is a number, not an expression of what the call gives."""
    return isinstance(size, int)


def at_least(size: Any, least: int) -> bool:
    """Whether a size reaches a number, or may."""
    return not known(size) or size >= least


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal, whatever the call gives."""
    return bool(a == b) if known(a) and known(b) else Analyzer().can_prove_equal(a, b)


def quotient(size: Any, by: Any) -> Any:
    """Size // by, neither of them negative: LLVM takes long to see that for itself."""
    return size // by if known(size) and known(by) else bind(T.truncdiv(size, by))


def remainder_of(size: Any, by: Any) -> Any:
    """Size % by, neither of them negative."""
    return size % by if known(size) and known(by) else bind(T.truncmod(size, by))


def parallel(extent: Any) -> Any:
    """A loop whose iterations the runtime's threads share."""
    return T.parallel(0, extent) if at_least(extent, 2) else T.serial(0, extent)


def loop(extent: Any) -> Any:
    """A plain loop."""
    return T.serial(0, extent)


def scratch(size: Any, dtype: str) -> Any:
    """Local memory, on the stack (or in registers) unless it is large; elements of 4 bytes."""
    # TVM's own limit for the stack is 1 KiB; this annotation tells it to leave the choice to us.
    stack = {"disable_lower_builtin": True} if known(size) and size * 4 <= STACK else {}
    return T.alloc_buffer((size,), dtype, annotations=stack)


def bind(value: Any) -> Any:
    """Name a value, so that it is computed once."""
    return T.Bind(value)


def opaque(value: Any, lanes: int = LANES) -> Any:
    """A float value that TVM's simplifier does not look into.

    It writes out what names stand for: where each is read more than once, the time for a chain of
    functions grows exponentially. The code is the same: compilers keep such memory in registers.
    """
    held = T.alloc_buffer((lanes,), FLOAT, scope="local")  # the scope that GPUs have too
    store(held, 0, value, lanes)
    return bind(load(held, 0, lanes))


def span(start: Any, lanes: int, stride: int = 1) -> Any:
    """Index of `lanes` elements from `start`."""
    return start if lanes == 1 else T.ramp(start, stride, lanes)


def load(buffer: Any, start: Any, lanes: int = LANES, stride: int = 1) -> Any:
    """`lanes` elements, `stride` apart."""
    return buffer[span(start, lanes, stride)]


def store(buffer: Any, start: Any, value: Any, lanes: int = LANES, stride: int = 1) -> None:
    """The inverse of `load`."""
    T.buffer_store(buffer, value, [span(start, lanes, stride)])


def spread(value: Any, lanes: int = LANES) -> Any:
    """One value in every lane."""
    return value if lanes == 1 else T.broadcast(value, lanes)


def number(value: float, lanes: int = LANES) -> Any:
    """A float32 constant in every lane."""
    return spread(T.float32(_float32(value)), lanes)


def reciprocal(size: Any) -> Any:
    """1 / size, of a size that the call gives: the float32 that `number(1 / size)` is."""
    return T.float32(1.0) / cast(size, "float32", 1)


def integer(value: int, lanes: int = LANES) -> Any:
    """An int32 constant in every lane."""
    return spread(T.int32(value), lanes)


def _float32(value: float) -> float:
    if math.isinf(value) or math.isnan(value):
        return value
    if abs(value) > 3.4028234663852886e38:
        return math.copysign(3.4028234663852886e38, value)
    return float(struct.unpack("f", struct.pack("f", value))[0])


def named(dtype: str, lanes: int) -> str:
    """TVM's name of a vector type."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def cast(value: Any, dtype: str, lanes: int = LANES) -> Any:
    """Convert each lane; floats towards zero."""
    return T.Cast(named(dtype, lanes), value)


def bits(value: Any, dtype: str, lanes: int = LANES) -> Any:
    """The same bits read as another type."""
    return T.reinterpret(value, dtype=named(dtype, lanes))


def intrinsic(name: str, dtype: str, *values: Any) -> Any:
    """One of LLVM's intrinsics; for a GPU, C's function of that name for float32."""
    if GPU.get():
        return T.call_pure_extern(dtype, f"{name.removeprefix('llvm.')}f", *values)
    return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), *values, dtype=dtype)


def extern(name: str, dtype: str, *values: Any) -> Any:
    """A function without effects, known by its name alone."""
    return T.call_pure_extern(dtype, name, *values)


def fma(a: Any, b: Any, c: Any, lanes: int = LANES) -> Any:
    """a·b + c, rounded once."""
    return intrinsic("llvm.fma", named(FLOAT, lanes), a, b, c)


def minimum(a: Any, b: Any) -> Any:
    """The smaller, lane by lane."""
    return T.min(a, b)


def maximum(a: Any, b: Any) -> Any:
    """The larger, lane by lane."""
    return T.max(a, b)


ROUNDER = (
    12582912.0  # 1.5·2²³: adding it leaves a float's integer part in the low bits, half to even
)
ROUNDER_BITS = 0x4B400000


def round_to_int(value: Any, lanes: int = LANES) -> Any:
    """float32 → int32, half to even, for |value| ≤ 2²² (callers clamp first)."""
    return bits(value + number(ROUNDER, lanes), "int32", lanes) - integer(ROUNDER_BITS, lanes)


def round_half_even(value: Any, lanes: int = LANES) -> Any:
    """The nearest whole float, half to even."""
    return intrinsic("llvm.rint", named(FLOAT, lanes), value)


def is_nan(value: Any, lanes: int = LANES) -> Any:
    """By its bits: TVM takes a comparison of a value with itself for true."""
    size = bits(value, "int32", lanes) & integer(0x7FFFFFFF, lanes)
    return size > integer(0x7F800000, lanes)


def round_bfloat16(value: Any, lanes: int = LANES) -> Any:
    """The nearest bfloat16 number, half to even, as a float32; NaN stays NaN."""
    have = bind(bits(value, "int32", lanes))
    odd = (have >> integer(16, lanes)) & integer(1, lanes)
    rounded = have + (odd + integer(0x7FFF, lanes))
    kept = T.Select(is_nan(value, lanes), have | integer(0x400000, lanes), rounded)
    return bits(bind(kept & integer(-0x10000, lanes)), FLOAT, lanes)


def narrow(value: Any, lanes: int = LANES) -> Any:
    """float32 numbers that are bfloat16 ones → their 16 bits, uint16."""
    return cast(bits(value, "int32", lanes) >> integer(16, lanes), "uint16", lanes)


def widen(value: Any, lanes: int = LANES) -> Any:
    """The inverse of `narrow`."""
    return bits(cast(value, "int32", lanes) << integer(16, lanes), FLOAT, lanes)


def polynomial(x: Any, coefficients: Sequence[float], lanes: int = LANES) -> Any:
    """Horner's rule, highest power first."""
    total = number(coefficients[0], lanes)
    for coefficient in coefficients[1:]:
        total = bind(fma(total, x, number(coefficient, lanes), lanes))
    return total


def exp(x: Any, lanes: int = LANES) -> Any:
    """e^x in float32, relative error below 2.5e-7; below −87.3 it gives e^−87.3, not zero.

    x = n·ln 2 + r with |r| ≤ ln 2 / 2, a polynomial of degree 6 for e^r, and 2ⁿ put into the
    exponent (the scheme of Cody and Waite, Software Manual for the Elementary Functions, ch. 6).
    """
    x = bind(minimum(maximum(x, number(-87.33654, lanes)), number(88.37626, lanes)))
    shifted = bind(fma(x, number(1.44269504088896341, lanes), number(ROUNDER, lanes), lanes))
    n = bind(shifted - number(ROUNDER, lanes))
    r = bind(fma(n, number(-0.693359375, lanes), x, lanes))
    r = bind(fma(n, number(2.12194440e-4, lanes), r, lanes))
    p = polynomial(r, [1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0], lanes)
    power = (bits(shifted, "int32", lanes) - integer(ROUNDER_BITS - 127, lanes)) << integer(
        23, lanes
    )
    return bind(p * bits(power, FLOAT, lanes))


def expm1(x: Any, lanes: int = LANES) -> Any:
    """e^x − 1, relative error below 5e-7: Taylor's series below 0.35, where e^x − 1 cancels."""
    series = polynomial(x, [1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0], lanes) * x
    one, near = number(1.0, lanes), number(0.35, lanes)
    small = maximum(x, number(0.0, lanes) - x) < near
    return bind(T.Select(small, series, exp(x, lanes) - one))


def log1p(x: Any, lanes: int = LANES) -> Any:
    """log(1 + x): the rounding of 1 + x is taken out (Higham 2002, section 1.14.1)."""
    x, one = opaque(x, lanes), number(1.0, lanes)
    total = bind(fma(x, one, one, lanes))  # a plain sum less one, TVM would simplify to x
    log = bind(intrinsic("llvm.log", named(FLOAT, lanes), total))
    small, none = bind(total - one), number(0.0, lanes)
    # Where 1 + x is 1, it is x; where x is so large that 1 drops out, the correction is 1.
    plain = T.Select(small == x, log, log * x / small)
    return opaque(T.Select(small == none, x, plain), lanes)


def remainder(a: Any, b: Any, floored: bool, lanes: int = LANES) -> Any:
    """What division leaves, with the sign of b where it is floored, else of a."""
    none = number(0.0, lanes)
    quotient = bind(intrinsic("llvm.trunc", named(FLOAT, lanes), a / b))
    rest = bind(fma(none - quotient, b, a, lanes))
    size = bind(maximum(b, none - b))
    # a / b may have rounded up to a whole number: one step back.
    rest = bind(T.Select(a < none, T.Select(rest > none, rest - size, rest),
                         T.Select(rest < none, rest + size, rest)))  # fmt: skip
    if not floored:
        return rest
    return bind(T.Select(b < none, T.Select(rest > none, rest + b, rest),
                         T.Select(rest < none, rest + b, rest)))  # fmt: skip


# erf(x) ≈ x·P(x²)/Q(x²) on |x| ≤ 4: the minimax rational of Eigen's float erf.
ERF_P = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
ERF_Q = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


def erf(x: Any, lanes: int = LANES) -> Any:
    """The error function in float32, absolute error below 5e-7."""
    x = bind(minimum(maximum(x, number(-4.0, lanes)), number(4.0, lanes)))
    square = bind(x * x)
    return bind(x * polynomial(square, ERF_P, lanes) / polynomial(square, ERF_Q, lanes))


def sigmoid(x: Any, lanes: int = LANES) -> Any:
    """1 / (1 + e^−x)."""
    one = number(1.0, lanes)
    return bind(one / (one + exp(number(0.0, lanes) - x, lanes)))


def tanh(x: Any, lanes: int = LANES) -> Any:
    """1 − 2 / (e^2x + 1): absolute error below 2e-7."""
    one = number(1.0, lanes)
    return bind(one - number(2.0, lanes) / (exp(x + x, lanes) + one))


def sum_lanes(vector: Any, buffer: Any) -> Any:
    """The sum of a vector's 16 lanes, always in the same order: halves are added until one is left.

    `buffer` is local memory of 16 float32 that the halves pass through.
    """
    store(buffer, 0, vector)
    width = LANES // 2
    while width >= 1:
        store(buffer, 0, load(buffer, 0, width) + load(buffer, width, width), width)
        width //= 2
    return bind(buffer[0])


def max_lanes(vector: Any, buffer: Any) -> Any:
    """The largest of a vector's 16 lanes."""
    store(buffer, 0, vector)
    width = LANES // 2
    while width >= 1:
        store(buffer, 0, maximum(load(buffer, 0, width), load(buffer, width, width)), width)
        width //= 2
    return bind(buffer[0])
