"""The RISC-V core that code is counted for: SiFive's U74, 64-bit.

In order, two instructions a cycle, of them one load or store, one jump, one multiplication or
float operation (U74 Core Complex Manual; LLVM's RISCVSchedSiFive7.td, which has the division's 26
cycles). Bytes from memory are an assumption: 3 GB/s at 1.5 GHz.
"""

from __future__ import annotations

import re

from qcompiler.kernels.assembly import Core, Instruction

_MEMORY = re.compile(r"(f)?([ls])([bhwd])u?")
_BYTES = {"b": 1, "h": 2, "w": 4, "d": 8}
DIVISION = 26  # cycles that a division of floats keeps its unit


def _read(line: str) -> Instruction:
    name, _, operands = line.partition(" ")
    memory = _MEMORY.fullmatch(name)
    if memory is not None:
        width = 0 if operands.endswith("(sp)") else _BYTES[memory[3]]
        loads = memory[2] == "l"
        return Instruction(
            line, name, 0, width * loads, width * (not loads), loads, not loads,
            {"any": 1.0, "memory": 1.0},
        )  # fmt: skip
    macs = int(bool(re.fullmatch(r"fn?m(?:add|sub)\.\w|mulw?", name)))
    takes = {"any": 1.0}
    if name.startswith(("fdiv", "fsqrt")):
        takes["product"] = float(DIVISION)
    elif name.startswith(("f", "mul")):
        takes["product"] = 1.0
    elif re.fullmatch(JUMP, name):
        takes["jump"] = 1.0
    return Instruction(line, name, macs, takes=takes)


JUMP = r"b(?:eq|ne|lt|ge|gt|le)(?:u|z)?|j"
U74 = Core(
    "SiFive U74", {"any": 2, "memory": 1, "product": 1, "jump": 1}, 2.0,
    jump=JUMP, call=r"call|tail|jal|jalr|jr|ret", comment="#", read=_read,
)  # fmt: skip
