"""Cycles of a Program's generated code, counted from its instructions: for machines not here.

Of each kernel's assembly the loop that does the work is counted, and how often it runs follows from
the sizes: a product's from its multiply-accumulates, any other kernel's from the bytes that it
reads and writes. The cycles of a round are the fewest that a core of that kind could take
(`qcompiler.kernels.assembly`). A weight also has to come from memory, so many bytes a cycle: the
shorter the input, the more that is what takes the time. Neither was timed.

Not counted: x86-64 without fused multiply-add, where products of floats call a function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import tvm

from qcompiler.backends.edge import choose_isa
from qcompiler.backends.edge_calls import Call, Calls
from qcompiler.backends.edge_group import Constants
from qcompiler.backends.edge_target import Machine, machine
from qcompiler.backends.edge_trace import trace
from qcompiler.errors import UnsupportedError
from qcompiler.kernels.assembly import Core, Loop, read
from qcompiler.kernels.cores_arm import A55, A76
from qcompiler.kernels.cores_riscv import U74
from qcompiler.kernels.cores_x86 import ZEN4
from qcompiler.kernels.tiles import Product
from qcompiler.program import Program
from qcompiler.target import Target

# Instruction set → the core whose cycles are counted.
CORES = {"aarch64": A76, "armv7": A55, "riscv64": U74, "x86-64": ZEN4}


def countable(target: Target) -> bool:
    """Whether instructions of code for the target are counted."""
    if target.runtime != "tvm" or target.device == "cuda" or target.any_size:
        return False
    where = machine(target)
    return where.family in CORES and choose_isa(where).fused


def core(target: Target) -> Core:
    """The core whose cycles are counted for a target."""
    return CORES[machine(target).family]


def cycles(program: Program, target: Target, sizes: Mapping[str, Sequence[int]]) -> float:
    """The fewest cycles of one run on one core.

    Args:
        program: with or without quantization.
        target: for which `countable`.
        sizes: shape of each input.
    """
    where = machine(target)
    calls = Calls(trace(program, sizes), choose_isa(where), Constants())
    known: dict[object, float] = {}
    total = 0.0
    for call in calls.calls:
        if call.key not in known:
            known[call.key] = _cycles(call, where)
        total += known[call.key]
    return total


def _cycles(call: Call, where: Machine) -> float:
    counted = CORES[where.family]
    found, whole = read(_assembly(call, where), counted)
    _, key, _ = call.key
    product = key[0] if isinstance(key, tuple) and key else None
    if isinstance(product, Product):
        found = [loop for loop in found if loop.products] or [whole]
        return max(_of_product(found, product), _constant_bytes(call) / counted.stream)
    if not any(loop.reads or loop.writes for loop in found):
        return whole.cycles
    return _of_others(found, call)


def _assembly(call: Call, where: Machine) -> str:
    module = tvm.IRModule({"counted": call.build("counted").function})
    with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
        library = tvm.tirx.build(module, target=tvm.target.Target(where.tvm))
    return str(library.inspect_source("s"))


def _of_product(found: Sequence[Loop], product: Product) -> float:
    main = max(found, key=lambda loop: loop.products)
    if not main.products:
        raise UnsupportedError("the assembly of a product does not multiply")
    # Those instructions multiply two rows at a time.
    rows = product.rows + product.rows % 2 if main.widest.endswith("mmla") else product.rows
    macs = prod(product.batch) * rows * product.columns * product.depth * product.groups
    return macs / main.products * main.cycles


def _constant_bytes(call: Call) -> int:
    return sum(
        storage.size * storage.dtype.itemsize
        for storage in call.arguments
        if storage.constant is not None
    )


def _of_others(found: Sequence[Loop], call: Call) -> float:
    """Of the loops that write, and of those that only read, the widest does it all."""
    written = {id(storage) for storage in call.writes}
    amounts = [0, 0]  # read, written
    for storage in call.arguments:
        amounts[id(storage) in written] += storage.size * storage.dtype.itemsize
    reading = [loop for loop in found if loop.reads and not loop.writes]
    writing = [loop for loop in found if loop.writes]
    total = 0.0
    if reading:
        main = max(reading, key=lambda loop: loop.reads)
        total += amounts[0] / main.reads * main.cycles
    if writing:  # a sum or an extreme leaves its loop in a register
        main = max(writing, key=lambda loop: loop.writes)
        total += amounts[1] / main.writes * main.cycles
    return total
