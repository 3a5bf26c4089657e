"""Number formats against an independent float64 reference in numpy."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompiler import qtype
from qcompiler.errors import InputError
from qcompiler.qtype import ELEMENTS, FLOATS, QType, dequantize, pack, unpack

PACKED = [name for name, (bits, _) in ELEMENTS.items() if bits <= 8 and name not in FLOATS]
SMALL = settings(max_examples=60, deadline=None)


@st.composite
def formats(draw: st.DrawFn) -> QType:
    """Any format of 2, 3, 4 or 8 bits."""
    element = draw(st.sampled_from(PACKED))
    granularity: Any = draw(st.sampled_from(["tensor", "channel", "token", "group"]))
    return QType(
        element,
        granularity,
        draw(st.sampled_from([1, 2, 3, 4])) if granularity == "group" else None,
        symmetric=draw(st.booleans()),
        reduced=element in ("int8", "uint8") and draw(st.booleans()),
        dynamic=draw(st.booleans()),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[QType, np.ndarray, int]:
    """A format, a float32 tensor that it divides, and an axis, negative ones too."""
    kind = draw(formats())
    ndim = draw(st.integers(1, 3))
    axis = draw(st.integers(-ndim, ndim - 1))
    shape = [draw(st.integers(1, 4)) for _ in range(ndim)]
    shape[axis] *= kind.group or 1
    # Magnitudes over the whole range that is not subnormal once divided by 255 steps.
    size = draw(st.sampled_from([1.0, 1e-3, 1e30, 1e-30]))
    floats = st.floats(-1, 1, width=32).map(lambda x: float(np.float32(x * size)))
    x = draw(hnp.arrays(np.float32, tuple(shape), elements=floats))
    shift = draw(st.sampled_from([0.0, 0.0, 2.0, -2.0]))  # ranges that do not contain 0 as well
    return kind, (x + np.float32(shift * size)).astype(np.float32), axis


def spread(kind: QType, x: np.ndarray, axis: int, values: np.ndarray) -> np.ndarray:
    """One value for each element of `x`, by index arithmetic alone."""
    axis %= x.ndim
    out = np.empty(x.shape)
    for index in itertools.product(*map(range, x.shape)):
        if kind.granularity == "tensor":
            out[index] = values
        elif kind.granularity == "channel":
            out[index] = values[index[axis]]
        elif kind.granularity == "token":
            out[index] = values[(*index[:-1], 0)]
        else:
            at = list(index)
            at[axis] //= kind.group or 1
            out[index] = values[tuple(at)]
    return out


def reference(kind: QType, x: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """clamp(round_half_even(x / s) + z), element by element, the quotient in exact arithmetic."""
    out = np.empty(x.shape, dtype=np.int64)
    for index in itertools.product(*map(range, x.shape)):
        q = round(Fraction(float(x[index])) / Fraction(float(scale[index]))) + int(zero[index])
        out[index] = min(max(q, kind.qmin), kind.qmax)
    return out


@SMALL
@given(cases())
def test_round_trip_within_half_a_step(case: tuple[QType, np.ndarray, int]) -> None:
    kind, x, axis = case
    tensor = torch.from_numpy(x)
    scale, zero = kind.scale_for(*kind.ranges(tensor, axis))
    assert scale.dtype == torch.float32
    assert zero.dtype == kind.dtype
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()

    q = kind.quantize(tensor, scale, zero, axis)
    assert q.dtype == kind.dtype
    assert q.shape == tensor.shape
    assert kind.qmin <= int(q.min())
    assert int(q.max()) <= kind.qmax

    steps = spread(kind, x, axis, scale.double().numpy())
    zeros = spread(kind, x, axis, zero.double().numpy())
    # The float32 quotient may fall on the other side of a tie, and only there differ.
    want = reference(kind, x, steps, zeros)
    differs = want != q.numpy()
    ties = np.abs(np.abs(x / steps - np.floor(x / steps)) - 0.5) < 256 * np.finfo(np.float32).eps
    assert not (differs & ~ties).any()

    back = dequantize(q, scale, zero, axis % x.ndim, kind.group or 0)
    assert torch.equal(back, kind.round_trip(tensor, axis))
    error = np.abs(back.double().numpy() - x.astype(np.float64))
    # Float rounding of quotient, scale and product: under 2⁻¹³ of a step over 256 steps.
    assert (error <= steps * (0.5 + 2**-13)).all()


@SMALL
@given(cases())
def test_zero_is_exact(case: tuple[QType, np.ndarray, int]) -> None:
    kind, x, axis = case
    scale, zero = kind.scale_for(*kind.ranges(torch.from_numpy(x), axis))
    assert ((zero >= kind.qmin) & (zero <= kind.qmax)).all()
    zeros = torch.zeros(x.shape)
    q = kind.quantize(zeros, scale, zero, axis)
    assert torch.equal(dequantize(q, scale, zero, axis % x.ndim, kind.group or 0), zeros)


@pytest.mark.parametrize("element", PACKED)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-45, 1e-38, -1e-38, 1e38])
def test_constant_tensors(element: str, symmetric: bool, value: float) -> None:
    """All zeros, one sign only, and magnitudes where a naive scale would be 0 or infinite."""
    kind = QType(element, symmetric=symmetric)
    x = torch.full((4,), value)
    scale, zero = kind.scale_for(*kind.ranges(x))
    assert torch.isfinite(scale)
    assert scale > 0
    back = dequantize(kind.quantize(x, scale, zero), scale, zero, 0, 0)
    assert (back.double() - x.double()).abs().max() <= 0.5001 * scale.double()


def test_rounding_is_half_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 126.5, 127.5, -127.5])
    q = QType("int8").quantize(x, torch.tensor(1.0), torch.tensor(0, dtype=torch.int8))
    assert q.tolist() == [0, 2, 2, 4, 0, -2, -2, 126, 127, -127]
    # The sum with the zero point is not rounded again: an odd one does not turn the ties around.
    q = QType("uint8", symmetric=False).quantize(
        x[:7], torch.tensor(1.0), torch.tensor(7, dtype=torch.uint8)
    )
    assert q.tolist() == [7, 9, 9, 11, 7, 5, 5]


@pytest.mark.parametrize(
    ("text", "low", "high", "middle"),
    [
        ("int8", -127, 127, 0),
        ("int8:tensor:affine", -128, 127, 0),
        ("int8:channel:reduced", -64, 63, 0),
        ("uint8:tensor:affine", 0, 255, 128),
        ("uint8:tensor", 0, 255, 128),
        ("uint8:tensor:affine:reduced", 0, 127, 64),
        ("int4:g32", -7, 7, 0),
        ("uint4:g32:affine", 0, 15, 8),
        ("int3", -3, 3, 0),
        ("uint3", 0, 7, 4),
        ("int2", -1, 1, 0),
        ("uint2", 0, 3, 2),
        ("float8_e4m3:channel", -448, 448, 0),
    ],
)
def test_ranges_of_elements(text: str, low: int, high: int, middle: int) -> None:
    kind = QType.parse(text)
    assert (kind.qmin, kind.qmax, kind.middle) == (low, high, middle)


def e4m3() -> np.ndarray:
    """The value of each byte without its sign, by the table of the OCP specification."""
    exponent, mantissa = np.arange(127) >> 3, np.arange(127) & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)


def nearest_bytes(x: np.ndarray) -> np.ndarray:
    """The nearest value's byte, that with an even mantissa in the middle, the largest beyond."""
    values, size = e4m3(), np.abs(x.astype(np.float64))
    upper = np.searchsorted(values, size).clip(1, 126)
    below, above = size - values[upper - 1], values[upper] - size
    up = (above < below) | ((above == below) & (upper % 2 == 0))
    return np.where(up, upper, upper - 1) | np.where(np.signbit(x), 128, 0)


