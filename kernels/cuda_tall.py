"""How a product of many tokens is shared out on Hopper: see `cuda_gemm_hopper`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qcompiler.kernels.cuda_code import HOPPER
from qcompiler.kernels.cuda_units import UNIT_ROWS
from qcompiler.kernels.cuda_weights import ROWS, Weights, Widened

CHUNK = 64  # columns of a unit of float16
STRIDE = 20  # floats from a token to the next where a warp turns sums round: no bank conflicts
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
        blocks: 0: one (or `splits`) for each piece. Otherwise so many for all: each takes as many
            whole pieces, and what remains is shared out among all of them stage by stage
            (stream-K: Osama et al. 2023), through a workspace.
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

    @property
    def batch(self) -> int:
        """Tokens whose sums a warp turns round at a time: few where other memory is held too."""
        return 8 if self.blocks or self.splits > 1 else 32

    @property
    def turned(self) -> int:
        """Bytes that a warp needs for it."""
        return self.batch * STRIDE * 4

    def pieces(self, tokens: int, form: Weights | Widened) -> tuple[int, int]:
        """Pieces of the output along tokens and rows."""
        return -(-tokens // self.tokens), -(-form.rows // self.rows)

    def clustered(self, form: Weights | Widened) -> int:
        """Blocks of a cluster: `splits`, but none without a stage."""
        return -(-form.stages // -(-form.stages // self.splits))

    def common(self, tokens: int, form: Weights | Widened) -> int:
        """Pieces that all `blocks` share out."""
        down, across = self.pieces(tokens, form)
        left = down * across % self.blocks
        few = 0 < left < self.blocks // 3 and down * across > self.blocks
        return left + self.blocks if few else left

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
        ring, turned = self.ring * (self.slot(form) + 16), self.readers * 4 * self.turned
        if self.blocks:
            return ring + turned
        return max(ring, turned + (self.tokens * self.rows * 4 if self.splits > 1 else 0))


RATE = 2048  # multiplications of a processor in a cycle


@dataclass(frozen=True)
class Cost:
    """What one wave of blocks takes on an H200, in microseconds.

    Attributes:
        start: and end, whatever they do.
        rate: for 1000 cycles at `RATE`.
        share: for 10000 sums that a cluster shares.
        stream: to leave sums to others and to add theirs, where all blocks share pieces (0: never).
        stream_rate: as `rate`, then.
    """

    start: float
    rate: float
    share: float
    stream: float = 0.0
    stream_rate: float = 0.0


# Partitions with their costs, fitted to 150 measured products (within 10 %).
COSTS = (
    (Tall(256, 1), Cost(1.8, 0.74, 0.75, 7.4, 0.766)),
    (Tall(128, 2), Cost(2.4, 0.765, 1.3, 7.0, 0.831)),
    (Tall(128, 1), Cost(2.0, 0.77, 1.3, 4.6, 0.858)),
    (Tall(128, 1, readers=3), Cost(1.0, 0.76, 1.3)),
    (Tall(64, 1, resident=2), Cost(0.5, 1.08, 1.0)),
)
MORE = 0.25  # of `stream`, for each block more that shares a piece
# How much longer a cluster's work takes where there are fewer blocks than places, two on each
# processor: presumably both come to lie on one processor while others have nothing to do.
CROWDED = 1.3
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
    for one, cost in COSTS:
        if one.tokens > 128 and mapped:
            continue
        how = replace(one, mapped=mapped)
        down, across = how.pieces(tokens, form)
        size = how.tokens * how.rows
        cycles = size * form.stage / RATE / 1000  # thousands, of a stage
        for splits in CLUSTERS if how.readers == 2 else (1,):
            if splits > 1 and splits * 2 > form.stages:
                continue
            each = cycles * -(-form.stages // splits) * cost.rate
            turns = -(-down * across // CLUSTERS[splits])  # of every processor
            if splits > 1:
                each *= CROWDED if turns < how.resident else 1
                each += size * cost.share / 10000
            time = -(-turns // how.resident) * cost.start + turns * each
            found.append((time, deepest(replace(how, splits=splits), form)))
        every = HOPPER.processors
        if stream and cost.stream and down * across * form.stages >= 2 * every:
            most = max(every / (down * across) - 1, 0)  # blocks more that share a piece
            time = cycles * form.stages * cost.stream_rate * down * across / every
            time += cost.stream * (1 + MORE * most)
            found.append((time, deepest(replace(how, blocks=every), form)))
    return min(found, key=lambda item: item[0] * (SHALLOW if item[1].ring < 3 else 1))[1]


def deepest(how: Tall, form: Weights | Widened) -> Tall:
    """With as many stages under way as there is room for, and six at most."""
    room = HOPPER.shared if how.resident == 1 else HOPPER.shared // 2 - 1024
    return next(
        found for ring in (6, 5, 4, 3, 2) if (found := replace(how, ring=ring)).shared(form) <= room
    )
