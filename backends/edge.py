"""Machine code: write a Program as TVM-generated kernels with a C runtime around them; load it.

The program is taken at fixed sizes (`entries`), one piece of code for each, which share the weights
and every kernel that they have in common. Integers are the program's own: nothing is quantized
anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qcompiler.audit import Audit
from qcompiler.backends import edge_folder
from qcompiler.backends.edge_artifact import SIZES, load
from qcompiler.backends.edge_audit import audited
from qcompiler.backends.edge_calls import Calls
from qcompiler.backends.edge_decoder import (
    CAPACITY,
    TOKENS,
    Decoding,
    Roles,
    input_shapes,
    last_token,
    roles,
)
from qcompiler.backends.edge_entries import Code, Weights, build_kernels, make_entry, state_bytes
from qcompiler.backends.edge_group import Constants
from qcompiler.backends.edge_memory import ALIGN
from qcompiler.backends.edge_model import Decoder, EdgeModel, Entry, Port
from qcompiler.backends.edge_ops import Ref, Storage, Trace
from qcompiler.backends.edge_ports import (
    batch_of,
    entries_of,
    exact_of,
    masked_sizes,
    output_ports,
    place_outputs,
    ports_of,
)
from qcompiler.backends.edge_target import Machine, machine
from qcompiler.backends.edge_trace import rows_looked_up, trace
from qcompiler.errors import InputError
from qcompiler.kernels import isa as isas
from qcompiler.program import Batch, Program
from qcompiler.target import Target

__all__ = ("choose_isa", "load", "lower")


class Maker:
    """What differs between machines: the calls, the compiler, the folder.

    Attributes:
        isa: that kernels are written for.
        features: that the machine must have.
    """

    chunks: tuple[int, ...] = TOKENS  # of a language model's prompt, where none are asked for

    def __init__(self, target: Target) -> None:
        self.machine = machine(target)
        self.isa, self.features = choose_isa(self.machine), self.machine.features

    def calls(self, *given: Any) -> Calls:
        """The calls of a trace."""
        return Calls(*given)

    def compile(self, kernels: Mapping[str, Any]) -> tuple[tuple[str, bytes], ...]:
        """Files with the kernels' code."""
        functions = {name: made.function for name, made in kernels.items()}
        return (("kernels.o", build_kernels(functions, self.machine)),)

    def write(self, edge: EdgeModel, folder: Path) -> None:
        """Write the model."""
        edge_folder.write(edge, folder)


def _maker(target: Target) -> Maker:
    if target.device == "cuda":
        from qcompiler.backends.edge_cuda_folder import CudaMaker

        return CudaMaker(target)
    return Maker(target)


def choose_isa(target: Machine) -> isas.Isa:
    """The kernels' instruction set for a machine."""
    has = set(target.features)
    if target.family == "x86-64":
        if "avx512vnni" in has:
            return isas.VNNI_BF16 if "avx512bf16" in has else isas.VNNI
        return isas.AVX2 if "avx2" in has else isas.SSE
    if target.family == "aarch64":
        if "bf16" in has:
            return isas.I8MM_BF16
        if "i8mm" in has:
            return isas.I8MM
        return isas.DOTPROD if "dotprod" in has else isas.NEON
    return isas.ARMV7 if target.family == "armv7" else isas.SCALAR


def lower(
    program: Program,
    target: Target,
    folder: Path,
    *,
    input_names: tuple[str, ...] = (),
    output_names: tuple[str, ...] = (),
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None = None,
    buckets: Mapping[str, Sequence[int]] | None = None,
    padding_mask: str = "",
    tried: tuple[Program, Batch] | None = None,
    planned: Mapping[str, str] | None = None,
    integer: Collection[str] = (),
    say: Callable[[str], None] = lambda step: None,
) -> Audit:
    """Write `program` into `folder` as a library, a runner and their weights.

    Args:
        program: with or without quantization; only ATen and qc ops.
        target: one of the `tvm:` targets.
        folder: must exist.
        input_names: names of the inputs; the program's own where not given.
        output_names: names of the flat outputs; `output_0`, … where not given.
        dynamic_shapes: names of the dynamic sizes by input and dimension.
        buckets: size's name → the sizes to compile for.
        padding_mask: the input that masks padding: sizes of its last dimension are padded up.
        tried: the float program and a batch, on which it is tried out whether batches may be run in
            pieces and sequences padded; where not given, they may.
        planned: the layers with quantized weights: node → module path.
        integer: those of them whose inputs are quantized too, so that integer kernels are promised.
        say: told of each step.

    Raises:
        UnsupportedError: for an op without a kernel, or where the target's C compiler is missing.
        InputError: for sizes that the model has not.
    """
    maker = _maker(target)
    found = roles(program)
    if found is not None:
        return _lower_decoder(
            program, found, target, folder, buckets or {}, planned or {}, integer, say
        )
    ports = ports_of(program, dynamic_shapes or {}, input_names)
    exact = exact_of(ports, program, padding_mask, tried) if tried is not None else {}
    if set(masked_sizes(ports, padding_mask, program)) & set(exact):
        padding_mask = ""
    entries_at = entries_of(ports, program, buckets or {}, padding_mask, exact)
    code, weights, constants = Code(), Weights(), Constants()
    known: dict[str, Any] = {}
    entries, last = [], None
    outputs: tuple[Port, ...] = ()
    for sizes in entries_at:
        say(f"generate code for {_shown(sizes)}" if sizes else "generate code")
        shapes = {
            name: [sizes[d] if isinstance(d, str) else d for d in port.shape]
            for name, port in zip(program.inputs, ports, strict=True)
        }
        traced = trace(program, shapes, known=known)
        rows = rows_looked_up(traced)
        ports = tuple(
            replace(port, limit=rows.get(name, 0))
            for name, port in zip(program.inputs, ports, strict=True)
        )
        calls = maker.calls(traced, maker.isa, constants)
        placed = place_outputs(traced, calls)
        entries.append(make_entry(sizes, traced, placed, calls, code, weights))
        if not outputs:
            outputs = output_ports(program, ports, placed, output_names, len(entries_at) > 1)
        last = calls
    say("compile kernels")
    objects = maker.compile(code.kernels)
    padded = frozenset(masked_sizes(ports, padding_mask, program))
    edge = EdgeModel(
        target=str(target), features=maker.features, inputs=ports, outputs=outputs,
        entries=tuple(entries), padded=padded, state=0, objects=objects,
        weights=b"".join(weights.parts) or b"\0" * ALIGN,
    )  # fmt: skip
    say("link")
    maker.write(edge, folder)
    given, made = [list(p.shape) for p in ports], [list(p.shape) for p in outputs]
    described = {
        "inputs": given, "outputs": made,
        "entries": [dict(e.sizes) for e in entries], "padded": sorted(padded),
        "batch": batch_of(given, made, padded | exact.keys()),
        "exact": exact,
    }  # fmt: skip
    (folder / SIZES).write_text(json.dumps(described) + "\n")
    assert last is not None
    return audited(last, planned or {}, integer)


