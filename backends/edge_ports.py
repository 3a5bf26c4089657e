"""The inputs and outputs of generated code, and the sizes that it is compiled for."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from qcompiler.backends.edge_calls import Calls
from qcompiler.backends.edge_model import Port
from qcompiler.backends.edge_ops import Ref, Trace
from qcompiler.errors import InputError, UnsupportedError
from qcompiler.meeting import Shapes, exact_sizes
from qcompiler.program import Batch, Program

PADDED = (16, 32, 64, 128, 256)  # entries for sizes that a mask lets us pad


def ports_of(
    program: Program, dynamic: Mapping[str, Mapping[int, str]], names: tuple[str, ...]
) -> tuple[Port, ...]:
    """The inputs, with the names of their dynamic sizes."""
    symbols: dict[str, str] = {}
    found = []
    for name, given in zip(program.inputs, names or program.inputs, strict=True):
        value: Any = program.placeholder(name).meta.get("val")
        if not isinstance(value, Tensor):
            raise UnsupportedError(f"input '{name}' is not a tensor")
        shape: list[int | str] = []
        sizes: Sequence[Any] = value.shape  # symbols where they are dynamic
        for dim, size in enumerate(sizes):
            if isinstance(size, int):
                shape.append(size)
                continue
            wanted = dynamic.get(name, dynamic.get(given, {})).get(dim, f"{given}_{dim}")
            shape.append(symbols.setdefault(str(size), wanted))
        found.append(Port(given, str(value.dtype).removeprefix("torch."), tuple(shape)))
    return tuple(found)


def masked_sizes(ports: Sequence[Port], mask: str, program: Program) -> list[str]:
    """Sizes that may be padded: the mask's last dimension, where it is dynamic."""
    for name, port in zip(program.inputs, ports, strict=True):
        if mask and mask in (name, port.name) and isinstance(port.shape[-1], str):
            return [port.shape[-1]]
    return []


def exact_of(
    ports: Sequence[Port], program: Program, padding_mask: str, tried: tuple[Program, Batch]
) -> dict[str, str]:
    """Sizes that must be met as they are, and why."""
    masks = [
        i for i, (name, port) in enumerate(zip(program.inputs, ports, strict=True))
        if padding_mask and padding_mask in (name, port.name)
    ]  # fmt: skip
    return exact_sizes(*tried, [p.shape for p in ports], masks[0] if masks else None)


def batch_of(inputs: Shapes, outputs: Shapes, whole: Collection[str]) -> str | None:
    """The size that leads every output and nothing but leads inputs, and is not one of `whole`."""
    names = {shape[0] for shape in outputs if shape and isinstance(shape[0], str)} - set(whole)
    for name in sorted(str(name) for name in names):
        inside = any(name in shape[1:] for shape in (*inputs, *outputs))
        if not inside and all(shape and shape[0] == name for shape in outputs):
            return name
    return None


def check_buckets(names: Sequence[str], buckets: Mapping[str, Sequence[int]]) -> None:
    """Raise InputError for sizes that the model has not, or that are not positive."""
    for name, values in buckets.items():
        if name not in names:
            known = f"its dynamic sizes are {', '.join(names)}"
            known = known if names else "all its sizes are fixed"
            raise InputError(f"--bucket {name}=…: the model has no such size; {known}")
        if not values or min(values) < 1:
            raise InputError(f"--bucket {name}=…: sizes are positive numbers")


def entries_of(
    ports: Sequence[Port], program: Program, buckets: Mapping[str, Sequence[int]], mask: str,
    exact: Collection[str] = (),
) -> list[dict[str, int]]:  # fmt: skip
    """The combinations of sizes to compile for, smallest first.

    Sizes in `exact` are no batches, though they lead.
    """
    names = list(dict.fromkeys(d for p in ports for d in p.shape if isinstance(d, str)))
    check_buckets(names, buckets)
    masked = masked_sizes(ports, mask, program)
    chosen = []
    for name in names:
        default = PADDED if name in masked else (_example(ports, program, name, name in exact),)
        chosen.append(sorted({int(v) for v in buckets.get(name, default)}))
    combined = [dict(zip(names, sizes, strict=True)) for sizes in itertools.product(*chosen)]
    return sorted(combined, key=lambda sizes: [*sizes.values()])


def _example(ports: Sequence[Port], program: Program, size: str, exact: bool) -> int:
    """1 for a size that leads every input (a batch), else what the model was captured with."""
    first = all(p.shape.index(size) == 0 for p in ports if size in p.shape)
    if first and not exact:
        return 1
    for name, port in zip(program.inputs, ports, strict=True):
        if size in port.shape:
            value = program.placeholder(name).meta["val"].shape[port.shape.index(size)]
            return int(value.node.hint) if value.node.hint else 1
    return 1


def place_outputs(traced: Trace, calls: Calls) -> tuple[Ref, ...]:
    """The outputs as tensors of their own, contiguous; copied where they are not."""
    taken: set[int] = {id(ref.storage) for ref in traced.inputs}
    found = []
    written = {id(s) for call in calls.calls for s in call.writes}
    for number, ref in enumerate(traced.outputs):
        own = (
            ref.contiguous
            and ref.offset == 0
            and ref.numel == ref.storage.size
            and id(ref.storage) not in taken
            and id(ref.storage) in written
        )
        if not own:
            made = calls.temporary(ref.dtype, ref.shape)
            calls.copy(ref, made, f"output_{number}")
            ref = made
        taken.add(id(ref.storage))
        found.append(ref)
    return tuple(found)


def output_ports(
    program: Program, inputs: Sequence[Port], placed: Sequence[Ref], names: tuple[str, ...],
    many: bool,
) -> tuple[Port, ...]:  # fmt: skip
    """The outputs with the names of their dynamic sizes, taken from the inputs' symbols."""
    symbols: dict[str, str] = {}
    for name, port in zip(program.inputs, inputs, strict=True):
        for size, known in zip(program.placeholder(name).meta["val"].shape, port.shape,
                               strict=True):  # fmt: skip
            if isinstance(known, str):
                symbols[str(size)] = known
    values = {n.name: n.meta.get("val") for n in program.exported.graph.nodes}
    found = []
    for number, (output, ref) in enumerate(
        zip(program.exported.graph_signature.user_outputs, placed, strict=True)
    ):
        name = names[number] if number < len(names) else f"output_{number}"
        value, shape = values.get(str(output)), []
        for dim, size in enumerate(ref.shape):
            symbol = str(value.shape[dim]) if isinstance(value, Tensor) else ""
            if symbol in symbols:
                shape.append(symbols[symbol])
            elif many and not symbol.isdigit():
                raise UnsupportedError(
                    f"output '{name}' has the size {symbol}, not one of the inputs' sizes: "
                    "compile for a single set of sizes (--bucket)"
                )
            else:
                shape.append(size)  # type: ignore[arg-type]  # int or name
        found.append(Port(name, str(ref.dtype).removeprefix("torch."), tuple(shape)))
    return tuple(found)
