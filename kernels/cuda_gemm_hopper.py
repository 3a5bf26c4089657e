"""Many tokens times 4- or 8-bit weights with Hopper's warpgroup products.

    out[m, n] = Σ_k x[m, k] · float16(scale[n, k's group] · weight[n, k])

As `cuda_gemm`, but the product is out' = W x': the weight's fragments are unpacked into registers,
from where a warpgroup product takes its left operand, and activations come as units
(`cuda_units`). A block computes 256 rows of the weight by `tokens`. While one half of the
fragments is multiplied, the other is unpacked.
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
    address,
    call,
    cuda_kernel,
    registers,
    tokens_of,
    value,
)
from qcompiler.kernels.cuda_hopper import GROUP, Ring
from qcompiler.kernels.cuda_units import UNIT, UNIT_ROWS
from qcompiler.kernels.cuda_weights import ROWS, Weights
from qcompiler.kernels.expression import Emitter, Expression

READERS = 2  # warpgroups that multiply
PARTS = 2  # products of 64 rows that each makes
ROWS_OF_BLOCK = READERS * PARTS * UNIT_ROWS
CHUNK = 64  # columns of a unit of float16


@dataclass(frozen=True)
class Tall:
    """How a product is shared out.

    Attributes:
        tokens: of a block, 64 or 128.
        ring: stages under way.
        band: blocks of tokens that share weights in the cache: they run side by side.
        splits: blocks that share out the columns of one piece of the output.
    """

    tokens: int = 128
    ring: int = 4
    band: int = 8
    splits: int = 1

    def pieces(self, tokens: int, form: Weights) -> tuple[int, int]:
        """Pieces of the output along tokens and rows."""
        return -(-tokens // self.tokens), -(-form.rows // ROWS_OF_BLOCK)

    def workspace(self, tokens: int, form: Weights) -> int:
        """float32 numbers of the workspace."""
        down, across = self.pieces(tokens, form)
        held = down * across * self.splits * ROWS_OF_BLOCK * self.tokens
        return held if self.splits > 1 else 0

    def weight_bytes(self, form: Weights) -> int:
        """Bytes of packed weights in a stage."""
        return ROWS_OF_BLOCK // ROWS * form.stage_bytes

    def slot(self, form: Weights) -> int:
        """Bytes of a stage: activations first, on a multiple of 1024."""
        size = self.tokens * form.stage * 2 + self.weight_bytes(form)
        return -(-size // 1024) * 1024

    def shared(self, form: Weights) -> int:
        """Bytes of shared memory."""
        return max(self.ring * (self.slot(form) + 16), self.tokens * (ROWS_OF_BLOCK + 8) * 4)


def choose_tall(tokens: int, form: Weights) -> Tall:
    """The deepest ring that fits, and as many splits as give every processor a block.

    Blocks that share a piece wait for one another: there are never more than run at once.
    """
    wide = 128 if tokens > 64 else 64
    rings = [Tall(wide, ring) for ring in (6, 5, 4, 3, 2)]
    found = next(how for how in rings if how.shared(form) <= HOPPER.shared)
    down, across = found.pieces(tokens, form)
    splits = max(1, min(HOPPER.processors // (down * across), form.stages // 4, 8))
    return replace(found, splits=splits)


def gemm_hopper(
    name: str, arguments: Sequence[Argument | Size], tokens: int, form: Weights, how: Tall,
    expression: Expression,
) -> CudaKernel:  # fmt: skip
    """The kernel.

    Args:
        name: of the function.
        arguments: x as units (uint8), packed weights (uint8); without groups the rows' scales (N
            float32); with splits the workspace (float32) and counters (int32, one for each piece of
            the output, zero before and after); then what the expression reads and writes.
            The last may be M, given by the call.
        tokens: M.
        form: of the weights.
        how: the partition.
        expression: over (…, N), with the sums as value 0; it stores them.
    """
    tokens = tokens_of(arguments, tokens)
    down, across = how.pieces(tokens, form)
    splits = how.splits
    chunks = form.stage // CHUNK
    x_units = -(-form.depth // CHUNK)  # along a row
    last_unit = -(-tokens // UNIT_ROWS) - 1
    slot_bytes, at_weights = how.slot(form), how.tokens * form.stage * 2
    stages = -(-form.stages // splits)
    splits = -(-form.stages // stages)  # none is left without work
    words = form.bits // 4
    steps_of_group = form.group // 16 if form.group else 0
    bytes_of_stage = at_weights + how.weight_bytes(form)
    size = how.tokens // 2  # sums of a thread for 64 rows
    threads = (READERS + 1) * GROUP
    with cuda_kernel(
        name, arguments, (down * across, splits), threads, how.shared(form), resident=1
    ) as (made, buffers, (block, split), thread, memory):
        made.together = down * across * splits if splits > 1 else 0
        x, packed = buffers[:2]
        whole = T.Bind(block // (how.band * across))
        height = T.Bind(T.min(down - whole * how.band, how.band))
        rest = T.Bind(block % (how.band * across))
        token_block = T.Bind(whole * how.band + rest % height)
        row_block = T.Bind(rest // height)
        group = T.Bind(thread // GROUP)
        first = T.Bind(split * stages)  # of the block's stages, and how many
        count = T.Bind(T.min(stages, form.stages - first))
        ring = Ring(memory, how.ring * slot_bytes, how.ring)
        emitter = Emitter(expression, buffers)
        ring.start(thread, READERS * GROUP // WARP)
        call("qc_sync")

        def produce() -> None:
            call("qc_registers_dec_40")
            with T.If(thread == READERS * GROUP), T.Then():
                # The previous kernel made the activations, but not the weights.
                early = min(how.ring, stages)
                for stage in range(early):
                    with T.If(stage < count), T.Then():
                        call("qc_barrier_expect", ring.full(stage), bytes_of_stage)
                        bring_weights(stage, stage)
                call("qc_after_previous")
                call("qc_let_next")
                for stage in range(early):
                    with T.If(stage < count), T.Then():
                        bring_activations(stage, stage)
                with T.If(count > early), T.Then(), T.serial(0, count - early) as later:
                    stage = T.Bind(later + early)
                    slot = T.Bind(stage % how.ring)
                    call("qc_barrier_wait", ring.free(slot), (stage // how.ring + 1) % 2)
                    call("qc_barrier_expect", ring.full(slot), bytes_of_stage)
                    bring_weights(stage, slot)
                    bring_activations(stage, slot)

        def bring_weights(stage: Any, slot: Any) -> None:
            start = slot * slot_bytes + at_weights
            for tile in range(ROWS_OF_BLOCK // ROWS):
                row = T.min(row_block * (ROWS_OF_BLOCK // ROWS) + tile, form.tiles - 1)
                source = (T.cast(row, "int64") * form.stages + first + stage) * form.stage_bytes
                call("qc_bulk_copy", address(memory, start + tile * form.stage_bytes),
                     address(packed, source), form.stage_bytes, ring.full(slot))  # fmt: skip

        def bring_activations(stage: Any, slot: Any) -> None:
            start = slot * slot_bytes
            for chunk in range(chunks):
                # A chunk past the end has weights of zero: any other chunk serves.
                column = T.min((first + stage) * chunks + chunk, x_units - 1)
                for unit in range(how.tokens // UNIT_ROWS):
                    row = T.min(token_block * (how.tokens // UNIT_ROWS) + unit, last_unit)
                    source = (T.cast(row, "int64") * x_units + column) * UNIT
                    to = start + (chunk * (how.tokens // UNIT_ROWS) + unit) * UNIT
                    call("qc_bulk_copy", address(memory, to), address(x, source), UNIT,
                         ring.full(slot))  # fmt: skip

        def multiply() -> None:
            call("qc_registers_inc_232")
            lane, warp = T.Bind(thread % WARP), T.Bind(thread // WARP % 4)
            totals = [registers(size, "float32") for _ in range(PARTS)]
            halves = [
                [registers(16, "int32") for _ in range(PARTS)] for _ in range(2)
            ]  # fragments of four steps
            held = registers(4 * words, "int32")
            for total in totals:
                for i in range(size):
                    T.buffer_store(total, T.float32(0), [i])

            def unpack(start: Any, chunk: int, half: int) -> None:
                for part in range(PARTS):
                    tile = (group * PARTS + part) * 4 + warp
                    base = T.Bind(start + at_weights + tile * form.stage_bytes)
                    for i in range(words):
                        at = base + (chunk * words + i) * 512 + lane * 16
                        call("qc_move16", address(held, i * 4, 4), address(memory, at))
                    for step in range(4):
                        a = address(halves[half][part], step * 4, 4)
                        call(f"qc_unpack{form.bits}", a, address(held, step * words, words))
                        if form.group:
                            at = base + form.weight_bytes + lane // 4 * 4
                            at = at + (chunk * 4 + step) // steps_of_group * 32
                            call("qc_scale_rows", a, address(memory, at))

            def release(slot: Any) -> None:
                with T.If(lane == 0), T.Then():
                    call("qc_barrier_arrive", ring.free(slot))

            per = 2 // chunks if chunks < 2 else 1  # stages a turn, so that halves alternate
            with T.serial(0, (count + per - 1) // per) as turn:
                for inner in range(per):
                    stage = T.Bind(turn * per + inner)
                    slot = T.Bind(stage % how.ring)
                    start = T.Bind(slot * slot_bytes)
                    with T.If(stage < count), T.Then():
                        call("qc_barrier_wait", ring.full(slot), stage // how.ring % 2)
                        for chunk in range(chunks):
                            half = (inner * chunks + chunk) % 2
                            unpack(start, chunk, half)
                            call("qc_wgmma_begin")
                            for step in range(4):
                                at = start + chunk * (how.tokens * 128) + step * 32
                                for part in range(PARTS):
                                    call(f"qc_wgmma_f16_{how.tokens}",
                                         address(totals[part], 0, size),
                                         address(halves[half][part], step * 4, 4),
                                         address(memory, at))  # fmt: skip
                            call("qc_wgmma_commit")
                            if chunk == chunks - 1:
                                call("qc_wgmma_wait_last", T.cast(stage == count - 1, "int32"))
                            else:
                                call("qc_wgmma_wait", 1)
                            if chunk == 0:
                                with T.If(stage > 0), T.Then():
                                    release((stage + how.ring - 1) % how.ring)
            for total in totals:
                call("qc_settle", address(total, 0, size), size)
            call("qc_after_previous")  # before anything is written
            (finish if splits == 1 else share)(totals, lane, warp)

        def write(token: Any, row: Any, found: Any) -> None:
            m = T.Bind(token_block * how.tokens + token)
            n = T.Bind(row_block * ROWS_OF_BLOCK + row)
            with T.If(T.And(m < tokens, n < form.rows)), T.Then():
                if form.scaled_after:
                    found = found * buffers[2][n]
                emitter.vector(emitter.coordinates(m), n, 1, T.Bind(found))

        def finish(totals: list[Any], lane: Any, warp: Any) -> None:
            """Turn the sums round in shared memory, [token][row], and store whole rows."""
            call("qc_sync_readers", READERS * GROUP)
            stride = ROWS_OF_BLOCK + 8
            for part in range(PARTS):
                for half in range(2):
                    row = T.Bind((group * PARTS + part) * 64 + warp * 16 + lane // 4 + half * 8)
                    for column in range(how.tokens // 8):
                        for i in range(2):
                            at = (column * 8 + lane % 4 * 2 + i) * stride + row
                            found = totals[part][column * 4 + half * 2 + i]
                            call("qc_put", address(memory, at * 4), found)
            call("qc_sync_readers", READERS * GROUP)
            with T.serial(0, how.tokens * ROWS_OF_BLOCK // (READERS * GROUP)) as i:
                at = T.Bind(i * (READERS * GROUP) + thread)
                token, row = T.Bind(at // ROWS_OF_BLOCK), T.Bind(at % ROWS_OF_BLOCK)
                write(token, row, value("qc_get", address(memory, (token * stride + row) * 4)))

        def share(totals: list[Any], lane: Any, warp: Any) -> None:
            """Leave the sums in the workspace; each block adds its share up, in order of blocks."""
            workspace, counters = buffers[2 + form.scaled_after :][:2]
            each = size // 4  # pieces of four numbers, of a part
            fours = each * PARTS
            mine = -(-fours // splits)

            def place(of: Any, i: Any) -> Any:
                start = T.cast(block * splits + of, "int64") * (fours * READERS * GROUP)
                return address(workspace, (start + i * (READERS * GROUP) + thread) * 4)

            for i in range(fours):
                call("qc_move16", place(split, i), address(totals[i // each], i % each * 4, 4))
            call("qc_meet", address(counters, block), splits, READERS * GROUP)
            with T.serial(0, mine) as turn:
                i = T.Bind(split * mine + turn)
                with T.If(i < fours), T.Then():
                    held = registers(4, "float32")
                    for e in range(4):
                        T.buffer_store(held, T.float32(0), [e])
                    for of in range(splits):
                        call("qc_add16", address(held, 0, 4), place(of, i))
                    first = (group * PARTS + i // each) * 64 + warp * 16 + lane // 4
                    for e in range(4):
                        token = i % each * 8 + lane % 4 * 2 + e % 2
                        write(token, first + e // 2 * 8, held[e])
            call("qc_part", address(counters, block), splits, READERS * GROUP)

        with T.If(group == READERS):
            with T.Then():
                produce()
            with T.Else():
                multiply()
    return made
