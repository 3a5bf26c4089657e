"""EdgeModel → program.c: the tables that the C runtime reads (`edge_program.h`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from qcompiler.backends.edge_model import EdgeModel, Entry, Port, Tensor

ALIGNMENT = 64  # bytes, of every tensor; also the runtime's
MAX_RANK = 8
MAX_SIZES = 32
MAX_PORTS = 64
DTYPES = {
    "float32": 4, "float64": 8, "float16": 2, "int8": 1, "int16": 2, "int32": 4, "int64": 8,
    "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8, "bool": 1,
}  # fmt: skip


def size_names(edge: EdgeModel) -> list[str]:
    """The names of all dynamic sizes, in the order of the ports."""
    named = [s for port in (*edge.inputs, *edge.outputs) for s in port.shape if isinstance(s, str)]
    return [*dict.fromkeys(named)]


def checksum(data: bytes) -> tuple[int, int]:
    """Two sums over little-endian 64-bit words w₀ … wₙ₋₁, as Fletcher's, modulo 2⁶⁴.

    Σ wᵢ and Σ (n − i) wᵢ; the end counts as filled up with zeros.
    """
    words = np.frombuffer(data + b"\0" * (-len(data) % 8), "<u8")
    first = second = 0
    block = 1 << 20
    for start in range(0, len(words), block):
        part = words[start : start + block]
        weights = np.arange(len(words) - start, len(words) - start - len(part), -1, dtype=np.uint64)
        first += int(part.sum(dtype=np.uint64))
        second += int((part * weights).sum(dtype=np.uint64))
    return first % (1 << 64), second % (1 << 64)


def check(edge: EdgeModel) -> None:
    """Whether the runtime can run it.

    Raises:
        ValueError: naming the first place where the model contradicts itself; a bug of whoever
            made it.
    """
    names = size_names(edge)
    ports = (*edge.inputs, *edge.outputs)
    _demand(len(names) <= MAX_SIZES, f"{len(names)} named sizes, at most {MAX_SIZES}")
    _demand(max(len(edge.inputs), len(edge.outputs)) <= MAX_PORTS, f"more than {MAX_PORTS} ports")
    _demand(bool(edge.entries), "no entries")
    _demand(bool(edge.outputs), "no outputs")
    for port in ports:
        _demand(port.dtype in DTYPES, f"{port.name}: unknown dtype {port.dtype}")
        _demand(len(port.shape) <= MAX_RANK, f"{port.name}: more than {MAX_RANK} dimensions")
        _demand(not port.limit or port.dtype == "int64", f"{port.name}: a limit of {port.dtype}")
    for number, entry in enumerate(edge.entries):
        where = f"entry {number} {dict(entry.sizes)}"
        _demand({*names} <= {*entry.sizes}, f"{where}: a size of {names} has no value")
        for index, tensor in enumerate(entry.tensors):
            _check_tensor(edge, entry, tensor, f"{where}, tensor {index}")
        used = {(t.space, t.at) for t in entry.tensors}
        for index, port in enumerate(edge.outputs):
            _demand(("output", index) in used, f"{where}: nothing writes output '{port.name}'")
        for step in entry.steps:
            fits = all(0 <= t < len(entry.tensors) for t in step.tensors)
            _demand(fits, f"{where}, {step.label}: no such tensor in {step.tensors}")
    if edge.decoder is not None:
        by_name = {port.name: port for port in ports}
        wanted = {
            edge.decoder.tokens: ("int64", 2),
            edge.decoder.position: ("int64", 1),
            edge.decoder.logits: ("float32", 3),
        }
        for name, form in wanted.items():
            found = by_name.get(name)
            fits = found is not None and (found.dtype, len(found.shape)) == form
            _demand(fits, f"decoder: no {form[0]} port '{name}' of rank {form[1]}")
        inputs = {edge.decoder.tokens, edge.decoder.position}
        _demand({p.name for p in edge.inputs} == inputs, "decoder: inputs besides these two")
        _demand(isinstance(by_name[edge.decoder.logits].shape[-1], int), "decoder: vocabulary")


def _check_tensor(edge: EdgeModel, entry: Entry, tensor: Tensor, where: str) -> None:
    _demand(tensor.dtype in DTYPES, f"{where}: unknown dtype {tensor.dtype}")
    _demand(len(tensor.shape) <= MAX_RANK, f"{where}: more than {MAX_RANK} dimensions")
    size = DTYPES[tensor.dtype] * int(np.prod(tensor.shape, dtype=np.int64))
    if tensor.space in ("input", "output"):
        ports = edge.inputs if tensor.space == "input" else edge.outputs
        _demand(0 <= tensor.at < len(ports), f"{where}: no {tensor.space} {tensor.at}")
        port = ports[tensor.at]
        shape = [entry.sizes[s] if isinstance(s, str) else s for s in port.shape]
        port_size = DTYPES[port.dtype] * int(np.prod(shape, dtype=np.int64))
        _demand(size == port_size, f"{where}: {size} bytes, and '{port.name}' has {port_size}")
        return
    room = {"weights": len(edge.weights), "arena": entry.arena, "state": edge.state}[tensor.space]
    inside = tensor.at >= 0 and tensor.at + size <= room
    _demand(inside, f"{where}: {tensor} is outside the {tensor.space} of {room} bytes")
    _demand(tensor.at % ALIGNMENT == 0, f"{where}: {tensor} is not at a multiple of {ALIGNMENT}")


def _demand(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"this EdgeModel cannot run: {what}")


def quoted(text: str) -> str:
    """A C string literal; what is not plain ASCII, in octal."""
    plain = {ord(c) for c in map(chr, range(32, 127))} - {ord('"'), ord("\\"), ord("?")}
    return '"' + "".join(chr(b) if b in plain else f"\\{b:03o}" for b in text.encode()) + '"'


def program_source(edge: EdgeModel) -> str:
    """The text of program.c."""
    names = size_names(edge)
    shapes = Shapes()
    symbols = sorted({step.symbol for entry in edge.entries for step in entry.steps})
    parts = [f"int __tvm_ffi_{s}(void *, const argument *, int32_t, argument *);" for s in symbols]
    bodies = [
        entry_tables(entry, number, names, shapes) for number, entry in enumerate(edge.entries)
    ]
    parts += [*shapes.lines, *(line for lines, _ in bodies for line in lines)]
    parts.append(array("model_port", "inputs", [_port(port) for port in edge.inputs]))
    parts.append(array("model_port", "outputs", [_port(port) for port in edge.outputs]))
    parts.append(array("int64_t", "limits", [str(port.limit) for port in edge.inputs]))
    parts.append(array("char *const", "size_names", [quoted(name) for name in names]))
    parts.append(array("uint8_t", "padded", [str(int(name in edge.padded)) for name in names]))
    parts.append(array("struct entry", "entries", [row for _, row in bodies]))
    fields = {
        "target": quoted(edge.target),
        "features": quoted(" ".join(edge.features)),
        "weights": f"{len(edge.weights)}u",
        "checksum": "{" + ", ".join(f"{part}ull" for part in checksum(edge.weights)) + "}",
        "state": f"{edge.state}u",
        "inputs": "inputs",
        "outputs": "outputs",
        "input_count": str(len(edge.inputs)),
        "limits": "limits",
        "output_count": str(len(edge.outputs)),
        "size_names": "size_names",
        "padded": "padded",
        "size_count": str(len(names)),
        "entries": "entries",
        "entry_count": str(len(edge.entries)),
    }
    if edge.decoder is not None:
        inputs = [port.name for port in edge.inputs]
        fields |= {
            "decodes": "1",
            "tokens": str(inputs.index(edge.decoder.tokens)),
            "position": str(inputs.index(edge.decoder.position)),
            "logits": str([p.name for p in edge.outputs].index(edge.decoder.logits)),
            "capacity": str(edge.decoder.capacity),
        }
    rows = "".join(f"  .{name} = {value},\n" for name, value in fields.items())
    return "\n".join(
        [
            '#include "edge_program.h"',
            "",
            *parts,
            "",
            f"const struct program compiled = {{\n{rows}}};",
            "",
        ]
    )


class Shapes:
    """Shapes as arrays, each written once."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._known: dict[tuple[int, ...], str] = {}

    def name(self, shape: tuple[int, ...]) -> str:
        """The array's name."""
        if shape not in self._known:
            self._known[shape] = f"shape_{len(self._known)}"
            self.lines.append(array("int64_t", self._known[shape], map(str, shape)))
        return self._known[shape]


