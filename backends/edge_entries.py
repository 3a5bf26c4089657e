"""What the entries of a compiled model are made of: kernels, constants, and the calls in memory.

Kernels and constants are kept once, however many entries share them.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qcompiler.backends.edge_calls import Call, Calls
from qcompiler.backends.edge_memory import ALIGN, plan
from qcompiler.backends.edge_model import MOST_ELEMENTS, Entry, Step
from qcompiler.backends.edge_model import Tensor as Placed
from qcompiler.backends.edge_ops import Ref, Storage, Trace
from qcompiler.backends.edge_target import Machine
from qcompiler.errors import UnsupportedError

# Floats that the C runtime does not know, stored as their bits.
AS_BITS = {torch.bfloat16: "uint16", torch.float8_e4m3fn: "uint8"}


@dataclass
class Code:
    """Kernels by what they compute, for all entries."""

    names: dict[Any, str] = field(default_factory=dict)
    kernels: dict[str, Any] = field(default_factory=dict)

    def symbol(self, call: Call) -> str:
        """The name of a call's kernel, which is made where it is new."""
        if call.key not in self.names:
            name = f"qc_{len(self.names)}_{call.kind}"
            self.names[call.key] = name
            self.kernels[name] = call.build(name)
        return self.names[call.key]


class Weights:
    """weights.bin: constants one after another, equal ones once."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size = 0
        self.places: dict[bytes, int] = {}
        self.known: dict[Storage, int] = {}

    def place(self, storage: Storage) -> int:
        """The offset of a constant."""
        assert storage.constant is not None
        if storage not in self.known:
            flat = storage.constant.contiguous().reshape(-1)
            if flat.stride() != (1,):  # one number, expanded: contiguous, whatever its stride
                flat = flat.clone(memory_format=torch.contiguous_format)
            data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
            name = hashlib.sha256(data).digest()
            if name not in self.places:
                self.places[name] = self.size
                self.parts.append(data + b"\0" * (-len(data) % ALIGN))
                self.size += len(self.parts[-1])
            self.known[storage] = self.places[name]
        return self.known[storage]


def state_bytes(storage: Storage) -> int:
    """Bytes that a storage takes in the state."""
    return -(-storage.size * storage.dtype.itemsize // ALIGN) * ALIGN


def make_entry(
    sizes: Mapping[str, int],
    traced: Trace,
    outputs: tuple[Ref, ...],
    calls: Calls,
    code: Code,
    weights: Weights,
) -> Entry:
    """The calls of a trace with the places of what they read and write.

    Args:
        sizes: that the trace was made at.
        traced: brings the inputs.
        outputs: what the entry returns.
        calls: in order.
        code, weights: get the kernels and constants that are new.

    Raises:
        UnsupportedError: for a tensor with more numbers than kernels count.
    """
    made = [(f"'{op.label}'", ref.storage) for op in traced.ops for ref in op.outputs]
    for label, storage in [*(("an input", ref.storage) for ref in traced.inputs), *made]:
        if storage.size > MOST_ELEMENTS:
            raise UnsupportedError(
                f"{label} has {storage.size} numbers at the sizes {dict(sizes)}, and generated "
                f"code counts to {MOST_ELEMENTS}: compile for smaller ones (--bucket …)"
            )
    fixed: dict[int, tuple[str, int]] = {}
    for number, ref in enumerate(traced.inputs):
        fixed[id(ref.storage)] = ("input", number)
    for number, ref in enumerate(outputs):
        fixed[id(ref.storage)] = ("output", number)
    held = 0
    for storage in calls.states:
        fixed[id(storage)] = ("state", held)
        held += state_bytes(storage)
    everything = {id(s): s for call in calls.calls for s in call.arguments}
    for storage in everything.values():
        if storage.constant is not None:
            fixed[id(storage)] = ("weights", weights.place(storage))
    offsets, arena = plan(calls.calls, set(fixed))
    numbers: dict[int, int] = {}
    tensors: list[Placed] = []

    def number_of(storage: Storage) -> int:
        if id(storage) not in numbers:
            space, at = fixed.get(id(storage), ("arena", offsets.get(id(storage), 0)))
            dtype = AS_BITS.get(storage.dtype) or str(storage.dtype).removeprefix("torch.")
            numbers[id(storage)] = len(tensors)
            shape: tuple[int, ...] = (storage.size,)
            for ref in (*traced.inputs, *outputs):
                if ref.storage is storage:
                    shape = ref.shape
            tensors.append(Placed(space, at, dtype, shape))  # type: ignore[arg-type]  # a Literal
        return numbers[id(storage)]

    steps = tuple(
        Step(code.symbol(call), call.label, tuple(number_of(s) for s in call.arguments))
        for call in calls.calls
    )
    return Entry(dict(sizes), arena, tuple(tensors), steps)


def build_kernels(functions: Mapping[str, Any], where: Machine) -> bytes:
    """Compile the kernels to one object file."""
    import tvm

    with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
        library = tvm.tirx.build(tvm.IRModule(dict(functions)), target=tvm.target.Target(where.tvm))
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "kernels.o"
        library.write_to_file(str(path), "o")
        return path.read_bytes()
