"""Generated linears as a library of custom operators for ONNX Runtime (`edge_ort.c`).

Each operator is taken at a few numbers of rows; the library computes any number piece by piece. Its
constants, packed as the kernels read them, are returned for the graph to hold.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qcompiler import ops
from qcompiler.backends.edge import choose_isa
from qcompiler.backends.edge_calls import Calls
from qcompiler.backends.edge_entries import Code, Weights, build_kernels, make_entry
from qcompiler.backends.edge_folder import HEADER, OPTIONS, SOURCES, Tools
from qcompiler.backends.edge_group import Constants
from qcompiler.backends.edge_integer import int8_panels
from qcompiler.backends.edge_memory import ALIGN
from qcompiler.backends.edge_ops import Op, Ref, Storage, Trace, Weight
from qcompiler.backends.edge_program import Shapes, array, entry_tables, quoted
from qcompiler.backends.edge_target import Machine, machine
from qcompiler.errors import UnsupportedError
from qcompiler.generated import Library, Operator, Step
from qcompiler.kernels.isa import Isa
from qcompiler.op_families import LINEAR
from qcompiler.qtype import QType
from qcompiler.target import Target

ROWS = (1, 2, 4, 8, 32, 128)  # that there is code for; greedily, so 1 must be among them
aten = torch.ops.aten

MAX_OUTPUTS = 16  # of edge_ort.h
COMPILED = ("edge_ort.c", "edge_cpu.c")
INCLUDED = ("edge_ort.h", "edge_ort_api.h", "edge_ort_call.h", "edge_program.h")
# The code for each of ONNX Runtime's CPU targets.
CODE = {"": "tvm:native", "vnni": "tvm:x86-64:avx512vnni", "avx2": "tvm:x86-64-v3"}


def build(operators: Sequence[Operator], target: Target, sizes: Sequence[int] = ()) -> Library:
    """Compile the operators.

    Args:
        operators: at least one.
        target: ONNX Runtime's, on this machine.
        sizes: the numbers of rows to make code for, ascending from 1; `ROWS` where not given.

    Raises:
        UnsupportedError: for a machine that this one is not, or without a C compiler.
    """
    where = _machine(target)
    isa = choose_isa(where)
    code, tables = Code(), _Tables()
    weights: list[bytes] = []
    for operator in operators:
        weights.append(_add(operator, sizes or ROWS, isa, code, tables))
    names = [f"int __tvm_ffi_{s}(void *, const argument *, int32_t, argument *);"
             for s in code.kernels]  # fmt: skip
    source = "\n".join(['#include "edge_ort.h"', "", *names, *tables.shapes.lines, *tables.lines])
    digest = hashlib.sha256("".join([source, str(where)]).encode())
    for blob in weights:
        digest.update(hashlib.sha256(blob).digest())
    number = int.from_bytes(digest.digest()[:7], "little")
    fields = (quoted(str(target)), quoted(" ".join(where.features)), f"{number}",
              f"{len(operators)}", "linears")  # fmt: skip
    source += "\n".join(
        ["", array("struct linear", "linears", tables.rows),
         f"const struct linears compiled_linears = {{{', '.join(fields)}}};", ""]
    )  # fmt: skip
    functions = {name: made.function for name, made in code.kernels.items()}
    content = _link(source, build_kernels(functions, where), where)
    return Library(content, number, tuple(weights), tuple(tables.looked_up))


def _machine(target: Target) -> Machine:
    name = CODE.get(target.feature)
    if name is None:
        raise UnsupportedError(
            f"'{target}': no kernels for ONNX Runtime are generated for the feature "
            f"'{target.feature}'; compile on the machine that runs them, with --target ort:cpu "
            "--kernels tvm"
        )
    found = machine(Target.parse(name))
    if not found.here:
        raise UnsupportedError(
            f"'{target}': generated kernels for ONNX Runtime are made on the machine that runs "
            "them, and this one is another; compile there with --target ort:cpu --kernels tvm"
        )
    return found


class _Tables:
    """The C tables of the operators."""

    def __init__(self) -> None:
        self.shapes, self.lines, self.rows = Shapes(), list[str](), list[str]()
        self.entries = 0
        self.looked_up: list[bool] = []


def _add(operator: Operator, sizes: Sequence[int], isa: Isa, code: Code, tables: _Tables) -> bytes:
    """Generate one operator's code; its constants."""
    if len(operator.columns) > MAX_OUTPUTS:
        raise UnsupportedError(
            f"{operator.name}: {len(operator.linears)} linears read one tensor, which with "
            f"{len(operator.kept)} values on the way to it makes more than the {MAX_OUTPUTS} "
            "outputs of an operator"
        )
    constants, weights, rows = Constants(), Weights(), []
    held = [Weight(x.q, x.scale, x.zero_point, x.axis, x.group) for x in operator.linears]
    for count in sizes:
        traced = _trace(operator, held, count)
        calls = Calls(traced, isa, constants)
        entry = make_entry({"rows": count}, traced, traced.outputs, calls, code, weights)
        lines, row = entry_tables(entry, tables.entries, ["rows"], tables.shapes)
        tables.entries += 1
        tables.lines += lines
        rows.append(row)
    blob = b"".join(weights.parts) or b"\0" * ALIGN
    name = f"of_{len(tables.rows)}"
    tables.lines.append(array("struct entry", f"entries_{name}", rows))
    columns = [str(n) for n in operator.columns]
    tables.lines.append(array("int64_t", f"columns_{name}", columns))
    fields = (
        quoted(operator.name), f"{len(blob)}u", str(operator.depth), f"columns_{name}",
        str(operator.inputs), str(len(columns)), str(len(rows)), f"entries_{name}",
        *_table(operator, isa, constants, weights),
    )  # fmt: skip
    tables.looked_up.append(fields[-1] != "0")
    tables.rows.append(f"{{{', '.join(fields)}}}")
    return blob


