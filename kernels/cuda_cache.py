"""New keys and values into a cache on a GPU, turned by their positions' angles.

Caches are rows, [head][tokens][size], in float16 or as integers of 8 or 4 bits with given scales,

    q = clamp(round(x / scale), −2^(b−1), 2^(b−1) − 1) + 2^(b−1)       stored unsigned, two a byte

as `qc::stored_attention` has them. Chunks of many tokens are written by a kernel of their own;
of few, by the attention itself (`cuda_decode`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.kernels import code
from qcompiler.kernels.cache import Sizes
from qcompiler.kernels.code import Argument
from qcompiler.kernels.cuda_code import CudaKernel, call, cuda_kernel
from qcompiler.kernels.cuda_expressions import THREADS
from qcompiler.kernels.expression import Access

QUERIES = 64.0  # what queries are multiplied with where scales are: float16 has few small numbers
HALF = 65504.0  # the largest float16
SHARERS = 4  # query heads that a block of the attention computes at most


@dataclass(frozen=True)
class Decode(Sizes):
    """Sizes on a GPU, and how its blocks share them out.

    Attributes:
        bits: of a number in the cache: 16 (float16), 8 or 4.
    """

    bits: int = 16

    @property
    def chunk(self) -> int:
        """Keys of a block."""
        return 64 if self.size <= 128 else 32

    @property
    def parts(self) -> int:
        """Blocks that share out the keys of a query at most."""
        return -(-self.capacity // self.chunk)

    @property
    def sharers(self) -> int:
        """Query heads that a block computes."""
        group = self.heads // self.kv_heads
        return max(n for n in range(1, SHARERS + 1) if group % n == 0)

    @property
    def counters(self) -> int:
        """int32 numbers, zero before and after."""
        return self.new * (self.heads // self.sharers)

    @property
    def workspace(self) -> int:
        """float32 numbers of the parts: sums, then the largest score and the sum of powers."""
        return self.new * self.heads * self.parts * (self.size + 2)

    @property
    def lanes(self) -> int:
        """Of a warp that read one key: a power of two."""
        return min(32, 1 << (self.size // 8 - 1).bit_length())


@dataclass(frozen=True)
class Source:
    """Where new keys or values come from.

    Attributes:
        x: access over (token, head, element).
        scale: of the cache's integers, over (head, element); None: the cache is float16.
    """

    x: Access
    scale: Access | None = None

    def step(self, buffers: Sequence[Any], head: Any, element: Any) -> Any:
        """The scale of an element; 1 where there is none."""
        if self.scale is None:
            return T.float32(1)
        a, b = self.scale.strides
        return buffers[self.scale.argument][self.scale.offset + head * a + element * b]


@dataclass(frozen=True)
class Rotary:
    """Tables of the rotary embedding.

    Attributes:
        cos, sin: accesses over (position, pair).
        positions: over (token).
        rows, pairs: of the tables.
        neighbours: whether pairs are neighbours, not the two halves.
    """

    cos: Access
    sin: Access
    positions: Access
    rows: int
    pairs: int
    neighbours: bool


def turned(
    buffers: Sequence[Any], access: Access, rotary: Rotary | None, size: int, token: Any, head: Any,
    element: Any,
) -> Any:  # fmt: skip
    """An element of a query or key, turned by its position's angle.

    Args:
        buffers: the kernel's.
        access: over (token, head, element).
        rotary: None: as it is.
        size: of a head.
        token, head, element: which.
    """
    a, b, c = access.strides
    held, start = buffers[access.argument], T.Bind(access.offset + token * a + head * b)
    own = T.Bind(held[start + element * c])
    if rotary is None:
        return own
    pairs, where = rotary.pairs, rotary.positions
    row = T.Cast("int32", buffers[where.argument][where.offset + token * where.strides[0]])
    row = T.Bind(T.min(T.max(row, T.int32(0)), T.int32(rotary.rows - 1)))
    if rotary.neighbours:
        second, pair = element % 2 == 1, element // 2
        partner = T.bitwise_xor(element, 1)
    else:
        second, pair = element >= pairs, element % pairs
        partner = T.Select(second, element - pairs, element + pairs)
    pair = T.Bind(T.min(pair, pairs - 1))
    other = T.Bind(held[start + partner * c])
    cos, sin = (
        T.Bind(buffers[t.argument][t.offset + row * t.strides[0] + pair * t.strides[1]])
        for t in (rotary.cos, rotary.sin)
    )
    found = own * cos + T.Select(second, other * sin, T.float32(0) - other * sin)
    return found if 2 * pairs == size else T.Select(element < 2 * pairs, found, own)


def stored(buffers: Sequence[Any], source: Source, bits: int, head: Any, first: Any,
           numbers: Sequence[Any]) -> Any:  # fmt: skip
    """What a cache keeps of one number, or the byte of two of 4 bits, from element `first` on."""
    if bits == 16:
        return T.Cast("float16", numbers[0])
    half = 1 << (bits - 1)
    found: Any = T.int32(0)
    for i, x in enumerate(numbers):
        q = code.round_half_even(x / source.step(buffers, head, first + i), 1)
        q = code.minimum(code.maximum(q, code.number(-half, 1)), code.number(half - 1, 1))
        found = found + T.Cast("int32", q + code.number(half, 1)) * (1 << (bits * i))
    return T.Cast("uint8", found)


def write_cache(
    name: str, arguments: Sequence[Argument], sizes: Decode, q: Access, k: Source, v: Source,
    rotary: Rotary | None,
) -> CudaKernel:  # fmt: skip
    """A kernel that turns queries and keys, and puts keys and values into their caches.

    Args:
        name: of the function.
        arguments: keys' cache, values' cache (float16 or uint8), position (int64), where the
            queries go (token, head, element; float16), then those of the accesses. Where the cache
            has scales, queries are multiplied with the keys' and with `QUERIES`, up to float16's
            largest number.
        sizes: of the attention.
        q: access over (token, head, element).
        k, v: keys and values.
        rotary: None leaves queries and keys as they are.
    """
    heads, kv_heads, size = sizes.heads, sizes.kv_heads, sizes.size
    every, per = heads + 2 * kv_heads, 2 if sizes.bits == 4 else 1
    count = sizes.new * every * size // per
    with cuda_kernel(name, arguments, (-(-count // THREADS),), THREADS) as (
        made, buffers, (block,), thread, _,
    ):  # fmt: skip
        call("qc_after_previous")
        call("qc_let_next")
        index = T.Bind(block * THREADS + thread)
        with T.If(index < count), T.Then():
            element = T.Bind(index % (size // per) * per)
            head = T.Bind(index // (size // per) % every)
            token = T.Bind(index // (size // per * every))
            position = T.Cast("int32", buffers[2][0])
            # Never beyond the cache, whatever the caller passed.
            spot = T.min(T.max(position + token, T.int32(0)), T.int32(sizes.capacity - 1))

            def keep(cache: Any, of: Any, source: Source, turns: Rotary | None) -> None:
                numbers = [
                    T.Bind(turned(buffers, source.x, turns, size, token, of, element + i))
                    for i in range(per)
                ]
                to = ((of * sizes.capacity + spot) * size + element) // per
                T.buffer_store(
                    cache, stored(buffers, source, sizes.bits, of, element, numbers), [to]
                )

            with T.If(head < heads):
                with T.Then():
                    for i in range(per):
                        x = turned(buffers, q, rotary, size, token, head, element + i)
                        if k.scale is not None:
                            step = k.step(buffers, head // (heads // kv_heads), element + i)
                            x = x * (step * code.number(QUERIES, 1))
                            # Infinity would make NaN of the whole row.
                            x = T.max(T.min(x, code.number(HALF, 1)), code.number(-HALF, 1))
                        to = (token * heads + head) * size + element + i
                        T.buffer_store(buffers[3], T.Cast("float16", x), [to])
                with T.Else(), T.If(head < heads + kv_heads):
                    with T.Then():
                        keep(buffers[0], T.Bind(head - heads), k, rotary)
                    with T.Else():
                        keep(buffers[1], T.Bind(head - (heads + kv_heads)), v, None)
    return made
