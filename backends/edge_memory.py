"""Where the values of a run lie: one arena, planned at compile time.

Each storage lives from the call that first writes it to the last that reads it. Largest first, each
gets the lowest offset that is free over its life (the greedy order of Pisarchyk and Lee 2020,
Efficient Memory Management for Deep Neural Net Inference, §4.2).
"""

from __future__ import annotations

from collections.abc import Sequence

from qcompiler.backends.edge_calls import Call
from qcompiler.backends.edge_ops import Storage

ALIGN = 64  # bytes


def plan(calls: Sequence[Call], fixed: set[int]) -> tuple[dict[int, int], int]:
    """Offsets of all storages that calls use, by id, and the arena's size in bytes.

    Args:
        calls: in the order in which they run.
        fixed: ids of storages that lie elsewhere (ports, constants).
    """
    life: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for number, call in enumerate(calls):
        for storage in call.arguments:
            if id(storage) in fixed:
                continue
            life.setdefault(id(storage), [number, number])[1] = number
            sizes[id(storage)] = _bytes(storage)
    placed: list[tuple[int, int, int, int]] = []  # offset, end, first call, last call
    offsets: dict[int, int] = {}
    for name in sorted(sizes, key=lambda n: (-sizes[n], life[n][0])):
        first, last = life[name]
        offset = 0
        for low, high, begin, end in sorted(placed):
            if begin <= last and first <= end and offset < high and low < offset + sizes[name]:
                offset = high
        offsets[name] = offset
        placed.append((offset, offset + sizes[name], first, last))
    return offsets, max((end for _, end, _, _ in placed), default=0)


def _bytes(storage: Storage) -> int:
    return -(-max(1, storage.size * storage.dtype.itemsize) // ALIGN) * ALIGN
