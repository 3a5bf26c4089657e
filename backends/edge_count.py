"""Cycles of a Program's generated code, counted from its instructions: for machines not here.

Of each kernel's assembly the loop that does the work is counted, and how often it runs follows from
the sizes: a product's from its multiply-accumulates, any other kernel's from the bytes that it
reads and writes. The cycles of a round are the fewest that a Cortex-A76 could take
(`qcompiler.kernels.assembly`). A weight also has to come from memory, at `STREAM` bytes a cycle:
the shorter the input, the more that is what takes the time. Neither was timed.
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
from qcompiler.kernels.assembly import Loop, loops, straight
from qcompiler.kernels.tiles import Product
from qcompiler.program import Program
from qcompiler.target import Target

# Bytes a cycle from memory, one core: an assumption, 10 GB/s at 2.4 GHz.
STREAM = 4.0


def countable(target: Target) -> bool:
    """Whether instructions of code for the target are counted: 64-bit ARM."""
    return target.runtime == "tvm" and target.device == "aarch64"


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
    text = _assembly(call, where)
    found = loops(text)
    _, key, _ = call.key
    product = key[0] if isinstance(key, tuple) and key else None
    if isinstance(product, Product):
        found = [loop for loop in found if loop.products] or [straight(text)]
        return max(_of_product(found, product), _constant_bytes(call) / STREAM)
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
    """One loop that writes and, where one only reads, that as well: the widest of each."""
    written = {id(storage) for storage in call.writes}
    amounts = {
        kind: sum(
            storage.size * storage.dtype.itemsize
            for storage in call.arguments
            if (id(storage) in written) is (kind == "st")
        )
        for kind in ("ld", "st")
    }
    writing = [loop for loop in found if loop.moved("st")]
    reading = [loop for loop in found if loop.moved("ld") and not loop.stores]
    total = 0.0
    for kind, group in (("st", writing), ("ld", reading)):
        if group:
            main = max(group, key=lambda loop: loop.moved(kind))
            total += amounts[kind] / main.moved(kind) * main.cycles
    return total