def test_floats_of_8_bits_round_to_the_nearest_even_and_saturate() -> None:
    values = e4m3()
    middles = (values[1:] + values[:-1]) / 2
    rest = np.random.default_rng(0).normal(size=2000) * 10.0 ** np.linspace(-4, 3, 2000)
    ends = np.array([448.0, 464.0, 465.0, 1e9, np.inf])
    some = np.concatenate([values, middles, np.nextafter(middles, 0), rest, ends])
    x = np.concatenate([some, -some]).astype(np.float32)
    kind = QType.parse("float8_e4m3")
    scale, zero = torch.tensor(1.0), torch.tensor(0).to(kind.dtype)
    q = kind.quantize(torch.from_numpy(x), scale, zero)
    assert q.dtype == torch.float8_e4m3fn
    assert np.array_equal(q.view(torch.uint8).numpy(), nearest_bytes(x))
    inside = np.abs(x) <= 448
    own = torch.from_numpy(x[inside]).to(torch.float8_e4m3fn)
    assert torch.equal(own.view(torch.uint8), q.view(torch.uint8)[torch.from_numpy(inside)])
    assert torch.equal(q.double().abs(), dequantize(q, scale, zero, 0, 0).double().abs())


@pytest.mark.parametrize("text", ["channel", "token", "tensor", "g8"])
def test_the_error_of_8_bit_floats_is_relative(text: str) -> None:
    """Half of the last of 3 bits of mantissa, or of the smallest step: 2⁻⁹ of the scale."""
    kind = QType.parse(f"float8_e4m3:{text}")
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)) ** 3
    axis = 1 if kind.group else 0
    scale, _ = kind.scale_for(*kind.ranges(x, axis))
    steps = spread(kind, x.numpy(), axis, scale.double().numpy())
    error = (kind.round_trip(x, axis).double() - x.double()).abs().numpy()
    assert (error <= np.maximum(np.abs(x.numpy()) * 2**-4, steps * 2**-10) * (1 + 2**-20)).all()
    assert kind.round_trip(x, axis).abs().max() == pytest.approx(float(x.abs().max()), rel=1e-6)