def _table(
    operator: Operator, isa: Isa, constants: Constants, weights: Weights
) -> tuple[str, str, str, str]:
    """Where the first weight lies in panels of int8: byte, panel, numbers side by side, rows.

    No rows where it is packed otherwise.
    """
    for linear in operator.linears[:1]:
        held = constants.by_key.get(int8_panels(linear.q, isa))
        if held is not None:
            at = str(weights.place(held))
            return at, str(isa.panel), str(isa.depth), str(len(linear.q))
    return "0", "1", "1", "0"


def _trace(operator: Operator, weights: Sequence[Weight], rows: int) -> Trace:
    """The operator on that many rows."""
    recorded: list[Op] = []

    def record(
        target: object, args: tuple[object, ...], label: str, *outputs: Ref, **named: object
    ) -> Ref:
        op = Op(target, args, named, outputs, label)
        for ref in op.refs():
            ref.storage.readers.append(op)
        for ref in outputs:
            ref.storage.maker = op
        recorded.append(op)
        return outputs[0]

    depth, label = operator.depth, operator.name
    given = tuple(_made(torch.float32, rows, depth) for _ in range(operator.inputs))
    for number, ref in enumerate(given):
        ref.storage.port = f"x_{number}"
    values = [*given]
    for step in operator.steps:
        function, arguments, named = _call(step, values, depth)
        made = _made(torch.float32, rows, depth)
        values.append(record(function, arguments, label, made, **named))
    kept = tuple(values[number] for number in operator.kept)
    x = values[-1] if operator.steps else values[0]
    if not operator.linears:
        return Trace(given, (x, *kept), tuple(recorded))
    kind = QType.parse(operator.activation)
    q, scale = _made(kind.dtype, rows, depth), _made(torch.float32, rows, 1)
    zero = _made(kind.dtype, rows, 1)
    record(ops.dynamic_quantize, (x, operator.activation), label, q, scale, zero)
    floats = _made(torch.float32, rows, depth)
    record(ops.dequantize, (q, scale, zero, 0, 0), label, floats)
    outputs = []
    for linear, weight in zip(operator.linears, weights, strict=True):
        bias = () if linear.bias is None else (_constant(linear.bias),)
        made = _made(torch.float32, rows, len(linear.q))
        outputs.append(record(LINEAR, (floats, _weight(weight), *bias), linear.name, made))
    return Trace(given, (*outputs, *kept), tuple(recorded))


def _call(
    step: Step, values: Sequence[Ref], depth: int
) -> tuple[object, tuple[object, ...], dict[str, object]]:
    """A step as a call of torch's: function, arguments, keywords."""
    operands = [values[number] for number in step.operands]
    constants = [_constant(tensor) for tensor in step.constants]
    if step.kind in ("add", "mul"):
        function = aten.add.Tensor if step.kind == "add" else aten.mul.Tensor
        return function, (*operands, *constants), {}
    if step.kind == "rotate":
        return ops.rotate, (*operands, *constants), {}
    if step.kind == "silu":
        return aten.silu.default, (*operands,), {}
    if step.kind in ("gelu", "gelu_tanh"):
        named = {"approximate": "tanh" if step.kind == "gelu_tanh" else "none"}
        return aten.gelu.default, (*operands,), dict(named)
    if step.kind == "rms_norm":
        return aten.rms_norm.default, (*operands, [depth], *constants, step.epsilon), {}
    missing = [None] * (2 - len(constants))  # a norm without a shift
    return aten.layer_norm.default, (*operands, [depth], *constants, *missing, step.epsilon), {}


def _made(dtype: torch.dtype, *shape: int) -> Ref:
    rows, columns = shape
    return Ref(Storage(dtype, rows * columns), dtype, 0, shape, (columns, 1))


def _constant(tensor: Tensor) -> Ref:
    held = tensor.detach().float().contiguous()
    storage = Storage(torch.float32, held.numel(), held)
    return Ref(storage, torch.float32, 0, tuple(held.shape), tuple(held.stride()))


def _weight(weight: Weight) -> Ref:
    storage = Storage(torch.float32, weight.q.numel(), weight=weight)
    rows, columns = weight.q.shape
    return Ref(storage, torch.float32, 0, (rows, columns), (columns, 1))


def _link(source: str, kernels: bytes, where: Machine) -> bytes:
    """The shared library, of which only `RegisterCustomOps` is seen from outside."""
    tools = Tools(where)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for file in (*COMPILED, *INCLUDED):
            shutil.copyfile(SOURCES / file, work / file)
        shutil.copyfile(SOURCES / "edge_api.h", work / HEADER)
        (work / "linears.c").write_text(source)
        (work / "kernels.o").write_bytes(kernels)
        (work / "exports").write_text("{ global: RegisterCustomOps; local: *; };\n")
        # It stays loaded: threads may end, and free their scratch memory, after the last session.
        tools.cc(
            work, *OPTIONS, *where.flags, "-shared", "-Wl,--version-script=exports",
            "-Wl,-z,nodelete", "-Wl,-soname,libqcompiler_ort.so", "-s", *COMPILED, "linears.c",
            "kernels.o", "-lpthread", "-lm", "-o", "library.so",
        )  # fmt: skip
        return (work / "library.so").read_bytes()
