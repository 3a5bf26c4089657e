"""Generated linears for ONNX Runtime's CUDA provider, as custom operators (`edge_cuda_ort.c`).

The library holds kernels for one GPU generation or several, and takes any number of rows. Its
constants, packed as the kernels read them, are returned for the graph to hold.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qcompiler.backends.edge_cuda_build import build_images
from qcompiler.backends.edge_cuda_linear import (
    integer_form,
    packed_weight,
    row_scales,
    weights_form,
    widened_form,
)
from qcompiler.backends.edge_cuda_products import MOST_TENSORS, Product
from qcompiler.backends.edge_cuda_tables import Kernels
from qcompiler.backends.edge_folder import OPTIONS, SOURCES, Tools
from qcompiler.backends.edge_integer import weight_sums
from qcompiler.backends.edge_ops import Weight
from qcompiler.backends.edge_program import array, quoted
from qcompiler.backends.edge_target import MACHINES, host_family
from qcompiler.errors import UnsupportedError
from qcompiler.generated import Library, Linear, Operator
from qcompiler.kernels.cuda_code import GPUS
from qcompiler.kernels.cuda_steps import NORMS, PIECE, RowStep, Steps
from qcompiler.kernels.cuda_weights import Bytes, Nibbles, Weights
from qcompiler.qtype import QType
from qcompiler.target import Target

ALL = (80, 86, 90)  # generations that code is made for where none is named; 8.9 runs that of 8.6
ALIGN = 256
MOST = 16  # products of an operator: edge_cuda_ort.h
COMPILED = ("edge_cuda_ort.c",)
INCLUDED = ("edge_cuda_ort.h", "edge_ort_api.h", "edge_ort_call.h")
# What `.incbin` reads is next to the source; nothing outside the library sees the name.
IMAGE = """\
__asm__(".section .rodata\\n.balign 64\\n.globl {0}\\n.hidden {0}\\n"
        "{0}:\\n.incbin \\"{0}\\"\\n.previous");
extern const unsigned char {0}[] __attribute__((visibility("hidden")));"""


@dataclass(frozen=True)
class _Packed:
    """An operator as its library knows it.

    Attributes:
        operator: itself.
        constants: of all its products and steps.
        before: the number of what it computes of rows before its products; -1: nothing.
        at: where the steps' constants begin, in bytes.
        products: of each linear its number, its columns, and where weight, scales, sums and bias
            begin.
    """

    operator: Operator
    constants: bytes
    before: int
    at: int
    products: list[tuple[int, int, list[int]]]

    def lines(self, number: int) -> list[str]:
        """Its products as C."""
        rows = [f"{{{form}, {columns}, {_listed(at)}}}" for form, columns, at in self.products]
        return [array("struct product", f"products_{number}", rows)]

    def row(self, number: int) -> str:
        """A row of C's table of operators."""
        op = self.operator
        fields = (
            quoted(op.name), f"{len(self.constants)}u", op.depth, op.inputs, len(op.kept),
            self.before, self.at, len(self.products), f"products_{number}",
        )  # fmt: skip
        return f"{{{_listed(fields)}}}"


def build(operators: Sequence[Operator], target: Target) -> Library:
    """Compile the operators: linears that read float16 tensors, or what is computed of them.

    Args:
        operators: at least one.
        target: ONNX Runtime's CUDA provider; its feature names one GPU generation.

    Raises:
        UnsupportedError: for formats or steps that there is no kernel for, or without nvcc or a C
            compiler.
    """
    tools = _tools()
    forms: dict[Product, int] = {}
    befores: dict[Steps, int] = {}
    packed = [_pack(operator, forms, befores) for operator in operators]
    named = [int(target.feature.removeprefix("sm_"))] if target.feature else ALL
    reading = [(p.before, [n for n, *_ in p.products]) for p in packed if p.before >= 0]
    lines, rows, images = list[str](), list[str](), list[bytes]()
    for number, capability in enumerate(named):
        tables = Kernels(f"gpu_{number}", forms, befores, reading, GPUS[capability])
        made, places = build_images(tables.kernels, capability)
        names = [f"image_{len(images) + i}" for i in range(len(made))]
        images += made
        lines += [IMAGE.format(name) for name in names]
        lines += [array("unsigned char *const", f"images_{number}", names), *tables.lines(places)]
        rows.append(
            f"{{{capability}, {len(made)}, {len(places)}, images_{number}, kernels_gpu_{number}, "
            f"choices_gpu_{number}, befores_gpu_{number}}}"
        )
    lines.append(array("struct gpu", "gpus", rows))
    lines += [line for number, one in enumerate(packed) for line in one.lines(number)]
    lines.append(array("struct operator_of", "list", [p.row(n) for n, p in enumerate(packed)]))
    digest = hashlib.sha256("\n".join(lines).encode())
    for content in (*images, *(one.constants for one in packed)):
        digest.update(hashlib.sha256(content).digest())
    number = int.from_bytes(digest.digest()[:7], "little")
    lines.append(
        f"const struct operators compiled_operators = {{{number}, {len(rows)}, {len(packed)}, "
        "gpus, list};"
    )
    source = "\n".join(['#include "edge_cuda_ort.h"', "", *lines, ""])
    weights = tuple(one.constants for one in packed)
    return Library(_link(tools, source, images), number, weights, (False,) * len(weights))


