"""How a product of many tokens is shared out on Hopper: see `cuda_gemm_hopper`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qcompiler.kernels.cuda_code import HOPPER
from qcompiler.kernels.cuda_units import UNIT_ROWS
from qcompiler.kernels.cuda_weights import ROWS, Weights, Widened

CHUNK = 64  # columns of a unit of float16
BATCH = 32  # tokens whose sums a warp turns round in shared memory at a time
STRIDE = 20  # floats from one to the next there: no bank conflicts
TURNED = BATCH * STRIDE * 4  # bytes of a warp
# Splits → clusters of so many blocks that run at once, each block alone on its processor: an H200's
# driver says so (cuOccupancyMaxActiveClusters).
CLUSTERS = {1: 132, 2: 66, 4: 30, 8: 15}


@dataclass(frozen=True)
class Tall:
    """How a product is shared out.

    Attributes:
        tokens: of a block, 64, 128 or 256.
        parts: products of 64 rows that a warpgroup makes, 1 or 2.
        ring: stages under way.
        band: blocks of tokens that share weights in the cache: they run side by side.
        splits: blocks that share out the columns of one piece of the output: a cluster.
        mapped: whether x is (M, K) float16, given by its tensor map (`cuda_hopper.MAP_BYTES`).
        readers: warpgroups that multiply, 2 or 3.
        resident: blocks of a processor, 1 or 2 (of 64 tokens and one part).
        blocks: 0: one (or `splits`) for each piece. Otherwise so many for all, among which the
            stages of all pieces are shared out evenly (stream-K), through a workspace.
    """

    tokens: int = 128
    parts: int = 2
    ring: int = 4
    band: int = 8
    splits: int = 1
    mapped: bool = False
    readers: int = 2
    resident: int = 1
    blocks: int = 0

    @property
    def rows(self) -> int:
        """Of a block."""
        return self.readers * self.parts * UNIT_ROWS

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that brings stages, and of one that multiplies."""
        return {(2, 1): (40, 232), (3, 1): (32, 160), (2, 2): (32, 104)}[
            self.readers, self.resident
        ]

    def pieces(self, tokens: int, form: Weights | Widened) -> tuple[int, int]:
        """Pieces of the output along tokens and rows."""
        return -(-tokens // self.tokens), -(-form.rows // self.rows)

    def workspace(self, tokens: int, form: Weights | Widened) -> int:
        """float32 numbers of the workspace."""
        return self.blocks * self.tokens * self.rows if self.blocks else 0

    def counters(self, tokens: int, form: Weights | Widened) -> int:
        """Counters: of each block, whether its sums are in the workspace."""
        return self.blocks

    def weight_bytes(self, form: Weights | Widened) -> int:
        """Bytes of packed weights in a stage."""
        return self.rows // ROWS * form.stage_bytes

    def slot(self, form: Weights | Widened) -> int:
        """Bytes of a stage: activations first, on a multiple of 1024."""
        size = self.tokens * form.stage * 2 + self.weight_bytes(form)
        return -(-size // 1024) * 1024

    def shared(self, form: Weights | Widened) -> int:
        """Bytes of shared memory."""
        ring, turned = self.ring * (self.slot(form) + 16), self.readers * 4 * TURNED
        if self.blocks:
            return ring + turned
        sums = self.tokens * self.rows * 4 if self.splits > 1 else turned
        return max(ring, sums)


RATE = 2048  # multiplications of a processor in a cycle
# Partitions, and what one wave of blocks takes on an H200, fitted to 120 measured products (±6 %
# for most): microseconds, those of 1000 cycles at `RATE`, and of 10000 sums that a cluster shares.
WAVES = (
    (Tall(256, 1), 0.3, 0.757, 1.29),
    (Tall(128, 2), 0.3, 0.783, 1.26),
    (Tall(128, 1), 2.0, 0.789, 0.94),
    (Tall(128, 1, readers=3), 2.5, 0.773, 1.2),
    (Tall(64, 1, resident=2), 2.0, 0.902, 1.18),
)
# Microseconds that it takes to leave sums to others and to add theirs; and how much longer work
# takes then.
STREAM, MORE = 6.0, 1.05
CACHE = 24 << 20  # bytes of activations up to which blocks of 256 tokens gain: half of the L2 cache
SHALLOW = 1.3  # how much longer a product takes with two stages under way


def choose_tall(
    tokens: int, form: Weights | Widened, stream: bool = False, mapped: bool = False
) -> Tall:
    """The partition that takes the shortest time.

    Args:
        tokens: M.
        form: of the weights.
        stream: whether pieces may be shared out through a workspace (`Tall.blocks`).
        mapped: as `Tall.mapped`; then blocks have 128 tokens at most.
    """
    found: list[tuple[float, Tall]] = []
    for one, start, rate, share in WAVES:
        if one.tokens > 128 and (mapped or tokens * form.depth * 2 > CACHE):
            continue
        how = replace(one, mapped=mapped)
        down, across = how.pieces(tokens, form)
        size = how.tokens * how.rows
        for splits in CLUSTERS if how.readers == 2 else (1,):
            if splits > 1 and splits * 2 > form.stages:
                continue
            work = size * -(-form.stages // splits) * form.stage / RATE / 1000
            each = work * rate + (size * share / 10000 if splits > 1 else 0)
            turns = -(-down * across // CLUSTERS[splits])  # of every processor
            time = -(-turns // how.resident) * start + turns * each
            found.append((time, deepest(replace(how, splits=splits), form)))
        # With fewer pieces, many blocks leave sums to one.
        if stream and how.parts == 2 and 2 * down * across > HOPPER.processors:
            work = size * form.stages * form.stage / RATE / 1000
            time = start + STREAM + MORE * work * rate * down * across / HOPPER.processors
            found.append((time, deepest(replace(how, blocks=HOPPER.processors), form)))
    return min(found, key=lambda item: item[0] * (SHALLOW if item[1].ring < 3 else 1))[1]


def deepest(how: Tall, form: Weights | Widened) -> Tall:
    """With as many stages under way as there is room for, and six at most."""
    room = HOPPER.shared if how.resident == 1 else HOPPER.shared // 2 - 1024
    return next(
        found for ring in (6, 5, 4, 3, 2) if (found := replace(how, ring=ring)).shared(form) <= room
    )
