"""Few tokens times 4- or 8-bit weights on a GPU: bound by reading the weights once.

    out[m, n] = Σ_g scale[n, g] · Σ_(k in g) x[m, k] · weight[n, k]        m ≤ 64

A block takes `tiles` × 16 rows of the weight; its warps share out the columns (split-K inside the
block), each with a ring of stages of its own in shared memory that asynchronous copies keep filled,
so that no warp waits for another before the end. Weights are unpacked in registers into fragments
of float16 and multiplied on the tensor cores, where up to eight tokens cost what one costs; the sum
over a group is float32 and multiplied with its scale once.

int8 weights by int8 or uint8 activations go the same way, with sums in int32 (`Bytes`), e4m3 by
e4m3 with sums in float32; 4-bit weights by int8 activations too, with sums that are exact over a
group (`Nibbles`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.kernels.code import Argument, Size
from qcompiler.kernels.cuda_code import (
    HOPPER,
    WARP,
    CudaKernel,
    Gpu,
    address,
    call,
    cuda_kernel,
    sync,
    tokens_of,
)
from qcompiler.kernels.cuda_sums import sums, whole
from qcompiler.kernels.cuda_weights import ROWS, Form
from qcompiler.kernels.expression import Emitter, Expression


@dataclass(frozen=True)
class Skinny:
    """How a product is shared out.

    Attributes:
        tiles: of 16 rows that a warp multiplies.
        warps: of a block, among which columns are shared out.
        ring: stages under way in each warp.
    """

    tiles: int
    warps: int
    ring: int

    def shared(self, tokens: int, form: Form) -> int:
        """Bytes of shared memory."""
        tokens = min(tokens, FEW)
        ring = self.warps * self.ring * self.slot(tokens, form)
        sums = self.warps * self.tiles * ROWS * whole(tokens) * 4
        return max(ring, sums)

    def slot(self, tokens: int, form: Form) -> int:
        """Bytes of one stage of a warp."""
        return self.tiles * _aligned(form.stage_bytes) + tokens * form.line


FEW = 64  # tokens of a block


def _aligned(size: int) -> int:
    return -(-size // 128) * 128


def choose(tokens: int, form: Form, gpu: Gpu = HOPPER) -> Skinny:
    """A partition that fills the GPU: wide tiles where activations would cost more than weights."""
    tokens, processors = min(tokens, FEW), gpu.processors
    short = form.stages <= 32  # a warp of eight has four stages at most
    tiles = 1 if tokens <= 4 else 4 if 16 < tokens <= 32 else 2
    if 3 * processors <= form.tiles <= 4 * processors:  # all at once with two blocks a processor
        tiles = max(tiles, 2)
    if short and tokens <= 8:
        tiles = 2 if form.tiles >= 3 * processors else 1
    while tiles > 1 and form.tiles < processors * tiles * 3 // 4:
        tiles //= 2
    warps = 4 if 8 < tokens <= 16 and form.tiles >= 3 * processors else 8
    if tokens <= 2 and form.tiles < 2 * processors and form.stages >= 64:
        warps = 16  # few blocks with much to read each
    while warps > 1 and form.stages < warps:
        warps //= 2
    rings = (3,) if short and tokens <= 16 and warps == 8 else (2,) if warps == 16 else (4, 3)
    for ring in rings:
        found = Skinny(tiles, warps, ring)
        if found.shared(tokens, form) <= gpu.shared // 2:
            return found
    while warps > 1 and Skinny(tiles, warps, 2).shared(tokens, form) > gpu.shared:
        warps //= 2
    return Skinny(tiles, warps, 2)


def skinny(
    name: str, arguments: Sequence[Argument | Size], tokens: int, form: Form, how: Skinny,
    expression: Expression,
) -> CudaKernel:  # fmt: skip
    """The kernel.

    Args:
        name: of the function.
        arguments: x, the packed weights (uint8), for float16 activations and rows with one scale
            those scales (N float32), then what the expression reads and writes. x: M·K float16, or
            of 8 bits as units where weights are `Bytes` or `Nibbles`. The last may be M, given by
            the call.
        tokens: M, or of a block where the call gives M; where there are more than 64, other blocks
            take the rest and read weights again.
        form: of the weights.
        how: the partition.
        expression: over (…, N), with the sums as value 0 (float32, of integers `Bytes` int32); it
            stores them.
    """
    tiles, warps, ring = how.tiles, how.warps, how.ring
    every, tokens = tokens_of(arguments, tokens), min(tokens, FEW)  # of all, and of a block
    columns = whole(tokens) // 8  # fragments of 8 tokens
    slot, wide = how.slot(tokens, form), _aligned(form.stage_bytes)
    turns = -(-form.stages // warps)
    pieces = form.line // 16  # of a token in a stage
    blocks = (-(-form.tiles // tiles), -(-every // tokens))
    with cuda_kernel(name, arguments, blocks, warps * WARP, how.shared(tokens, form)) as (
        made, buffers, (block, token_block), thread, memory,
    ):  # fmt: skip
        x, packed = buffers[:2]
        lane, warp = T.Bind(thread % WARP), T.Bind(thread // WARP)
        mine = T.Bind(warp * (ring * slot))
        first_token = T.Bind(token_block * tokens)
        product = sums(form, tiles, tokens, wide, lane, memory)

        def each(count: int, valid: Any, body: Any) -> None:
            """body(i) for i below count, shared out among the lanes."""
            for first in range(0, count, WARP):
                inside = valid if first + WARP <= count else T.And(valid, lane + first < count)
                with T.If(inside), T.Then():
                    body(lane + first)

        def weights(turn: Any, place: Any) -> None:
            stage = T.Bind(turn * warps + warp)
            for tile in range(tiles):
                row = T.min(block * tiles + tile, form.tiles - 1)
                start = T.Bind(form.start(T.cast(row, "int64"), stage))
                each(form.stage_bytes // 16, stage < form.stages, lambda at, start=start, tile=tile:
                     call("qc_copy16", address(memory, mine + place * slot + tile * wide + at * 16),
                          address(packed, start + at * 16), 1))  # fmt: skip

        def activations(turn: Any, place: Any) -> None:
            stage = T.Bind(turn * warps + warp)

            def piece(at: Any) -> None:
                token, chunk = T.Bind(at // pieces), T.Bind(at % pieces)
                row = T.Bind(first_token + token)
                to = mine + place * slot + tiles * wide + token * form.line
                valid, start, swizzled = product.activation(row, every, stage, chunk)
                at = swizzled if swizzled is not None else T.bitwise_xor(chunk, token % 8)
                call("qc_copy16", address(memory, to + at * 16), address(x, start),
                     T.cast(valid, "int32"))  # fmt: skip

            each(tokens * pieces, stage < form.stages, piece)

        product.clear()
        # All of the ring at once where no slot is used twice.
        begun = turns if turns <= ring else ring - 1
        for early in range(begun):
            weights(early, early)
        call("qc_after_previous")
        call("qc_let_next")
        for early in range(begun):
            activations(early, early)
            call("qc_commit")

        def turn_of(turn: Any, left: int, ahead: bool) -> None:
            call("qc_wait", left)
            call("qc_sync_warp")
            if ahead:
                later = T.Bind(turn + (ring - 1))
                with T.If(later < turns), T.Then():
                    weights(later, later % ring)
                    activations(later, later % ring)
                call("qc_commit")
            with T.If(turn * warps + warp < form.stages), T.Then():
                product.multiply(T.Bind(mine + turn % ring * slot))

        if turns <= ring:
            for turn in range(turns):
                turn_of(turn, turns - 1 - turn, False)
        else:
            with T.serial(0, turns) as turn:
                turn_of(turn, ring - 2, True)
        call("qc_wait", 0)
        sync()
        # Each warp's sums [token][row], then added in the warps' order.
        parts = T.decl_buffer((how.shared(tokens, form) // 4,), product.dtype, data=memory.data,
                             scope="shared.dyn")  # fmt: skip
        rows, room = tiles * ROWS, tiles * ROWS * columns * 8
        for tile in range(tiles):
            for column in range(columns):
                for i in range(4):
                    token = column * 8 + lane % 4 * 2 + i % 2
                    row = tile * ROWS + lane // 4 + i // 2 * 8
                    T.buffer_store(
                        parts,
                        product.total[(tile * columns + column) * 4 + i],
                        [warp * room + token * rows + row],
                    )
        sync()
        emitter = Emitter(expression, buffers)
        count = rows * tokens
        for first in range(0, count, warps * WARP):
            index = T.Bind(thread + first)
            row = T.Bind(block * rows + index % rows)
            token = T.Bind(first_token + index // rows)
            inside = T.And(index < count, T.And(row < form.rows, token < every))
            with T.If(inside), T.Then():
                value = parts[index]
                for other in range(1, warps):
                    value = value + parts[other * room + index]
                if form.scaled_after:
                    value = value * buffers[2][row]
                emitter.vector(emitter.coordinates(token), row, 1, T.Bind(value))
    return made
