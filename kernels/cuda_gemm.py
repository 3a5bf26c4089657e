"""Many tokens times 4- or 8-bit weights on a GPU's tensor cores.

    out[m, n] = Σ_k x[m, k] · float16(scale[n, k's group] · weight[n, k])

A block computes `warps` · `tiles` · 16 rows of the weight by `tokens` of its own. Packed weights
and activations come through a ring of stages in shared memory; each warp unpacks its own rows in
registers (no other warp needs them) and multiplies them with all the block's tokens. Where there
are fewer tiles than processors, columns are shared out among blocks too (split-K): each leaves its
sums in a workspace, and the last one to finish adds them in order, so that results don't depend on
the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    registers,
    sync,
    tokens_of,
    value,
)
from qcompiler.kernels.cuda_sums import Halves
from qcompiler.kernels.cuda_units import UNIT, UNIT_BYTES, UNIT_ROWS
from qcompiler.kernels.cuda_unpack import unpack
from qcompiler.kernels.cuda_weights import LIFT, ROWS, Weights, Widened
from qcompiler.kernels.expression import Emitter, Expression


@dataclass(frozen=True)
class Blocks:
    """How a product is shared out.

    Attributes:
        tiles: of 16 rows that a warp multiplies.
        warps: of a block, each with rows of its own.
        tokens: of a block, a multiple of 8.
        ring: stages under way.
        splits: blocks that share out the columns of one piece of the output.
    """

    tiles: int
    warps: int
    tokens: int
    ring: int
    splits: int = 1

    @property
    def rows(self) -> int:
        """Of a block."""
        return self.tiles * self.warps * ROWS

    def slot(self, form: Weights | Widened) -> int:
        """Bytes of a stage."""
        return self.tiles * self.warps * form.stage_bytes + self.tokens * form.line

    def shared(self, form: Weights | Widened) -> int:
        """Bytes of shared memory."""
        return max(self.ring * self.slot(form), self.tokens * (self.rows + 8) * 4)

    def grid(self, tokens: int, form: Weights | Widened) -> tuple[int, int, int]:
        """Blocks along rows, tokens and columns of the weight."""
        return -(-form.rows // self.rows), -(-tokens // self.tokens), self.splits

    def workspace(self, tokens: int, form: Weights | Widened) -> int:
        """float32 numbers of the workspace."""
        rows, columns, splits = self.grid(tokens, form)
        return rows * columns * splits * self.rows * self.tokens if splits > 1 else 0

    def counters(self, tokens: int, form: Weights | Widened) -> int:
        """Counters: of each piece of the output, how many blocks have left their sums."""
        rows, columns, _ = self.grid(tokens, form)
        return rows * columns


def gemm(
    name: str, arguments: Sequence[Argument | Size], tokens: int, form: Weights | Widened,
    how: Blocks, expression: Expression,
) -> CudaKernel:  # fmt: skip
    """The kernel.

    Args:
        name: of the function.
        arguments: x (M·K float16; units of float16 where weights are `Widened`), packed weights
            (uint8); without groups the rows' scales (N float32); with splits the workspace
            (float32) and counters (int32, one for each piece of the output, zero before and after);
            then what the expression reads and writes. The last may be M, given by the call.
        tokens: M.
        form: of the weights.
        how: the partition.
        expression: over (…, N), with the sums as value 0; it stores them.
    """
    tiles, warps, ring, splits = how.tiles, how.warps, how.ring, how.splits
    columns = how.tokens // 8
    slot, threads = how.slot(form), warps * WARP
    wide = warps * tiles * form.stage_bytes
    pieces = form.line // 16
    turns = -(-form.stages // splits)
    tokens = tokens_of(arguments, tokens)
    grid = how.grid(tokens, form)
    with cuda_kernel(name, arguments, grid, threads, how.shared(form)) as (
        made, buffers, (row_block, token_block, split), thread, memory,
    ):  # fmt: skip
        x, packed = buffers[:2]
        lane, warp = T.Bind(thread % WARP), T.Bind(thread // WARP)
        first_token = T.Bind(token_block * how.tokens)
        product = _Halves(form, tiles, how.tokens, lane, memory)
        total = product.total

        def each(count: int, body: Any) -> None:
            """body(i) for i below count, shared out among the threads."""
            for first in range(0, count, threads):
                if first + threads <= count:
                    body(thread + first)
                else:
                    with T.If(thread + first < count), T.Then():
                        body(thread + first)

        def weights(turn: Any, place: Any) -> None:
            stage = T.Bind(split * turns + turn)
            size = form.stage_bytes // 16

            def piece(at: Any) -> None:
                row = T.min(row_block * (warps * tiles) + at // size, form.tiles - 1)
                start = (T.cast(row, "int64") * form.stages + stage) * form.stage_bytes
                call("qc_copy16", address(memory, place * slot + at * 16),
                     address(packed, start + at % size * 16), 1)  # fmt: skip

            with T.If(stage < form.stages), T.Then():
                each(warps * tiles * size, piece)

        def activations(turn: Any, place: Any) -> None:
            stage = T.Bind(split * turns + turn)

            def piece(at: Any) -> None:
                token, chunk = T.Bind(at // pieces), T.Bind(at % pieces)
                row = T.Bind(first_token + token)
                valid, start, swizzled = product.activation(row, tokens, stage, chunk)
                to = place * slot + wide + token * form.line
                spot = swizzled if swizzled is not None else T.bitwise_xor(chunk, token % 8)
                call("qc_copy16", address(memory, to + spot * 16), address(x, start),
                     T.cast(valid, "int32"))  # fmt: skip

            with T.If(stage < form.stages), T.Then():
                each(how.tokens * pieces, piece)

        def place_of_stage(slot_number: Any) -> tuple[Any, Any]:
            """Where this warp's weights and the block's tokens lie."""
            start = T.Bind(slot_number * slot)
            return T.Bind(start + warp * (tiles * form.stage_bytes)), T.Bind(start + wide)

        product.clear()
        for early in range(min(ring - 1, turns)):
            weights(early, early)
        call("qc_after_previous")
        call("qc_let_next")
        for early in range(ring - 1):
            if early < turns:
                activations(early, early)
            call("qc_commit")
        with T.serial(0, turns) as turn:
            call("qc_wait", ring - 2)
            sync()
            ahead = T.Bind(turn + (ring - 1))
            with T.If(ahead < turns), T.Then():
                weights(ahead, ahead % ring)
                activations(ahead, ahead % ring)
            call("qc_commit")
            with T.If(split * turns + turn < form.stages), T.Then():
                base = place_of_stage(turn % ring)
                product.multiply(*base)
        call("qc_wait", 0)
        sync()

        def finish() -> None:
            """Turn the sums round in shared memory, [token][row], and store whole rows."""
            stride = how.rows + 8
            held = T.decl_buffer((how.shared(form) // 4,), "float32", data=memory.data,
                                 scope="shared.dyn")  # fmt: skip
            for tile in range(tiles):
                for half in range(2):
                    row = T.Bind((warp * tiles + tile) * ROWS + lane // 4 + half * 8)
                    for column in range(columns):
                        for i in range(2):
                            found = total[(tile * columns + column) * 4 + half * 2 + i]
                            token = column * 8 + lane % 4 * 2 + i
                            T.buffer_store(held, found, [token * stride + row])
            sync()
            emitter = Emitter(expression, buffers)
            with T.serial(0, how.tokens * how.rows // threads) as turn:
                at = T.Bind(turn * threads + thread)
                token, row = T.Bind(at // how.rows), T.Bind(at % how.rows)
                m, n = T.Bind(first_token + token), T.Bind(row_block * how.rows + row)
                with T.If(T.And(m < tokens, n < form.rows)), T.Then():
                    found = held[token * stride + row]
                    if form.scaled_after:
                        found = found * buffers[2][n]
                    if isinstance(form, Widened):
                        found = found * T.float32(1 / LIFT)
                    emitter.vector(emitter.coordinates(m), n, 1, T.Bind(found))

        if splits == 1:
            finish()
        else:
            workspace, counters = buffers[2 + form.scaled_after :][:2]
            count = tiles * columns  # of 16 bytes
            piece_of = T.Bind(token_block * grid[0] + row_block)

            def place_of(part: Any, i: int) -> Any:
                start = T.cast(piece_of * splits + part, "int64") * (count * threads)
                return (start + i * threads + thread) * 4

            for i in range(count):
                call("qc_move16", address(workspace, place_of(split, i)), address(total, i * 4, 4))
            with T.If(value("qc_is_last", address(counters, piece_of), splits) != 0), T.Then():
                for i in range(count * 4):
                    T.buffer_store(total, T.float32(0), [i])
                with T.serial(0, splits) as part:
                    for i in range(count):
                        call(
                            "qc_add16",
                            address(total, i * 4, 4),
                            address(workspace, place_of(part, i)),
                        )
                finish()
    return made


class _Halves(Halves):
    """Sums of a warp with many tokens: fragments of tokens are read anew for each eight of them."""

    form: Weights | Widened  # type: ignore[assignment]  # one kind more than the base reads

    def __init__(
        self, form: Weights | Widened, tiles: int, tokens: int, lane: Any, memory: Any
    ) -> None:
        self.form, self.tiles, self.columns = form, tiles, tokens // 8
        self.lane, self.memory = lane, memory
        self.total = registers(tiles * self.columns * 4, "float32")
        self.held = registers(tiles * 4, "int32")
        self.a, self.b = registers(tiles * 8, "int32"), registers(4, "int32")

    def activation(self, row: Any, count: int, stage: Any, chunk: Any) -> tuple[Any, Any, Any]:
        """Whether 16 bytes of x are there, and where; units are swizzled already."""
        if isinstance(self.form, Weights):
            return super().activation(row, count, stage, chunk)
        across = -(-self.form.depth * 2 // UNIT_BYTES)
        valid = T.Bind(row < count)
        # A unit past the end has weights of zero: any other one serves.
        column = T.min(stage * (self.form.line // UNIT_BYTES) + chunk // 8, across - 1)
        unit = T.cast(row // UNIT_ROWS, "int64") * across + column
        start = unit * UNIT + row % UNIT_ROWS * UNIT_BYTES + chunk % 8 * 16
        return valid, T.Select(valid, start, T.int64(0)), chunk

    def multiply(self, base: Any, source: Any = None) -> None:
        """Add one stage: weights at `base`, tokens at `source` in shared memory."""
        form, tiles, lane, memory = self.form, self.tiles, self.lane, self.memory
        words = form.bits // 4
        for pair in range(form.stage // 32):  # an ldmatrix brings tokens for two steps
            for step in (2 * pair, 2 * pair + 1):
                for tile in range(tiles):
                    start = base + tile * form.stage_bytes
                    held = address(self.held, tile * 4, 4)
                    if step * words % 4 == 0:
                        at = start + step * words // 4 * 512 + lane * 16
                        call("qc_move16", held, address(memory, at))
                    a = address(self.a, (step % 2 * tiles + tile) * 4, 4)
                    held = address(self.held, tile * 4 + step * words % 4, words)
                    unpack(form, a, held, memory, start, step, lane)
            for column in range(self.columns):
                chunk = T.bitwise_xor(pair * 4 + lane // 8, lane % 8)
                at = source + (column * 8 + lane % 8) * form.line + chunk * 16
                call("qc_ldmatrix", address(self.b, 0, 4), address(memory, at))
                for step in range(2):
                    for tile in range(tiles):
                        call("qc_mma_f16",
                             address(self.total, (tile * self.columns + column) * 4, 4),
                             address(self.a, (step * tiles + tile) * 4, 4),
                             address(self.b, step * 2, 2))  # fmt: skip


def choose_blocks(tokens: int, form: Weights | Widened, gpu: Gpu = HOPPER) -> Blocks:
    """A partition that gives every processor a block."""
    wide = 32 if tokens <= 32 else 64 if tokens <= 64 else 128

    def blocks(wide: int, ring: int) -> Blocks:
        return Blocks(2 if wide == 128 else 1, 8, wide, ring)

    ring = 4
    while blocks(wide, ring).shared(form) > gpu.shared:
        if ring > 2:
            ring -= 1
        else:
            wide, ring = wide // 2, 4
    found = blocks(wide, ring)
    rows, columns, _ = found.grid(tokens, form)
    splits = max(1, min(gpu.processors // (rows * columns), form.stages // 4, 8))
    return replace(found, splits=splits)
