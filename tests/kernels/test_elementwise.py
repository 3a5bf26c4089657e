"""Elementwise expressions: every op against torch, with its bound; layouts; lookups; casts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from qcompiler import ops
from qcompiler.errors import UnsupportedError
from qcompiler.kernels import isa as isas
from qcompiler.kernels.elementwise import CHUNK, collapsed, elementwise
from qcompiler.kernels.scalar_ops import BINARY, OPS, UNARY

Run = Callable[..., Any]

WIDE = torch.cat([torch.linspace(-30, 30, 3001), torch.tensor([0.0, -0.0, 1e-30, -1e-6, 1e4])])
POSITIVE = torch.cat([torch.logspace(-20, 20, 2000), torch.tensor([1.0])])
SMALL = torch.cat([torch.logspace(-30, 0, 500), -torch.logspace(-30, 0, 500), torch.zeros(1)])
UNIT = torch.linspace(-1, 1, 999)
HALVES = torch.cat([torch.arange(-50, 50) / 2, torch.linspace(-9, 9, 777)])

# op: inputs, numbers, reference in float64, rtol, atol. Zero for both: the correctly rounded value.
# exp and what is made of it hold a relative error of 2e-7, erf an absolute one of 5e-7.
FLOATS: dict[str, tuple[Tensor, tuple[float, ...], Callable[[Tensor], Tensor], float, float]] = {
    "neg": (WIDE, (), torch.neg, 0, 0),
    "abs": (WIDE, (), torch.abs, 0, 0),
    "relu": (WIDE, (), torch.relu, 0, 0),
    "sqrt": (POSITIVE, (), torch.sqrt, 0, 0),
    "rsqrt": (POSITIVE, (), torch.rsqrt, 2e-7, 0),
    "reciprocal": (POSITIVE, (), torch.reciprocal, 0, 0),
    "exp": (torch.linspace(-87, 88, 5001), (), torch.exp, 3e-7, 0),
    "erf": (WIDE, (), torch.erf, 0, 5e-7),
    "sigmoid": (WIDE, (), torch.sigmoid, 4e-7, 0),
    "tanh": (WIDE, (), torch.tanh, 0, 4e-7),
    "silu": (WIDE, (), functional.silu, 5e-7, 0),
    "gelu": (WIDE, (), functional.gelu, 2e-7, 3e-6),
    "gelu_tanh": (WIDE, (), lambda x: functional.gelu(x, approximate="tanh"), 2e-7, 3e-6),
    "hardsigmoid": (WIDE, (), functional.hardsigmoid, 2e-7, 1e-7),
    "hardswish": (WIDE, (), functional.hardswish, 3e-7, 1e-6),
    "clamp": (WIDE, (-2.5, 7.0), lambda x: x.clamp(-2.5, 7.0), 0, 0),
    "leaky_relu": (WIDE, (0.1,), lambda x: functional.leaky_relu(x, 0.1), 2e-7, 0),
    "round": (HALVES, (), torch.round, 0, 0),
    "log": (POSITIVE, (), torch.log, 2e-7, 1e-7),
    "sin": (WIDE[:3001], (), torch.sin, 0, 2e-7),
    "cos": (WIDE[:3001], (), torch.cos, 0, 2e-7),
    "floor": (HALVES, (), torch.floor, 0, 0),
    "ceil": (HALVES, (), torch.ceil, 0, 0),
    "trunc": (HALVES, (), torch.trunc, 0, 0),
    "sign": (WIDE, (), torch.sign, 0, 0),
    "expm1": (SMALL, (), torch.expm1, 5e-7, 0),
    "log1p": (torch.cat([SMALL[SMALL > -1], POSITIVE]), (), torch.log1p, 4e-7, 0),
    "log2": (POSITIVE, (), torch.log2, 2e-7, 1e-7),
    "log10": (POSITIVE, (), torch.log10, 2e-7, 1e-7),
    "exp2": (torch.linspace(-120, 120, 1001), (), torch.exp2, 2e-7, 0),
    "tan": (SMALL, (), torch.tan, 3e-7, 0),
    "asin": (UNIT, (), torch.asin, 4e-7, 0),
    "acos": (UNIT, (), torch.acos, 4e-7, 2e-7),
    "atan": (WIDE, (), torch.atan, 3e-7, 0),
    "sinh": (WIDE[:3001], (), torch.sinh, 4e-7, 0),
    "cosh": (WIDE[:3001], (), torch.cosh, 4e-7, 0),
}
PAIRS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div,
    "maximum": torch.maximum, "minimum": torch.minimum, "pow": torch.pow,
    "eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge,
    "and": torch.logical_and, "or": torch.logical_or, "xor": torch.logical_xor,
    "atan2": torch.atan2, "fmod": torch.fmod, "remainder": torch.remainder,
}  # fmt: skip
TRUTHS = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor"})
WHOLE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "floordiv": lambda a, b: a // b, "bitand": torch.bitwise_and, "bitor": torch.bitwise_or,
    "bitxor": torch.bitwise_xor, "shl": torch.bitwise_left_shift, "shr": torch.bitwise_right_shift,
}  # fmt: skip


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_no_op_is_forgotten() -> None:
    assert {*FLOATS, "not", "isnan"} == UNARY
    assert {*PAIRS, *WHOLE} == BINARY
    assert {
        *FLOATS,
        *PAIRS,
        *WHOLE,
        "not",
        "isnan",
        "where",
        "cast",
        "quantize",
        "quantize_by",
        "dequantize",
    } == OPS


@pytest.mark.parametrize("op", FLOATS)
def test_functions(writer: Any, run: Run, op: str) -> None:
    x, numbers, reference, rtol, atol = FLOATS[op]
    e = writer(tuple(x.shape), x)
    e.store(e.step(op, "float32", e.load(x), numbers=numbers))
    (found,) = run(elementwise("e", e.arguments, e.expression), e, isas.VNNI)
    want = reference(x.double())
    if rtol == atol == 0:
        assert torch.equal(found, want.float())
    else:
        torch.testing.assert_close(found.double(), want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("x", [-math.inf, -1e30, -200.0, 200.0, 1e30, math.inf])
def test_functions_of_huge_numbers(writer: Any, run: Run, x: float) -> None:
    """Nothing overflows where the function itself does not."""
    names = ("sigmoid", "tanh", "erf", "relu", "hardsigmoid")
    given_ = torch.full((20,), x)
    e = writer((20,), given_)
    loaded = e.load(given_)
    for name in names:
        e.store(e.step(name, "float32", loaded))
    for name, found in zip(
        names, run(elementwise("e", e.arguments, e.expression), e, isas.AVX2), strict=True
    ):
        want = FLOATS[name][2](given_.double())
        torch.testing.assert_close(found.double(), want, rtol=0, atol=5e-7)


@pytest.mark.parametrize("op", PAIRS)
def test_pairs(writer: Any, run: Run, op: str) -> None:
    a, b = normal(3, 37), normal(3, 37, seed=1)
    b[:, ::3] = a[:, ::3]
    kind = "float32"
    if op in ("and", "or", "xor"):
        a, b, kind = a > 0, b > 0, "bool"
    if op == "pow":
        a = a.abs() + 0.1
    if op in TRUTHS:
        kind = "bool"
    e = writer((3, 37), a, b)
    e.store(e.step(op, kind, e.load(a), e.load(b)), getattr(torch, kind))
    (found,) = run(elementwise("e", e.arguments, e.expression), e, isas.VNNI)
    want = PAIRS[op](a, b) if kind == "bool" else PAIRS[op](a.double(), b.double()).float()
    if op in ("pow", "atan2", "fmod", "remainder"):
        # A quotient that rounds to a whole number leaves a rest of that rounding.
        atol = 0 if op == "pow" else 1e-6
        torch.testing.assert_close(found.reshape(3, 37), want, rtol=3e-7, atol=atol)
    else:
        assert torch.equal(found.reshape(3, 37), want)


@pytest.mark.parametrize(
    "op", ["add", "sub", "mul", "maximum", "minimum", "lt", "eq", "fmod", "remainder", *WHOLE]
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_whole_numbers(writer: Any, run: Run, op: str, dtype: torch.dtype) -> None:
    a = torch.arange(-20, 21).to(dtype) * 1000003 % 4001
    b = a.flip(0) % 20 + 1 if op in ("shl", "shr") else a.flip(0) - 7
    kind = "bool" if op in TRUTHS else str(dtype).removeprefix("torch.")
    e = writer((41,), a, b)
    e.store(e.step(op, kind, e.load(a), e.load(b)), getattr(torch, kind))
    (found,) = run(elementwise("e", e.arguments, e.expression), e, isas.VNNI)
    assert torch.equal(found, (PAIRS | WHOLE)[op](a, b))


def test_where_and_not(writer: Any, run: Run) -> None:
    a, b = normal(50), normal(50, seed=1)
    e = writer((50,), a, b)
    first, second = e.load(a), e.load(b)
    greater = e.step("not", "bool", e.step("lt", "bool", first, second))
    always = e.step("and", "bool", greater, e.number(1, "bool"))
    e.store(e.step("where", "float32", always, first, second))
    (found,) = run(elementwise("e", e.arguments, e.expression), e, isas.VNNI)
    assert torch.equal(found, torch.maximum(a, b))


def test_nan_is_found(writer: Any, run: Run) -> None:
    x = torch.tensor([0.0, math.nan, math.inf, -math.inf, -math.nan, 1.0] * 5)
    e = writer((30,), x)
    e.store(e.step("isnan", "bool", e.load(x)), torch.bool)
    (found,) = run(elementwise("e", e.arguments, e.expression), e, isas.VNNI)
    assert torch.equal(found, x.isnan())


CASTS = [
    (torch.float32, torch.int64), (torch.float32, torch.int32), (torch.float32, torch.bool),
    (torch.int64, torch.float32), (torch.int64, torch.bool), (torch.int64, torch.int32),
    (torch.bool, torch.float32), (torch.bool, torch.int64), (torch.uint8, torch.float32),
    (torch.int8, torch.int64), (torch.int32, torch.int64),
]  # fmt: skip


@pytest.mark.parametrize(("have", "want"), CASTS, ids=str)
def test_casts(writer: Any, run: Run, have: torch.dtype, want: torch.dtype) -> None:
    x = (normal(35) * 20).to(have) if have != torch.bool else normal(35) > 0
    x[3] = 0
    e = writer((35,), x)
    e.store(e.step("cast", str(want).removeprefix("torch."), e.load(x)), want)
    (found,) = run(elementwise("e", e.arguments, e.expression), e, isas.VNNI)
    assert torch.equal(found, x.to(want))


@pytest.mark.parametrize("isa", [isas.VNNI, isas.AVX2, isas.SSE], ids=lambda isa: isa.name)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
def test_quantization_is_bit_exact(
    writer: Any, run: Run, dtype: torch.dtype, isa: isas.Isa
) -> None:
    """Ties go to the even level, everything past the range to its end, infinity too."""
    info = torch.iinfo(dtype)
    scale, zero = torch.tensor([0.5]), torch.tensor([info.min + 100], dtype=dtype)
    x = torch.cat([torch.arange(-300, 300) / 4, normal(999) * 30, torch.tensor([1e30, -1e30])])
    x = torch.cat([x, torch.tensor([math.inf, -math.inf])])
    kind = str(dtype).removeprefix("torch.")
    e = writer(tuple(x.shape), x)
    s, z = e.load(scale, (0,)), e.load(zero, (0,))
    level = e.step("quantize", kind, e.load(x), s, z, numbers=(info.min, info.max))
    e.store(level, dtype)
    e.store(e.step("dequantize", "float32", level, s, z))
    levels, back = run(elementwise("e", e.arguments, e.expression), e, isa)
    want = ops.quantize(x, scale[0], zero[0], 0, 0, info.min, info.max)
    assert torch.equal(levels, want)
    assert torch.equal(back, ops.dequantize(want, scale[0], zero[0], 0, 0))


def test_a_scale_for_each_channel(writer: Any, run: Run) -> None:
    x, scale = normal(4, 20), torch.rand(20) + 0.01
    zero = torch.arange(20, dtype=torch.uint8)
    e = writer((4, 20), x)
    level = e.step(
        "quantize", "uint8", e.load(x), e.load(scale, (0, 1)), e.load(zero, (0, 1)),
        numbers=(0, 255),
    )  # fmt: skip
    e.store(level, torch.uint8)
    (found,) = run(elementwise("e", e.arguments, e.expression), e, isas.VNNI)
    want = ops.quantize(x, scale, zero, 1, 0, 0, 255)
    assert torch.equal(found.reshape(4, 20), want)


@settings(deadline=None, max_examples=10, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 19), min_size=1, max_size=4),
    spread=st.lists(st.booleans(), min_size=4, max_size=4),
    order=st.permutations(range(4)),
)
@example(shape=[2, 3, 33], spread=[True, False, False, False], order=[2, 1, 0, 3])
@example(shape=[CHUNK + 5], spread=[False] * 4, order=[0, 1, 2, 3])
@example(shape=[3, 2 * CHUNK], spread=[True] + [False] * 3, order=[1, 0, 2, 3])
def test_broadcast_and_permuted(
    writer: Any, run: Run, shape: list[int], spread: list[bool], order: list[int]
) -> None:
    """One operand broadcast along some dimensions, the other lying in another order."""
    order = [d for d in order if d < len(shape)]
    a = normal(*[1 if s else n for n, s in zip(shape, spread, strict=False)])
    b = normal(*[shape[d] for d in order], seed=1).permute(
        [order.index(d) for d in range(len(shape))]
    )
    e = writer(tuple(shape))
    steps = tuple(0 if n == 1 else s for n, s in zip(a.shape, a.stride(), strict=True))
    flat = b.as_strided((b.numel(),), (1,))
    e.store(e.step("sub", "float32", e.load(a, steps), e.load(flat, tuple(b.stride()))))
    assert collapsed(e.expression).rows * collapsed(e.expression).width == b.numel()
    (found,) = run(elementwise("e", e.arguments, e.expression), e, isas.VNNI)
    assert torch.equal(found.reshape(shape), a - b)


def test_a_single_number(writer: Any, run: Run) -> None:
    x = torch.tensor(3.0)
    e = writer((), x)
    e.store(e.step("add", "float32", e.load(x), e.number(4.0)), size=1)
    assert run(elementwise("e", e.arguments, e.expression), e, isas.VNNI)[0].tolist() == [7.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_lookups_never_leave_the_table(writer: Any, run: Run, dtype: torch.dtype) -> None:
    """Negative rows count from the end; those that the table has not are the nearest it has."""
    table = (normal(10, 21) * 40).to(dtype)
    index = torch.tensor([3, 0, 9, 10, -1, 2**40, -(2**40)])
    kind = str(dtype).removeprefix("torch.")
    e = writer((7, 21), table, index)
    place, where = e.access(table, (0, 1)), e.access(index, (1, 0))
    e.store(e.step("lookup", kind, access=place, indices=(where,), numbers=(21, 10)), dtype)
    (found,) = run(elementwise("e", e.arguments, e.expression), e, isas.VNNI)
    assert torch.equal(
        found.reshape(7, 21), table[torch.where(index < 0, index + 10, index).clamp(0, 9)]
    )


def test_refusals(writer: Any) -> None:
    x = normal(20)
    e = writer((20,), x)
    e.store(e.step("gamma", "float32", e.load(x), e.load(x)))
    with pytest.raises(UnsupportedError, match="no elementwise op 'gamma'"):
        elementwise("e", e.arguments, e.expression)


def test_lookups_element_by_element(writer: Any, run: Run) -> None:
    """Where each element has its own place, in two dimensions of the table at once."""
    table = normal(6, 7)
    rows, columns = torch.tensor([[0, 5, -1]]).expand(4, 3), torch.tensor([[3], [6], [0], [-7]])
    e = writer((4, 3), table, rows[0].contiguous(), columns.flatten())
    place = e.access(table, (0, 0))
    indices = (e.access(e.tensors[1], (0, 1)), e.access(e.tensors[2], (1, 0)))
    found = e.step("lookup", "float32", access=place, indices=indices, numbers=(7, 6, 1, 7))
    e.store(e.step("neg", "float32", found))
    (got,) = run(elementwise("e", e.arguments, e.expression), e, isas.VNNI)
    assert torch.equal(got.reshape(4, 3), -table[rows, columns])


@pytest.mark.parametrize("target", ["tvm:aarch64", "tvm:armv7", "tvm:riscv64"])
def test_other_machines(writer: Any, emulate: Run, target: str) -> None:
    """Quantization bit for bit; exp, erf and tanh, which have no library behind them, too."""
    x, scale = WIDE.clone(), torch.tensor([0.1])
    zero = torch.tensor([128], dtype=torch.uint8)
    e = writer(tuple(x.shape), x)
    loaded = e.load(x)
    level = e.step(
        "quantize", "uint8", loaded, e.load(scale, (0,)), e.load(zero, (0,)), numbers=(0, 255)
    )
    e.store(level, torch.uint8)
    names = ("gelu", "sigmoid", "exp", "log", "floor")
    for name in names:
        source = e.step("abs", "float32", loaded) if name == "log" else loaded
        source = e.step("maximum", "float32", source, e.number(1e-9)) if name == "log" else source
        e.store(e.step(name, "float32", source))
    ((levels, *found),) = emulate(target, [(elementwise("e", e.arguments, e.expression), e)])
    assert torch.equal(levels, ops.quantize(x, scale[0], zero[0], 0, 0, 0, 255))
    for name, values in zip(names, found, strict=True):
        given_ = x.double().abs().clamp(min=1e-9) if name == "log" else x.double()
        want = FLOATS[name][2](given_)
        torch.testing.assert_close(
            values.double()[:3001], want[:3001], rtol=4e-7, atol=3e-6 if name == "gelu" else 1e-7
        )
