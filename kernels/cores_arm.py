"""The ARM cores that code is counted for.

    Cortex-A76  64-bit: four instructions a cycle, of them two vector operations, two loads or
                stores (Arm's Software Optimization Guide, r4p1). Its integer `mla` runs once a
                cycle, not twice: the bound of int8 without dot products is too kind.
    Cortex-A55  32-bit: in order, two instructions a cycle, two vector pipes of 64 bits, 64 bits
                loaded and 128 stored a cycle (Arm's Software Optimization Guide, ARM-EPM-128372)

Bytes from memory are assumptions: 10 GB/s at 2.4 GHz, 4 GB/s at 2 GHz.
"""

from __future__ import annotations

import re

from qcompiler.kernels.assembly import Core, Instruction

# Multiply-accumulates of an instruction on whole registers, by its name.
MULTIPLY = {"sdot": 16, "udot": 16, "smmla": 32, "usmmla": 32, "bfmmla": 16, "mla": 4, "fmla": 4,
            "smlal": 4, "smlal2": 4, "umlal": 4, "umlal2": 4}  # fmt: skip
_REGISTER = re.compile(r"\b(?:v\d+\.(?:(16b|8h|4s|2d)|(8b|4h|2s|1d)|([bhsd]))|([qdshbxw])\d+)\b")
_BYTES = {"q": 16, "x": 8, "d": 8, "s": 4, "w": 4, "h": 2, "b": 1}
DIVISION = 10  # cycles that a vdiv.f32 keeps its pipe


def _read_64(line: str) -> Instruction:
    name, _, operands = line.partition(" ")
    loads, stores = name.startswith("ld"), name.startswith("st")
    width = 0 if "[sp" in operands else _width_64(name, operands)
    takes = {"any": 1.0, "vector": float(operands.startswith("v"))}
    if loads or stores:
        takes["memory"] = 1.0
    return Instruction(
        line, name.removesuffix("2"), MULTIPLY.get(name, 0), width * loads, width * stores,
        loads, stores, takes,
    )  # fmt: skip


def _width_64(name: str, operands: str) -> int:
    if name.endswith(("b", "h")):
        return 1 if name.endswith("b") else 2
    total = 0
    for full, half, lane, plain in _REGISTER.findall(operands.split("[", maxsplit=1)[0]):
        total += 16 if full else 8 if half else _BYTES[lane or plain]
    return total


def _read_32(line: str) -> Instruction:
    name, _, operands = line.partition(" ")
    takes = {"any": 1.0}
    loads = bool(re.match(r"v?ldr|v?ldm|vld\d|v?pop", name))
    stores = bool(re.match(r"v?str|v?stm|vst\d|v?push", name))
    width = _width_32(name, operands) if loads or stores else 0
    macs = 0
    if loads:
        takes["load"] = -(-width // 8)
    elif stores:
        takes["store"] = -(-width // 16)
    elif name.startswith("vdiv"):
        takes["vector"], takes["divide"] = 1.0, float(DIVISION)
    elif name.startswith("v"):
        bits = {"q": 128, "d": 64}.get(operands[:1], 32)
        takes["vector"] = max(1.0, bits / 64)
        product = re.match(r"v(?:fma|mla)(l?)\.[a-z](\d+)", name)
        macs = bits // (int(product[2]) * (2 if product[1] else 1)) if product else 0
    moved = 0 if "[sp" in operands or name.endswith(("push", "pop")) else width
    return Instruction(
        line, name, macs, moved * loads, moved * stores, loads, stores, takes
    )  # fmt: skip


def _width_32(name: str, operands: str) -> int:
    """Bytes: a register's, a list's, or one element's that is spread over several."""
    if not name.startswith("v"):
        size = {"b": 1, "h": 2, "d": 8}.get(name[3:].lstrip("s")[:1], 4)
        return 4 * (operands.count(",") + 1) if "{" in operands else size
    element = re.search(r"\.(\d+)$", name)
    if element and "[" in operands.split("}", maxsplit=1)[0]:  # {d0[], d1[]} or {d0[1]}
        return int(element[1]) // 8
    registers = re.findall(r"\b([sdq])\d+\b", operands.split("}", maxsplit=1)[0])
    return sum(_BYTES[kind] for kind in registers)


A76 = Core(
    "Cortex-A76", {"any": 4, "vector": 2, "memory": 2}, 4.0,
    jump=r"b|b\.\w+|cbn?z|tbn?z", call=r"blr?|br|ret", comment="//", read=_read_64,
)  # fmt: skip
A55 = Core(
    "Cortex-A55", {"any": 2, "vector": 2, "load": 1, "store": 1, "divide": 1}, 2.0,
    jump=r"b(?:eq|ne|hs|lo|mi|pl|vs|vc|hi|ls|ge|lt|gt|le)?", call=r"bl\w?|bx", comment="@",
    read=_read_32,
)  # fmt: skip
