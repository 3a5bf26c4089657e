"""Many tokens times 4- or 8-bit weights with Hopper's warpgroup products.

    out[m, n] = Σ_k x[m, k] · float16(scale[n, k's group] · weight[n, k])

As `cuda_gemm`, but the product is out' = W x': the weight's fragments are unpacked into registers,
from where a warpgroup product takes its left operand, and activations come as units
(`cuda_units`). A block computes up to 256 rows of the weight by `tokens`. While one half of the
fragments is multiplied, the other is unpacked. Where there are fewer such pieces than processors,
the blocks of a cluster share out a piece's columns; each adds up its part of the sums, which it
reads from the others' shared memory.
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
    address,
    call,
    cuda_kernel,
    registers,
    tokens_of,
    value,
)
from qcompiler.kernels.cuda_hopper import GROUP, Ring
from qcompiler.kernels.cuda_units import UNIT, UNIT_ROWS
from qcompiler.kernels.cuda_unpack import unpack
from qcompiler.kernels.cuda_weights import LIFT, ROWS, Weights, Widened
from qcompiler.kernels.expression import Emitter, Expression

READERS = 2  # warpgroups that multiply
CHUNK = 64  # columns of a unit of float16
# Splits → clusters of so many blocks that run at once, each block alone on its processor: an H200's
# driver says so (cuOccupancyMaxActiveClusters).
CLUSTERS = {1: 132, 2: 66, 4: 30, 8: 15}
RATE = 2048  # multiplications of a processor in a cycle
FILL = 4000  # cycles until a block's first stages have come
NARROW = 1.15  # how much longer 64 tokens take a multiplication: weights are unpacked for fewer
SHARE = 1 / 8  # cycles that a block of a cluster takes for each of its sums to be added up


@dataclass(frozen=True)
class Tall:
    """How a product is shared out.

    Attributes:
        tokens: of a block, 64 or 128.
        parts: products of 64 rows that a warpgroup makes, 1 or 2.
        ring: stages under way.
        band: blocks of tokens that share weights in the cache: they run side by side.
        splits: blocks that share out the columns of one piece of the output: a cluster.
        mapped: whether x is (M, K) float16, given by its tensor map (`cuda_hopper.MAP_BYTES`).
    """

    tokens: int = 128
    parts: int = 2
    ring: int = 4
    band: int = 8
    splits: int = 1
    mapped: bool = False

    @property
    def rows(self) -> int:
        """Of a block."""
        return READERS * self.parts * UNIT_ROWS

    def pieces(self, tokens: int, form: Weights | Widened) -> tuple[int, int]:
        """Pieces of the output along tokens and rows."""
        return -(-tokens // self.tokens), -(-form.rows // self.rows)

    def weight_bytes(self, form: Weights | Widened) -> int:
        """Bytes of packed weights in a stage."""
        return self.rows // ROWS * form.stage_bytes

    def slot(self, form: Weights | Widened) -> int:
        """Bytes of a stage: activations first, on a multiple of 1024."""
        size = self.tokens * form.stage * 2 + self.weight_bytes(form)
        return -(-size // 1024) * 1024

    def shared(self, form: Weights | Widened) -> int:
        """Bytes of shared memory."""
        return max(self.ring * (self.slot(form) + 16), self.tokens * (self.rows + 8) * 4)


def choose_tall(tokens: int, form: Weights | Widened) -> Tall:
    """The partition that takes the fewest cycles, by a count that fits measured times."""

    def cycles(how: Tall) -> float:
        down, across = how.pieces(tokens, form)
        depth = -(-form.stages // how.splits) * form.stage
        work = how.tokens * how.rows * depth / RATE * (NARROW if how.tokens == 64 else 1)
        share = how.tokens * how.rows * SHARE if how.splits > 1 else 0
        return -(-down * across // CLUSTERS[how.splits]) * (FILL + work + share)

    found = [
        Tall(wide, parts, ring, splits=splits)
        for wide, parts in ((128, 2), (128, 1), (64, 1))
        for splits in CLUSTERS
        if splits == 1 or splits * 2 <= form.stages
        for ring in (6, 5, 4, 3, 2)
    ]
    return min((how for how in found if how.shared(form) <= HOPPER.shared), key=cycles)


def gemm_hopper(
    name: str, arguments: Sequence[Argument | Size], tokens: int, form: Weights | Widened,
    how: Tall,
    expression: Expression,
) -> CudaKernel:  # fmt: skip
    """The kernel.

    Args:
        name: of the function.
        arguments: x as units or its tensor map (uint8), packed weights (uint8); without groups the
            rows' scales (N float32); then what the expression reads and writes. The last may be M,
            given by the call.
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
    bytes_of_stage = at_weights + how.weight_bytes(form)
    size = how.tokens // 2  # sums of a thread for 64 rows
    threads = (READERS + 1) * GROUP
    with cuda_kernel(
        name, arguments, (down * across, splits), threads, how.shared(form), resident=1
    ) as (made, buffers, (block, split), thread, memory):
        made.cluster = splits
        made.maps = (arguments[0].name,) if how.mapped else ()
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
            for tile in range(how.rows // ROWS):
                row = T.min(row_block * (how.rows // ROWS) + tile, form.tiles - 1)
                source = (T.cast(row, "int64") * form.stages + first + stage) * form.stage_bytes
                call("qc_bulk_copy", address(memory, start + tile * form.stage_bytes),
                     address(packed, source), form.stage_bytes, ring.full(slot))  # fmt: skip

        def bring_activations(stage: Any, slot: Any) -> None:
            start = slot * slot_bytes
            if how.mapped:
                for chunk in range(chunks):
                    call("qc_tile_copy", address(memory, start + chunk * (how.tokens * 128)),
                         address(x), (first + stage) * form.stage + chunk * CHUNK,
                         token_block * how.tokens, ring.full(slot))  # fmt: skip
                return
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
            totals = [registers(size, "float32") for _ in range(how.parts)]
            halves = [
                [registers(16, "int32") for _ in range(how.parts)] for _ in range(2)
            ]  # fragments of four steps
            held = registers(4 * words, "int32")
            for total in totals:
                for i in range(size):
                    T.buffer_store(total, T.float32(0), [i])

            def fragments(start: Any, chunk: int, half: int) -> None:
                for part in range(how.parts):
                    tile = (group * how.parts + part) * 4 + warp
                    base = T.Bind(start + at_weights + tile * form.stage_bytes)
                    for i in range(words):
                        at = base + (chunk * words + i) * 512 + lane * 16
                        call("qc_move16", address(held, i * 4, 4), address(memory, at))
                    for step in range(4):
                        a = address(halves[half][part], step * 4, 4)
                        packed_step = address(held, step * words, words)
                        unpack(form, a, packed_step, memory, base, chunk * 4 + step, lane)

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
                            fragments(start, chunk, half)
                            call("qc_wgmma_begin")
                            for step in range(4):
                                at = start + chunk * (how.tokens * 128) + step * 32
                                for part in range(how.parts):
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
            n = T.Bind(row_block * how.rows + row)
            with T.If(T.And(m < tokens, n < form.rows)), T.Then():
                if form.scaled_after:
                    found = found * buffers[2][n]
                if isinstance(form, Widened):
                    found = found * T.float32(1 / LIFT)
                emitter.vector(emitter.coordinates(m), n, 1, T.Bind(found))

        def finish(totals: list[Any], lane: Any, warp: Any) -> None:
            """Turn the sums round in shared memory, [token][row], and store whole rows."""
            call("qc_sync_readers", READERS * GROUP)
            stride = how.rows + 8
            for part in range(how.parts):
                for half in range(2):
                    row = T.Bind((group * how.parts + part) * 64 + warp * 16 + lane // 4 + half * 8)
                    for column in range(how.tokens // 8):
                        for i in range(2):
                            at = (column * 8 + lane % 4 * 2 + i) * stride + row
                            found = totals[part][column * 4 + half * 2 + i]
                            call("qc_put", address(memory, at * 4), found)
            call("qc_sync_readers", READERS * GROUP)
            with T.serial(0, how.tokens * how.rows // (READERS * GROUP)) as i:
                at = T.Bind(i * (READERS * GROUP) + thread)
                token, row = T.Bind(at // how.rows), T.Bind(at % how.rows)
                write(token, row, value("qc_get", address(memory, (token * stride + row) * 4)))

        def share(totals: list[Any], lane: Any, warp: Any) -> None:
            """Leave the sums in shared memory; each block adds its share up, in order of blocks."""
            call("qc_sync_readers", READERS * GROUP)
            each = size // 4  # pieces of four numbers, of a part
            fours = each * how.parts
            mine = -(-fours // splits)

            def place(i: Any) -> Any:
                return address(memory, (i * (READERS * GROUP) + thread) * 16)

            for i in range(fours):
                call("qc_move16", place(i), address(totals[i // each], i % each * 4, 4))
            call("qc_cluster_meet")
            with T.serial(0, mine) as turn:
                i = T.Bind(split * mine + turn)
                with T.If(i < fours), T.Then():
                    held = registers(4, "float32")
                    for e in range(4):
                        T.buffer_store(held, T.float32(0), [e])
                    for of in range(splits):
                        call("qc_add16_of", address(held, 0, 4), place(i), of)
                    first = (group * how.parts + i // each) * 64 + warp * 16 + lane // 4
                    for e in range(4):
                        token = i % each * 8 + lane % 4 * 2 + e % 2
                        write(token, first + e // 2 * 8, held[e])
            call("qc_cluster_meet")  # none leaves while others read its memory

        with T.If(group == READERS):
            with T.Then():
                produce()
            with T.Else():
                multiply()
    return made
