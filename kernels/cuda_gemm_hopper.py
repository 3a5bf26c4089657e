"""Many tokens times 4- or 8-bit weights with Hopper's warpgroup products.

    out[m, n] = Σ_k x[m, k] · float16(scale[n, k's group] · weight[n, k])

As `cuda_gemm`, but the product is out' = W x': the weight's fragments are unpacked into registers,
from where a warpgroup product takes its left operand, and activations come as units
(`cuda_units`). A block computes up to 256 rows of the weight by `tokens`. While one half of the
fragments is multiplied, the other is unpacked. Where there are fewer such pieces than processors,
the blocks of a cluster share out a piece's columns; each adds up its part of the sums, which it
reads from the others' shared memory. Where pieces don't divide among the processors, so many blocks
take whole ones and share out the stages of what is left evenly (stream-K: Osama et al. 2023,
"Stream-K"): sums of a piece that another block began are left to it in a workspace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.kernels.code import Argument, Size
from qcompiler.kernels.cuda_code import (
    WARP,
    CudaKernel,
    address,
    call,
    cuda_kernel,
    registers,
    tokens_of,
)
from qcompiler.kernels.cuda_epilogue import TOGETHER, store_together
from qcompiler.kernels.cuda_hopper import GROUP, Ring
from qcompiler.kernels.cuda_pieces import OwnPieces
from qcompiler.kernels.cuda_tall import CHUNK, STRIDE, Tall
from qcompiler.kernels.cuda_units import UNIT, UNIT_ROWS
from qcompiler.kernels.cuda_unpack import unpack
from qcompiler.kernels.cuda_weights import LIFT, ROWS, Weights, Widened
from qcompiler.kernels.expression import Emitter, Expression


def gemm_hopper(
    name: str, arguments: Sequence[Argument | Size], tokens: int, form: Weights | Widened,
    how: Tall,
    expression: Expression,
) -> CudaKernel:  # fmt: skip
    """The kernel.

    Args:
        name: of the function.
        arguments: x as units or its tensor map (uint8), packed weights (uint8); without groups the
            rows' scales (N float32); with `how.blocks` a workspace (float32) and counters (int32,
            one for each block, zero before and after); then what the expression reads and writes.
            The last may be M, given by the call, without `how.blocks`.
        tokens: M.
        form: of the weights.
        how: the partition.
        expression: over (…, N), with the sums as value 0; it stores them.
    """
    tokens = tokens_of(arguments, tokens)
    down, across = how.pieces(tokens, form)
    splits, readers, blocks = how.splits, how.readers, how.blocks
    chunks = form.stage // CHUNK
    x_units = -(-form.depth // CHUNK)  # along a row
    last_unit = -(-tokens // UNIT_ROWS) - 1
    slot_bytes, at_weights = how.slot(form), how.tokens * form.stage * 2
    splits = how.clustered(form)
    stages = -(-form.stages // splits)
    words = form.bits // 4
    bytes_of_stage = at_weights + how.weight_bytes(form)
    size = how.tokens // 2  # sums of a thread for 64 rows
    threads = (readers + 1) * GROUP
    each = readers * GROUP  # threads that multiply
    fours = size // 4 * how.parts  # of a thread's sums
    after = how.ring * (slot_bytes + 16)  # the ring and its barriers
    grid = (blocks, 1) if blocks else (down * across, splits)
    with cuda_kernel(name, arguments, grid, threads, how.shared(form), how.resident) as (
        made, buffers, (block, split), thread, memory,
    ):  # fmt: skip
        made.cluster = splits
        made.maps = (arguments[0].name,) if how.mapped else ()
        x, packed = buffers[:2]
        group = T.Bind(thread // GROUP)
        ring = Ring(memory, how.ring * slot_bytes, how.ring)
        emitter = Emitter(expression, buffers)
        ring.start(thread, each // WARP, warps=True)
        call("qc_sync")

        if blocks:
            workspace, flags = buffers[2 + form.scaled_after :][:2]

        own = OwnPieces(how, form, tokens, block, split)

        def produce() -> None:
            call(f"qc_registers_dec_{how.registers[0]}")
            with T.If(thread == each), T.Then():

                def bring(
                    _: Any, where: tuple[Any, Any], start: Any, count: Any, done: Any
                ) -> None:
                    early = min(how.ring, stages)
                    with T.If(done == 0), T.Then():
                        # The previous kernel made the activations, but not the weights.
                        for stage in range(early):
                            with T.If(stage < count), T.Then():
                                bring_weights(where[1], start + stage, stage)
                        call("qc_after_previous")
                        call("qc_let_next")
                        for stage in range(early):
                            with T.If(stage < count), T.Then():
                                bring_activations(where[0], start + stage, stage)
                    there = T.Bind(T.Select(done == 0, T.min(early, count), 0))
                    with T.serial(0, count - there) as later:
                        stage = T.Bind(there + later)
                        step = T.Bind(done + stage)
                        slot = T.Bind(step % how.ring)
                        call("qc_barrier_wait", ring.free(slot), (step // how.ring + 1) % 2)
                        bring_weights(where[1], start + stage, slot)
                        bring_activations(where[0], start + stage, slot)

                own.each(bring)

        def bring_weights(row_block: Any, stage: Any, slot: Any) -> None:
            call("qc_barrier_expect", ring.full(slot), bytes_of_stage)
            start = T.Bind(slot * slot_bytes + at_weights)
            for tile in range(how.rows // ROWS):
                row = T.min(row_block * (how.rows // ROWS) + tile, form.tiles - 1)
                source = (T.cast(row, "int64") * form.stages + stage) * form.stage_bytes
                call("qc_bulk_copy", address(memory, start + tile * form.stage_bytes),
                     address(packed, source), form.stage_bytes, ring.full(slot))  # fmt: skip

        def bring_activations(token_block: Any, stage: Any, slot: Any) -> None:
            start = T.Bind(slot * slot_bytes)
            for chunk in range(chunks):
                to = start + chunk * (how.tokens * 128)
                if how.mapped:
                    call("qc_tile_copy", address(memory, to), address(x),
                         stage * form.stage + chunk * CHUNK, token_block * how.tokens,
                         ring.full(slot))  # fmt: skip
                    continue
                # A chunk past the end has weights of zero: any other chunk serves.
                column = T.min(stage * chunks + chunk, x_units - 1)
                for unit in range(how.tokens // UNIT_ROWS):
                    row = T.min(token_block * (how.tokens // UNIT_ROWS) + unit, last_unit)
                    source = (T.cast(row, "int64") * x_units + column) * UNIT
                    call("qc_bulk_copy", address(memory, to + unit * UNIT), address(x, source),
                         UNIT, ring.full(slot))  # fmt: skip

        def multiply() -> None:
            call(f"qc_registers_inc_{how.registers[1]}")
            lane, warp = T.Bind(thread % WARP), T.Bind(thread // WARP % 4)
            totals = [registers(size, "float32") for _ in range(how.parts)]
            halves = [
                [registers(16, "int32") for _ in range(how.parts)] for _ in range(2)
            ]  # fragments of four steps
            held = registers(4 * words, "int32")

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
                call("qc_barrier_arrive_warp", ring.free(slot), lane)

            def sum_up(done: Any, count: Any) -> None:
                """The sums of the block's `count` stages after its first `done`."""
                for total in totals:
                    for i in range(size):
                        T.buffer_store(total, T.float32(0), [i])
                per = 2 // chunks if chunks < 2 else 1  # stages a turn, so that halves alternate
                with T.serial(0, (count + per - 1) // per) as turn:
                    for inner in range(per):
                        stage = T.Bind(turn * per + inner)
                        step = T.Bind(done + stage)
                        slot = T.Bind(step % how.ring)
                        start = T.Bind(slot * slot_bytes)
                        with T.If(stage < count), T.Then():
                            call("qc_barrier_wait", ring.full(slot), step // how.ring % 2)
                            for chunk in range(chunks):
                                half = (inner * chunks + chunk) % 2
                                fragments(start, chunk, half)
                                call("qc_wgmma_begin")
                                for k in range(4):
                                    at = start + chunk * (how.tokens * 128) + k * 32
                                    for part in range(how.parts):
                                        call(f"qc_wgmma_f16_{how.tokens}",
                                             address(totals[part], 0, size),
                                             address(halves[half][part], k * 4, 4),
                                             address(memory, at))  # fmt: skip
                                call("qc_wgmma_commit")
                                if chunk == chunks - 1:
                                    call("qc_wgmma_wait_last", T.cast(stage == count - 1, "int32"))
                                else:
                                    call("qc_wgmma_wait", 1)
                                if chunk == 0:
                                    with T.If(stage > 0), T.Then():
                                        release((step + how.ring - 1) % how.ring)
                for total in totals:
                    call("qc_settle", address(total, 0, size), size)

            def add_up(piece: Any, where: Any, start: Any, count: Any, done: Any) -> None:
                sum_up(done, count)
                if not blocks:
                    call("qc_after_previous")  # before anything is written
                    if splits > 1:
                        share(totals, lane, warp, where)
                    else:
                        call("qc_sync_readers", each)
                        finish(totals, lane, warp, where, 0)
                    return
                with T.If(count > 0), T.Then():
                    release((done + count + how.ring - 1) % how.ring)
                # Who has a piece's first stages finishes it: others have theirs ready by then.
                with T.If(start == 0):
                    with T.Then():
                        if own.common:
                            with T.If(piece < own.common), T.Then():
                                add_others(totals, piece)
                        finish(totals, lane, warp, where, after)
                    with T.Else():
                        leave(totals)

            if blocks:
                call("qc_after_previous")
            own.each(add_up)

        def fours_of(totals: list[Any], i: Any) -> Any:
            return address(totals[i // (size // 4)], i % (size // 4) * 4, 4)

        def room(of: Any, i: int) -> Any:
            start = T.cast(of, "int64") * (fours * each)
            return address(workspace, (start + i * each + thread) * 4)

        def leave(totals: list[Any]) -> None:
            """Leave the sums to the block before."""
            for i in range(fours):
                call("qc_move16", room(block, i), fours_of(totals, i))
            call("qc_sync_readers", each)
            with T.If(thread == 0), T.Then():
                call("qc_flag_set", address(flags, block))

        def add_others(totals: list[Any], piece: Any) -> None:
            """Add what the next blocks left of this piece, in their order."""
            with T.serial(0, own.last_of(piece) - block) as other:
                of = T.Bind(block + 1 + other)
                with T.If(thread == 0), T.Then():
                    call("qc_flag_wait", address(flags, of))
                call("qc_sync_readers", each)
                for i in range(fours):
                    call("qc_add16", fours_of(totals, i), room(of, i))
                call("qc_sync_readers", each)
                with T.If(thread == 0), T.Then():
                    call("qc_flag_clear", address(flags, of))

        def write(where: tuple[Any, Any], token: Any, row: Any, found: Any) -> None:
            """Four rows' sums of a token."""
            m = T.Bind(where[0] * how.tokens + token)
            n = T.Bind(where[1] * how.rows + row)

            def made(i: int) -> Any:
                one = found[i]
                if form.scaled_after:
                    one = one * buffers[2][n + i]
                if isinstance(form, Widened):
                    one = one * T.float32(1 / LIFT)
                return T.Bind(one)

            with T.If(T.And(m < tokens, n < form.rows)), T.Then():
                place = emitter.coordinates(m)
                if form.rows % TOGETHER == 0:
                    store_together(emitter, place, n, [made(i) for i in range(TOGETHER)])
                    return
                for i in range(TOGETHER):
                    with T.If(n + i < form.rows), T.Then():
                        emitter.vector(place, n + i, 1, made(i))

        def turn_round(
            where: tuple[Any, Any], mine: Any, token: Any, row: Any, count: int,
            sums: Callable[[int, int], Any],
        ) -> None:  # fmt: skip
            """Write a warp's sums of 16 rows by 8 · count tokens, turned round in `mine`.

            sums(column, e) are four of a thread for each eight tokens, of two tokens and two rows.
            """
            lane = T.Bind(thread % WARP)
            call("qc_sync_warp")
            for column in range(count):
                for e in range(4):
                    at = (column * 8 + lane % 4 * 2 + e % 2) * STRIDE + lane // 4 + e // 2 * 8
                    call("qc_put", address(memory, mine + at * 4), sums(column, e))
            call("qc_sync_warp")
            for column in range(count):
                held = registers(TOGETHER, "float32")
                at = (column * 8 + lane % 8) * STRIDE + lane // 8 * TOGETHER
                call("qc_move16", address(held, 0, TOGETHER), address(memory, mine + at * 4))
                write(where, token + column * 8 + lane % 8, row + lane // 8 * TOGETHER, held)

        def finish(
            totals: list[Any], lane: Any, warp: Any, where: tuple[Any, Any], start: int
        ) -> None:
            """Each warp turns its sums round in shared memory, some tokens at a time."""
            mine = T.Bind(start + thread // WARP * how.turned)
            many = how.batch // 8
            for part in range(how.parts):
                row = T.Bind((group * how.parts + part) * 64 + warp * 16)
                for first in range(0, how.tokens // 8, many):
                    sums = partial(_of_columns, totals[part], first)
                    turn_round(where, mine, first * 8, row, many, sums)

        def share(totals: list[Any], lane: Any, warp: Any, where: tuple[Any, Any]) -> None:
            """Leave the sums in shared memory; each block adds its share up, in order of blocks."""
            call("qc_sync_readers", each)
            per = size // 4  # of a part
            many = -(-fours // splits)
            mine = T.Bind(how.tokens * how.rows * 4 + thread // WARP * how.turned)

            def place(i: Any) -> Any:
                return address(memory, (i * each + thread) * 16)

            for i in range(fours):
                call("qc_move16", place(i), fours_of(totals, i))
            call("qc_cluster_meet")
            with T.serial(0, many) as turn:
                i = T.Bind(split * many + turn)
                with T.If(i < fours), T.Then():
                    held = registers(4, "float32")
                    for e in range(4):
                        T.buffer_store(held, T.float32(0), [e])
                    for of in range(splits):
                        call("qc_add16_of", address(held, 0, 4), place(i), of)
                    row = T.Bind((group * how.parts + i // per) * 64 + warp * 16)
                    turn_round(where, mine, i % per * 8, row, 1, lambda _, e: held[e])
            call("qc_cluster_meet")  # none leaves while others read its memory

        with T.If(group == readers):
            with T.Then():
                produce()
            with T.Else():
                multiply()
    return made


def _of_columns(total: Any, first: int, column: int, e: int) -> Any:
    """A thread's e-th sum of column `first + column`, each of eight tokens."""
    return total[(first + column) * 4 + e]
