"""Many tokens times 4- or 8-bit weights with Hopper's warpgroup products.

    out[m, n] = Σ_k x[m, k] · float16(scale[n, k's group] · weight[n, k])

As `cuda_gemm`, but the product is out' = W x': the weight's fragments are unpacked into registers,
from where a warpgroup product takes its left operand, and activations come as units
(`cuda_units`). A block computes up to 256 rows of the weight by `tokens`. While one half of the
fragments is multiplied, the other is unpacked. Where there are fewer such pieces than processors,
the blocks of a cluster share out a piece's columns; each adds up its part of the sums, which it
reads from the others' shared memory. Where pieces don't divide among the processors, so many blocks
share out all their stages evenly (stream-K: Osama et al. 2023, "Stream-K"): sums of a piece that
another block began are left to it in a workspace.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    value,
)
from qcompiler.kernels.cuda_hopper import GROUP, Ring
from qcompiler.kernels.cuda_tall import BATCH, CHUNK, STRIDE, TURNED, Tall
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
    stages = -(-form.stages // splits)
    splits = -(-form.stages // stages)  # none is left without work
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

        def place_of(piece: Any) -> tuple[Any, Any]:
            """A piece's tokens and rows, in pieces."""
            whole = T.Bind(piece // (how.band * across))
            height = T.Bind(T.min(down - whole * how.band, how.band))
            rest = T.Bind(piece % (how.band * across))
            return T.Bind(whole * how.band + rest % height), T.Bind(rest // height)

        if blocks:
            workspace, flags = buffers[2 + form.scaled_after :][:2]
            every = T.Bind(down * across * form.stages)
            first = T.Bind(block * every // blocks)
            count = T.Bind((block + 1) * every // blocks - first)
        else:
            first = T.Bind(split * stages)
            count = T.Bind(T.min(stages, form.stages - first))
            only = place_of(block)

        def at(step: Any) -> tuple[Any, Any, Any]:
            """Tokens, rows and the stage of the block's step."""
            if not blocks:
                return *only, first + step
            where = T.Bind(first + step)
            return *place_of(T.Bind(where // form.stages)), T.Bind(where % form.stages)

        def produce() -> None:
            call(f"qc_registers_dec_{how.registers[0]}")
            with T.If(thread == each), T.Then():
                # The previous kernel made the activations, but not the weights.
                early = min(how.ring, stages)
                for stage in range(early):
                    with T.If(stage < count), T.Then():
                        call("qc_barrier_expect", ring.full(stage), bytes_of_stage)
                        bring_weights(at(stage), stage)
                call("qc_after_previous")
                call("qc_let_next")
                for stage in range(early):
                    with T.If(stage < count), T.Then():
                        bring_activations(at(stage), stage)
                with T.If(count > early), T.Then(), T.serial(0, count - early) as later:
                    stage = T.Bind(later + early)
                    slot = T.Bind(stage % how.ring)
                    call("qc_barrier_wait", ring.free(slot), (stage // how.ring + 1) % 2)
                    call("qc_barrier_expect", ring.full(slot), bytes_of_stage)
                    where = at(stage)
                    bring_weights(where, slot)
                    bring_activations(where, slot)

        def bring_weights(where: Any, slot: Any) -> None:
            _, row_block, stage = where
            start = slot * slot_bytes + at_weights
            for tile in range(how.rows // ROWS):
                row = T.min(row_block * (how.rows // ROWS) + tile, form.tiles - 1)
                source = (T.cast(row, "int64") * form.stages + stage) * form.stage_bytes
                call("qc_bulk_copy", address(memory, start + tile * form.stage_bytes),
                     address(packed, source), form.stage_bytes, ring.full(slot))  # fmt: skip

        def bring_activations(where: Any, slot: Any) -> None:
            token_block, _, stage = where
            start = slot * slot_bytes
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

            if not blocks:
                sum_up(0, count)
                call("qc_after_previous")  # before anything is written
                if splits > 1:
                    share(totals, lane, warp)
                else:
                    call("qc_sync_readers", each)
                    finish(totals, lane, warp, only, 0)
                return
            call("qc_after_previous")
            last = first + count
            own = T.Bind(first // form.stages)
            with T.serial(0, (last - 1) // form.stages - own + 1) as turn:
                piece = T.Bind(own + turn)
                start = T.Bind(T.max(first, piece * form.stages))
                stop = T.Bind(T.min(last, (piece + 1) * form.stages))
                done = T.Bind(start - first)
                many = T.Bind(stop - start)
                sum_up(done, many)
                release((done + many + how.ring - 1) % how.ring)
                # Who has a piece's first stages finishes it: others have theirs ready by then.
                with T.If(start == piece * form.stages):
                    with T.Then():
                        final = T.Bind(((piece + 1) * form.stages * blocks - 1) // every)
                        with T.If(final > block), T.Then():
                            add_others(totals, final)
                        finish(totals, lane, warp, place_of(piece), after)
                    with T.Else():
                        leave(totals)

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

        def add_others(totals: list[Any], final: Any) -> None:
            """Add what the next blocks up to `final` left of this piece, in their order."""
            with T.serial(0, final - block) as other:
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
            token_block, row_block = where
            m = T.Bind(token_block * how.tokens + token)
            n = T.Bind(row_block * how.rows + row)
            with T.If(T.And(m < tokens, n < form.rows)), T.Then():
                if form.scaled_after:
                    found = found * buffers[2][n]
                if isinstance(form, Widened):
                    found = found * T.float32(1 / LIFT)
                emitter.vector(emitter.coordinates(m), n, 1, T.Bind(found))

        def finish(
            totals: list[Any], lane: Any, warp: Any, where: tuple[Any, Any], start: int
        ) -> None:
            """Each warp turns its sums round in shared memory, some tokens at a time."""
            mine = T.Bind(start + thread // WARP * TURNED)
            for part in range(how.parts):
                for batch in range(0, how.tokens, BATCH):
                    call("qc_sync_warp")
                    for column in range(BATCH // 8):
                        for e in range(4):
                            at = (column * 8 + lane % 4 * 2 + e % 2) * STRIDE
                            at = at + lane // 4 + e // 2 * 8
                            found = totals[part][(batch // 8 + column) * 4 + e]
                            call("qc_put", address(memory, mine + at * 4), found)
                    call("qc_sync_warp")
                    with T.serial(0, BATCH // 2) as i:
                        token, row = T.Bind(i * 2 + lane // 16), T.Bind(lane % 16)
                        found = value("qc_get", address(memory, mine + (token * STRIDE + row) * 4))
                        row = (group * how.parts + part) * 64 + warp * 16 + row
                        write(where, batch + token, row, found)

        def share(totals: list[Any], lane: Any, warp: Any) -> None:
            """Leave the sums in shared memory; each block adds its share up, in order of blocks."""
            call("qc_sync_readers", each)
            per = size // 4  # of a part
            mine = -(-fours // splits)

            def place(i: Any) -> Any:
                return address(memory, (i * each + thread) * 16)

            for i in range(fours):
                call("qc_move16", place(i), fours_of(totals, i))
            call("qc_cluster_meet")
            with T.serial(0, mine) as turn:
                i = T.Bind(split * mine + turn)
                with T.If(i < fours), T.Then():
                    held = registers(4, "float32")
                    for e in range(4):
                        T.buffer_store(held, T.float32(0), [e])
                    for of in range(splits):
                        call("qc_add16_of", address(held, 0, 4), place(i), of)
                    row = (group * how.parts + i // per) * 64 + warp * 16 + lane // 4
                    for e in range(4):
                        token = i % per * 8 + lane % 4 * 2 + e % 2
                        write(only, token, row + e // 2 * 8, held[e])
            call("qc_cluster_meet")  # none leaves while others read its memory

        with T.If(group == readers):
            with T.Then():
                produce()
            with T.Else():
                multiply()
    return made
