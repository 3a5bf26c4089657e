"""Few tokens times 4- or 8-bit weights on a GPU: bound by reading the weights once.

    out[m, n] = Σ_g scale[n, g] · Σ_(k in g) x[m, k] · weight[n, k]        m ≤ 64

A block takes `tiles` × 16 rows of the weight; its warps share out the columns (split-K inside the
block), each with a ring of stages of its own in shared memory that asynchronous copies keep filled,
so that no warp waits for another before the end. Weights are unpacked in registers into fragments
of float16 and multiplied on the tensor cores, where up to eight tokens cost what one costs; the sum
over a group is float32 and multiplied with its scale once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.kernels.code import Argument
from qcompiler.kernels.cuda_code import (
    MAX_SHARED,
    WARP,
    CudaKernel,
    address,
    call,
    cuda_kernel,
    registers,
    sync,
)
from qcompiler.kernels.cuda_weights import ROWS, Weights
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

    def shared(self, tokens: int, form: Weights) -> int:
        """Bytes of shared memory."""
        ring = self.warps * self.ring * self.slot(tokens, form)
        sums = self.warps * self.tiles * ROWS * _whole(tokens) * 4
        return max(ring, sums)

    def slot(self, tokens: int, form: Weights) -> int:
        """Bytes of one stage of a warp."""
        return self.tiles * _aligned(form.stage_bytes) + tokens * form.stage * 2


FEW = 64  # tokens of a block


def _whole(tokens: int) -> int:
    return -(-tokens // 8) * 8


def _aligned(size: int) -> int:
    return -(-size // 128) * 128


def choose(tokens: int, form: Weights, processors: int = 132) -> Skinny:
    """A partition that fills the GPU: wide tiles where activations would cost more than weights."""
    tokens = min(tokens, FEW)
    tiles = 1 if tokens <= 4 else 4 if 16 < tokens <= 32 else 2
    if 3 * processors <= form.tiles <= 4 * processors:  # all at once with two blocks a processor
        tiles = max(tiles, 2)
    while tiles > 1 and form.tiles < processors * tiles * 3 // 4:
        tiles //= 2
    warps = 4 if 8 < tokens <= 16 and form.tiles >= 3 * processors else 8
    while warps > 1 and form.stages < warps:
        warps //= 2
    if tokens <= 2 and -(-form.stages // warps) <= 4 and tiles == 1:
        return Skinny(tiles, warps, 6)  # fewer of the next kernel's blocks beside it: more even
    for ring in (4, 3):
        found = Skinny(tiles, warps, ring)
        if found.shared(tokens, form) <= MAX_SHARED // 2:
            return found
    while warps > 1 and Skinny(tiles, warps, 2).shared(tokens, form) > MAX_SHARED:
        warps //= 2
    return Skinny(tiles, warps, 2)


def skinny(
    name: str, arguments: Sequence[Argument], tokens: int, form: Weights, how: Skinny,
    expression: Expression | None = None,
) -> CudaKernel:  # fmt: skip
    """The kernel.

    Args:
        name: of the function.
        arguments: x (M·K float16), packed weights (uint8), out (M·N float16); without groups also
            the rows' scales (N float32). With an expression there is no out, and its own follow.
        tokens: M; where there are more than 64, other blocks take the rest and read weights again.
        form: of the weights.
        how: the partition.
        expression: over (…, N), with the float32 sums as value 0; it stores them.
    """
    tiles, warps, ring = how.tiles, how.warps, how.ring
    whole, tokens = tokens, min(tokens, FEW)  # of all, and of a block
    columns = _whole(tokens) // 8  # fragments of 8 tokens
    slot, wide = how.slot(tokens, form), _aligned(form.stage_bytes)
    turns = -(-form.stages // warps)
    pieces = form.stage * 2 // 16  # 16-byte pieces of a token in a stage
    groups = form.stage // form.group if form.group else 1
    steps = form.stage // 16 // groups  # k16 steps of a group
    blocks = (-(-form.tiles // tiles), -(-whole // tokens))
    words = form.bits // 4  # of a lane for a k16 step
    with cuda_kernel(name, arguments, blocks, warps * WARP, how.shared(tokens, form)) as (
        made, buffers, (block, token_block), thread, memory,
    ):  # fmt: skip
        x, packed = buffers[:2]
        lane, warp = T.Bind(thread % WARP), T.Bind(thread // WARP)
        mine = T.Bind(warp * (ring * slot))
        first_token = T.Bind(token_block * tokens)
        total = registers(tiles * columns * 4, "float32")
        part = registers(tiles * columns * 4, "float32")
        held = registers(tiles * 4, "int32")  # 16 bytes of packed weights of each tile
        a, b = registers(4, "int32"), registers(columns * 4, "int32")

        def weights(turn: Any, place: Any) -> None:
            stage = T.Bind(turn * warps + warp)
            for tile in range(tiles):
                row = T.min(block * tiles + tile, form.tiles - 1)
                start = T.Bind((T.cast(row, "int64") * form.stages + stage) * form.stage_bytes)
                each(form.stage_bytes // 16, stage < form.stages, lambda at, start=start, tile=tile:
                     call("qc_copy16", address(memory, mine + place * slot + tile * wide + at * 16),
                          address(packed, start + at * 16), 1))  # fmt: skip

        def each(count: int, valid: Any, body: Any) -> None:
            """body(i) for i below count, shared out among the lanes."""
            for first in range(0, count, WARP):
                inside = valid if first + WARP <= count else T.And(valid, lane + first < count)
                with T.If(inside), T.Then():
                    body(lane + first)

        def activations(turn: Any, place: Any) -> None:
            stage = T.Bind(turn * warps + warp)

            def piece(at: Any) -> None:
                token, chunk = T.Bind(at // pieces), T.Bind(at % pieces)
                to = mine + place * slot + tiles * wide + token * (form.stage * 2)
                k = T.Bind(stage * form.stage + chunk * 8)
                row = T.Bind(first_token + token)
                valid = T.Bind(T.And(k < form.depth, row < whole))
                call("qc_copy16", address(memory, to + T.bitwise_xor(chunk, token % 8) * 16),
                     address(x, T.Select(valid, T.cast(row, "int64") * form.depth + k, T.int64(0))),
                     T.cast(valid, "int32"))  # fmt: skip

            each(tokens * pieces, stage < form.stages, piece)

        def zero(buffer: Any, size: int) -> None:
            for i in range(size):
                T.buffer_store(buffer, T.float32(0), [i])

        def multiply(place: Any) -> None:
            base = T.Bind(mine + place * slot)
            source = T.Bind(base + tiles * wide)
            for step in range(form.stage // 16):
                if step % 2 == 0:  # a load brings the tokens of two steps
                    for column in range(columns):
                        token = T.Bind(T.min(column * 8 + lane % 8, tokens - 1))
                        chunk = T.Bind(T.bitwise_xor(step * 2 + lane // 8, token % 8))
                        call(
                            "qc_ldmatrix",
                            address(b, column * 4, 4),
                            address(memory, source + token * (form.stage * 2) + chunk * 16),
                        )
                if step * words % 4 == 0:
                    for tile in range(tiles):
                        at = base + tile * wide + step * words // 4 * 512 + lane * 16
                        call("qc_move16", address(held, tile * 4, 4), address(memory, at))
                into = part if form.group else total
                if form.group and step % steps == 0:
                    zero(part, tiles * columns * 4)
                for tile in range(tiles):
                    call(
                        f"qc_unpack{form.bits}",
                        address(a, 0, 4),
                        address(held, tile * 4 + step * words % 4, words),
                    )
                    for column in range(columns):
                        call(
                            "qc_mma_f16",
                            address(into, (tile * columns + column) * 4, 4),
                            address(a, 0, 4),
                            address(b, column * 4 + step % 2 * 2, 2),
                        )
                if form.group and step % steps == steps - 1:
                    for tile in range(tiles):
                        at = base + tile * wide + form.weight_bytes
                        at = at + (step // steps * 8 + lane // 4) * 4
                        for column in range(columns):
                            i = (tile * columns + column) * 4
                            call(
                                "qc_add_scaled",
                                address(total, i, 4),
                                address(part, i, 4),
                                address(memory, at),
                            )

        zero(total, tiles * columns * 4)
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
                multiply(turn % ring)

        if turns <= ring:
            for turn in range(turns):
                turn_of(turn, turns - 1 - turn, False)
        else:
            with T.serial(0, turns) as turn:
                turn_of(turn, ring - 2, True)
        call("qc_wait", 0)
        sync()
        # Each warp's sums [token][row], then added in the warps' order.
        sums = T.decl_buffer((how.shared(tokens, form) // 4,), "float32", data=memory.data,
                             scope="shared.dyn")  # fmt: skip
        rows, room = tiles * ROWS, tiles * ROWS * columns * 8
        for tile in range(tiles):
            for column in range(columns):
                for i in range(4):
                    token = column * 8 + lane % 4 * 2 + i % 2
                    row = tile * ROWS + lane // 4 + i // 2 * 8
                    T.buffer_store(
                        sums,
                        total[(tile * columns + column) * 4 + i],
                        [warp * room + token * rows + row],
                    )
        sync()
        count = rows * tokens
        for first in range(0, count, warps * WARP):
            index = T.Bind(thread + first)
            row = T.Bind(block * rows + index % rows)
            token = T.Bind(first_token + index // rows)
            inside = T.And(index < count, T.And(row < form.rows, token < whole))
            with T.If(inside), T.Then():
                value = sums[index]
                for other in range(1, warps):
                    value = value + sums[other * room + index]
                if not form.group:
                    value = value * buffers[3 if expression is None else 2][row]
                if expression is not None:
                    emitter = Emitter(expression, buffers)
                    emitter.vector(emitter.coordinates(token), row, 1, T.Bind(value))
                    continue
                T.buffer_store(buffers[2], T.cast(value, "float16"), [token * form.rows + row])
    return made
