"""Number formats: how a tensor is stored, how its scale is chosen, how it is rounded and packed.

A value x and its integer q are tied by  x = s · (q − z)  and  q = clamp(round(x / s) + z, qmin,
qmax), with rounding half to even. Symmetric formats have z = 0. See "A Survey of Low-bit Large
Language Models" (section 2.2, uniform quantization) and ONNX QuantizeLinear-21, whose arithmetic
(division by the scale, then saturation) is followed bit for bit.

q may be an 8-bit float in place of an integer, and round(x / s) then the nearest of those:
`float8_e4m3` is E4M3 of the OCP 8-bit Floating Point Specification (revision 1.0) and of
Micikevicius 2022, "FP8 Formats for Deep Learning": 3 bits of mantissa, exponents from −6 to 8,
subnormal numbers, no infinities, ±448 at most, which is what larger numbers become (the
specification's saturating conversion). Such formats are symmetric.

A QType knows no axis: the axis belongs to the use of the tensor and is an argument of each method.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from qcompiler.errors import InputError, nearest

Granularity = Literal["tensor", "channel", "token", "group"]

ELEMENTS = {
    f"{sign}int{bits}": (bits, sign == "") for bits in (2, 3, 4, 6, 8) for sign in ("", "u")
}
ELEMENTS["int32"] = (32, True)
FLOATS = {"float8_e4m3": torch.float8_e4m3fn}  # elements that are no integers
ELEMENTS |= {name: (8 * dtype.itemsize, True) for name, dtype in FLOATS.items()}
SMALLEST = 16  # elements of a group that was made smaller
PIECE = 1 << 20  # elements that are packed at a time: whole bytes in any number of bits


@dataclass(frozen=True)
class QType:
    """One number format.

    Attributes:
        element: `int8`, `uint8`, `int4`, `float8_e4m3`, …; see `ELEMENTS`.
        granularity: one scale per tensor, per channel, per token (the last axis shares a scale), or
            per group along an axis.
        group: elements that share a scale; only with `granularity="group"`.
        symmetric: whether the zero point is fixed at the middle (0 for signed, 2^(bits-1) for
            unsigned elements).
        reduced: one bit of the range left unused (int8 in −64…63): CPUs without VNNI add two u8×s8
            products in int16.
        dynamic: the scale is computed from the tensor when the model runs; always so for `token`.
    """

    element: str = "int8"
    granularity: Granularity = "tensor"
    group: int | None = None
    symmetric: bool = True
    reduced: bool = False
    dynamic: bool = False

    def __post_init__(self) -> None:
        if self.element not in ELEMENTS:
            raise InputError(
                f"unknown number format '{self.element}': {nearest(self.element, [*ELEMENTS])}"
            )
        if (self.granularity == "group") != (self.group is not None) or (
            self.group is not None and self.group < 1
        ):
            raise InputError(f"a group size goes with granularity 'group' alone: {self!r}")
        if self.reduced and (self.bits != 8 or self.floating):
            raise InputError(f"'reduced' is for 8-bit integers, not for {self.element}")
        if self.floating and not self.symmetric:
            raise InputError(f"{self.element} has no zero point: leave out 'affine'")
        if self.granularity == "token":
            object.__setattr__(self, "dynamic", True)

    def __str__(self) -> str:
        parts = [self.element, f"g{self.group}" if self.group else self.granularity]
        parts += [] if self.symmetric else ["affine"]
        parts += ["reduced"] if self.reduced else []
        parts += ["dynamic"] if self.dynamic and self.granularity != "token" else []
        return ":".join(parts)

    @classmethod
    def parse(cls, text: str) -> QType:
        """The inverse of `str`: `int4:g128`, `int8:channel`, `uint8:tensor:affine`, …"""
        element, *rest = text.strip().split(":")
        granularity: Granularity = "tensor"
        group = None
        flags = {"affine": False, "reduced": False, "dynamic": False}
        for index, part in enumerate(rest):
            if part in ("tensor", "channel", "token") and index == 0:
                granularity = part  # type: ignore[assignment]  # narrowed by the test
            elif re.fullmatch(r"g[1-9]\d*", part) and index == 0:
                granularity, group = "group", int(part[1:])
            elif part in flags:
                flags[part] = True
            else:
                known = ["tensor", "channel", "token", "g128", *flags]
                raise InputError(f"'{part}' in the number format '{text}': {nearest(part, known)}")
        return cls(
            element, granularity, group, not flags["affine"], flags["reduced"], flags["dynamic"]
        )

    @property
    def bits(self) -> int:
        """Bits of storage per element."""
        return ELEMENTS[self.element][0]

    @property
    def signed(self) -> bool:
        """Whether elements may be negative."""
        return ELEMENTS[self.element][1]

    @property
    def floating(self) -> bool:
        """Whether elements are floats."""
        return self.element in FLOATS

    @property
    def qmin(self) -> int:
        """Smallest element used.

        Symmetric signed formats leave out −2^(bits−1), so that −x rounds to −q.
        """
        if self.floating:
            return -self.qmax
        bits = self.bits - self.reduced
        low = -(1 << (bits - 1)) if self.signed else 0
        return low + 1 if self.signed and self.symmetric and not self.reduced else low

    @property
    def qmax(self) -> int:
        """Largest element used."""
        if self.floating:
            return int(torch.finfo(self.dtype).max)
        bits = self.bits - self.reduced
        return (1 << (bits - 1)) - 1 if self.signed else (1 << bits) - 1

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype that holds one unpacked element."""
        if self.floating:
            return FLOATS[self.element]
        if self.bits == 32:
            return torch.int32
        return torch.int8 if self.signed else torch.uint8

    def scale_for(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point that cover [low, high] and represent 0 exactly.

        Args:
            low, high: float tensors of one shape; the range of each scale's elements.

        Returns:
            `(scale, zero_point)`: float32, and the storage dtype (int32 for int32 elements), both
            of that shape.
        """
        low, high = low.double().clamp(max=0.0), high.double().clamp(min=0.0)
        if self.symmetric:
            # Unsigned symmetric formats keep the middle as zero; the lower half has one step more.
            levels = self.qmax - self.middle
            scale = torch.maximum(high, -low) / levels
            zero = torch.full_like(scale, self.middle)
        else:
            scale = (high - low) / (self.qmax - self.qmin)
            zero = torch.zeros_like(scale)
        # Below the smallest normal float32 the division of QuantizeLinear would overflow.
        scale = scale.clamp(min=float(torch.finfo(torch.float32).tiny) * 256).float()
        scale = torch.where((low == 0) & (high == 0), torch.ones_like(scale), scale)
        if not self.symmetric:
            zero = (self.qmin - low / scale.double()).round().clamp(self.qmin, self.qmax)
        return scale, zero.to(self.dtype)

    @property
    def middle(self) -> int:
        """The zero point of the symmetric form."""
        return 0 if self.signed else 1 << (self.bits - self.reduced - 1)

    def ranges(self, x: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
        """Smallest and largest element for each scale of `x`, in the shape that the scale has.

        Per tensor: (); per channel: (x.shape[axis],); per token: x.shape with 1 in the last place;
        per group: x.shape with x.shape[axis] / group along `axis`.
        """
        if self.granularity == "tensor":
            return x.amin(), x.amax()
        if self.granularity == "channel":
            others = [i for i in range(x.ndim) if i != axis % x.ndim]
            return (x.amin(others), x.amax(others)) if others else (x, x)
        if self.granularity == "token":
            return x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        blocks = _blocks(x, axis % x.ndim, self.group or 1)
        return blocks.amin(axis % x.ndim + 1), blocks.amax(axis % x.ndim + 1)

    def quantize(self, x: Tensor, scale: Tensor, zero: Tensor, axis: int = 0) -> Tensor:
        """Q = clamp(round_half_even(x / scale) + zero, qmin, qmax), in `dtype`."""
        axis, zero = axis % x.ndim if x.ndim else 0, zero.to(self.dtype)
        return quantize(x, scale, zero, axis, self.group or 0, self.qmin, self.qmax)

    def round(self, x: Tensor) -> Tensor:
        """The nearest of its elements, half to even, in x's dtype: integers are not clamped."""
        return rounded(x, self.dtype)

    def round_trip(self, x: Tensor, axis: int = 0) -> Tensor:
        """`x` after quantization with its own range and dequantization.

        The simulation of this format.
        """
        scale, zero = self.scale_for(*self.ranges(x, axis))
        q = self.quantize(x, scale, zero, axis)
        return dequantize(q, scale, zero, axis % x.ndim, self.group or 0)

    def fitted(self, size: int) -> QType | None:
        """This format with the largest group, halved down to 16, that divides an axis of `size`.

        None where none does; a format without groups fits any size.
        """
        group = self.group
        if group is None:
            return self
        while size % group and group > SMALLEST:
            group //= 2
        return None if size % group else replace(self, group=group)

    def bytes_for(self, elements: int, scales: int) -> int:
        """Bytes of storage for that many elements and scales.

        A scale is a float32, with a zero point of one byte where the format is affine.
        """
        return (elements * self.bits + 7) // 8 + scales * (4 if self.symmetric else 5)


def _blocks(x: Tensor, axis: int, group: int) -> Tensor:
    if x.shape[axis] % group:
        raise InputError(
            f"{x.shape[axis]} elements along axis {axis} do not divide by groups of {group}"
        )
    blocks: Tensor = x.unflatten(axis, (x.shape[axis] // group, group))
    return blocks


def broadcast(scale: Tensor, x: Tensor, axis: int, group: int) -> Tensor:
    """`scale` (or a zero point) in a shape that broadcasts over `x`."""
    if scale.ndim == 0 or (scale.ndim == x.ndim and not group):
        return scale
    if group:
        return scale.repeat_interleave(group, axis)
    return scale.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest number of `dtype`, half to even, in x's dtype.

    Integers are not clamped, floats are: torch's own cast makes NaN of what is too large.
    """
    if not dtype.is_floating_point:
        return x.round()
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype).to(x.dtype)


def quantize(
    x: Tensor, scale: Tensor, zero: Tensor, axis: int, group: int, qmin: int, qmax: int
) -> Tensor:
    """Q = clamp(round_half_even(x / scale) + zero, qmin, qmax), in zero's dtype."""
    q = rounded(x / broadcast(scale, x, axis, group), zero.dtype)
    if not zero.is_floating_point():
        q = q + broadcast(zero, x, axis, group).to(x.dtype)
    if zero.dtype == torch.int32:
        # float32 has no 2³¹ − 1: the limit would round up, and the cast wrap around.
        q = q.double()
    return q.clamp(qmin, qmax).to(zero.dtype)


def dequantize(q: Tensor, scale: Tensor, zero: Tensor | None, axis: int, group: int) -> Tensor:
    """X = scale · (q − zero) in float32; the difference is exact in int32."""
    centred = q.to(scale.dtype if q.is_floating_point() else torch.int32)
    if zero is not None and not q.is_floating_point():
        centred = centred - broadcast(zero, q, axis, group).to(torch.int32)
    return centred.to(scale.dtype) * broadcast(scale, q, axis, group)


def pack(q: Tensor, element: str) -> Tensor:
    """Integers of 2, 3, 4, 6 or 8 bits as a flat uint8 tensor.

    The bit order is little-endian: element i is at bits [i·b, (i+1)·b). For 4 and 2 bits this is
    the byte layout of ONNX's INT4 and INT2 tensors.
    """
    bits = ELEMENTS[element][0]
    if q.numel() > PIECE:  # what is computed in between takes many times the memory
        return torch.cat([pack(part, element) for part in q.flatten().split(PIECE)])
    flat = q.flatten().to(torch.int32) & ((1 << bits) - 1)
    if bits == 8:
        return flat.to(torch.uint8)
    pad = -len(flat) % 8
    flat = torch.nn.functional.pad(flat, (0, pad)).reshape(-1, 8).to(torch.int64)
    words = (flat << (torch.arange(8) * bits)).sum(1)  # 8 elements fill `bits` bytes exactly
    packed = (words[:, None] >> (torch.arange(bits) * 8)) & 0xFF
    return packed.flatten()[: (q.numel() * bits + 7) // 8].to(torch.uint8)


def unpack(packed: Tensor, element: str, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`: an int8 or uint8 tensor of `shape`."""
    bits, signed = ELEMENTS[element]
    count = math.prod(shape)
    if count > PIECE:
        parts = packed.split(PIECE * bits // 8)
        sizes = [min(PIECE, count - PIECE * i) for i in range(len(parts))]
        pairs = zip(parts, sizes, strict=True)
        return torch.cat([unpack(part, element, (size,)) for part, size in pairs]).reshape(shape)
    words = packed.to(torch.int64)
    words = torch.nn.functional.pad(words, (0, -len(words) % bits)).reshape(-1, bits)
    joined = (words << (torch.arange(bits) * 8)).sum(1)
    flat = ((joined[:, None] >> (torch.arange(8) * bits)) & ((1 << bits) - 1)).flatten()[:count]
    if signed:
        flat = torch.where(flat >= 1 << (bits - 1), flat - (1 << bits), flat)
    return flat.to(torch.int8 if signed else torch.uint8).reshape(shape)