def _tools() -> Tools:
    """What links for this machine; the plainest of its kind, as nothing is computed there."""
    here = [known for known in MACHINES.values() if known.family == host_family()]
    if not here:
        raise UnsupportedError(f"no library is linked on this machine ({host_family()})")
    return Tools(here[0])


def _listed(fields: Iterable[object]) -> str:
    return ", ".join(map(str, fields))


def _pack(operator: Operator, forms: dict[Product, int], befores: dict[Steps, int]) -> _Packed:
    """Pack an operator's constants, and number its products and what is computed before them."""
    kind = QType.parse(operator.activation) if operator.activation else None
    before, held = _before(operator, kind)
    tensors = max(operator.inputs, len(operator.kept))
    if not operator.linears or len(operator.linears) > MOST or tensors > MOST_TENSORS:
        raise UnsupportedError(
            f"{operator.name}: GPU kernels for ONNX Runtime compute up to {MOST} linears of up to "
            f"{MOST_TENSORS} tensors"
        )
    parts = _Parts()
    at, products = parts.add(held), []
    for linear in operator.linears:
        weight = _weight(linear)
        if operator.depth % 8:
            raise UnsupportedError(
                f"'{linear.name}': GPU targets have no kernel for {operator.depth} inputs, not a "
                "multiple of 8"
            )
        form: Weights | Bytes | Nibbles
        if kind is None:
            form = weights_form(weight, linear.name)
        else:
            form = integer_form(weight, kind.dtype, linear.name)
            if isinstance(form, Nibbles):
                widened_form(weight, form, linear.name)
        product = Product(form, linear.bias is not None, before is not None and before.shifted)
        places = [
            parts.add(packed_weight(weight, form)),
            parts.add(None if weight.group else row_scales(weight)),
            parts.add(weight_sums(weight) if product.shifted else None),
            parts.add(None if linear.bias is None else linear.bias.float().contiguous()),
        ]
        products.append((forms.setdefault(product, len(forms)), form.rows, places))
    number = -1 if before is None else befores.setdefault(before, len(befores))
    return _Packed(operator, parts.content, number, at, products)


class _Parts:
    """Tensors one behind the other, each at a multiple of `ALIGN` bytes."""

    def __init__(self) -> None:
        self.held: list[bytes] = []
        self.size = 0

    def add(self, tensor: Tensor | None) -> int:
        """Where it begins; None takes no room."""
        content = b"" if tensor is None else tensor.cpu().numpy().tobytes()
        self.held.append(content + b"\0" * (-len(content) % ALIGN))
        self.size += len(self.held[-1])
        return self.size - len(self.held[-1])

    @property
    def content(self) -> bytes:
        return b"".join(self.held)


def _before(operator: Operator, kind: QType | None) -> tuple[Steps | None, Tensor | None]:
    """What it computes of rows before its products, and the constants of that."""
    if kind is None and not operator.steps:
        return None, None
    rows = tuple(
        RowStep(step.kind, step.operands, tuple(c.numel() for c in step.constants), step.epsilon)
        for step in operator.steps
    )
    known = {*NORMS, "add", "mul", "silu", "gelu", "gelu_tanh"}
    if unknown := {step.kind for step in rows} - known:
        raise UnsupportedError(f"{operator.name}: no kernel of GPU targets computes {unknown}")
    made = Steps(operator.depth, operator.inputs, rows, operator.kept, (), kind)
    flat = [
        torch.nn.functional.pad(constant.float().reshape(-1), (0, -constant.numel() % PIECE))
        for step in operator.steps
        for constant in step.constants
    ]
    return made, torch.cat(flat) if flat else None


def _weight(linear: Linear) -> Weight:
    return Weight(linear.q, linear.scale, linear.zero_point, linear.axis, linear.group)


def _link(tools: Tools, source: str, images: Sequence[bytes]) -> bytes:
    """The shared library, of which only `RegisterCustomOps` is seen from outside."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for file in (*COMPILED, *INCLUDED):
            shutil.copyfile(SOURCES / file, work / file)
        for number, image in enumerate(images):
            (work / f"image_{number}").write_bytes(image)
        (work / "products.c").write_text(source)
        (work / "exports").write_text("{ global: RegisterCustomOps; local: *; };\n")
        tools.cc(
            work, *OPTIONS, "-shared", "-Wl,--version-script=exports", "-Wl,-z,nodelete",
            "-Wl,-soname,libqcompiler_ort.so", "-s", *COMPILED, "products.c", "-lpthread", "-ldl",
            "-o", "library.so",
        )  # fmt: skip
        return (work / "library.so").read_bytes()
