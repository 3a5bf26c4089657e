"""Code for any size: the kernels of `edge`, called by TVM's virtual machine.

The program is taken at several sizes (`edge_sizes`), and its kernel calls become one Relax function
whose tensors have the sizes' formulas as shapes; each kernel gets the sizes as arguments. Nothing
is padded, and the integers are those of code for fixed sizes. What runs it is TVM's runtime, in
Python; there is no C interface.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tvm
from tvm import relax
from tvm.relax.op import vm as machine_ops

from qcompiler.audit import Audit
from qcompiler.backends.edge import choose_isa
from qcompiler.backends.edge_artifact import CODE, SIZES
from qcompiler.backends.edge_audit import audited
from qcompiler.backends.edge_calls import Calls
from qcompiler.backends.edge_decoder import roles
from qcompiler.backends.edge_group import HELD, Constants
from qcompiler.backends.edge_model import Port
from qcompiler.backends.edge_ops import Ref, Storage, Trace
from qcompiler.backends.edge_ports import check_buckets, output_ports, place_outputs, ports_of
from qcompiler.backends.edge_sizes import Formula, bound, generalized, probes
from qcompiler.backends.edge_target import machine
from qcompiler.backends.edge_trace import rows_looked_up, trace
from qcompiler.errors import UnsupportedError
from qcompiler.kernels import attention, matmul_float, matmul_int8, matmul_packed
from qcompiler.kernels.code import Argument, Size
from qcompiler.kernels.depthwise import depthwise
from qcompiler.kernels.elementwise import elementwise
from qcompiler.kernels.rows import quantize_rows, reduction, rows
from qcompiler.program import Program
from qcompiler.target import Target

MOST = 512  # the largest size that is looked at where the model names none
LEAST = 5  # looked at even where the user names less, but for 1: a square is known from 2 to 5

Build = Callable[[str, Sequence[Any], Any], Any]


def _rows(kind: str, name: str, given: Sequence[Any], key: Any) -> Any:
    return rows(name, given, kind, *key)


# Kinds of calls whose kernels take sizes that only the call knows, built from a call's key.
BUILD: dict[str, Build] = {
    "elementwise": elementwise,
    "matmul_int8": lambda name, given, key: matmul_int8.matmul_int8(
        name, given, key[0], key[3], key[1], key[2], key[4]
    ),
    "matmul_float": lambda name, given, key: matmul_float.matmul_float(name, given, *key),
    "matmul_packed": lambda name, given, key: matmul_packed.matmul_packed(name, given, *key),
    "depthwise": lambda name, given, key: depthwise(name, given, *key),
    "pool": lambda name, given, key: reduction(name, given, key[0], key[1], 4, key[2]),
    "attention": lambda name, given, key: attention.attention(name, given, *key),
    "reduce": lambda name, given, key: reduction(name, given, *key),
    "range": lambda name, given, key: reduction(name, given, key[0], key[1], 1, key[2]),
    "quantize_rows": lambda name, given, key: quantize_rows(name, given, *key),
    **{kind: partial(_rows, kind) for kind in ("layer_norm", "rms_norm", "softmax")},
}


@dataclass
class _Taken:
    """The program at one point: its calls, and its memory in the order in which they meet it."""

    trace: Trace
    calls: Calls
    outputs: tuple[Ref, ...]
    storages: list[Storage]
    steps: list[tuple[Any, list[int]]]

    @classmethod
    def at(cls, traced: Trace, calls: Calls) -> _Taken:
        outputs = place_outputs(traced, calls)
        numbers: dict[int, int] = {}
        storages: list[Storage] = []

        def number(storage: Storage) -> int:
            if id(storage) not in numbers:
                numbers[id(storage)] = len(storages)
                storages.append(storage)
            return numbers[id(storage)]

        for ref in traced.inputs:
            number(ref.storage)
        steps = [(call.key, [number(s) for s in call.arguments]) for call in calls.calls]
        for ref in outputs:
            number(ref.storage)
        return cls(traced, calls, outputs, storages, steps)


def lower(
    program: Program,
    target: Target,
    folder: Path,
    *,
    input_names: tuple[str, ...] = (),
    output_names: tuple[str, ...] = (),
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None = None,
    buckets: Mapping[str, Sequence[int]] | None = None,
    planned: Mapping[str, str] | None = None,
    integer: Collection[str] = (),
    say: Callable[[str], None] = lambda step: None,
) -> Audit:
    """Write `program` into `folder` as a library for TVM's virtual machine.

    Args:
        program, target, folder, input_names, output_names, dynamic_shapes: as for `edge.lower`.
        buckets: size's name → the largest that it may have; where not given, that of the model.
        planned, integer, say: as for `edge.lower`.

    Raises:
        UnsupportedError: for what has no code for any size, with the reason.
        InputError: for sizes that the model has not, or that are not positive.
    """
    if roles(program) is not None:
        raise UnsupportedError(
            f"{target}: a language model's cache has a fixed capacity and its prompt is read in "
            "chunks: compile it for the target without ':dynamic'"
        )
    ports = ports_of(program, dynamic_shapes or {}, input_names)
    names = list(dict.fromkeys(d for p in ports for d in p.shape if isinstance(d, str)))
    limits, given = _limits(program, ports, names, buckets or {}, target)
    isa, constants = choose_isa(machine(target)), Constants()
    points = probes(limits)
    taken, known = [], dict[str, Any]()
    for point in points:
        say(f"look at {', '.join(f'{name} {size}' for name, size in point.items())}")
        shapes = {
            name: [point[d] if isinstance(d, str) else d for d in port.shape]
            for name, port in zip(program.inputs, ports, strict=True)
        }
        traced = trace(program, shapes, known=known)
        taken.append(_Taken.at(traced, Calls(traced, isa, constants)))
    say("generate code for any size")
    steps = _steps(taken, points)
    sizes = [_formula(taken, points, i) for i in range(len(taken[0].storages))]
    held, bounded = _constants(taken, points)
    last = taken[-1]
    outputs = output_ports(program, ports, last.outputs, output_names, True)
    shapes_out = [generalized(refs, points) for refs in _shapes(taken)]
    module = _module(names, ports, taken[0], steps, sizes, held, shapes_out)
    say("compile kernels")
    _compile(module, target, folder / CODE)
    table = rows_looked_up(last.trace)
    described = {
        "inputs": [list(p.shape) for p in ports], "outputs": [list(p.shape) for p in outputs],
        "names": [p.name for p in ports], "entries": [], "padded": [],
        "features": list(machine(target).features),
        "limits": given | {n: min(s, given.get(n, s)) for n, s in limits.items() if bounded},
        "sizes": names,
        "elements": [*dict.fromkeys(s.terms for s in sizes if isinstance(s, Formula))],
        "rows": [table.get(name, 0) for name in program.inputs],
        "dtypes": [[p.dtype for p in ports], [p.dtype for p in outputs]],
    }  # fmt: skip
    (folder / SIZES).write_text(json.dumps(described) + "\n")
    return audited(last.calls, planned or {}, integer)


def _limits(
    program: Program, ports: Sequence[Port], names: Sequence[str],
    buckets: Mapping[str, Sequence[int]], target: Target,
) -> tuple[dict[str, int], dict[str, int]]:  # fmt: skip
    """The largest value of each size that is looked at, and those that the user or model named."""
    if not names:
        raise UnsupportedError(
            f"{target}: all sizes of this model are fixed; use the target without ':dynamic'"
        )
    check_buckets(names, buckets)
    ranges = {str(s): r for s, r in program.exported.range_constraints.items()}
    given: dict[str, int] = {}
    for name, port in zip(program.inputs, ports, strict=True):
        for known, size in zip(port.shape, program.placeholder(name).meta["val"].shape,
                               strict=True):  # fmt: skip
            upper = str(getattr(ranges.get(str(size)), "upper", ""))
            if isinstance(known, str) and upper.isdigit():
                given[known] = min(given.get(known, int(upper)), int(upper))
    limits = {name: min(MOST, given.get(name, MOST)) for name in names}
    named = {name: max(values) for name, values in buckets.items()}
    for name, size in named.items():
        limits[name] = 1 if size == 1 else max(size, min(LEAST, limits[name]))
    return limits, given | named


def _steps(
    taken: Sequence[_Taken], points: Sequence[Mapping[str, int]]
) -> list[tuple[str, str, Any, list[int]]]:
    """Kind, label, key and arguments of each call, for any size."""
    counts = {len(one.steps) for one in taken}
    if len(counts) > 1:
        raise UnsupportedError(
            f"no code for any size: {min(counts)} to {max(counts)} kernels at different sizes"
        )
    found = []
    for i, call in enumerate(taken[0].calls.calls):
        try:
            key, arguments = generalized([one.steps[i] for one in taken], points)
        except UnsupportedError as error:
            raise UnsupportedError(
                f"no code for any size: '{call.label}' ({call.kind}): {error}"
            ) from error
        if call.kind not in BUILD:
            raise UnsupportedError(
                f"no code for any size: '{call.label}': the kernel {call.kind} has fixed sizes"
            )
        found.append((call.kind, call.label, key, arguments))
    return found


def _formula(taken: Sequence[_Taken], points: Sequence[Mapping[str, int]], index: int) -> Any:
    """The number of elements of a storage; a constant's largest."""
    storages = [one.storages[index] for one in taken]
    if storages[0].constant is not None:
        return max(s.size for s in storages)
    return generalized([s.size for s in storages], points)


