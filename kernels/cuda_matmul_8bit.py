"""Products of 8-bit numbers on Hopper's tensor cores, for many tokens: integers or fp8.

    sum[m, n] = Σ_k x[m, k] · weight[n, k]

Sums of integers are exact in int32. Those of fp8 (e4m3) keep about 14 bits in the tensor cores
(DeepSeek-V3 2024, section 3.3.2), so the sums of 256 products each are added up in float32:
2e-4 off instead of 2e-3 for K = 8192, at 3 % more time (each 128: 1e-4, at 12 %). Scales, one for
each token and output, and zero points are the expression's business. Both operands come as units
(`cuda_units`); a block computes 128 tokens by `columns` outputs.
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
)
from qcompiler.kernels.cuda_hopper import GROUP, Ring
from qcompiler.kernels.cuda_units import UNIT, UNIT_BYTES, UNIT_ROWS, Kind, sums_of
from qcompiler.kernels.expression import Emitter, Expression

READERS = 2  # warpgroups that multiply, each 64 tokens
TOKENS = READERS * UNIT_ROWS  # of a block
# Sums of fp8 products that become float32 together: of so many stages of 128 columns of K, for so
# many outputs (for more there are no registers).
STAGES, OUTPUTS = 2, 128


@dataclass(frozen=True)
class Product8:
    """Sizes of an int8 product and how it is shared out.

    Attributes:
        tokens, rows, depth: M, N, K.
        kind: of x.
        columns: outputs of a block, 64, 128 or 256.
        ring: stages under way.
        band: blocks of tokens that share weights in the cache: they run side by side.
    """

    tokens: int
    rows: int
    depth: int
    kind: Kind = "s8"
    columns: int = 256
    ring: int = 4
    band: int = 16

    @property
    def sums(self) -> str:
        """Their dtype."""
        return sums_of(self.kind)

    @property
    def slot(self) -> int:
        """Bytes of a stage."""
        return (TOKENS + self.columns) * UNIT_BYTES

    @property
    def shared(self) -> int:
        """Bytes of shared memory: the ring and its barriers."""
        return self.ring * (self.slot + 16)


def choose_product(tokens: int, rows: int, depth: int, kind: Kind) -> Product8:
    """The widest blocks of which every processor gets one."""
    down = -(-tokens // TOKENS)
    for columns in (256, 128):
        if down * -(-rows // columns) >= HOPPER.processors:
            return Product8(tokens, rows, depth, kind, columns, 4 if columns == 256 else 6)
    return Product8(tokens, rows, depth, kind, 64, 8)


def matmul_8bit(
    name: str, arguments: Sequence[Argument | Size], product: Product8, expression: Expression
) -> CudaKernel:
    """The kernel.

    Args:
        name: of the function.
        arguments: x and the weight as units (uint8), then what the expression reads and writes. The
            last may be M, given by the call.
        product: sizes.
        expression: over (…, N), with the sums as value 0; it stores them.
    """
    p, tokens = product, tokens_of(arguments, product.tokens)
    stages = -(-p.depth // UNIT_BYTES)
    down, across = -(-tokens // TOKENS), -(-p.rows // p.columns)
    units_down, units_across = -(-tokens // UNIT_ROWS), -(-p.rows // UNIT_ROWS)
    threads = (READERS + 1) * GROUP
    with cuda_kernel(name, arguments, (down * across,), threads, p.shared, resident=1) as (
        made, buffers, (block,), thread, memory,
    ):  # fmt: skip
        x, weight = buffers[:2]
        # Bands of blocks: all outputs for `band` blocks of tokens, then the next.
        whole = T.Bind(block // (p.band * across))
        height = T.Bind(T.min(down - whole * p.band, p.band))
        rest = T.Bind(block % (p.band * across))
        token_block = T.Bind(whole * p.band + rest % height)
        row_block = T.Bind(rest // height)
        group = T.Bind(thread // GROUP)
        ring = Ring(memory, p.ring * p.slot, p.ring)
        ring.start(thread, READERS)
        call("qc_sync")
        emitter = Emitter(expression, buffers)

        def copy(source: Any, first: Any, count: int, last: int, at: Any, stage: Any,
                 slot: Any) -> None:  # fmt: skip
            for unit in range(count):
                row = T.cast(T.min(first + unit, last - 1), "int64")
                call(
                    "qc_bulk_copy",
                    address(memory, at + unit * UNIT),
                    address(source, (row * stages + stage) * UNIT),
                    UNIT,
                    ring.full(slot),
                )

        def produce() -> None:
            call("qc_registers_dec_40")
            with T.If(thread == READERS * GROUP), T.Then():
                # The previous kernel made the activations, but not the weights.
                early = min(p.ring, stages)
                for stage in range(early):
                    call("qc_barrier_expect", ring.full(stage), p.slot)
                    bring_weights(stage, stage)
                call("qc_after_previous")
                call("qc_let_next")
                for stage in range(early):
                    bring_activations(stage, stage)
                with T.serial(0, stages - early) as later:
                    stage = T.Bind(later + early)
                    slot = T.Bind(stage % p.ring)
                    call("qc_barrier_wait", ring.free(slot), (stage // p.ring + 1) % 2)
                    call("qc_barrier_expect", ring.full(slot), p.slot)
                    bring_activations(stage, slot)
                    bring_weights(stage, slot)

        def bring_activations(stage: Any, slot: Any) -> None:
            copy(x, token_block * READERS, READERS, units_down, slot * p.slot, stage, slot)

        def bring_weights(stage: Any, slot: Any) -> None:
            copy(weight, row_block * (p.columns // UNIT_ROWS), p.columns // UNIT_ROWS,
                 units_across, slot * p.slot + READERS * UNIT, stage, slot)  # fmt: skip

        def operands(slot: Any, step: int, column: int = 0) -> tuple[Any, Any]:
            start = slot * p.slot + step * 32
            weights = start + (READERS + column // UNIT_ROWS) * UNIT
            return address(memory, start + group * UNIT), address(memory, weights)

        def release(slot: Any) -> None:
            with T.If(thread % GROUP == 0), T.Then():
                call("qc_barrier_arrive", ring.free(slot))

        def add(total: Any) -> None:
            with T.serial(0, stages) as stage:
                slot = T.Bind(stage % p.ring)
                call("qc_barrier_wait", ring.full(slot), stage // p.ring % 2)
                call("qc_wgmma_begin")
                for step in range(UNIT_BYTES // 32):
                    call(f"qc_wgmma_{p.kind}_{p.columns}", address(total, 0, p.columns // 2),
                         *operands(slot, step))  # fmt: skip
                call("qc_wgmma_commit")
                # The stage before is used up once no more than this one is under way.
                call("qc_wgmma_wait", 1)
                with T.If(stage > 0), T.Then():
                    release((stage + p.ring - 1) % p.ring)
            call("qc_settle", address(total, 0, p.columns // 2), p.columns // 2)

        def add_in_parts(total: Any) -> None:
            wide = min(p.columns, OUTPUTS)
            part = registers(wide // 2, p.sums)
            for i in range(wide // 2):
                T.buffer_store(part, T.float32(0), [i])
            with T.serial(0, -(-stages // STAGES)) as turn:
                for column in range(0, p.columns, wide):
                    call("qc_wgmma_begin")
                    for inner in range(STAGES):
                        stage = T.Bind(turn * STAGES + inner)
                        slot = T.Bind(stage % p.ring)
                        with T.If(stage < stages), T.Then():
                            if column == 0:
                                call("qc_barrier_wait", ring.full(slot), stage // p.ring % 2)
                                call("qc_wgmma_begin")
                            for step in range(UNIT_BYTES // 32):
                                more = "" if step or inner else "_first"
                                call(f"qc_wgmma_{p.kind}_{wide}{more}",
                                     address(part, 0, wide // 2),
                                     *operands(slot, step, column))  # fmt: skip
                            call("qc_wgmma_commit")
                    call("qc_settle", address(part, 0, wide // 2), wide // 2)
                    if column + wide == p.columns:
                        for inner in range(STAGES):
                            stage = T.Bind(turn * STAGES + inner)
                            with T.If(stage < stages), T.Then():
                                release(T.Bind(stage % p.ring))
                    for i in range(wide // 2):
                        at = column // 2 + i
                        T.buffer_store(total, total[at] + part[i], [at])

        def multiply() -> None:
            call("qc_registers_inc_232")
            total = registers(p.columns // 2, p.sums)
            for i in range(p.columns // 2):
                T.buffer_store(total, T.Cast(p.sums, T.int32(0)), [i])
            (add if p.sums == "int32" else add_in_parts)(total)
            call("qc_after_previous")
            lane = T.Bind(thread % WARP)
            first = T.Bind(token_block * TOKENS + thread // WARP * 16 + lane // 4)
            for half in range(2):
                m = T.Bind(first + half * 8)
                with T.If(m < tokens), T.Then():
                    place = emitter.coordinates(m)
                    # nvcc unrolls it: the same code of a tenth of the source.
                    with T.unroll(0, p.columns // 8) as column, T.unroll(0, 2) as i:
                        n = T.Bind(row_block * p.columns + column * 8 + lane % 4 * 2 + i)
                        found = T.Bind(total[column * 4 + half * 2 + i])
                        with T.If(n < p.rows), T.Then():
                            emitter.vector(place, n, 1, found)

        with T.If(group == READERS):
            with T.Then():
                produce()
            with T.Else():
                multiply()
    return made
