"""The x86-64 core that code is counted for: AMD's Zen 4.

Six instructions a cycle; four vector pipes of 256 bits, of which two multiply, two add floats and
convert, two shift and move lanes; two vector loads (of 512 bits one) and one store of 256 bits (two
of fewer) a cycle; four integer units (Software Optimization Guide for the AMD Zen4
Microarchitecture, no. 57647). Instructions on 512 bits take a pipe for two cycles. Zen 3 has the
same for 256 bits, Intel's cores from Ice Lake on have as many multiplications a cycle or, with a
second unit for 512 bits, twice as many. Bytes from memory are an assumption: 28 GB/s at 3.5 GHz.
"""

from __future__ import annotations

import re

from qcompiler.kernels.assembly import Core, Instruction

_VECTOR = re.compile(r"%([xyz])mm\d+")
_BITS = {"x": 128, "y": 256, "z": 512}
# Names without the v of AVX → products of a pair of elements of so many bits for each of so many
# bits of the register: (bits of a sum, products in it).
_PRODUCTS = {"pdpbusd": (32, 4), "dpbf16ps": (32, 2), "pmaddubsw": (16, 2), "pmaddwd": (32, 2),
             "pmulld": (32, 1)}  # fmt: skip
_MULTIPLY = re.compile(r"fn?m(?:add|sub)\d*[ps][sd]|mul[ps][sd]|pmul\w+|pmadd\w+|pdp\w+|dpbf16ps")
_ADD = re.compile(r"(?:add|sub)[ps][sd]|cvt\w+|round[ps][sd]|rndscale[ps][sd]")
_LANES = re.compile(
    r"perm\w+|shuf\w+|pshuf\w+|punpck\w+|unpck\w+|p?extr\w+|p?insr\w+|insert\w+|extract\w+|"
    r"p?broadcast\w+|pmov\w+|movs[hl]dup|movhlps|movlhps|movd|pack\w+|ppack\w+|palignr|"
    r"ps(?:rl|ll|ra)\w+"
)
_MOVES = re.compile(r"movap[sd]|movup[sd]|movdq[au]\d*|movs[sd]|mov[qdlwb]?|mov[sz][bwl][wlq]")
_GENERAL = {"q": 8, "l": 4, "w": 2, "b": 1}
DIVISION = 5.0  # cycles that a division keeps its pipe, for 256 bits


def _read(line: str) -> Instruction:
    name, _, rest = line.partition(" ")
    operands = rest.split(", ")  # an address has no space inside
    vectors = _VECTOR.findall(rest)
    bits = max((_BITS[v] for v in vectors), default=0)
    plain = name.removeprefix("v") if vectors else name
    places = [o for o in operands if "(" in o] if not plain.startswith("lea") else []
    takes = {"any": 1.0}
    width = _width(plain, places[0], vectors, bits) if places else 0
    writes = bool(places) and "(" in operands[-1] and not re.match(r"cmp|test|vucomi|push", name)
    reads = bool(places) and not (writes and (vectors or _moves(plain)))
    if reads:
        takes["load"] = max(1.0, width / 32) if vectors else 2 / 3
    if writes:
        takes["store"] = max(0.5, width / 32)
    if vectors:
        takes |= _pipes(plain, bits, bool(places))
    elif not _moves(plain) and not plain.startswith("j"):
        takes["integer"] = 1.0
    data = 0 if re.search(r"\(%r(?:sp|ip)", places[0] if places else "") else width
    return Instruction(
        line, plain, _macs(plain, bits), data * reads, data * writes, reads, writes, takes
    )


def _moves(plain: str) -> bool:
    """Whether it only moves: from memory, to memory, or a register's name."""
    return bool(_MOVES.fullmatch(plain)) and plain != "movd"


def _macs(plain: str, bits: int) -> int:
    if re.fullmatch(r"fn?m(?:add|sub)\d+[ps][sd]", plain):
        return bits // 32 if plain.endswith("ps") else bits // 64 if plain.endswith("pd") else 1
    size, each = _PRODUCTS.get(plain, (1, 0))
    return bits // size * each


def _pipes(plain: str, bits: int, memory: bool) -> dict[str, float]:
    """Slots of the vector pipes, in halves of 512 bits."""
    if _moves(plain) or (memory and re.match(r"p?broadcast", plain)):
        return {}
    slots = max(1.0, bits / 256)
    takes = {"vector": slots}
    if plain.startswith(("div", "sqrt")):
        takes["divide"] = DIVISION * max(0.7, bits / 256)
    elif _MULTIPLY.fullmatch(plain):
        takes["multiply"] = slots
    elif _ADD.fullmatch(plain):
        takes["add"] = slots
    elif _LANES.fullmatch(plain):
        takes["lanes"] = slots
    return takes


def _width(plain: str, place: str, vectors: list[str], bits: int) -> int:
    """Bytes of memory."""
    spread = re.search(r"\{1to(\d+)\}", place)
    if spread:
        return bits // 8 // int(spread[1])
    if not vectors:
        suffix = plain[3:].lstrip("sz")[:1] if plain.startswith("mov") else plain[-1:]
        return _GENERAL.get(suffix, 8)
    if plain.startswith(("pbroadcast", "broadcast")):
        return {"b": 1, "w": 2, "d": 4, "q": 8, "ss": 4, "sd": 8}.get(
            re.sub(r"p?broadcast", "", plain), 16
        )
    narrowed = re.fullmatch(r"pmov(?:[sz]x)?([bwdq])([bwdq])", plain)
    if narrowed:  # from the narrower of two kinds of elements to the wider, or back
        sizes = sorted("bwdq".index(kind) for kind in narrowed.groups())
        return bits // 8 >> (sizes[1] - sizes[0])
    if plain.endswith("ss") or plain in ("movd", "pextrd", "pinsrd"):
        return 4
    return 8 if plain.endswith("sd") or plain == "movq" else bits // 8


ZEN4 = Core(
    "Zen 4",
    {"any": 6, "vector": 4, "multiply": 2, "add": 2, "lanes": 2, "divide": 1, "load": 2, "store": 1,
     "integer": 4},
    8.0, jump=r"j\w+", call=r"callq?|retq?", comment="#", read=_read,
)  # fmt: skip