def _shapes(taken: Sequence[_Taken]) -> list[list[tuple[int, ...]]]:
    return [list(shapes) for shapes in zip(*([r.shape for r in t.outputs] for t in taken),
                                           strict=True)]  # fmt: skip


def _constants(
    taken: Sequence[_Taken], points: Sequence[Mapping[str, int]]
) -> tuple[dict[int, torch.Tensor], bool]:
    """The constants by number, and whether one of them ends where the largest sizes end.

    A constant may be longer at larger sizes (a table of positions) if all begin alike.
    """
    found: dict[int, torch.Tensor] = {}
    bounded = False
    for index, storages in enumerate(zip(*(one.storages for one in taken), strict=True)):
        given = [s.constant for s in storages]
        if all(c is None for c in given):
            continue
        if any(c is None for c in given):
            raise UnsupportedError("no code for any size: a value is constant at some sizes alone")
        flat = [c.contiguous().reshape(-1) for c in given if c is not None]
        longest = max(flat, key=len)
        for part in flat:
            if part is not longest and not torch.equal(part, longest[: len(part)]):
                calls = taken[0].calls.calls
                label = next(c.label for c in calls if storages[0] in c.arguments)
                raise UnsupportedError(
                    f"no code for any size: '{label}' reads a constant that has other contents at "
                    "other sizes, such as a causal mask that the model computes"
                )
        bounded = bounded or any(len(part) != len(longest) for part in flat)
        found[index] = longest
    return found, bounded