def array(kind: str, name: str, values: Iterable[str]) -> str:
    """The definition of an array in C."""
    text = ", ".join(values) or "0"  # C knows no empty array
    return f"static const {kind} {name}[] = {{{text}}};"


def entry_tables(
    entry: Entry, number: int, names: Sequence[str], shapes: Shapes
) -> tuple[list[str], str]:
    """The arrays of an entry, and its row in the table of entries."""
    tensors = [
        f"{{{t.space.upper()}, MODEL_{t.dtype.upper()}, {len(t.shape)}, {shapes.name(t.shape)}, "
        f"{t.at}u}}"
        for t in entry.tensors
    ]
    steps: list[str] = []
    arguments: list[str] = []
    for step in entry.steps:
        place = f"{len(arguments)}, {len(step.tensors)}"
        steps.append(f"{{__tvm_ffi_{step.symbol}, {quoted(step.label)}, {place}}}")
        arguments += map(str, step.tensors)
    lines = [
        array("int64_t", f"sizes_{number}", (str(entry.sizes[name]) for name in names)),
        array("struct tensor", f"tensors_{number}", tensors or ["{0}"]),
        array("struct step", f"steps_{number}", steps or ["{0}"]),
        array("uint32_t", f"arguments_{number}", arguments),
    ]
    row = ", ".join(
        [f"sizes_{number}", f"{entry.arena}u", f"tensors_{number}", f"steps_{number}",
         f"arguments_{number}", str(len(tensors)), str(len(steps)), str(len(arguments))]
    )  # fmt: skip
    return lines, f"{{{row}}}"


def _port(port: Port) -> str:
    shape = ", ".join("-1" if isinstance(size, str) else str(size) for size in port.shape) or "0"
    sizes = ", ".join(quoted(s) if isinstance(s, str) else "0" for s in port.shape) or "0"
    return (
        f"{{{quoted(port.name)}, MODEL_{port.dtype.upper()}, {len(port.shape)}, "
        f"{{{shape}}}, {{{sizes}}}}}"
    )
