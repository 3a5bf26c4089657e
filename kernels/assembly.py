"""What the loops of AArch64 assembly are made of, and how fast they could run at best.

The bound is that of a Cortex-A76 (Arm's Software Optimization Guide, r4p1): four instructions a
cycle, two of them vector operations, two loads or stores. (Its integer `mla` runs once a cycle, not
twice: the bound of int8 without dot products is too kind.) A bound is not a measurement.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

CORE = "Cortex-A76"  # the bounds are of
# Multiply-accumulates of an instruction on whole registers, by its name.
MULTIPLY = {"sdot": 16, "udot": 16, "smmla": 32, "usmmla": 32, "bfmmla": 16, "mla": 4, "fmla": 4,
            "smlal": 4, "smlal2": 4, "umlal": 4, "umlal2": 4}  # fmt: skip
_JUMP = r"(?:b|b\.\w+|blr?|br|cbn?z|tbn?z)\s"
_REGISTER = re.compile(r"\b(?:v\d+\.(?:(16b|8h|4s|2d)|(8b|4h|2s|1d)|([bhsd]))|([qdshbxw])\d+)\b")
_BYTES = {"q": 16, "x": 8, "d": 8, "s": 4, "w": 4, "h": 2, "b": 1}


@dataclass(frozen=True)
class Loop:
    """An innermost loop.

    Attributes:
        lines: its instructions.
        macs: multiply-accumulates of one round.
        multiplies: instructions that make them.
        loads: instructions that read memory.
        stores: that write it.
    """

    lines: tuple[str, ...]
    macs: int
    multiplies: int
    loads: int
    stores: int

    @property
    def cycles(self) -> float:
        """The fewest of a round on a Cortex-A76."""
        vectors = sum("v" in line.split(None, 1)[-1][:1] for line in self.lines)
        return max(vectors / 2, (self.loads + self.stores) / 2, len(self.lines) / 4)

    @property
    def widest(self) -> str:
        """The instruction that multiplies most, of equal ones the most frequent; or nothing.

        One on the upper half of its registers (`smlal2`) counts as its partner.
        """
        names = [name.removesuffix("2") for name in self._names if name in MULTIPLY]
        return max(sorted(names), key=lambda n: (MULTIPLY[n], names.count(n)), default="")

    @property
    def products(self) -> int:
        """Multiply-accumulates of a round by the widest instruction: others unpack and scale."""
        kinds = [name.removesuffix("2") for name in self._names]
        return kinds.count(self.widest) * MULTIPLY.get(self.widest, 0)

    @property
    def _names(self) -> list[str]:
        return [line.split()[0] for line in self.lines]

    def moved(self, kind: str) -> int:
        """Bytes of a round that instructions beginning with `ld` or `st` move."""
        return sum(_width(line) for line in self.lines if line.startswith(kind))


def _width(line: str) -> int:
    name, _, rest = line.partition(" ")
    if name.endswith(("b", "h")):
        return 1 if name.endswith("b") else 2
    total = 0
    for full, half, lane, plain in _REGISTER.findall(rest.split("[")[0]):
        total += 16 if full else 8 if half else _BYTES[lane or plain]
    return total


def loops(text: str) -> list[Loop]:
    """The innermost loops of an AArch64 assembly text."""
    return _read(text)[0]


def straight(text: str) -> Loop:
    """All instructions of a text, as a loop of one round: what has none, sizes being small."""
    return _loop(_read(text)[1])


def _read(text: str) -> tuple[list[Loop], list[str]]:
    """The innermost loops, and all instructions."""
    found: list[Loop] = []
    lines: list[str] = []
    labels: dict[str, int] = {}
    for raw in text.splitlines():
        line = re.sub(r"\s+", " ", raw.split("//")[0].strip())
        label = re.fullmatch(r"(\.L\w+):", line)
        if label:
            labels[label[1]] = len(lines)
            continue
        if not line or line.startswith((".", "#")) or line.endswith(":"):
            continue
        lines.append(line)
        jump = re.match(_JUMP + r".*?(\.L\w+)$", line)
        start = labels.get(jump[1]) if jump else None
        if start is None:
            continue
        body = lines[start:]
        if any(re.match(_JUMP, other) for other in body[:-1]):
            continue  # not an innermost one
        found.append(_loop(body))
    return found, lines


def _loop(body: list[str]) -> Loop:
    names = [line.split()[0] for line in body]
    return Loop(
        tuple(body), sum(MULTIPLY.get(name, 0) for name in names),
        sum(name in MULTIPLY for name in names),
        sum(name.startswith("ld") for name in names),
        sum(name.startswith("st") for name in names),
    )  # fmt: skip


def inner_loop(text: str) -> Loop:
    """The innermost loop that multiplies most.

    Raises:
        ValueError: the text has no loop.
    """
    found = loops(text)
    if not found:
        raise ValueError("the text has no loop")
    return max(found, key=lambda loop: loop.macs)
