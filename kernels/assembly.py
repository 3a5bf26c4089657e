"""What the loops of assembly text are made of, and how fast a core could run them at best.

A core has units: so many slots a cycle each, of which an instruction takes some. The bound is

    cycles of a round  ≥  max over units of  Σ over instructions of slots taken ÷ slots a cycle

which leaves out that results take time to arrive, and all waiting for memory. A bound is not a
measurement.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class Instruction:
    """One instruction, as far as bounds need it.

    Attributes:
        text: its line.
        kind: its name; one on the upper half of its registers has its partner's.
        macs: multiply-accumulates.
        reads, writes: bytes of memory; on the stack none, because that holds no data of its own.
        loads, stores: whether it reads and writes memory at all.
        takes: unit → slots.
    """

    text: str
    kind: str
    macs: int = 0
    reads: int = 0
    writes: int = 0
    loads: bool = False
    stores: bool = False
    takes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Core:
    """A core, and how its assembly is written.

    Attributes:
        name: for people.
        units: unit → slots a cycle.
        stream: bytes a cycle from memory, one core: an assumption.
        jump: pattern of the names of jumps; their target is the last operand.
        call: pattern of the names of calls and of jumps to what is not known.
        comment: pattern of where a comment begins.
        read: line → instruction.
    """

    name: str
    units: Mapping[str, float]
    stream: float
    jump: str
    call: str
    comment: str
    read: Callable[[str], Instruction]


@dataclass(frozen=True)
class Loop:
    """An innermost loop on a core."""

    core: Core
    instructions: tuple[Instruction, ...]

    @property
    def lines(self) -> tuple[str, ...]:
        """Its instructions as text."""
        return tuple(i.text for i in self.instructions)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one round."""
        return sum(i.macs for i in self.instructions)

    @property
    def multiplies(self) -> int:
        """Instructions that make them."""
        return sum(i.macs > 0 for i in self.instructions)

    @property
    def loads(self) -> int:
        """Instructions that read memory."""
        return sum(i.loads for i in self.instructions)

    @property
    def stores(self) -> int:
        """Instructions that write memory."""
        return sum(i.stores for i in self.instructions)

    @property
    def reads(self) -> int:
        """Bytes that a round reads."""
        return sum(i.reads for i in self.instructions)

    @property
    def writes(self) -> int:
        """Bytes that a round writes."""
        return sum(i.writes for i in self.instructions)

    @property
    def cycles(self) -> float:
        """The fewest of a round."""
        return max(
            sum(i.takes.get(unit, 0.0) for i in self.instructions) / slots
            for unit, slots in self.core.units.items()
        )

    @property
    def widest(self) -> str:
        """The instruction that multiplies most, of equal ones the most frequent; or nothing."""
        found = [i for i in self.instructions if i.macs]
        kinds = [i.kind for i in found]
        best = max(sorted(found, key=_kind), key=lambda i: (i.macs, kinds.count(i.kind)),
                   default=None)  # fmt: skip
        return best.kind if best is not None else ""

    @property
    def products(self) -> int:
        """Multiply-accumulates of a round by the widest instruction: others unpack and scale."""
        return sum(i.macs for i in self.instructions if i.kind == self.widest)


def _kind(instruction: Instruction) -> str:
    return instruction.kind


class Text(NamedTuple):
    """What an assembly text holds.

    Attributes:
        loops: the innermost loops.
        whole: all instructions, as a loop of one round: what has none, sizes being small.
    """

    loops: list[Loop]
    whole: Loop


def read(text: str, core: Core) -> Text:
    """The loops of an assembly text for a core; those that call functions are not among them."""
    found: list[Loop] = []
    lines: list[Instruction] = []
    labels: dict[str, int] = {}
    barred: list[int] = []  # calls, and jumps back: places that no innermost loop goes over
    for raw in text.splitlines():
        line = re.sub(r"\s+", " ", re.split(core.comment, raw)[0].strip())
        label = re.fullmatch(r"(\.L\w+):", line)
        if label:
            labels[label[1]] = len(lines)
            continue
        if not line or line.startswith((".", "#")) or line.endswith(":"):
            continue
        name, _, operands = line.partition(" ")
        if re.fullmatch(core.call, name):
            barred.append(len(lines))
        lines.append(core.read(line))
        target = re.search(r"(\.L\w+)$", operands)
        if target is None or target[1] not in labels or not re.fullmatch(core.jump, name):
            continue
        start = labels[target[1]]
        if not any(place >= start for place in barred):
            found.append(Loop(core, tuple(lines[start:])))
        barred.append(len(lines) - 1)
    return Text(found, Loop(core, tuple(lines)))


def loops(text: str, core: Core) -> list[Loop]:
    """The innermost loops of an assembly text."""
    return read(text, core).loops


def inner_loop(text: str, core: Core) -> Loop:
    """The innermost loop that multiplies most.

    Raises:
        ValueError: the text has no loop.
    """
    found = loops(text, core)
    if not found:
        raise ValueError("the text has no loop")
    return max(found, key=lambda loop: loop.macs)