def _held(dtype: torch.dtype) -> str:
    return HELD.get(dtype) or str(dtype).removeprefix("torch.")


def _module(
    names: Sequence[str], ports: Sequence[Port], taken: _Taken,
    steps: Sequence[tuple[str, str, Any, list[int]]], sizes: Sequence[Any],
    constants: Mapping[int, torch.Tensor], shapes: Sequence[Any],
) -> Any:  # fmt: skip
    """The Relax module: one function, and a kernel for each key."""
    builder = relax.BlockBuilder()
    given = {name: tvm.tirx.Var(name, "int64") for name in names}

    def whole(size: Any) -> Any:
        """A size as an expression over the function's sizes."""
        found = bound(size, given)
        return tvm.tirx.IntImm("int64", found) if isinstance(found, int) else found

    def kind(shape: Sequence[Any], dtype: str) -> Any:
        return relax.TensorType(shape, dtype)

    def seen(value: Any, shape: Sequence[Any], dtype: str) -> Any:
        """The same memory in another shape."""
        reshape = relax.ExternFunc("vm.builtin.reshape")
        made = relax.Call(reshape, [value, relax.ShapeExpr(shape)], None, [kind(shape, dtype)])
        return builder.emit(made)

    dtypes = [_held(s.dtype) for s in taken.storages]
    inputs = []
    for number, port in enumerate(ports):
        shape = [given[d] if isinstance(d, str) else whole(d) for d in port.shape]
        inputs.append(relax.Var(port.name.replace(".", "_"), kind(shape, dtypes[number])))
    kernels: dict[Any, Any] = {}
    memory: dict[int, Any] = {}

    def held(number: int) -> Any:
        """A storage's memory, allocated where it is first used."""
        if number not in memory:
            if number in constants:
                value = constants[number]
                value = value.view(torch.uint8) if value.dtype == torch.bool else value
                memory[number] = relax.const(tvm.runtime.tensor(value.numpy()))
            else:
                shape = relax.ShapeExpr([whole(sizes[number])])
                memory[number] = builder.emit(
                    relax.op.builtin.alloc_tensor(shape, dtypes[number], 0)
                )
        return memory[number]

    with builder.function("main", inputs, pure=False):
        for number, value in enumerate(inputs):
            memory[number] = seen(value, [whole(sizes[number])], dtypes[number])
        for label, (call, key, arguments) in ((s[1], (s[0], s[2], s[3])) for s in steps):
            if key not in kernels:
                function = _kernel(f"qc_{len(kernels)}_{call}", call, label, key, names)
                kernels[key] = builder.add_func(function, f"qc_{len(kernels)}_{call}")
            passed = [held(number) for number in arguments]
            amounts = relax.ShapeExpr([given[name] for name in names])
            builder.emit(machine_ops.call_tir_dyn(kernels[key], relax.Tuple([*passed, amounts])))
        results = []
        for ref, shape in zip(taken.outputs, shapes, strict=True):
            number = next(i for i, s in enumerate(taken.storages) if s is ref.storage)
            results.append(seen(held(number), [whole(d) for d in shape], dtypes[number]))
        builder.emit_func_output(relax.Tuple(results))
    module = builder.get()
    module["main"] = module["main"].with_attr("relax.force_pure", True)
    return module