def _lower_decoder(
    program: Program,
    found: Roles,
    target: Target,
    folder: Path,
    buckets: Mapping[str, Sequence[int]],
    planned: Mapping[str, str],
    integer: Collection[str],
    say: Callable[[str], None],
) -> Audit:
    """A language model: chunks of tokens, the cache in the model's state."""
    maker = _maker(target)
    unknown = [name for name in buckets if name not in ("tokens", "capacity")]
    if unknown:
        raise InputError(
            f"--bucket {unknown[0]}=…: a language model has tokens=… (sizes of the chunks that a "
            "prompt is read in; 1 is always among them) and capacity=… (of the cache)"
        )
    capacity = max(buckets.get("capacity", (CAPACITY,)))
    if found.context:
        capacity = min(capacity, found.context)
    capacity = -(-capacity // 32) * 32
    chunks = sorted({1, *(n for n in buckets.get("tokens", maker.chunks) if n <= capacity)})
    module = last_token(program)
    code, weights, constants = Code(), Weights(), Constants()
    known: dict[str, Any] = {}
    entries: list[Entry] = []
    outputs: tuple[Ref, ...] = ()
    states: list[Storage] = []
    last = None
    rows: dict[str, int] = {}
    for new in chunks:
        say(f"generate code for {new} tokens")
        position = Storage(torch.int64, 1, port="position")
        counted = {found.positions: position} if found.positions else {}
        traced = trace(program, input_shapes(program, found, new), module, counted, known)
        calls = maker.calls(traced, maker.isa, constants, Decoding(capacity, position))
        placed = place_outputs(traced, calls)
        tokens = next(r for r in traced.inputs if r.storage.port == found.tokens)
        spot = Ref(position, torch.int64, 0, (1,), (1,))
        narrowed = Trace((tokens, spot), traced.outputs, traced.ops)
        entries.append(make_entry({"tokens": new}, narrowed, placed, calls, code, weights))
        outputs, states, last = placed, calls.states, calls
        rows = rows_looked_up(traced)
    assert last is not None
    say("compile kernels")
    objects = maker.compile(code.kernels)
    logits = outputs[0].shape
    middle: int | str = logits[1] if logits[1] == 1 else "tokens"
    ports = (
        Port(found.tokens, "int64", (1, "tokens"), rows.get(found.tokens, 0)),
        Port("position", "int64", (1,)),
    )  # fmt: skip
    made = (Port("logits", "float32", (1, middle, logits[2])),)
    edge = EdgeModel(
        target=str(target), features=maker.features, inputs=ports, outputs=made,
        entries=tuple(entries), padded=frozenset() if middle == 1 else frozenset({"tokens"}),
        state=sum(state_bytes(s) for s in states), objects=objects,
        weights=b"".join(weights.parts) or b"\0" * ALIGN,
        decoder=Decoder(found.tokens, "position", "logits", capacity),
    )  # fmt: skip
    say("link")
    maker.write(edge, folder)
    described = {
        "inputs": [list(p.shape) for p in ports], "outputs": [list(p.shape) for p in made],
        "entries": [dict(e.sizes) for e in entries], "padded": [], "capacity": capacity,
        "tokens": program.inputs.index(found.tokens),
    }  # fmt: skip
    (folder / SIZES).write_text(json.dumps(described) + "\n")
    return audited(last, planned, integer)


def _shown(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def sizes_run(
    program: Program,
    batch: Batch,
    *,
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None = None,
    buckets: Mapping[str, Sequence[int]] | None = None,
    padding_mask: str = "",
) -> dict[str, int]:
    """The compiled sizes that a batch runs at: its own, or those that it is padded to.

    Args:
        program: not a language model with its cache.
        batch: inputs.
        dynamic_shapes, buckets, padding_mask: as for `lower`.
    """
    ports = ports_of(program, dynamic_shapes or {}, ())
    own = {
        d: int(value.shape[i])
        for port, value in zip(ports, batch, strict=True)
        for i, d in enumerate(port.shape)
        if isinstance(d, str)
    }
    padded = masked_sizes(ports, padding_mask, program)
    for sizes in entries_of(ports, program, buckets or {}, padding_mask):
        if all(own[d] == n or (d in padded and own[d] < n) for d, n in sizes.items()):
            return sizes
    return own