@pytest.mark.parametrize("text", ["float8_e4m3:tensor:affine", "float8_e4m3:channel:reduced"])
def test_8_bit_floats_have_no_zero_point_and_use_all_bits(text: str) -> None:
    with pytest.raises(InputError, match="float8_e4m3"):
        QType.parse(text)


def test_symmetric_formats_mirror() -> None:
    """−x rounds to −q: there is no −128 on one side only."""
    x = torch.linspace(-4, 4, 257)
    kind = QType("int8")
    scale, zero = kind.scale_for(*kind.ranges(x))
    assert torch.equal(kind.quantize(x, scale, zero), -kind.quantize(-x, scale, zero))


def test_group_must_divide() -> None:
    with pytest.raises(InputError, match=r"10 elements along axis 1 .* groups of 4"):
        QType.parse("int4:g4").ranges(torch.zeros(2, 10), 1)


@SMALL
@given(st.sampled_from(PACKED), st.data())
def test_pack_and_unpack(element: str, data: st.DataObject) -> None:
    bits, signed = ELEMENTS[element]
    low = -(1 << (bits - 1)) if signed else 0
    dtype = np.int8 if signed else np.uint8
    shape = data.draw(st.lists(st.integers(0, 5), max_size=3).map(tuple))
    elements = st.integers(low, low + (1 << bits) - 1)
    values = data.draw(hnp.arrays(dtype, shape, elements=elements))
    packed = pack(torch.from_numpy(values), element)
    assert packed.dtype == torch.uint8
    assert packed.shape == (math.ceil(values.size * bits / 8),)

    # Reference: the bits of all elements, lowest first, in one row.
    masked = values.astype(np.int64).ravel()[:, None] & ((1 << bits) - 1)
    row = ((masked >> np.arange(bits)) & 1).astype(np.uint8).ravel()
    assert packed.numpy().tobytes() == np.packbits(row, bitorder="little").tobytes()

    back = unpack(packed, element, shape)
    assert back.dtype == (torch.int8 if signed else torch.uint8)
    assert back.numpy().tolist() == values.tolist()
    assert tuple(back.shape) == shape