def _kernel(name: str, kind: str, label: str, key: Any, names: Sequence[str]) -> Any:
    """The code of a call, its sizes expressed by those that it is given."""
    variables = {size: tvm.tirx.Var(size, "int64") for size in names}
    narrow = {size: tvm.tirx.Cast("int32", variable) for size, variable in variables.items()}
    _, values, declared = key
    arguments: list[Any] = [
        Argument(f"a{i}", dtype, size if isinstance(size, int) else None)
        for i, (dtype, size) in enumerate(declared)
    ]
    arguments += [Size(size, variable) for size, variable in variables.items()]
    try:
        return BUILD[kind](name, arguments, bound(values, narrow)).function
    except (TypeError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UnsupportedError(
            f"no code for any size: '{label}' ({kind}) needs a fixed size: {reason[0][:200]}"
        ) from error


def _compile(module: Any, target: Target, path: Path) -> None:
    transform = relax.transform
    passes = tvm.transform.Sequential([
        transform.ToNonDataflow(), transform.RemovePurityChecking(),
        transform.StaticPlanBlockMemory(), transform.LowerAllocTensor(),
        transform.KillAfterLastUse(), transform.LowerRuntimeBuiltin(),
        transform.ComputePrimValue(), transform.VMShapeLower(), transform.AttachGlobalSymbol(),
    ])  # fmt: skip
    with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
        built = relax.build(
            module, target=tvm.target.Target(machine(target).tvm), relax_pipeline=passes
        )
    built.export_library(str(path))