@pytest.mark.parametrize("element", ["int4", "uint3", "int8"])
def test_packing_piece_by_piece_gives_the_same_bytes(
    element: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits, signed = ELEMENTS[element]
    low = -(1 << (bits - 1)) if signed else 0
    values = torch.randint(low, low + (1 << bits), (7, 23)).to(
        torch.int8 if signed else torch.uint8
    )
    whole = pack(values, element)
    monkeypatch.setattr(qtype, "PIECE", 16)
    assert torch.equal(pack(values, element), whole)
    assert torch.equal(unpack(whole, element, (7, 23)), values)


@given(formats())
def test_parse_is_the_inverse_of_str(kind: QType) -> None:
    assert QType.parse(str(kind)) == kind


@pytest.mark.parametrize(
    "text",
    [
        "int8:tensor",
        "int8:channel",
        "int4:g128",
        "uint4:g32:affine",
        "uint8:tensor:affine:reduced:dynamic",
        "int8:token",
        "int3:g64",
        "int32:channel",
    ],
)
def test_str_is_the_inverse_of_parse(text: str) -> None:
    assert str(QType.parse(text)) == text


def test_the_default_granularity_is_the_tensor() -> None:
    assert QType.parse("int8") == QType.parse(" int8:tensor ") == QType()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int9", "'int9'.*did you mean 'int8'"),
        ("unit8", "'unit8'.*did you mean 'uint8'"),
        ("", "known: .*int8"),
        ("int8:chanel", "'chanel' in .*'int8:chanel'.*did you mean 'channel'"),
        ("uint8:tensor:afine", "'afine'.*did you mean 'affine'"),
        ("int4:g0", "'g0'"),
        ("int4:g-4", "'g-4'"),
        ("int4:128", "'128'.*did you mean 'g128'"),
        ("int8:affine:channel", "'channel'"),
    ],
)
def test_parse_errors_name_the_nearest(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        QType.parse(text)


@pytest.mark.parametrize(
    "arguments",
    [
        {"granularity": "group"},
        {"granularity": "group", "group": 0},
        {"granularity": "channel", "group": 32},
        {"element": "int4", "reduced": True},
        {"element": "int2", "reduced": True},
    ],
)
def test_formats_that_make_no_sense(arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        QType(**arguments)


def test_token_is_always_dynamic() -> None:
    assert QType("int8", "token").dynamic
    assert QType("int8", "token") == QType("int8", "token", dynamic=True)


def test_int32_saturates() -> None:
    """2³¹ − 1 is no float32: a clamp there would let 2³¹ through, which wraps around to −2³¹."""
    kind = QType("int32")
    q = kind.quantize(
        torch.tensor([3e9, -3e9, 5.0]), torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)
    )
    assert q.tolist() == [2**31 - 1, -(2**31) + 1, 5]


def test_bytes() -> None:
    assert QType.parse("int4:g32").bytes_for(1024, 32) == 512 + 32 * 4
    assert QType.parse("uint4:g32:affine").bytes_for(1024, 32) == 512 + 32 * 5
    assert QType.parse("int3").bytes_for(3, 1) == 2 + 4


def test_groups_shrink_until_they_divide() -> None:
    assert str(QType.parse("int4:g64").fitted(48)) == "int4:g16"
    assert QType.parse("int4:g32").fitted(21) is None
    assert QType.parse("int8:channel").fitted(21) == QType.parse("int8:channel")
